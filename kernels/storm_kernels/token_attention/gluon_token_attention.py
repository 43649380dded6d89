"""The kernels of `gpu.token_attention`, in Gluon: keys and values of the slots are read once.

The last program of a head, whose stretch is the shortest, writes the new token to its slot and
begins its sums with it, while its slots are on their way. No program reads that slot: nothing has
to wait for the write, and in a ring that is full what the token replaces is left out.

The slots are shared out evenly among the programs of a key-value head, which cannot be known before
the kernel runs: stretches of whole tiles would leave some programs with half as much again. A
program copies its first STAGES tiles to shared memory before it does anything else. Its query heads
fill up to 16 rows of the tensor cores' products; the rest of the rows is zero.

A second kernel adds what the programs have found. The last program of a head could do it, but that
is one multiprocessor for a head's partial results, and its counter would have to be zeroed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from storm_kernels.gluon_copies import copy_to_shared

_ROWS = gl.constexpr(16)  # of a product
_LOWEST = gl.constexpr(-3.0e38)  # in place of minus infinity, whose differences are no numbers
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def _sums_layout(warps):
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def _operand_layout(number, warps):
    return gl.DotOperandLayout(number, _sums_layout(warps), 2)


@gluon.constexpr_function
def _copy_layout(channels, warps):
    lanes = channels // 8  # of 16 bytes
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _fetch(memory, slots, first, end, hole, D: gl.constexpr):
    """Starts to copy a tile's slots before `end`, if there are any; a commit group in any case.

    What is masked is zero.
    """
    if first < end:
        TILE: gl.constexpr = memory.shape[0]
        C: gl.constexpr = memory.shape[1]
        layout: gl.constexpr = _copy_layout(C, gl.num_warps())
        slot = gl.expand_dims(first + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout)), 1)
        channel = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(0, layout)), 0)
        copy_to_shared(memory, slots + (slot * D + channel), mask=(slot < end) & (slot != hole))
    async_copy.commit_group()


@gluon.jit
def _turned(x, half, there, cos, sin, HALF: gl.constexpr):
    """Both halves of rows turned as `storm_jax.models.layers.rotate` does, rounded to their dtype.

    Args:
        x: pointers to the rows, or to one.
        half: channels of a half.
        there: mask.
        cos, sin: float32 [C / 2].
    """
    cosine = gl.load(cos + half)
    sine = gl.load(sin + half)
    a = gl.load(x + half, mask=there, other=0.0)
    b = gl.load(x + (half + HALF), mask=there, other=0.0)
    dtype: gl.constexpr = a.dtype
    a = a.to(gl.float32)
    b = b.to(gl.float32)
    return (a * cosine - b * sine).to(dtype), (b * cosine + a * sine).to(dtype)


@gluon.jit
def _capped(s, SCALE: gl.constexpr, SOFTCAP: gl.constexpr):
    """Scores times log2 e, of products."""
    if SOFTCAP == 0.0:
        s *= SCALE * _LOG2_E
    else:
        tanh = 1.0 - 2.0 / (1.0 + gl.exp2(s * (2.0 * SCALE / SOFTCAP * _LOG2_E)))
        s = tanh * (SOFTCAP * _LOG2_E)
    return s


@gluon.jit
def _scores(queries, keys, left, hole, SCALE: gl.constexpr, SOFTCAP: gl.constexpr):
    """Scores times log2 e; minus infinity for a slot and behind the first `left` ones."""
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = keys.shape[0]
    zero = gl.zeros([_ROWS, TILE], gl.float32, _sums_layout(WARPS))
    s = mma_v2(queries, keys.permute((1, 0)).load(_operand_layout(1, WARPS)), zero)
    s = _capped(s, SCALE, SOFTCAP)
    slot = gl.arange(0, TILE, layout=gl.SliceLayout(0, _sums_layout(WARPS)))
    there = gl.expand_dims((slot < left) & (slot != hole), 0)
    return gl.where(there, s, float("-inf"))


@gluon.jit
def token_attention_parts(
    qkv, cos, sin, position, held, k, v, sums, tops, totals,
    SCALE: gl.constexpr, SOFTCAP: gl.constexpr, T: gl.constexpr, K: gl.constexpr, G: gl.constexpr,
    C: gl.constexpr, SPLITS: gl.constexpr, STEP: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: key-value heads, stretches of slots.

    Args:
        qkv: [1, K, G + 2, C], bfloat16 or float16: queries, the key and the value of the new token,
            queries and key before they are turned.
        cos, sin: float32 [1, C / 2], of the new token's angles.
        position: int32 [1], of the new token; its slot is position mod T.
        held: int32 [1], earlier tokens to attend to: of the first min(held, T) slots all but that
            of the new token are read.
        k, v: [1, T, K, C] in the same dtype. The new token is written to its slot.
        sums: float32 [K, G, SPLITS, C], of the values times 2^(score - top); programs that have
            nothing to attend to do not write them.
        tops: float32 [K, G, SPLITS], the largest of the stretch's scores times log2 e.
        totals: float32 [K, G, SPLITS], the sums of 2^(score - top).
        SCALE: of the scores.
        SOFTCAP: of the scores, or 0.
        SPLITS: stretches.
        STEP: a stretch has a multiple of so many slots.
        TILE: slots that a program takes at a time.
        STAGES: tiles in shared memory.
    """
    WARPS: gl.constexpr = gl.num_warps()
    D: gl.constexpr = K * C
    HALF: gl.constexpr = C // 2
    dtype: gl.constexpr = k.dtype.element_ty
    layout: gl.constexpr = _sums_layout(WARPS)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    queries_layout: gl.constexpr = _operand_layout(0, WARPS)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    head = gl.program_id(0)
    split = gl.program_id(1)
    new = gl.load(position) % T
    count = gl.minimum(gl.load(held), T)
    stretch = ((count + SPLITS - 1) // SPLITS + STEP - 1) // STEP * STEP
    first = split * stretch
    end = gl.minimum(first + stretch, count)
    is_last = split == SPLITS - 1
    qkv += head * ((G + 2) * C)
    k += head * C
    v += head * C

    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, C], swizzled)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, C], swizzled)
    for stage in gl.static_range(0, STAGES):
        _fetch(keys.index(stage), k, first + stage * TILE, end, new, D)
        _fetch(values.index(stage), v, first + stage * TILE, end, new, D)
    row = gl.expand_dims(gl.arange(0, _ROWS, layout=gl.SliceLayout(1, queries_layout)), 1)
    half = gl.expand_dims(gl.arange(0, HALF, layout=gl.SliceLayout(0, queries_layout)), 0)
    q0, q1 = _turned(qkv + row * C, half, row < G, cos, sin, HALF)
    # A thread has the same channels of both halves: nothing moves.
    queries = gl.join(q0, q1).permute((0, 2, 1)).reshape((_ROWS, C))
    queries = gl.convert_layout(queries, queries_layout, assert_trivial=True)

    y = gl.zeros([_ROWS, C], gl.float32, layout)
    weights = gl.zeros([_ROWS, TILE], gl.float32, layout)  # a thread's own sums
    top = gl.full([_ROWS], _LOWEST, gl.float32, rows)
    if is_last:
        # The key fills all columns of its operand, so that a row's products are all its score.
        key_layout: gl.constexpr = _operand_layout(1, WARPS)
        deep = gl.expand_dims(gl.arange(0, HALF, layout=gl.SliceLayout(1, key_layout)), 1)
        deep += gl.zeros([HALF, TILE], gl.int32, key_layout)
        is_first = gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, key_layout)), 0) == 0
        k0, k1 = _turned(qkv + G * C, deep, deep < HALF, cos, sin, HALF)
        channel = gl.arange(0, C, layout=gl.SliceLayout(0, layout))
        value = gl.load(qkv + ((G + 1) * C + channel))
        gl.store(k + (new * D + deep), k0, mask=is_first)
        gl.store(k + (new * D + HALF + deep), k1, mask=is_first)
        gl.store(v + (new * D + channel), value)
        s = mma_v2(q0, k0, gl.zeros([_ROWS, TILE], gl.float32, layout))
        s = mma_v2(q1, k1, s)
        top = gl.max(_capped(s, SCALE, SOFTCAP), 1)
        y += gl.expand_dims(value.to(gl.float32), 0)
        slot = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
        weights += gl.expand_dims(gl.where(slot == 0, 1.0, 0.0), 0)
    stage = 0
    for tile in range(first, end, TILE):
        # Of the groups since that of these keys, one for each tile's keys and one for its values.
        async_copy.wait_group(2 * STAGES - 1)
        s = _scores(queries, keys.index(stage), end - tile, new - tile, SCALE, SOFTCAP)
        higher = gl.maximum(top, gl.max(s, 1))
        # Behind the barriers of the maximum these keys are used up.
        _fetch(keys.index(stage), k, tile + STAGES * TILE, end, new, D)
        less = gl.expand_dims(gl.exp2(top - higher), 1)
        p = gl.exp2(s - gl.expand_dims(higher, 1))
        top = higher
        weights = weights * less + p
        p = gl.convert_layout(p.to(dtype), queries_layout)
        async_copy.wait_group(2 * STAGES - 1)
        y = mma_v2(p, values.index(stage).load(_operand_layout(1, WARPS)), y * less)
        _fetch(values.index(stage), v, tile + STAGES * TILE, end, new, D)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)

    row = gl.arange(0, _ROWS, layout=rows)
    place = (head * G + row) * SPLITS + split
    gl.store(tops + place, top, mask=row < G)
    gl.store(totals + place, gl.sum(weights, 1), mask=row < G)
    channel = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(0, layout)), 0)
    there = gl.expand_dims((row < G) & ((first < end) | is_last), 1)
    gl.store(sums + (gl.expand_dims(place, 1) * C + channel), y, mask=there)


