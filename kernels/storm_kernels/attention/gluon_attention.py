"""The kernel of `gpu.attention`, in Gluon for Hopper's tensor cores.

A program takes QUERIES queries of one head and goes over its keys in tiles, with the scores of a
tile in registers. 72 channels are 64 and a rest of 16, of which 8 are padding: scores are the sum
of two products, results are two products. The padding of the values' first such channel is one, so
the sums of the weights come out beside the results.

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
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from storm_kernels.selective_scan.gluon_lanes import copy_to_shared

_LARGEST_SUM = gl.constexpr(2.0**50)


@gluon.constexpr_function
def _swizzled(channels):
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * channels, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def _sums(columns, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def _weights(columns, warps):
    return gl.DotOperandLayout(0, _sums(columns, warps), 2)


@gluon.constexpr_function
def _rows(lanes, warps):
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _allocate(dtype: gl.constexpr, ROWS: gl.constexpr):
    """Memory for 64 channels and for the rest; see `_turn` for the leading axis."""
    return (
        gl.allocate_shared_memory(dtype, [1, ROWS, 64], _swizzled(64)),
        gl.allocate_shared_memory(dtype, [1, ROWS, 16], _swizzled(16)),
    )


@gluon.jit
def _copy(
    memory, pointer, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr,
    CHANNELS: gl.constexpr,
):  # fmt: skip
    """Starts to copy CHANNELS (64 or 8) channels of rows from `first` on; zeros beyond the last."""
    layout: gl.constexpr = _rows(CHANNELS // 8, gl.num_warps())
    row = first + gl.arange(0, memory.shape[0], layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    place = gl.expand_dims(row, 1) * D + gl.expand_dims(channel, 0)
    if WHOLE:
        copy_to_shared(memory, pointer + place)
    else:
        copy_to_shared(memory, pointer + place, mask=gl.expand_dims(row, 1) < N)


@gluon.jit
def _copy_head(memory, pointer, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr):
    _copy(memory[0], pointer, first, N, D, WHOLE, 64)
    _copy(memory[1].slice(0, 8, 1), pointer + 64, first, N, D, WHOLE, 8)


@gluon.jit
def _at(memory, zero):
    return memory[0].index(zero), memory[1].index(zero)


@gluon.jit
def _fetch(k, v, keys, values, tile, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr):
    """Starts to copy a tile, if there is one; a commit group in any case."""
    if tile * KEYS < N:
        _copy_head(keys, k, tile * KEYS, N, D, N % KEYS == 0)
        _copy_head(values, v, tile * KEYS, N, D, N % KEYS == 0)
    async_copy.commit_group()


@gluon.jit
def _pad(memory, value):
    """Channels 72 to 79: `value` and seven zeros."""
    ROWS: gl.constexpr = memory[1].shape[0]
    layout: gl.constexpr = _rows(1, gl.num_warps())
    channel = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    x = gl.where(channel == 0, value, 0.0).to(memory[1].dtype)
    x = gl.expand_dims(x, 0) + gl.zeros([ROWS, 8], memory[1].dtype, layout)
    memory[1].slice(8, 8, 1).store(x)


@gluon.jit
def _start_scores(queries, keys):
    QUERIES: gl.constexpr = queries[0].shape[0]
    KEYS: gl.constexpr = keys[0].shape[0]
    zero = gl.zeros([QUERIES, KEYS], gl.float32, _sums(KEYS, gl.num_warps()))
    s = warpgroup_mma(queries[0], keys[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(queries[1], keys[1].permute((1, 0)), s, is_async=True)


@gluon.jit
def _masked(s, left):
    """The scores of the first `left` keys of a tile, and minus infinity."""
    KEYS: gl.constexpr = s.shape[1]
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, _sums(KEYS, gl.num_warps())))
    return gl.where(gl.expand_dims(key, 0) < left, s, float("-inf"))


@gluon.jit
def _start_results(s, top, values, sums, SCALE: gl.constexpr):
    """Adds a tile's values. Returns the sums under way, and the weights, to be kept until then."""
    p = gl.exp2(s * SCALE - gl.expand_dims(top, 1)).to(values[0].dtype)
    p0 = gl.convert_layout(p, _weights(64, gl.num_warps()))
    p1 = gl.convert_layout(p, _weights(16, gl.num_warps()))
    y0 = warpgroup_mma(p0, values[0], sums[0], is_async=True)
    y1 = warpgroup_mma(p1, values[1], sums[1], is_async=True)
    return (y0, y1), (p0, p1)


@gluon.jit
def _turn(
    queries, k, v, keys, values, s, sums, top, tile, zero,
    SLOT: gl.constexpr, SCALE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Adds a tile whose scores are there, and makes those of the next.

    Args:
        zero: 0, but not to the compiler: it would keep the descriptors of all buffers in registers,
            which there are not enough of.
    """
    AFTER: gl.constexpr = (SLOT + 1) % STAGES
    BEFORE: gl.constexpr = (SLOT + STAGES - 1) % STAGES
    sums, weights = _start_results(s, top, _at(values[SLOT], zero), sums, SCALE)
    # Gluon puts a barrier behind the wait: with it the next tile is there for all, and the one
    # before was used up by all.
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    s = _start_scores(queries, _at(keys[AFTER], zero))
    _fetch(
        k, v, _at(keys[BEFORE], zero), _at(values[BEFORE], zero), tile + STAGES - 1, N, D, KEYS
    )  # fmt: skip
    s, y0, y1, _, _ = warpgroup_mma_wait(0, deps=[s, sums[0], sums[1], weights[0], weights[1]])
    return s, (warpgroup_mma_init(y0), warpgroup_mma_init(y1))


@gluon.jit
def _totals(rest):
    """The sums of the weights, which stand in the column of the values' ones."""
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, _sums(16, gl.num_warps())))
    return gl.sum(gl.where(gl.expand_dims(column, 0) == 8, rest, 0.0), 1)


