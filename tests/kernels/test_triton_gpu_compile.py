"""The GPU kernels as production launches them, through the compiler: registers, spills, memory.

No GPU is needed. `recorded_launches` takes every constant and compiler option from the calls that
`triton_gpu` makes, so nothing here repeats the table of sizes.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from storm_kernels.selective_scan import selective_scan
from tests.kernels.gpu_emulation import Launch, recorded_launches

pytest.importorskip("triton")

KERNELS = ("scan_forward", "scan_adjoint", "scan_backward")
SHAPES = {
    "few rows": (1, 2304, 65536, 16),
    "many rows": (1, 7168, 32768, 16),
    "masked": (2, 1000, 1134, 16),  # neither whole tiles nor whole blocks of channels
    "many states": (1, 2304, 4096, 64),
}
"""Batch, channels, length, state."""

# Bytes that a thread spills at most, by compute capability: bfloat16 without and with segments,
# float32 without and with. Measured, the larger of Triton 3.9.0 and 3.6.0, each with its own ptxas.
SPILLED = {
    ("scan_forward", "few rows"): {
        80: (64, 56, 48, 40),
        90: (64, 80, 56, 64),
        100: (72, 72, 80, 64),
    },
    ("scan_adjoint", "few rows"): {80: (0, 0, 0, 0), 90: (0, 0, 0, 8), 100: (0, 0, 0, 8)},
    ("scan_backward", "few rows"): {
        80: (112, 208, 112, 200),
        90: (144, 264, 144, 256),
        100: (184, 336, 200, 304),
    },
    ("scan_forward", "many rows"): {
        80: (32, 48, 56, 112),
        90: (40, 72, 40, 88),
        100: (48, 64, 48, 72),
    },
    ("scan_adjoint", "many rows"): {80: (0, 0, 8, 8), 90: (0, 0, 0, 16), 100: (0, 0, 0, 16)},
    ("scan_forward", "masked"): {90: (72, 72, 48, 64)},
    ("scan_adjoint", "masked"): {90: (0, 0, 0, 8)},
    ("scan_backward", "masked"): {90: (216, 336, 224, 336)},
    ("scan_forward", "many states"): {90: (64, 64)},
    ("scan_adjoint", "many states"): {90: (0, 0)},
    ("scan_backward", "many states"): {90: (144, 264)},
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a CTA can have, by compute capability (CUDA C++ Programming Guide)."""


@functools.cache
def launches(shape, dtype, segments) -> dict[str, Launch]:
    """By kernel: the forward that saves, and the backward, with all operands."""
    batch, channels, length, state = SHAPES[shape]
    wide, narrow = (batch, channels, length), (batch, length, state)

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    case = {name: like(*wide, dtype=dtype) for name in ("u", "delta", "z")}
    case |= {name: like(*narrow, dtype=dtype) for name in ("B", "C")}
    case |= {"A": like(channels, state), "initial_state": like(batch, channels, state)}
    case |= {name: like(channels) for name in ("D", "delta_bias")}
    ids = like(batch, length, dtype=jnp.int32) if segments else None

    def with_gradients(case, ids):
        def scan(case):
            return selective_scan(
                **case, segment_ids=ids, delta_softplus=True, layout="bdl",
                return_final_state=True, implementation="triton_gpu",
            )  # fmt: skip

        outputs, pull = jax.vjp(scan, case)
        return pull(outputs)

    with recorded_launches() as found:
        jax.eval_shape(with_gradients, case, ids)
    assert {launch.name for launch in found} == set(KERNELS)
    # Of several backward kernels, one for each block of states, the first has all operands.
    return {launch.name: launch for launch in reversed(found)}


def cases():
    dtypes = [(dtype, segments) for dtype in ("bfloat16", "float32") for segments in (False, True)]
    for (kernel, shape), by_target in SPILLED.items():
        for target, spilled in by_target.items():
            for case, bytes in zip(dtypes, spilled, strict=False):
                marks = ()
                if (shape, target) != ("few rows", 90) or case[0] == "float32":
                    # CI compiles what has the most to hold: those with segments; of the shapes
                    # that others have their numbers of registers from, in one dtype.
                    dear = case[1] and (shape, target) == ("few rows", 90)
                    dear |= case == ("bfloat16", True) and (shape == "few rows" or target == 90)
                    marks = (pytest.mark.slow, *(() if dear else (pytest.mark.exhaustive,)))
                yield pytest.param(kernel, shape, target, *case, bytes, marks=marks)


@pytest.mark.parametrize(
    ("kernel", "shape", "target", "dtype", "segments", "spilled"), list(cases())
)
def test_registers_spills_and_shared_memory(kernel, shape, target, dtype, segments, spilled):
    launch = launches(shape, jnp.dtype(dtype), segments)[kernel]
    code = launch.compiled(target)
    limit = launch.options.get("maxnreg", 255)
    print(
        f"registers {code.registers} of {limit}, spilled {code.stack_bytes} bytes in"
        f" {code.spills} instructions, shared memory {code.shared_bytes} bytes"
    )
    assert code.num_threads == 32 * launch.warps
    assert code.registers <= limit
    assert code.stack_bytes <= spilled and code.local_bytes == 0
    assert code.shared_bytes <= SHARED_MEMORY[target]
    if target >= 90:  # where the sizes were measured, registers and not memory limit the CTAs
        resident = 65536 // (code.registers * code.num_threads)
        assert resident * (code.shared_bytes + 1024) <= SHARED_MEMORY[target] + 1024


def test_the_limit_on_registers_follows_the_number_of_rows():
    few, many = (
        launches(shape, jnp.dtype("bfloat16"), False)["scan_forward"].options["maxnreg"]
        for shape in ("few rows", "many rows")
    )
    assert (few, many) == (255, 168)
