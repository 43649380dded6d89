"""Static cost on a TPU that is not there: rows from compiled bundles instead of times.

libtpu compiles a scan's Pallas kernels on any host; `tpu_cost` counts their bundles. Per register
of state (1024 elements) and position that gives bundles and the slots of each unit, and with the
chip's rates the least time that they allow. Waiting for memory is not in it.

For `pallas_tpu` the counts are of all that a block of channels needs; what the blocks of a grid
step share is beside it ("overhead" in the JSON lines). Of a user's kernel nothing is known, so what
counts is its innermost loop with the most exponentials, alone, per exponential: a register and
position has one in a recurrence. What the kernel does elsewhere is not in its row.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator

import jax

from storm_kernels import tpu_cost
from storm_kernels.ablation import floors, programs
from storm_kernels.ablation.implementations import Implementation, from_file
from storm_kernels.ablation.operands import (
    DTYPES,
    FUSED,
    Setting,
    cotangents,
    operands,
    results,
)
from storm_kernels.ablation.report import Row
from storm_kernels.ablation.run import Plan, explain
from storm_kernels.ablation.shapes import Shape

_LENGTH = 1024  # compiled with this many: longer ones are more grid steps of the same code
_UNITS = {"VALU": "VALU", "EUP": "EUP", "XLU": "XLU", "load": "VLOAD", "store": "VSTORE"}


def require_libtpu() -> None:
    """Raises ValueError if this host cannot compile for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "static cost on a TPU needs its compiler, libtpu: pip install 'storm_jax[tpu]'"
        )


def without_kernel(implementation: Implementation) -> Implementation:
    """The same, with `missing` set where there is no Pallas TPU kernel to count."""
    if implementation.name == "pallas_tpu" or implementation.source is not None:
        return implementation
    reason = "has no Pallas TPU kernel whose bundles could be counted"
    return dataclasses.replace(implementation, missing=reason)


def rows(plan: Plan, generation: str, announce: Callable[[str], None]) -> Iterator[Row]:
    """The plan's rows for a TPU of this generation; see `run.rows`."""
    for shape in plan.shapes:
        for setting in plan.settings:
            for implementation in plan.implementations:
                for direction in plan.directions:
                    announce(f"{shape} {setting.dtype} {direction} {implementation.name}")
                    yield _row(implementation, shape, setting, direction, generation)


def _row(
    implementation: Implementation, shape: Shape, setting: Setting, direction: str, generation: str
) -> Row:
    row = functools.partial(Row, implementation.name, shape, setting, direction)
    if implementation.missing is not None:
        return row("failed" if implementation.broken else "not run", implementation.missing)
    reason = _unsupported(implementation, shape, setting, direction)
    if reason is not None:
        return row("not run", reason)
    backward = direction == "backward"
    try:
        if implementation.source is None:
            kernel, cost = _own(shape, setting, backward, generation)
            remark = ""
        else:
            kernel, cost = _of_user(implementation.source, shape, setting, backward, generation)
            remark = f"the hot loop of {cost.kernel} alone"
        bound = tpu_cost.roofline(
            cost, kernel, generation,
            batch=shape.batch, length=shape.length, channels=shape.channels, state=shape.state,
            hbm_bytes=tpu_cost.scan_hbm_bytes(
                batch=shape.batch, length=shape.length, channels=shape.channels,
                state=shape.state, itemsize=DTYPES[setting.dtype].dtype.itemsize,
                fused="z" in setting.optional, backward=backward,
            ),
        )  # fmt: skip
    except NoKernel as error:
        return row("not run", str(error))
    except Exception as error:
        return row("failed", explain(error))
    slots = {name: cost.slots[unit] for name, unit in _UNITS.items()}
    static: dict[str, object] = {
        "bundles": cost.bundles,
        "recurrence": cost.recurrence,
        "overhead": cost.overhead,
        "slots": slots,
        "spills": cost.spills,
        "kernel": cost.kernel,
        "ms": bound.ms,
        "resource": bound.resource,
        "by_resource": bound.by_resource,
    }
    floor = floors.floor(floors.tpu_rates(generation), shape, setting, direction)
    return row("ok", remark, static=static, floor=floor)