@gluon.jit
def _careful(
    queries, k, v, keys, values,
    SCALE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """The results of all tiles for any scores, each row's largest so far being looked for."""
    wide: gl.constexpr = _sums(64, gl.num_warps())
    narrow: gl.constexpr = _sums(16, gl.num_warps())
    top = gl.full(
        [QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, _sums(KEYS, gl.num_warps()))
    )
    y0 = gl.zeros([QUERIES, 64], gl.float32, wide)
    y1 = gl.zeros([QUERIES, 16], gl.float32, narrow)
    for tile in range(0, (N + KEYS - 1) // KEYS):
        _fetch(k, v, keys, values, tile, N, D, KEYS)
        async_copy.wait_group(0)
        fence_async_shared()
        s = warpgroup_mma_wait(0, deps=[_start_scores(queries, keys)])
        if N % KEYS != 0:
            s = _masked(s, N - tile * KEYS)
        higher = gl.maximum(top, gl.max(s, 1) * SCALE)
        less = gl.exp2(top - higher)
        top = higher
        y0 = y0 * gl.expand_dims(gl.convert_layout(less, gl.SliceLayout(1, wide)), 1)
        y1 = y1 * gl.expand_dims(gl.convert_layout(less, gl.SliceLayout(1, narrow)), 1)
        sums, weights = _start_results(s, top, values, (y0, y1), SCALE)
        y0, y1, _, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], weights[0], weights[1]])
    return y0, y1


@gluon.jit
def _write(
    out, y, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr, CHANNELS: gl.constexpr
):
    """The first CHANNELS channels of y."""
    layout: gl.constexpr = _rows(y.shape[1] // 8, gl.num_warps())
    y = gl.convert_layout(y, layout)
    row = first + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))
    there = gl.expand_dims(channel, 0) < CHANNELS
    if not WHOLE:
        there = there & (gl.expand_dims(row, 1) < N)
    gl.store(out + (gl.expand_dims(row, 1) * D + gl.expand_dims(channel, 0)), y, mask=there)


@gluon.jit
def attention_forward(
    q, k, v, out,
    SCALE: gl.constexpr, N: gl.constexpr, H: gl.constexpr, C: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries, heads, rows of the batch.

    Args:
        q, k, v, out: bfloat16 [B, N, H, C].
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

    # Memory of its own for each tile: the compiler sees which barriers are needed.
    queries = _at(_allocate(dtype, QUERIES), 0)
    keys = ()
    values = ()
    for _ in gl.static_range(0, STAGES):
        keys = keys + (_allocate(dtype, KEYS),)
        values = values + (_allocate(dtype, KEYS),)
    _copy_head(queries, q, first, N, D, WHOLE)
    for tile in gl.static_range(0, STAGES - 1):
        _fetch(k, v, _at(keys[tile], 0), _at(values[tile], 0), tile, N, D, KEYS)
    _pad(queries, 0.0)
    for slot in gl.static_range(0, STAGES):
        _pad(_at(keys[slot], 0), 0.0)
        _pad(_at(values[slot], 0), 1.0)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    s = warpgroup_mma_wait(0, deps=[_start_scores(queries, _at(keys[0], 0))])
    if TILES == 1 and N % KEYS != 0:
        s = _masked(s, N)
    top = gl.max(s, 1) * SCALE

    y0 = gl.zeros([QUERIES, 64], gl.float32, _sums(64, WARPS))
    y1 = gl.zeros([QUERIES, 16], gl.float32, _sums(16, WARPS))
    sums = (warpgroup_mma_init(y0), warpgroup_mma_init(y1))
    ROUNDS: gl.constexpr = (TILES - 1) // STAGES
    rounds = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(ROUNDS)], dtype=gl.int32, is_pure=True, pack=1
    )
    for turn in range(rounds):
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
        s = _masked(s, N - (TILES - 1) * KEYS)
    sums, weights = _start_results(s, top, _at(values[(TILES - 1) % STAGES], 0), sums, SCALE)
    y0, y1, _, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], weights[0], weights[1]])

    total = _totals(y1)
    # NaN is not less either.
    if gl.min((total < _LARGEST_SUM).to(gl.int32), 0) == 0:
        y0, y1 = _careful(
            queries, k, v, _at(keys[0], 0), _at(values[0], 0), SCALE, N, D, KEYS, QUERIES
        )
        total = _totals(y1)
    inverse = 1.0 / total
    y1 = (y1 * gl.expand_dims(inverse, 1)).to(dtype)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, _sums(64, WARPS)))
    y0 = (y0 * gl.expand_dims(inverse, 1)).to(dtype)
    _write(out, y0, first, N, D, WHOLE, 64)
    _write(out + 64, y1, first, N, D, WHOLE, 8)
