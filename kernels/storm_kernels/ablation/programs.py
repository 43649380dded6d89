"""A scan as compiled programs: forward, backward alone, and both; what they keep and take.

A program is what the table has a row for. JAX scans become `JaxProgram`s here; a scan of another
framework makes its own objects with the same methods (`Program`), see `peers`.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.extend.core import Literal

from storm_kernels.ablation.operands import Operands, Scan, Setting, results

Values = dict[str, jax.Array]
_NOT_DIFFERENTIABLE = ("segment_ids",)


class Program(Protocol):
    """One row's program, its arguments included.

    Attributes:
        saved_bytes: what a forward keeps for the backward besides the operands themselves; None
            where the program is no backward.
    """

    saved_bytes: int | None

    def seconds(self, calls: int) -> float:
        """Seconds a call, over `calls` calls queued one after the other and waited for once."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes: "peak" beyond the arguments, and what else is known."""
        ...

    def values(self, given: Values | None = None) -> Values:
        """Results of one call by name: y and h, or gradients, then of the cotangents `given`."""
        ...


@dataclasses.dataclass
class JaxProgram:
    """A compiled function with its arguments, the last of which may be cotangents."""

    compiled: Any
    arguments: tuple
    saved_bytes: int | None = None

    def seconds(self, calls: int) -> float:
        result = None
        begin = time.perf_counter()
        for _ in range(calls):
            result = self.compiled(*self.arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    def memory(self) -> dict[str, int]:
        found = {}
        analysis = self.compiled.memory_analysis()
        if analysis is not None:
            found["temporaries"] = analysis.temp_size_in_bytes
            found["results"] = analysis.output_size_in_bytes
            found["arguments"] = analysis.argument_size_in_bytes
            found["peak"] = found["temporaries"] + found["results"]
        device = jax.tree.leaves(self.arguments)[0].device
        stats = getattr(device, "memory_stats", lambda: None)() or {}
        if "peak_bytes_in_use" in stats:  # since the process began: there is no reset
            found["device_peak_of_process"] = stats["peak_bytes_in_use"]
        return found

    def values(self, given: Values | None = None) -> Values:
        if given is None:
            return self.compiled(*self.arguments)
        return self.compiled(*self.arguments[:-1], given)


def compile_program(function: Callable, arguments: tuple) -> JaxProgram:
    """Compiles `function` for these arguments.

    Raises:
        MemoryError: the program needs more than is free; it would be killed, not refused.
    """
    program = JaxProgram(jax.jit(function).lower(*arguments).compile(), arguments)
    device = jax.tree.leaves(arguments)[0].device
    needed, free = program.memory().get("peak", 0), free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        )
    return program


