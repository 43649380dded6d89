"""The kernel of `gpu.attention`, in Gluon for Hopper's tensor cores.

A program takes QUERIES queries of one head and goes over its keys in tiles, with the scores of a
tile in registers. The first channel of the values' padding (`gluon_heads`) is one, so the sums of
the weights come out beside the results.

The largest score of the first tile stands for that of all: no tile is looked through for a larger
one, and nothing is scaled again. bfloat16 and float32 have the exponents for weights up to 2^50. A
program whose weights add up to more does its work again in `_careful`.

A warpgroup's products run on while its next instructions are issued; two programs to a
multiprocessor fill the rest. Tiles of keys and values come through STAGES buffers by `cp.async`.
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
    masked,
    opaque,
    pad,
    start_scores,
    start_sums,
    sums_layout,
    write_head,
)

_LARGEST_SUM = gl.constexpr(2.0**50)


@gluon.jit
def _fetch(k, v, keys, values, tile, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr):
    """Starts to copy a tile, if there is one; a commit group in any case."""
    if tile * KEYS < N:
        copy_head(keys, k, tile * KEYS, N, D, N % KEYS == 0)
        copy_head(values, v, tile * KEYS, N, D, N % KEYS == 0)
    async_copy.commit_group()


@gluon.jit
def _start_results(s, top, values, sums, SCALE: gl.constexpr):
    """Adds a tile's values. Returns the sums under way, and the weights, to be kept until then."""
    p = gl.exp2(s * SCALE - gl.expand_dims(top, 1)).to(values[0].dtype)
    return start_sums(p, values, sums)


@gluon.jit
def _turn(
    queries, k, v, keys, values, s, sums, top, tile, zero,
    SLOT: gl.constexpr, SCALE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Adds a tile whose scores are there, and makes those of the next; `zero` is that of `at`."""
    AFTER: gl.constexpr = (SLOT + 1) % STAGES
    BEFORE: gl.constexpr = (SLOT + STAGES - 1) % STAGES
    sums, weights = _start_results(s, top, at(values[SLOT], zero), sums, SCALE)
    # Gluon puts a barrier behind the wait: with it the next tile is there for all, and the one
    # before was used up by all.
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    s = start_scores(queries, at(keys[AFTER], zero))
    _fetch(
        k, v, at(keys[BEFORE], zero), at(values[BEFORE], zero), tile + STAGES - 1, N, D, KEYS
    )  # fmt: skip
    s, y0, y1, _, _ = warpgroup_mma_wait(0, deps=[s, sums[0], sums[1], weights[0], weights[1]])
    return s, (warpgroup_mma_init(y0), warpgroup_mma_init(y1))


@gluon.jit
def _totals(rest):
    """The sums of the weights, which stand in the column of the values' ones."""
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, sums_layout(16, gl.num_warps())))
    return gl.sum(gl.where(gl.expand_dims(column, 0) == 8, rest, 0.0), 1)


@gluon.jit
def _careful(
    queries, k, v, keys, values,
    SCALE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """The results of all tiles for any scores, and each row's largest, which is looked for."""
    wide: gl.constexpr = sums_layout(64, gl.num_warps())
    narrow: gl.constexpr = sums_layout(16, gl.num_warps())
    top = gl.full(
        [QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, sums_layout(KEYS, gl.num_warps()))
    )
    y0 = gl.zeros([QUERIES, 64], gl.float32, wide)
    y1 = gl.zeros([QUERIES, 16], gl.float32, narrow)
    for tile in range(0, (N + KEYS - 1) // KEYS):
        _fetch(k, v, keys, values, tile, N, D, KEYS)
        async_copy.wait_group(0)
        fence_async_shared()
        s = warpgroup_mma_wait(0, deps=[start_scores(queries, keys)])
        if N % KEYS != 0:
            s = masked(s, N - tile * KEYS)
        higher = gl.maximum(top, gl.max(s, 1) * SCALE)
        less = gl.exp2(top - higher)
        top = higher
        y0 = y0 * gl.expand_dims(gl.convert_layout(less, gl.SliceLayout(1, wide)), 1)
        y1 = y1 * gl.expand_dims(gl.convert_layout(less, gl.SliceLayout(1, narrow)), 1)
        sums, weights = _start_results(s, top, values, (y0, y1), SCALE)
        y0, y1, _, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], weights[0], weights[1]])
    return y0, y1, top


