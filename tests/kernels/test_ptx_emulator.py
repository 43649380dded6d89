"""Triton's and Gluon's own code in the PTX emulator, each kernel against NumPy."""

import functools
import math
import re

import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402
from triton import jit  # noqa: E402
from triton import language as tl
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

from tests.kernels.ptx_compile import compile_gluon  # noqa: E402
from tests.kernels.ptx_emulator import MemoryFault, RaceError, Window, run  # noqa: E402

# Triton 3.6 has it under another name.
async_load = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)
TYPES = {
    np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", np.dtype(bfloat16): "bf16",
    np.dtype(np.int32): "i32", np.dtype(np.int64): "i64", np.dtype(np.int8): "i8",
    np.dtype(np.uint32): "u32", np.dtype(np.int16): "i16",
}  # fmt: skip


def compiled(kernel, arguments, warps=4, target=90, **constexprs):
    """Compiled for the types of the arguments: arrays, or (type name, number)."""
    names = [n for n in kernel.arg_names if n not in constexprs]
    kinds = [
        "*" + TYPES[a.dtype]
        if isinstance(a, np.ndarray)
        else a[0]
        if isinstance(a, tuple)
        else "i32"
        for a in arguments
    ]
    return compile_gluon(kernel, dict(zip(names, kinds, strict=True)), constexprs, warps, target)


def launch(kernel, grid, *arguments, warps=4, target=90, checks=True, **constexprs):
    """Compiles and runs."""
    code = compiled(kernel, arguments, warps, target, **constexprs)
    values = [a[1] if isinstance(a, tuple) else a for a in arguments]
    grid = (*grid, 1, 1)[:3]
    return run(code.ptx, grid, code.num_threads, values, code.shared_bytes, check_races=checks)


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
    code = compile_gluon(
        far_kernel, {"x": "*fp32", "out": "*fp32", "batch_stride": "i64", "n": "i32"},
        {"BLOCK": 128}, 4,
    )  # fmt: skip
    run(code.ptx, (3, 1, 1), 128, [Window(pieces), out, stride, 100], code.shared_bytes)
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


# ---------------------------------------------------------------- Gluon


@gluon.jit
def transpose_kernel(
    x, out, M: gl.constexpr, N: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr
):
    m, n = gl.arange(0, M, gl.SliceLayout(1, FIRST)), gl.arange(0, N, gl.SliceLayout(0, FIRST))
    v = gl.convert_layout(gl.load(x + m[:, None] * N + n[None, :]), SECOND)
    m, n = gl.arange(0, M, gl.SliceLayout(1, SECOND)), gl.arange(0, N, gl.SliceLayout(0, SECOND))
    gl.store(out + n[None, :] * M + m[:, None], v)


@TARGETS
@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.int8])
@pytest.mark.parametrize("warps", [1, 4])
def test_layout_conversions(dtype, warps, target):
    wide = gl.BlockedLayout([1, 4], [4, 8], [warps, 1], [1, 0])
    tall = gl.BlockedLayout([8, 1], [8, 4], [1, warps], [0, 1])
    x = np.asarray(9 * normal(64, 64, seed=14), dtype)
    out = np.zeros((64, 64), dtype)
    launch(
        transpose_kernel, (1,), x, out, M=64, N=64, FIRST=wide, SECOND=tall, warps=warps,
        target=target,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x.T)


