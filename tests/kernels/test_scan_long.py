"""Long sequences against float64, and arrays of more than 2^31 elements."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_kernels.selective_scan import selective_scan
from tests.kernels import scan_suite
from tests.kernels.scan_oracle import oracle

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("implementation", scan_suite.FAST)
@pytest.mark.parametrize("length", [65536, 65537])
def test_real_initialisation_over_65536_positions(implementation, length):
    scan_suite.real_initialisation(implementation, length)


# The conftest asks for quick compilation; here it is running that takes the time.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
CHANNELS, LENGTH = 1024, 2**21 + 64
WINDOW, COMPARED = 128, 32  # with A = -8 nothing is remembered over the rest of the window
A = -8.0
PERIOD = 8191  # a prime: a wrong offset by any power of two meets other numbers


def element(position, channel):
    """Multiples of 1/256 in (0, 1), exact in float16."""
    return (position % PERIOD * 31 + channel * 17) % 255 / 256 + 1 / 256


def repeated(length_axis):
    """`element` at all positions and channels, made on the host: nothing wider on the device."""
    block = element(np.arange(PERIOD)[:, None], np.arange(CHANNELS)).astype(jnp.float16)
    shape = (LENGTH, CHANNELS)
    whole = np.empty(shape if length_axis == 1 else shape[::-1], jnp.float16)
    rows = whole if length_axis == 1 else whole.T
    for start in range(0, LENGTH, PERIOD):
        rows[start : start + PERIOD] = block[: LENGTH - start]
    return whole[None]


def memory_at_hand():
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", scan_suite.FAST)
@pytest.mark.parametrize("layout", ["bld", "bdl"])
@pytest.mark.parametrize("gradients", [False, True])
def test_more_than_2_to_the_31_elements(implementation, layout, gradients):
    """The first and last positions of all channels. u, delta and y's gradient are one array."""
    length_axis = 1 if layout == "bld" else 2
    shape = (1, LENGTH, CHANNELS) if layout == "bld" else (1, CHANNELS, LENGTH)
    assert LENGTH * CHANNELS > 2**31

    def program(u, B):
        def scan(u, delta):
            weight = jnp.full((CHANNELS, 1), A)
            return selective_scan(
                u, delta, weight, B, B, implementation=implementation, layout=layout
            )

        def ends(x):
            first = jax.lax.slice_in_dim(x, 0, COMPARED, axis=length_axis)
            last = jax.lax.slice_in_dim(x, LENGTH - COMPARED, LENGTH, axis=length_axis)
            return first, last

        if not gradients:
            return (ends(scan(u, u)),)
        y, pull = jax.vjp(scan, u, u)
        return tuple(ends(x) for x in (y, *pull(u)))

    operands = (
        jax.ShapeDtypeStruct(shape, jnp.float16),
        jax.ShapeDtypeStruct((1, LENGTH, 1), jnp.float16),
    )
    compiled = jax.jit(program, compiler_options=OPTIMISED).lower(*operands).compile()
    plan = compiled.memory_analysis()
    needed = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    if 1.3 * needed > memory_at_hand():
        pytest.skip(
            f"needs {1.3 * needed / 2**30:.1f} GiB, there are {memory_at_hand() / 2**30:.1f}"
        )
    row = element(np.arange(LENGTH), 5)[None, :, None]
    u = jax.device_put(repeated(length_axis))
    results = compiled(u, jnp.asarray(row, jnp.float16))

    for index, start in enumerate((0, LENGTH - WINDOW)):
        window = start + np.arange(WINDOW)
        block = element(window[:, None], np.arange(CHANNELS))[None]
        row = element(window, 5)[None, :, None]
        case = {"u": block, "delta": block, "A": np.full((CHANNELS, 1), A), "B": row, "C": row}
        y, _, slopes = oracle(case, block, np.zeros((1, CHANNELS, 1)), delta_softplus=False)
        part = slice(0, COMPARED) if index == 0 else slice(-COMPARED, None)
        expected = (y, slopes["u"], slopes["delta"])[: len(results)]
        for got, value in zip(results, expected, strict=True):
            got = np.asarray(got[index], np.float64)
            got = got if layout == "bld" else got.swapaxes(1, 2)
            np.testing.assert_allclose(got, value[:, part], 2**-9, 1e-5)