@gluon.jit
def attention_forward(
    q, k, v, out, lse,
    SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries, heads, rows of the batch.

    Args:
        q, k, v, out: bfloat16 [B, N, H, C].
        lse: float32 [B, H, N], the logarithm, to the base 2, of a query's sum of exponentials.
        SCALE: of the scores, times log2 e; positive.
        C: 72.
        QUERIES: of a program, 16 for each warp.
        KEYS: of a tile, 64.
        STAGES: tiles in shared memory, at least 3.
    """
    gl.static_assert(C == 72)
    WARPS: gl.constexpr = gl.num_warps()
    D: gl.constexpr = H * C
    TILES: gl.constexpr = (N + KEYS - 1) // KEYS
    WHOLE: gl.constexpr = N % QUERIES == 0
    dtype: gl.constexpr = q.dtype.element_ty
    first = gl.program_id(0) * QUERIES
    start = gl.program_id(2).to(gl.int64) * (N * D) + gl.program_id(1) * C
    q += start
    k += start
    v += start
    out += start
    lse += (gl.program_id(2).to(gl.int64) * H + gl.program_id(1)) * N

    # Memory of its own for each tile: the compiler sees which barriers are needed.
    queries = at(allocate(dtype, QUERIES), 0)
    keys = ()
    values = ()
    for _ in gl.static_range(0, STAGES):
        keys = keys + (allocate(dtype, KEYS),)
        values = values + (allocate(dtype, KEYS),)
    copy_head(queries, q, first, N, D, WHOLE)
    for tile in gl.static_range(0, STAGES - 1):
        _fetch(k, v, at(keys[tile], 0), at(values[tile], 0), tile, N, D, KEYS)
    pad(queries, 0.0, 0)
    for slot in gl.static_range(0, STAGES):
        pad(at(keys[slot], 0), 0.0, 0)
        pad(at(values[slot], 0), 1.0, 1)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    s = warpgroup_mma_wait(0, deps=[start_scores(queries, at(keys[0], 0))])
    if TILES == 1 and N % KEYS != 0:
        s = masked(s, N)
    top = gl.max(s, 1) * SCALE

    y0 = gl.zeros([QUERIES, 64], gl.float32, sums_layout(64, WARPS))
    y1 = gl.zeros([QUERIES, 16], gl.float32, sums_layout(16, WARPS))
    sums = (warpgroup_mma_init(y0), warpgroup_mma_init(y1))
    ROUNDS: gl.constexpr = (TILES - 1) // STAGES
    for turn in range(opaque(ROUNDS)):
        for slot in gl.static_range(0, STAGES):
            s, sums = _turn(
                queries, k, v, keys, values, s, sums, top, turn * STAGES + slot, turn >> 20,
                slot, SCALE, N, D, KEYS, STAGES,
            )  # fmt: skip
    for slot in gl.static_range(0, TILES - 1 - ROUNDS * STAGES):
        s, sums = _turn(
            queries, k, v, keys, values, s, sums, top, ROUNDS * STAGES + slot, 0,
            slot, SCALE, N, D, KEYS, STAGES,
        )  # fmt: skip
    if TILES > 1 and N % KEYS != 0:
        s = masked(s, N - (TILES - 1) * KEYS)
    sums, weights = _start_results(s, top, at(values[(TILES - 1) % STAGES], 0), sums, SCALE)
    y0, y1, _, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], weights[0], weights[1]])

    total = _totals(y1)
    # NaN is not less either.
    if gl.min((total < _LARGEST_SUM).to(gl.int32), 0) == 0:
        y0, y1, top = _careful(
            queries, k, v, at(keys[0], 0), at(values[0], 0), SCALE, N, D, KEYS, QUERIES
        )
        total = _totals(y1)
    rows: gl.constexpr = gl.SliceLayout(1, sums_layout(16, WARPS))
    row = first + gl.arange(0, QUERIES, layout=rows)
    gl.store(lse + row, gl.convert_layout(top, rows) + gl.log2(total), mask=row < N)
    inverse = 1.0 / total
    y1 = (y1 * gl.expand_dims(inverse, 1)).to(dtype)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, sums_layout(64, WARPS)))
    y0 = (y0 * gl.expand_dims(inverse, 1)).to(dtype)
    write_head(out, (y0, y1), first, N, D, WHOLE)
