"""The kernels of the gradients of `gpu.attention`, in Gluon for Hopper's tensor cores.

Two kernels of one form. One holds a block of keys and values and goes over the queries with their
gradients of the result; the other holds queries and goes over the keys. Both make the scores again,
so nothing is added up between programs and gradients are the same bits from run to run:

    s = q k^T,  t = dy v^T,  p = exp(scale s - lse),  r = p (t - sum(y dy))
    dv = p^T dy,  dk = scale r^T q,  dq = scale r k

What is taken away from s and t is a channel of the product: the padding of the queries and of their
gradients (`gluon_heads`) carries it as three bfloat16, which add up to a float32, and that of keys
and values carries ones. So of a score there is left to do: a factor, an exponential, a product and
two conversions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from storm_kernels.attention.gluon_heads import (
    allocate,
    at,
    copy_head,
    copy_rows,
    masked,
    opaque,
    pad,
    start_scores,
    start_sums,
    sums_layout,
    write_head,
)

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _copy_pair(
    memory, others, a, b, a_pads, b_pads, first, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    PADS: gl.constexpr,
):  # fmt: skip
    """Starts to copy rows of a head of two operands, with their padding if PADS."""
    WHOLE: gl.constexpr = N % memory[0].shape[0] == 0
    copy_head(memory, a, first, N, H * C, WHOLE)
    copy_head(others, b, first, N, H * C, WHOLE)
    if PADS:
        copy_rows(memory[1].slice(8, 8, 1), a_pads, first, N, H * 8, WHOLE, 8)
        copy_rows(others[1].slice(8, 8, 1), b_pads, first, N, H * 8, WHOLE, 8)


@gluon.jit
def _fetch(
    memory, others, c, d, c_pads, d_pads, tile, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    PADS: gl.constexpr,
):  # fmt: skip
    """Starts to copy a tile, if there is one; a commit group in any case."""
    TILE: gl.constexpr = memory[0].shape[0]
    if tile * TILE < N:
        _copy_pair(memory, others, c, d, c_pads, d_pads, tile * TILE, N, H, C, PADS)
    async_copy.commit_group()


@gluon.jit
def _turn(
    held, c, d, c_pads, d_pads, cs, ds, s, t, a_sums, b_sums, tile, KEYS: gl.constexpr,
    LAST: gl.constexpr, SLOT: gl.constexpr, SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr,
    C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds a tile whose products s and t are there, and makes those of the next."""
    AFTER: gl.constexpr = (SLOT + 1) % STAGES
    BEFORE: gl.constexpr = (SLOT + STAGES - 1) % STAGES
    TILE: gl.constexpr = cs[0][0].shape[1]
    dtype: gl.constexpr = c.dtype.element_ty
    # Addresses are made from it in every turn: kept for all slots they would fill the registers.
    tile = opaque(tile)
    zero = tile >> 20
    # Gluon puts a barrier behind the wait: with it the next tile is there for all, and the one
    # before was used up by all.
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    _fetch(
        at(cs[BEFORE], zero), at(ds[BEFORE], zero), c, d, c_pads, d_pads, tile + STAGES - 1,
        N, H, C, KEYS,
    )  # fmt: skip
    if LAST and not KEYS and N % TILE != 0:  # keys that are not there; such queries are all zero
        s = masked(s, N % TILE)
    p = gl.exp2(s * SCALE)
    r = (p * t).to(dtype)
    if KEYS:
        b_sums, p_kept = start_sums(p.to(dtype), at(ds[SLOT], zero), b_sums)
    a_sums, r_kept = start_sums(r, at(cs[SLOT], zero), a_sums)
    s = start_scores(at(held[0], zero), at(cs[AFTER], zero))
    t = start_scores(at(held[1], zero), at(ds[AFTER], zero))
    s, t, a0, a1, _, _ = warpgroup_mma_wait(
        0, deps=[s, t, a_sums[0], a_sums[1], r_kept[0], r_kept[1]]
    )
    if KEYS:
        b0, b1, _, _ = warpgroup_mma_wait(0, deps=[b_sums[0], b_sums[1], p_kept[0], p_kept[1]])
        b_sums = (warpgroup_mma_init(b0), warpgroup_mma_init(b1))
    return s, t, (warpgroup_mma_init(a0), warpgroup_mma_init(a1)), b_sums