def nothing(case: Operands) -> JaxProgram:
    """A program that takes all operands and does next to nothing: its time is the host's."""
    compiled = jax.jit(lambda case: case["A"][:1, :1], keep_unused=True).lower(case).compile()
    return JaxProgram(compiled, (case,))


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on a device, None where that is not known."""
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    return None


def forward(scan: Scan, case: Operands, setting: Setting) -> JaxProgram:
    """y alone (and the final state where the setting has one)."""
    return compile_program(lambda case: results(scan, case, setting), (case,))


def both(scan: Scan, case: Operands, setting: Setting, given: Values) -> JaxProgram:
    """Forward and backward in one program, which returns the gradients of all operands."""

    return compile_program(functools.partial(gradients, scan, setting), (case, given))


def gradients(scan: Scan, setting: Setting, case: Operands, given: Values) -> Values:
    """The gradients of all operands but segment ids, for cotangents of y and the final state."""
    pull, dtypes = _pullback(scan, case, setting)
    return pull(_cast(given, dtypes))[0]


def backward(scan: Scan, case: Operands, setting: Setting, given: Values) -> JaxProgram:
    """The backward alone: the function that `jax.vjp` returns, applied to what it has kept.

    The forward runs once, beforehand. `saved_bytes` counts what it keeps; operands kept as they
    are, or reshaped without moving anything, cost nothing and are not counted.
    """
    try:
        return _split(scan, case, setting, given)
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        # A custom_vjp whose backward closes over an operand (segment ids, say) instead of keeping
        # it cannot be cut in two while it is traced, but it can with operands that have values.
        return _split_outside(scan, case, setting, given)


def _split(scan: Scan, case: Operands, setting: Setting, given: Values) -> JaxProgram:
    """`backward` with the forward as one compiled program."""
    tree, dtypes = None, {}

    def keep(case):
        nonlocal tree, dtypes
        pull, dtypes = _pullback(scan, case, setting)
        leaves, tree = jax.tree.flatten(pull)
        return leaves

    traced = jax.make_jaxpr(keep)(case)
    inputs = jax.tree.leaves(case)
    position = {var: i for i, var in enumerate(traced.jaxpr.invars)}
    kept = traced.jaxpr.outvars
    # Only what is new comes out of the program: results that are arguments would be copied.
    new = [i for i, var in enumerate(kept) if _is_literal(var) or var not in position]

    def keep_new(case):
        leaves = keep(case)
        return [leaves[i] for i in new]

    made = compile_program(keep_new, (case,)).values()
    fresh = dict(zip(new, made, strict=True))
    leaves = [fresh[i] if i in fresh else inputs[position[var]] for i, var in enumerate(kept)]
    program = _pulling(tree, dtypes, leaves, given)
    jax.block_until_ready(program.values())  # a tracer closed over is not refused before this
    counted = {}
    for i in new:
        origin = _before_reshapes(traced.jaxpr, kept[i])
        if _is_literal(origin) or origin not in position:
            counted[id(origin)] = origin.aval.size * origin.aval.dtype.itemsize
    program.saved_bytes = sum(counted.values())
    return program


def _split_outside(scan: Scan, case: Operands, setting: Setting, given: Values) -> JaxProgram:
    """`backward` with the forward run operation by operation, which takes more memory."""
    pull, dtypes = _pullback(scan, case, setting)
    leaves, tree = jax.tree.flatten(pull)
    program = _pulling(tree, dtypes, leaves, given)
    operands = {id(x) for x in case.values()}
    saved = {id(x): x.nbytes for x in leaves if id(x) not in operands}
    program.saved_bytes = sum(saved.values())
    return program


def _pulling(tree, dtypes: dict, leaves: list, given: Values) -> JaxProgram:
    def pull(leaves, given):
        return jax.tree.unflatten(tree, leaves)(_cast(given, dtypes))[0]

    return compile_program(pull, (leaves, given))


def _pullback(scan: Scan, case: Operands, setting: Setting) -> tuple[Callable, dict]:
    """The function from cotangents to gradients, and the dtypes that it wants them in."""
    fixed = {name: x for name, x in case.items() if name in _NOT_DIFFERENTIABLE}
    moving = {name: x for name, x in case.items() if name not in _NOT_DIFFERENTIABLE}
    found, pull = jax.vjp(lambda moving: results(scan, moving | fixed, setting), moving)
    return pull, {name: x.dtype for name, x in found.items()}


def _cast(given: Values, dtypes: dict) -> Values:
    return {name: x.astype(dtypes[name]) for name, x in given.items()}


def _is_literal(var: object) -> bool:
    return isinstance(var, Literal)


def _before_reshapes(jaxpr, var):
    """What a value is a reshape of, itself if of nothing."""
    made_by = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    while not _is_literal(var) and var in made_by:
        eqn = made_by[var]
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"].jaxpr
            origin = _before_reshapes(inner, inner.outvars[eqn.outvars.index(var)])
            if _is_literal(origin) or origin not in inner.invars:
                break
            var = eqn.invars[inner.invars.index(origin)]
            continue
        if eqn.primitive.name not in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
            break
        if _is_literal(eqn.invars[0]) or eqn.invars[0].aval.size != var.aval.size:
            break
        var = eqn.invars[0]
    return var