class NoKernel(Exception):
    """A program without a Pallas kernel that has exponentials."""


def _unsupported(implementation, shape: Shape, setting: Setting, direction: str) -> str | None:
    if direction == "both":
        return "forward and backward are counted each for itself"
    if implementation.source is not None:
        return None
    if set(setting.optional) not in (set(FUSED), set()):
        return f"counted with {','.join(FUSED)} or with none of them, not more or less"
    if setting.layout != "bld" or setting.reverse:
        return "counted in layout 'bld' and not in reverse"
    if (shape.groups or 1) > 1 or shape.state > 16:
        return "counted with one group and at most 16 states"
    return None


def _own(shape: Shape, setting: Setting, backward: bool, generation: str):
    """The counts of `pallas_tpu`, from the nearest sizes that have one form of the kernel."""
    channels = max(2048, -(-shape.channels // 1024) * 1024)
    kernel = _compiled_own(
        channels,
        shape.state,
        DTYPES[setting.dtype].dtype.name,
        "z" in setting.optional,
        backward,
        generation,
    )
    return kernel, tpu_cost.scan_cost(kernel, generation, shape.state)


@functools.lru_cache(maxsize=64)
def _compiled_own(channels, state, dtype, fused, backward, generation) -> tpu_cost.Kernel:
    program = tpu_cost.scan_program(
        batch=1, length=_LENGTH, channels=channels, state=state, dtype=dtype,
        fused=fused, backward=backward, segments=False,
    )  # fmt: skip
    return tpu_cost.scan_kernel(tpu_cost.compile_and_count(program, generation), backward)


def _of_user(source: str, shape: Shape, setting: Setting, backward: bool, generation: str):
    """The counts of the hot loop of a user's last kernel that has exponentials in a loop."""
    shape = dataclasses.replace(shape, length=min(shape.length, _LENGTH))
    kernels = _compiled_of_user(source, shape, setting, backward, generation)
    with_exponentials = [k for k in kernels if k.loops and k.hot_loop().slots["EUP"]]
    if not with_exponentials:
        raise NoKernel("compiles to no Pallas kernel with exponentials in a loop")
    kernel = with_exponentials[-1]
    hot = kernel.hot_loop()
    per = hot.slots["EUP"] / floors.tpu_rates(generation).exp_slots
    return kernel, tpu_cost.ScanCost(
        kernel=kernel.name,
        bundles=hot.bundles / per,
        recurrence=hot.bundles / per,
        overhead=0.0,
        slots={unit: hot.slots[unit] / per for unit in tpu_cost.UNITS},
        spills=hot.slots["VSTORE:SPILL"],
    )


@functools.lru_cache(maxsize=64)
def _compiled_of_user(source, shape, setting, backward, generation) -> list[tpu_cost.Kernel]:
    program = f"""
from storm_kernels.ablation import static
from storm_kernels.ablation.operands import Setting
from storm_kernels.ablation.shapes import Shape
function, arguments = static.user_program({source!r}, {shape!r}, {setting!r}, {backward}, sharding)
"""
    return tpu_cost.compile_and_count(program, generation)


def user_program(source: str, shape: Shape, setting: Setting, backward: bool, sharding):
    """A function and its arguments for `tpu_cost.compile_and_count`: a user's scan.

    Args:
        source: as on the command line, `path/to/file.py:function`.
        shape, setting: of the case.
        backward: the gradients of all operands, with the forward that they need.
        sharding: of all arguments.
    """
    implementation = from_file(source)
    scan = implementation.scan
    if scan is None:
        raise ValueError(implementation.missing)

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    case = placed(jax.eval_shape(functools.partial(operands, shape, setting)))
    given = placed(jax.eval_shape(functools.partial(cotangents, shape, setting)))
    if backward:
        return functools.partial(programs.gradients, scan, setting), (case, given)
    return (lambda case: results(scan, case, setting)), (case,)