def test_a_missing_barrier_is_caught():
    wide = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    tall = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    x, out = normal(64, 64), np.zeros((64, 64), np.float32)
    code = compiled(transpose_kernel, (x, out), M=64, N=64, FIRST=wide, SECOND=tall)
    assert code.shared_bytes >= 64 * 64 * 4 // 2
    ptx, removed = re.subn(r"\n\s*bar\.sync[^;]*;", "\n", code.ptx)
    assert removed
    with pytest.raises(RaceError, match="since the last barrier"):
        run(ptx, (1, 1, 1), 128, [x, out], code.shared_bytes)
    with pytest.raises(MemoryFault, match="bytes at shared address"):
        run(code.ptx, (1, 1, 1), 128, [x, out], code.shared_bytes // 2)


@gluon.jit
def shared_kernel(x, out, N: gl.constexpr, LAYOUT: gl.constexpr, SHARED: gl.constexpr):
    at = gl.arange(0, N, LAYOUT)
    ring = gl.allocate_shared_memory(gl.float32, [2, N], SHARED)
    total = gl.zeros([N], gl.float32, LAYOUT)
    for k in range(6):
        slot = ring.index(k % 2)
        slot.store(gl.load(x + k * N + at))
        total += slot.load(LAYOUT) * (k + 1)
    gl.store(out + at, total)


@gluon.jit
def copy_kernel(
    x,
    out,
    N: gl.constexpr,
    STEPS: gl.constexpr,
    LAYOUT: gl.constexpr,
    OTHER: gl.constexpr,
    SHARED: gl.constexpr,
):
    at = gl.arange(0, N, LAYOUT)
    ring = gl.allocate_shared_memory(gl.float32, [3, N], SHARED)
    for k in gl.static_range(2):
        async_load(ring.index(k), x + k * N + at)
        async_copy.commit_group()
    total = gl.zeros([N], gl.float32, OTHER)
    for k in range(STEPS):
        more = k + 2 < STEPS
        async_load(ring.index((k + 2) % 3), x + (k + 2) * N + at, mask=more & (at < N))
        async_copy.commit_group()
        async_copy.wait_group(2)
        total += ring.index(k % 3).load(OTHER) * (k + 1)
    gl.store(out + gl.arange(0, N, OTHER), total)


def test_shared_memory_and_asynchronous_copies():
    layout = gl.BlockedLayout([4], [32], [4], [0])
    other = gl.BlockedLayout([1], [32], [4], [0])
    shared = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x = normal(6, 512, seed=15)
    expected = (x.astype(np.float64) * np.arange(1, 7)[:, None]).sum(0)
    out = np.zeros(512, np.float32)
    launch(shared_kernel, (1,), x, out, N=512, LAYOUT=layout, SHARED=shared)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    out[:] = 0
    constants = dict(N=512, STEPS=6, LAYOUT=layout, OTHER=other, SHARED=shared)
    launch(copy_kernel, (1,), x, out, **constants)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    # Waiting for too little reads what was there before: NaN.
    code = compiled(copy_kernel, (x, out), **constants)
    late = code.ptx.replace("cp.async.wait_group 2", "cp.async.wait_group 3")
    late = late.replace("cp.async.wait_group \t2", "cp.async.wait_group 3")
    assert late != code.ptx
    run(late, (1, 1, 1), 128, [x, out], code.shared_bytes, check_races=False)
    assert np.isnan(out).any()


@gluon.jit
def shuffle_kernel(x, out, N: gl.constexpr, LAYOUT: gl.constexpr):
    at = gl.arange(0, N, LAYOUT)
    v = gl.load(x + at)
    swapped = gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 5, 0x1f, -1;", "=r,r", [v], gl.float32, True, 1
    )
    moved = gl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        .reg .b32 other;
        shfl.sync.up.b32 other|inside, $1, 1, 0, -1;
        selp.b32 $0, other, 0, inside;
        }""",
        "=r,r", [v], gl.float32, True, 1,
    )  # fmt: skip
    gl.store(out + at, swapped)
    gl.store(out + N + at, moved)
    packed = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [v], gl.bfloat16, True, 2
    )
    gl.store(out + 2 * N + at, packed.to(gl.float32))
    fast = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], gl.float32, True, 1)
    gl.store(out + 3 * N + at, fast)


def test_shuffles_in_inline_assembly():
    x, out = normal(256, seed=16), np.zeros((4, 256), np.float32)
    layout = gl.BlockedLayout([2], [32], [4], [0])
    launch(shuffle_kernel, (1,), x, out, N=256, LAYOUT=layout)
    lanes = x.reshape(4, 32, 2)
    np.testing.assert_array_equal(out[0].reshape(4, 32, 2), lanes[:, np.arange(32) ^ 5])
    moved = np.pad(lanes, ((0, 0), (1, 0), (0, 0)))[:, :32]
    np.testing.assert_array_equal(out[1].reshape(4, 32, 2), moved)
    np.testing.assert_array_equal(out[2], x.astype(bfloat16).astype(np.float32))
    np.testing.assert_allclose(out[3], np.tanh(x), rtol=1e-6)


@gluon.jit
def shapes_kernel(x, out, N: gl.constexpr, LAYOUT: gl.constexpr, FLAT: gl.constexpr):
    m = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    pair = gl.arange(0, 2, gl.SliceLayout(0, LAYOUT))
    v = gl.load(x + m[:, None] * 2 + pair[None, :])
    even, odd = gl.split(v)
    joined = gl.join(odd, even + odd)
    square = gl.reshape(joined, [N // 4, 4, 2])
    turned = gl.reshape(gl.permute(square, [2, 0, 1]), [2 * N])
    at = gl.arange(0, 2 * N, FLAT)
    gl.store(out + at, gl.convert_layout(turned, FLAT))


@TARGETS
def test_split_join_reshape_permute(target):
    x, out = normal(128, 2, seed=17), np.zeros(256, np.float32)
    layout = gl.BlockedLayout([2, 2], [32, 1], [4, 1], [1, 0])
    flat = gl.BlockedLayout([2], [32], [4], [0])
    launch(shapes_kernel, (1,), x, out, N=128, LAYOUT=layout, FLAT=flat, target=target)
    joined = np.stack([x[:, 1], x[:, 0] + x[:, 1]], 1)
    np.testing.assert_array_equal(out, joined.reshape(32, 4, 2).transpose(2, 0, 1).ravel())


@gluon.jit
def selective_scan_kernel(
    u, delta, A, B, C, y, final, length, channels,
    G: gl.constexpr, K: gl.constexpr, R: gl.constexpr, W: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    # K steps of a thread, 32 W threads along time, R channels; the state crosses blocks of T steps.
    block: gl.constexpr = gl.BlockedLayout([K, R], [32, 1], [W, 1], [0, 1])
    t = gl.arange(0, T, gl.SliceLayout(1, block))
    row = gl.arange(0, R, gl.SliceLayout(0, block))
    e = gl.program_id(0) * R + row
    batch = gl.program_id(1)
    for g in range(G):
        a = gl.load(A + e * G + g, mask=e < channels, other=0.0) * 1.4426950408889634
        h = gl.zeros([R], gl.float32, gl.SliceLayout(0, block))
        for start in range(0, length, T):
            at = start + t
            inside = (at < length)[:, None] & (e < channels)[None, :]
            place = (batch * channels + e)[None, :] * length + at[:, None]
            dt = gl.load(delta + place, mask=inside, other=0.0).to(gl.float32)
            x = gl.load(u + place, mask=inside, other=0.0).to(gl.float32)
            b = gl.load(B + (batch * G + g) * length + at, mask=at < length, other=0.0)
            c = gl.load(C + (batch * G + g) * length + at, mask=at < length, other=0.0)
            decay = gl.exp2(dt * a[None, :])
            inflow = dt * x * b.to(gl.float32)[:, None]
            p, s = gl.associative_scan((decay, inflow), 0, combine)
            s += p * h[None, :]
            before = gl.load(y + place, mask=inside, other=0.0)
            gl.store(y + place, before + s * c.to(gl.float32)[:, None], mask=inside)
            h = gl.sum(gl.where((t == T - 1)[:, None], s, 0.0), 0)
        gl.store(final + (batch * channels + e) * G + g, h, mask=e < channels)


@TARGETS
@pytest.mark.parametrize(
    ("length", "channels", "K", "R", "W"), [(300, 6, 2, 4, 2), (97, 3, 4, 1, 1), (64, 4, 1, 2, 4)]
)
def test_a_selective_scan(length, channels, K, R, W, target):
    rng = np.random.default_rng(18)
    batch, G = 2, 3
    u = normal(batch, channels, length, seed=19, dtype=bfloat16)
    delta = (0.2 * rng.random((batch, channels, length))).astype(bfloat16)
    A = -rng.random((channels, G)).astype(np.float32)
    B, C = (normal(batch, G, length, seed=s, dtype=bfloat16) for s in (20, 21))
    y = np.zeros((batch, channels, length), np.float32)
    final = np.zeros((batch, channels, G), np.float32)
    launch(
        selective_scan_kernel, (-(-channels // R), batch), u, delta, A, B, C, y, final, length,
        channels, G=G, K=K, R=R, W=W, T=32 * K * W, warps=W, target=target,
    )  # fmt: skip
    u, delta, B, C = (v.astype(np.float64) for v in (u, delta, B, C))
    step = delta[..., None]
    decay, inflow = np.exp(step * A[:, None]), step * u[..., None] * B.transpose(0, 2, 1)[:, None]
    state = np.zeros((batch, channels, G))
    expected = np.zeros(y.shape)
    for t in range(length):
        state = decay[:, :, t] * state + inflow[:, :, t]
        expected[:, :, t] = (state * C[:, None, :, t]).sum(-1)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(final, state, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------- what a kernel uses


@gluon.jit
def heavy_kernel(x, out, STRIDE: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    at = gl.arange(0, COUNT, LAYOUT)
    v = gl.load(x + at)
    for _ in range(STRIDE):
        v = gl.associative_scan(v, 0, _multiply)
    gl.store(out + at, v)


@gluon.jit
def _multiply(a, b):
    return a * b


@functools.cache
def _heavy(target, limit):
    layout = gl.BlockedLayout([128], [32], [1], [0])
    return compile_gluon(
        heavy_kernel, {"x": "*fp32", "out": "*fp32"},
        {"STRIDE": 3, "COUNT": 128 * 32, "LAYOUT": layout}, 1, target,
        options={"maxnreg": limit} if limit else None,
    )  # fmt: skip


@TARGETS
def test_registers_and_spills(target):
    free, tight = _heavy(target, None), _heavy(target, 48)
    assert 128 < free.registers <= 255 and free.spills == 0 and free.stack_bytes == 0
    assert tight.registers <= 48 and tight.spills > 0 and tight.stack_bytes > 0
    assert free.num_threads == 32
    with pytest.raises(ValueError, match="LAYOUT must be either in signature or in constexprs"):
        compile_gluon(heavy_kernel, {"x": "*fp32", "out": "*fp32"}, {"STRIDE": 1, "COUNT": 32}, 1)
