"""Triton's own code in the PTX emulator, each kernel against NumPy."""

import math

import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402
from triton import jit  # noqa: E402
from triton import language as tl
from triton.language.extra import libdevice  # noqa: E402

from tests.kernels import ptx_launch  # noqa: E402
from tests.kernels.ptx_emulator import MemoryFault, Window  # noqa: E402


def launch(kernel, grid, *arguments, warps=4, target=90, **constexprs):
    """`ptx_launch.launch` with the arguments in order."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    ptx_launch.launch(
        kernel, grid, dict(zip(names, arguments, strict=True)), constexprs, warps, target
    )


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


TARGETS = pytest.mark.parametrize("target", [80, 90, 100])


# ---------------------------------------------------------------- element by element


@jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    a = tl.load(x + at, mask=mask, other=0.0)
    b = tl.load(y + at, mask=mask, other=0.0)
    tl.store(out + at, a + b, mask=mask)


@TARGETS
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16, np.int8, np.int64])
def test_add_with_a_mask(dtype, target):
    n = 1000
    x, y = (np.asarray(20 * normal(n, seed=s), dtype) for s in (1, 2))
    out = np.zeros(n + 5, dtype)
    launch(add_kernel, (4,), x, y, out[:n], n, BLOCK=256, target=target)
    np.testing.assert_array_equal(out[:n], x + y)
    with pytest.raises(MemoryFault, match="which holds bytes") as caught:
        launch(add_kernel, (4,), x, y, out[:n], n + 1, BLOCK=256, target=target)
    assert "test_ptx_emulator.py:" in caught.value.__notes__[0]


@jit
def functions_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(out + at, tl.exp2(v))
    tl.store(out + BLOCK + at, tl.log2(tl.abs(v)))
    tl.store(out + 2 * BLOCK + at, tl.exp(v))
    tl.store(out + 3 * BLOCK + at, tl.log(1 + tl.exp(v)))
    tl.store(out + 4 * BLOCK + at, v / (1 + tl.exp(-v)))
    tl.store(out + 5 * BLOCK + at, tl.sqrt(tl.abs(v)) + tl.rsqrt(tl.abs(v)))
    tl.store(out + 6 * BLOCK + at, tl.div_rn(v, 3.0) + tl.floor(v))
    tl.store(out + 7 * BLOCK + at, tl.where(v > 0, v, tl.minimum(v * v, 5.0)))


@TARGETS
def test_functions(target):
    x = 8 * normal(256, seed=3)
    x[:2] = [30, -30]
    out = np.zeros((8, 256), np.float32)
    launch(functions_kernel, (1,), x, out, BLOCK=256, target=target)
    d = x.astype(np.float64)
    expected = [
        np.exp2(d), np.log2(abs(d)), np.exp(d), np.log1p(np.exp(d)), d / (1 + np.exp(-d)),
        abs(d) ** 0.5 + abs(d) ** -0.5, d / 3 + np.floor(d),
        np.where(d > 0, d, np.minimum(d * d, 5)),
    ]  # fmt: skip
    for k, row in enumerate(expected):
        # 1 + exp(v) rounds to f32 before its logarithm: an error of 2^-24, absolute.
        np.testing.assert_allclose(out[k], row, rtol=1e-6 * (1 + 5 * (k in (2, 4))), atol=2e-7)


@jit
def library_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(out + at, libdevice.log1p(tl.abs(v)))
    tl.store(out + BLOCK + at, libdevice.expm1(v))
    tl.store(out + 2 * BLOCK + at, libdevice.tanh(v))
    tl.store(out + 3 * BLOCK + at, tl.sin(v * 1e5))  # reduced with the bits of 2 / pi
    tl.store(out + 4 * BLOCK + at, tl.erf(v))
    tl.store(out + 5 * BLOCK + at, libdevice.pow(tl.abs(v), v))
    tl.store(out + 6 * BLOCK + at, libdevice.rint(v * 7))


@TARGETS
def test_libdevice(target):
    # Long straight code that is right only if every instruction of it is.
    x = 3 * normal(256, seed=22)
    out = np.zeros((7, 256), np.float32)
    launch(library_kernel, (1,), x, out, BLOCK=256, target=target)
    d, large = x.astype(np.float64), (x * np.float32(1e5)).astype(np.float64)
    expected = [
        np.log1p(abs(d)), np.expm1(d), np.tanh(d), np.sin(large), np.vectorize(math.erf)(d),
        abs(d) ** d, np.rint(x * np.float32(7)),
    ]  # fmt: skip
    for k, row in enumerate(expected):
        np.testing.assert_allclose(out[k], row, rtol=5e-7, err_msg=str(k))


@jit
def convert_kernel(x, half, brain, back, whole, word, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(half + at, v.to(tl.float16))
    b = v.to(tl.bfloat16)
    tl.store(brain + at, b)
    tl.store(back + at, b.to(tl.float32) + v.to(tl.float16).to(tl.float32))
    tl.store(whole + at, tl.clamp(v, -1e6, 1e6).to(tl.int32))
    tl.store(word + at, v.to(tl.uint32, bitcast=True))


@TARGETS
def test_conversions(target):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(1024) * 2.0 ** rng.integers(-30, 30, 1024)).astype(np.float32)
    x[:9] = [np.inf, -np.inf, np.nan, 0, -0.0, 65520, 65519, 3.4e38, 1e-45]
    bits = x.view(np.uint32)
    bits[100:300] = bits[100:300] & 0xFFFF0000 | 0x8000  # ties of bf16
    bits[300:500] = bits[300:500] & 0xFFFFE000 | 0x1000  # ties of f16
    half, brain = np.zeros(1024, np.float16), np.zeros(1024, bfloat16)
    back, whole = np.zeros(1024, np.float32), np.zeros(1024, np.int32)
    word = np.zeros(1024, np.uint32)
    launch(convert_kernel, (1,), x, half, brain, back, whole, word, BLOCK=1024, target=target)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, x.astype(np.float16))
        np.testing.assert_array_equal(brain.view(np.uint16) == 0x7FFF, np.isnan(x))
        number = ~np.isnan(x)
        np.testing.assert_array_equal(
            brain.view(np.uint16)[number], x.astype(bfloat16).view(np.uint16)[number]
        )
        sum_of_both = x.astype(bfloat16).astype(np.float32) + x.astype(np.float16).astype(
            np.float32
        )
        np.testing.assert_array_equal(back, sum_of_both)
    np.testing.assert_array_equal(whole[number], np.clip(x[number], -1e6, 1e6).astype(np.int32))
    np.testing.assert_array_equal(word, bits)


@jit
def halves_kernel(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b + a)
    tl.store(out + BLOCK + at, tl.maximum(a, b) - b)
    tl.store(out + 2 * BLOCK + at, tl.where(a < b, -a, tl.abs(b)))


@TARGETS
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_arithmetic_in_halves(dtype, target):
    x, y = (normal(512, seed=s, dtype=dtype) for s in (5, 6))
    out = np.zeros((3, 512), dtype)
    launch(halves_kernel, (1,), x, y, out, BLOCK=512, target=target)
    a, b = x.astype(np.float64), y.astype(np.float64)
    # Fused or not (sm_80 has no bf16 product of its own), the sum is right to a unit of it.
    unit = np.finfo(dtype).eps if dtype == np.float16 else 2.0**-7
    np.testing.assert_allclose(out[0].astype(np.float64), a * b + a, rtol=unit, atol=2 * unit)
    np.testing.assert_array_equal(out[1], (np.maximum(a, b) - b).astype(dtype))
    np.testing.assert_array_equal(out[2], np.where(a < b, -a, abs(b)).astype(dtype))


@jit
def integers_kernel(x, y, out, wide, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a // b)
    tl.store(out + BLOCK + at, a % b)
    tl.store(out + 2 * BLOCK + at, (a >> 3) ^ (b << 5) | (a & 15))
    tl.store(out + 3 * BLOCK + at, tl.minimum(a, b) * 7 - tl.abs(a))
    tl.store(wide + at, a.to(tl.int64) * b + (a.to(tl.int64) << 20))
    tl.store(wide + BLOCK + at, a.to(tl.int64) * b // 12345)


def test_integers():
    rng = np.random.default_rng(7)
    x = rng.integers(-(2**31), 2**31, 256).astype(np.int32)
    y = rng.integers(1, 2**16, 256).astype(np.int32)
    out, wide = np.zeros((4, 256), np.int32), np.zeros((2, 256), np.int64)
    launch(integers_kernel, (1,), x, y, out, wide, BLOCK=256)
    quotient = np.trunc(x / y).astype(np.int32)
    np.testing.assert_array_equal(out[0], quotient)
    np.testing.assert_array_equal(out[1], x - quotient * y)
    np.testing.assert_array_equal(out[2], (x >> 3) ^ (y << 5) | (x & 15))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out[3], np.minimum(x, y) * np.int32(7) - abs(x))
    product = x.astype(np.int64) * y
    np.testing.assert_array_equal(wide[0], product + (x.astype(np.int64) << 20))
    np.testing.assert_array_equal(wide[1], np.sign(product) * (abs(product) // 12345))


@jit
def far_kernel(x, out, batch_stride, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * batch_stride
    tl.store(out + tl.program_id(0) * BLOCK + at, tl.load(x + start + at, mask=at < n, other=-1.0))


def test_offsets_beyond_two_to_the_31():
    stride = 3 * 2**30  # elements
    pieces = {k * stride * 4: normal(100, seed=k) for k in range(3)}
    out = np.zeros((3, 128), np.float32)
    launch(far_kernel, (3,), Window(pieces), out, stride, 100, BLOCK=128)
    np.testing.assert_array_equal(out[:, :100], np.stack(list(pieces.values())))
    assert (out[:, 100:] == -1).all()


# ---------------------------------------------------------------- reductions and scans


@jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + at, mask=at < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * n + at, e / tl.sum(e, 0), mask=at < n)


@TARGETS
@pytest.mark.parametrize(("n", "warps"), [(781, 4), (200, 8), (1000, 1)])
def test_softmax_across_warps(n, warps, target):
    x, out = 3 * normal(5, n, seed=8), np.zeros((5, n), np.float32)
    launch(softmax_kernel, (5,), x, out, n, BLOCK=1024, warps=warps, target=target)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=2e-6, atol=1e-12)


@jit
def sums_kernel(x, by_row, by_column, best, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(by_row + m, tl.sum(v, 1))
    tl.store(by_column + n, tl.sum(v, 0))
    tl.store(best + m, tl.argmax(v, 1))


@pytest.mark.parametrize(("M", "N", "warps"), [(32, 64, 4), (128, 4, 8), (2, 512, 2), (16, 16, 1)])
def test_sums_over_both_axes(M, N, warps):
    x = normal(M, N, seed=9)
    rows, columns = np.zeros(M, np.float32), np.zeros(N, np.float32)
    best = np.zeros(M, np.int32)
    launch(sums_kernel, (1,), x, rows, columns, best, M=M, N=N, warps=warps)
    np.testing.assert_allclose(rows, x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(columns, x.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(best, x.argmax(1))


@jit
def combine(a0, b0, a1, b1):
    return a0 * a1, a1 * b0 + b1


@jit
def scan_kernel(
    a, b, out, T: tl.constexpr, R: tl.constexpr, AXIS: tl.constexpr, BACK: tl.constexpr
):
    t, r = tl.arange(0, T), tl.arange(0, R)
    at = t[:, None] * R + r[None, :]
    _, state = tl.associative_scan((tl.load(a + at), tl.load(b + at)), AXIS, combine, reverse=BACK)
    tl.store(out + at, state)


def recurrence(a, b, state=None, back=False):
    """state = a * state + b along the first axis, in float64."""
    state = np.zeros(a.shape[1:]) if state is None else state
    out = np.zeros(a.shape)
    for t in range(len(a))[:: -1 if back else 1]:
        state = a[t].astype(np.float64) * state + b[t]
        out[t] = state
    return out


@TARGETS
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("T", "R", "axis", "warps"), [(256, 4, 0, 4), (8, 128, 1, 8), (64, 2, 0, 1)]
)
def test_associative_scan(T, R, axis, back, warps, target):
    a = np.random.default_rng(10).random((T, R)).astype(np.float32)
    b = normal(T, R, seed=11)
    out = np.zeros((T, R), np.float32)
    launch(scan_kernel, (1,), a, b, out, T=T, R=R, AXIS=axis, BACK=back, warps=warps, target=target)
    expected = recurrence(a, b, back=back) if axis == 0 else recurrence(a.T, b.T, back=back).T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@jit
def rearranged_kernel(x, counts, sorted_out, running, picked, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(counts + tl.arange(0, 16), tl.histogram(v, 16))
    tl.store(sorted_out + at, tl.sort(v))
    tl.store(running + at, tl.cumsum(v, 0, reverse=True))
    tl.store(picked + at, tl.gather(v, (at * 7 + 3) % BLOCK, 0))


@TARGETS
def test_histogram_sort_cumsum_gather(target):
    x = np.random.default_rng(12).integers(0, 16, 256).astype(np.int32)
    counts, picked = np.zeros(16, np.int32), np.zeros(256, np.int32)
    in_order, running = np.zeros(256, np.int32), np.zeros(256, np.int32)
    launch(rearranged_kernel, (1,), x, counts, in_order, running, picked, BLOCK=256, target=target)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=16))
    np.testing.assert_array_equal(in_order, np.sort(x))
    np.testing.assert_array_equal(running, np.cumsum(x[::-1])[::-1])
    np.testing.assert_array_equal(picked, x[(np.arange(256) * 7 + 3) % 256])


@jit
def pipelined_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, n, num_stages=4):  # its loads become cp.async three rows ahead
        a = tl.load(x + k * BLOCK + at, eviction_policy="evict_first")
        total += a * tl.load(y + k * BLOCK + at, eviction_policy="evict_last")
    tl.store(out + at, total, cache_modifier=".cs")


@TARGETS
@pytest.mark.parametrize("n", [0, 1, 3, 10])
def test_pipelined_loads(n, target):
    x, y = normal(10, 512, seed=24), normal(10, 512, seed=25)
    out = np.full(512, np.nan, np.float32)
    launch(pipelined_kernel, (1,), x, y, out, n, BLOCK=512, target=target)
    expected = (x[:n].astype(np.float64) * y[:n]).sum(0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- control flow and atomics


@jit
def ragged_kernel(x, lengths, out, total, order, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    if length == 0:
        return
    at = tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32)
    for t in range(length):
        state = 0.5 * state + tl.load(x + (row * stride + t) * BLOCK + at)
        state += 0.01 * tl.sum(state, 0)  # through shared memory, with barriers
        if t % 3 == 2:
            state += 1.0
    tl.store(out + row * BLOCK + at, state)
    tl.atomic_add(total + at, state)
    place = tl.atomic_add(order, 1)
    tl.store(order + 1 + place, row)


def test_loops_of_different_lengths_and_atomics():
    lengths = np.array([3, 0, 7, 1, 4, 7], np.int32)
    x = normal(6, 8, 128, seed=13)
    out, total = np.zeros((6, 128), np.float32), np.zeros(128, np.float32)
    order = np.full(7, -1, np.int32)
    order[0] = 0
    launch(ragged_kernel, (6,), x, lengths, out, total, order, 8, BLOCK=128)
    expected = np.zeros((6, 128))
    for row, length in enumerate(lengths):
        for t in range(length):
            expected[row] = 0.5 * expected[row] + x[row, t]
            expected[row] += 0.01 * expected[row].sum() + (t % 3 == 2)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, expected.sum(0), rtol=1e-5, atol=1e-5)
    assert order[0] == 5 and sorted(order[1:6]) == [0, 2, 3, 4, 5] and order[6] == -1
