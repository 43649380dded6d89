"""Gluon's own code in the PTX emulator: layouts, shared memory, inline assembly, a whole scan."""

import functools
import re

import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy  # noqa: E402

from tests.kernels import ptx_launch  # noqa: E402
from tests.kernels.ptx_compile import compile_gluon  # noqa: E402
from tests.kernels.ptx_emulator import MemoryFault, RaceError, run  # noqa: E402

# Triton 3.6 has it under another name.
async_load = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)


def launch(kernel, grid, *arguments, warps=4, target=90, **constexprs):
    """`ptx_launch.launch` with the arguments in order."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    ptx_launch.launch(
        kernel, grid, dict(zip(names, arguments, strict=True)), constexprs, warps, target
    )


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


TARGETS = pytest.mark.parametrize("target", [80, 90, 100])


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
    code = ptx_launch.compile_for(
        transpose_kernel, {"x": x, "out": out}, dict(M=64, N=64, FIRST=wide, SECOND=tall)
    )
    assert code.shared_bytes >= 64 * 64 * 4 // 2
    ptx, removed = re.subn(r"\n\s*bar\.sync[^;]*;", "\n", code.ptx)
    assert removed
    with pytest.raises(RaceError, match="since the last barrier"):
        run(ptx, (1, 1, 1), 128, [x, out], code.shared_bytes)
    with pytest.raises(MemoryFault, match="bytes at shared address"):
        run(code.ptx, (1, 1, 1), 128, [x, out], code.shared_bytes // 2)


@gluon.jit
def sum_kernel(x, out, N: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr):
    v = gl.convert_layout(gl.load(x + gl.arange(0, N, FIRST)), SECOND)
    gl.store(out + gl.arange(0, N, SECOND), v + gl.sum(v, 0))


@TARGETS
@pytest.mark.parametrize("warps", [1, 8, 32])
def test_sums_across_warps(warps, target):
    first = gl.BlockedLayout([4], [32], [warps], [0])
    second = gl.BlockedLayout([1], [32], [warps], [0])
    x, out = normal(128 * warps, seed=30), np.zeros(128 * warps, np.float32)
    launch(
        sum_kernel, (1,), x, out, N=len(x), FIRST=first, SECOND=second, warps=warps, target=target
    )
    np.testing.assert_allclose(out, x + x.astype(np.float64).sum(), rtol=1e-5, atol=1e-4)


@TARGETS
def test_linear_layouts(target):
    first = gl.DistributedLinearLayout(
        [[1], [64]], [[2], [4], [8], [16], [32]], [[128], [256]], [], [512]
    )
    second = gl.DistributedLinearLayout(
        [[256], [4]], [[1], [2], [8], [128], [32]], [[16], [64]], [], [512]
    )
    x, out = normal(512, seed=31), np.zeros(512, np.float32)
    launch(sum_kernel, (1,), x, out, N=512, FIRST=first, SECOND=second, target=target)
    np.testing.assert_allclose(out, x + x.astype(np.float64).sum(), rtol=1e-5, atol=1e-4)


@gluon.jit
def turn_kernel(
    x, out, M: gl.constexpr, N: gl.constexpr,
    FIRST: gl.constexpr, SECOND: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    m, n = gl.arange(0, M, gl.SliceLayout(1, FIRST)), gl.arange(0, N, gl.SliceLayout(0, FIRST))
    memory = gl.allocate_shared_memory(x.dtype.element_ty, [M, N], SHARED)
    memory.store(gl.load(x + m[:, None] * N + n[None, :]))
    turned = memory.permute((1, 0)).load(SECOND)
    n, m = gl.arange(0, N, gl.SliceLayout(1, SECOND)), gl.arange(0, M, gl.SliceLayout(0, SECOND))
    gl.store(out + n[:, None] * M + m[None, :], turned)


@TARGETS
@pytest.mark.parametrize(
    ("shared", "dtype"),
    [
        (gl.SwizzledSharedLayout(8, 2, 4, [1, 0]), bfloat16),
        (gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), np.float32),
        (gl.PaddedSharedLayout.with_identity_for([[32, 4]], [64, 128], [1, 0]), np.float32),
        (gl.NVMMASharedLayout(128, 32, 2), np.float32),
        (gl.NVMMASharedLayout(128, 16, 2), bfloat16),
    ],
)
def test_shared_layouts(shared, dtype, target):
    # Those of 16 bits go through ldmatrix.
    first = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    second = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    x, out = normal(64, 128, seed=32, dtype=dtype), np.zeros((128, 64), dtype)
    launch(
        turn_kernel, (1,), x, out, M=64, N=128, FIRST=first, SECOND=second, SHARED=shared,
        target=target,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x.T)


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
    code = ptx_launch.compile_for(copy_kernel, {"x": x, "out": out}, constants)
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
def combine(a0, b0, a1, b1):
    return a0 * a1, a1 * b0 + b1


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