@gluon.jit
def token_attention_whole(
    sums, tops, totals, out,
    SPLITS: gl.constexpr, C: gl.constexpr, CHANNELS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Grid: heads, parts of CHANNELS channels.

    Args:
        sums, tops, totals: of `token_attention_parts`.
        out: [1, K, G, C].
        TILE: stretches that the threads read together.
    """
    LANES: gl.constexpr = CHANNELS // 4
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    head = gl.program_id(0)
    split = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    channel += gl.program_id(1) * CHANNELS
    sums += head * SPLITS * C
    # All is on its way before any of it is waited for.
    found = ()
    for tile in gl.static_range(0, (SPLITS + TILE - 1) // TILE):
        at = tile * TILE + split
        there = at < SPLITS
        at += head * SPLITS
        top = gl.load(tops + at, mask=there, other=_LOWEST)
        total = gl.load(totals + at, mask=there, other=0.0)
        place = gl.expand_dims((tile * TILE + split) * C, 1) + gl.expand_dims(channel, 0)
        y = gl.load(sums + place, mask=gl.expand_dims(there, 1), other=0.0)
        found = found + ((top, total, y),)
    top = found[0][0]
    for tile in gl.static_range(1, len(found)):
        top = gl.maximum(top, found[tile][0])
    top = gl.max(top, 0)
    total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, layout))
    y = gl.zeros([TILE, CHANNELS], gl.float32, layout)
    for tile in gl.static_range(0, len(found)):
        weight = gl.exp2(found[tile][0] - top)
        total += weight * found[tile][1]
        # Without slots nothing was written.
        nothing = gl.expand_dims(found[tile][1] == 0.0, 1)
        y += gl.where(nothing, 0.0, found[tile][2] * gl.expand_dims(weight, 1))
    y = gl.sum(y, 0) / gl.sum(total, 0)
    gl.store(out + (head * C + channel), y.to(out.dtype.element_ty))
