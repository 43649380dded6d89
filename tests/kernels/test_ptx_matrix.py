"""Tensor cores in the PTX emulator: layouts of the operands, sums, and what must be left alone."""

import re

import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import mma_v2  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tests.kernels import ptx_launch  # noqa: E402
from tests.kernels.ptx_emulator import RaceError, run  # noqa: E402
from tests.kernels.ptx_snippets import threads  # noqa: E402


@gluon.jit
def _shared(pointer, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A row-major matrix in shared memory, as the tensor cores read it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    x = gl.load(pointer + row[:, None] * COLUMNS + column[None, :])
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], x.dtype)
    return gl.allocate_shared_memory(x.dtype, [ROWS, COLUMNS], swizzled, x)


@gluon.jit
def product_kernel(
    a, b, out, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, B_ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = 1 + a [M, K] times b, [K, N] or (B_ROWS == N) [N, K]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    left = _shared(a, M, K)
    if B_ROWS == K:
        right = _shared(b, K, N)
    else:
        right = _shared(b, N, K).permute((1, 0))
    fence_async_shared()
    one = gl.full([M, N], 1.0, gl.float32, layout)
    if REGISTERS:
        y = warpgroup_mma(left.load(gl.DotOperandLayout(0, layout, 2)), right, one, is_async=True)
    else:
        y = warpgroup_mma(left, right, one, is_async=True)
    y = warpgroup_mma_wait(0, deps=[y])
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    gl.store(out + m[:, None] * N + n[None, :], y)


def operands(M, N, K, transposed, dtype):
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 9, (M, K)).astype(dtype)
    b = rng.integers(-8, 9, (K, N)).astype(dtype)
    return a, np.ascontiguousarray(b.T) if transposed else b, 1 + a.astype("f4") @ b.astype("f4")


# Rows of 128, 64 and 32 bytes are swizzled each in their way.
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "warps"), [(64, 64, 4), (128, 64, 8), (16, 128, 4), (32, 32, 8), (64, 16, 4)]
)
def test_products(N, K, warps, transposed, registers):
    M = 16 * warps
    a, b, want = operands(M, N, K, transposed, bfloat16)
    out = np.zeros((M, N), np.float32)
    constants = dict(M=M, N=N, K=K, B_ROWS=N if transposed else K, REGISTERS=registers)
    if N == K:
        constants["B_ROWS"] = -1 if transposed else K
    ptx_launch.launch(product_kernel, (1,), {"a": a, "b": b, "out": out}, constants, warps)
    np.testing.assert_array_equal(out, want)  # small integers: every sum is exact


def test_halves():
    a, b, want = operands(64, 64, 32, False, np.float16)
    out = np.zeros((64, 64), np.float32)
    constants = dict(M=64, N=64, K=32, B_ROWS=32, REGISTERS=True)
    ptx_launch.launch(product_kernel, (1,), {"a": a, "b": b, "out": out}, constants)
    np.testing.assert_array_equal(out, want)


@gluon.jit
def overwritten_kernel(a, out, EARLY: gl.constexpr):
    """out = a a^T, and then zeros where a was."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    x = _shared(a, 64, 64)
    fence_async_shared()
    y = gl.zeros([64, 64], gl.float32, layout)
    y = warpgroup_mma(x, x.permute((1, 0)), y, is_async=True)
    if EARLY:
        x.store(gl.zeros([64, 64], x.dtype, layout))
    y = warpgroup_mma_wait(0, deps=[y])
    if not EARLY:
        x.store(gl.zeros([64, 64], x.dtype, layout))
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    gl.store(out + m[:, None] * 64 + n[None, :], y)


def test_what_a_product_under_way_reads_must_stay():
    a, _, _ = operands(64, 64, 64, False, bfloat16)
    out = np.zeros((64, 64), np.float32)
    ptx_launch.launch(overwritten_kernel, (1,), {"a": a, "out": out}, {"EARLY": False})
    np.testing.assert_array_equal(out, a.astype("f4") @ a.astype("f4").T)
    # Gluon puts a barrier before the store, which does not end the product.
    with pytest.raises(RaceError, match=r"writes shared address \d+, which warps .* read"):
        ptx_launch.launch(overwritten_kernel, (1,), {"a": a, "out": out}, {"EARLY": True})


def test_a_missing_barrier_is_caught():
    a, b, _ = operands(64, 64, 64, False, bfloat16)
    out = np.zeros((64, 64), np.float32)
    code = ptx_launch.compile_for(
        product_kernel,
        {"a": a, "b": b, "out": out},
        dict(M=64, N=64, K=64, B_ROWS=64, REGISTERS=False),
    )
    ptx, removed = re.subn(r"\n\s*bar\.sync[^;]*;", "\n", code.ptx)
    assert removed
    with pytest.raises(RaceError, match="reads shared address"):
        run(ptx, (1, 1, 1), 128, [a, b, out], code.shared_bytes)


def test_part_of_a_warpgroup():
    body = "setp.lt.u32 %p1, %r0, 64; @%p1 bra L; ret; L: wgmma.wait_group.sync.aligned 0;"
    with pytest.raises(RuntimeError, match="part of a warpgroup"):
        threads(body, [], 128)
    with pytest.raises(RuntimeError, match="CTAs of 64 threads"):
        threads("wgmma.commit_group.sync.aligned;", [], 64)


@gluon.jit
def warp_product_kernel(
    a, b, out, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """out [M, N] = 1 + a [M, K] times b, [K, N] or (TRANSPOSED) [N, K], by mma.sync."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])
    lefts: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rights: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    row = gl.arange(0, M, layout=gl.SliceLayout(1, lefts))
    column = gl.arange(0, K, layout=gl.SliceLayout(0, lefts))
    left = gl.load(a + row[:, None] * K + column[None, :])
    ROWS: gl.constexpr = N if TRANSPOSED else K
    COLUMNS: gl.constexpr = K if TRANSPOSED else N
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, rows))
    x = gl.load(b + row[:, None] * COLUMNS + column[None, :])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, min(COLUMNS // 8, 8), [1, 0])
    memory = gl.allocate_shared_memory(b.dtype.element_ty, [ROWS, COLUMNS], swizzled, x)
    if TRANSPOSED:
        right = memory.permute((1, 0)).load(rights)
    else:
        right = memory.load(rights)
    y = mma_v2(left, right, gl.full([M, N], 1.0, gl.float32, layout))
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    gl.store(out + m[:, None] * N + n[None, :], y)


@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "warps"), [(16, 32, 64, 4), (32, 64, 16, 2)])
def test_products_of_a_warp(M, N, K, warps, transposed, dtype):
    a, b, want = operands(M, N, K, transposed, dtype)
    out = np.zeros((M, N), np.float32)
    constants = dict(M=M, N=N, K=K, TRANSPOSED=transposed)
    code = ptx_launch.launch(
        warp_product_kernel, (1,), {"a": a, "b": b, "out": out}, constants, warps
    )
    loads = re.findall(r"ldmatrix\S*", code.ptx)
    assert loads
    assert all(("trans" in load) != transposed for load in loads)
    np.testing.assert_array_equal(out, want)


def test_part_of_a_warp():
    body = """
    setp.lt.u32 %p1, %r0, 8; @%p1 bra L; ret;
    L: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%r2, %r3, %r4, %r5}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r2, %r3, %r4, %r5};
    """
    with pytest.raises(RuntimeError, match="part of a warp"):
        threads(body, [], 32)