@gluon.jit
def _gradients(
    a, b, a_pads, b_pads, c, d, c_pads, d_pads, a_out, b_out, KEYS: gl.constexpr,
    SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Holds ROWS rows of a and b, goes over c and d: the gradient of a and, if KEYS, of b."""
    gl.static_assert(C == 72)
    WARPS: gl.constexpr = gl.num_warps()
    TILES: gl.constexpr = (N + TILE - 1) // TILE
    dtype: gl.constexpr = a.dtype.element_ty
    first = gl.program_id(0) * ROWS
    start = gl.program_id(2).to(gl.int64) * (N * H * C) + gl.program_id(1) * C
    a += start
    b += start
    c += start
    d += start
    a_out += start
    b_out += start
    start = gl.program_id(2).to(gl.int64) * (N * H * 8) + gl.program_id(1) * 8
    if KEYS:
        c_pads += start
        d_pads += start
    else:
        a_pads += start
        b_pads += start

    # Memory of its own for each tile: the compiler sees which barriers are needed.
    held = (allocate(dtype, ROWS), allocate(dtype, ROWS))
    cs = ()
    ds = ()
    for _ in gl.static_range(0, STAGES):
        cs = cs + (allocate(dtype, TILE),)
        ds = ds + (allocate(dtype, TILE),)
    _copy_pair(at(held[0], 0), at(held[1], 0), a, b, a_pads, b_pads, first, N, H, C, not KEYS)
    for tile in gl.static_range(0, STAGES - 1):
        _fetch(at(cs[tile], 0), at(ds[tile], 0), c, d, c_pads, d_pads, tile, N, H, C, KEYS)
    if KEYS:
        pad(at(held[0], 0), 1.0, 3)
        pad(at(held[1], 0), 1.0, 3)
    else:
        for slot in gl.static_range(0, STAGES):
            pad(at(cs[slot], 0), 1.0, 3)
            pad(at(ds[slot], 0), 1.0, 3)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    s = start_scores(at(held[0], 0), at(cs[0], 0))
    t = start_scores(at(held[1], 0), at(ds[0], 0))
    s, t = warpgroup_mma_wait(0, deps=[s, t])

    wide = gl.zeros([ROWS, 64], gl.float32, sums_layout(64, WARPS))
    narrow = gl.zeros([ROWS, 16], gl.float32, sums_layout(16, WARPS))
    a_sums = (warpgroup_mma_init(wide), warpgroup_mma_init(narrow))
    b_sums = (warpgroup_mma_init(wide), warpgroup_mma_init(narrow))
    ROUNDS: gl.constexpr = (TILES - 1) // STAGES
    for turn in range(opaque(ROUNDS)):
        for slot in gl.static_range(0, STAGES):
            s, t, a_sums, b_sums = _turn(
                held, c, d, c_pads, d_pads, cs, ds, s, t, a_sums, b_sums, turn * STAGES + slot,
                KEYS, False, slot, SCALE, N, H, C, STAGES,
            )  # fmt: skip
    for slot in gl.static_range(0, TILES - ROUNDS * STAGES):
        s, t, a_sums, b_sums = _turn(
            held, c, d, c_pads, d_pads, cs, ds, s, t, a_sums, b_sums, ROUNDS * STAGES + slot,
            KEYS, ROUNDS * STAGES + slot == TILES - 1, slot, SCALE, N, H, C, STAGES,
        )  # fmt: skip
    y0, y1 = warpgroup_mma_wait(0, deps=[a_sums[0], a_sums[1]])
    FACTOR: gl.constexpr = SCALE / _LOG2_E
    y = ((y0 * FACTOR).to(dtype), (y1 * FACTOR).to(dtype))
    write_head(a_out, y, first, N, H * C, N % ROWS == 0)
    if KEYS:
        y0, y1 = warpgroup_mma_wait(0, deps=[b_sums[0], b_sums[1]])
        write_head(b_out, (y0.to(dtype), y1.to(dtype)), first, N, H * C, N % ROWS == 0)


@gluon.jit
def attention_backward_keys(
    q, k, v, dy, q_pads, dy_pads, dk, dv,
    SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. Grid: blocks of keys, heads, rows of the batch.

    Args:
        q, k, v, dy, dk, dv: bfloat16 [B, N, H, C].
        q_pads, dy_pads: bfloat16 [B, N, H, 8], what the padding of q and dy carries, in the first
            three: -lse / SCALE, lse being that of `attention_forward`, and -sum(y dy).
        SCALE: of the scores, times log2 e; positive.
        C: 72.
        ROWS: keys of a program, 16 for each warp.
        TILE: queries that it goes over at a time.
        STAGES: tiles in shared memory, at least 3.
    """
    _gradients(
        k, v, k, v, q, dy, q_pads, dy_pads, dk, dv, True, SCALE, N, H, C, ROWS, TILE, STAGES
    )  # fmt: skip


@gluon.jit
def attention_backward_queries(
    q, k, v, dy, q_pads, dy_pads, dq,
    SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Gradient of queries: as `attention_backward_keys`, with queries and keys changed over."""
    _gradients(
        q, dy, q_pads, dy_pads, k, v, k, v, dq, dq, False, SCALE, N, H, C, ROWS, TILE, STAGES
    )  # fmt: skip
