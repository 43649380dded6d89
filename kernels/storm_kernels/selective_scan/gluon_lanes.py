"""Device functions of the GPU scan, in Gluon: how a warp holds a stretch of a sequence.

A thread holds K consecutive steps of one channel, the threads of a warp are `channels` rows of
`lanes` lanes each, and rows are spread over channels and warps. The threads of one lane are
neighbours, thread lane * channels + row of a warp: they read the same B and C, and shared memory
answers neighbours at once (measured on an H100: a third less of its time).

In Gluon's terms a tile is [rows, lanes, K] with K in the thread's registers (`tile_layout`). A
recurrence over the K steps needs them one by one: `peel` takes a tile apart into K tensors [rows,
lanes] of one register each, which costs no instruction, and `wrap` puts it together again.

Between the lanes of a row the recurrence h = p * h_before + q is an inclusive scan by warp
shuffles (`lane_scan`). Its assembly is written out because Gluon's own scan keeps both operands
for all lanes, twice the instructions, and cannot shift by one lane without shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.gluon_copies import copy_to_shared

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def tile_layout(steps, lanes, channels, warps):
    """[rows, lanes, steps]: `steps` in registers, lanes x channels in a warp, rows over warps."""
    return gl.BlockedLayout([1, 1, steps], [channels, lanes, 1], [warps, 1, 1], [2, 0, 1])


@gluon.constexpr_function
def row_layout(lanes, channels, warps):
    """[rows, lanes]: one register a thread."""
    return gl.BlockedLayout([1, 1], [channels, lanes], [warps, 1], [0, 1])


@gluon.constexpr_function
def in_order(i, count, reverse):
    """The i-th of `count` indices, from the last to the first if `reverse`."""
    return count - 1 - i if reverse else i


@gluon.constexpr_function
def onward(reverse, count=1):
    """The direction in which a recurrence runs over the lanes, `count` times."""
    return " ".join(["down" if reverse else "up"] * count)


@gluon.jit
def _halves(x):
    """The first and the second half of the last axis of [rows, lanes, steps]."""
    rows: gl.constexpr = x.shape[0]
    lanes: gl.constexpr = x.shape[1]
    steps: gl.constexpr = x.shape[2]
    if steps == 2:
        out = gl.split(x)
    else:
        out = gl.split(gl.permute(gl.reshape(x, [rows, lanes, 2, steps // 2]), (0, 1, 3, 2)))
    return out


@gluon.jit
def ordered(steps, K: gl.constexpr, REVERSE: gl.constexpr):
    """The K entries of a tuple, from the last to the first if REVERSE."""
    out = ()
    for i in gl.static_range(0, K):
        out = out + (steps[in_order(i, K, REVERSE)],)
    return out


@gluon.jit
def peel(x, layout: gl.constexpr):
    """[rows, lanes, K] -> K tensors [rows, lanes] in `layout`, in order."""
    steps: gl.constexpr = x.shape[2]
    parts = (x,)
    for level in gl.static_range(0, 5):
        if (steps >> level) > 1:
            finer = ()
            for i in gl.static_range(0, 1 << level):
                first, second = _halves(parts[i])
                finer = finer + (first, second)
            parts = finer
    out = ()
    for i in gl.static_range(0, steps):
        out = out + (gl.convert_layout(parts[i], layout, assert_trivial=True),)
    return out


@gluon.jit
def _zip(first, second):
    """Joins [rows, lanes] or [rows, lanes, steps] into [rows, lanes, 2 steps], alternating."""
    x = gl.join(first, second)
    if len(x.shape) == 4:
        out = gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * 2])
    else:
        out = x
    return out


@gluon.jit
def wrap(steps, count: gl.constexpr, layout: gl.constexpr):
    """The inverse of `peel`: `count` tensors [rows, lanes] -> [rows, lanes, count]."""
    parts = steps
    for level in gl.static_range(0, 5):
        if (count >> level) > 1:
            coarser = ()
            for i in gl.static_range(0, count >> (level + 1)):
                pair = _zip(parts[i], parts[i + (count >> (level + 1))])
                coarser = coarser + (pair,)
            parts = coarser
    return gl.convert_layout(parts[0], layout, assert_trivial=True)


@gluon.jit
def load_tile(
    pointer, row, first, limit, mask_row, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Loads K steps a thread as one tensor [rows, lanes, K].

    Args:
        pointer: to an array whose length axis is contiguous.
        row: int64 [rows, 1, 1], where a row's sequence starts in it.
        first: position of the tile's first step.
        limit: length of the sequence.
        mask_row: bool [rows, 1, 1], the rows that exist.
        WHOLE: all rows and steps of all tiles exist: nothing needs a mask.
    """
    tile: gl.constexpr = tile_layout(K, LANES, CHANNELS, WARPS)
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(2, tile)))
    step = gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, tile)))
    place = gl.expand_dims(gl.expand_dims(lane, 0), 2) * K + first
    place = place + gl.expand_dims(gl.expand_dims(step, 0), 1)
    if WHOLE:
        x = gl.load(pointer + row + place)
    else:
        x = gl.load(pointer + row + place, mask=mask_row & (place < limit), other=0.0)
    return x


@gluon.jit
def steps_of(x, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr):
    """A loaded tile as K float32 tensors [rows, lanes]."""
    if x.dtype == gl.bfloat16:
        # One instruction a value; the compiler's own conversion takes one and a half.
        wide = gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t;"
            " and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = x.to(gl.float32)
    return peel(wide, row_layout(LANES, CHANNELS, WARPS))


@gluon.jit
def store_steps(
    pointer, row, first, limit, mask_row, steps, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Stores K tensors [rows, lanes] where `load_tile` reads them, rounded."""
    tile: gl.constexpr = tile_layout(K, LANES, CHANNELS, WARPS)
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(2, tile)))
    step = gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, tile)))
    place = gl.expand_dims(gl.expand_dims(lane, 0), 2) * K + first
    place = place + gl.expand_dims(gl.expand_dims(step, 0), 1)
    x = wrap(steps, K, tile).to(pointer.dtype.element_ty)
    if WHOLE:
        gl.store(pointer + row + place, x)
    else:
        gl.store(pointer + row + place, x, mask=mask_row & (place < limit))


@gluon.jit
def load_marks(
    marks, row, first, limit,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Which of a thread's steps count and before which the state restarts, as bits of int32.

    Args:
        marks: int8; 0 padding, 1 valid, 3 valid and the state restarts here.
        row: int64 [rows, 1, 1], where a row's marks start.
        first: position of the tile's first step.
        limit: length of the sequence.

    Returns:
        valid, restart: int32 [rows, lanes], bit k for step k.
    """
    mark = steps_of(
        load_tile(marks, row, first, limit, row >= 0, False, K, LANES, CHANNELS, WARPS),
        LANES, CHANNELS, WARPS,
    )  # fmt: skip
    valid = (mark[0] * 0).to(gl.int32)
    restart = valid
    for k in gl.static_range(0, K):
        valid = valid | ((mark[k] > 0.5).to(gl.int32) << k)
        restart = restart | ((mark[k] > 1.5).to(gl.int32) << k)
    return valid, restart


@gluon.jit
def keep(steps, bits, K: gl.constexpr):
    """Zero where a step's bit is not set: replaced, not multiplied, for a NaN may stand there."""
    out = ()
    for k in gl.static_range(0, K):
        out = out + (gl.where((bits & (1 << k)) != 0, steps[k], 0.0),)
    return out


@gluon.jit
def unless(x, bits, k: gl.constexpr, SOME: gl.constexpr):
    """Zero where bit k is set, if SOME are: replaced, not multiplied, for x may be infinite."""
    out = x
    if SOME:
        out = gl.where((bits & (1 << k)) != 0, 0.0, x)
    return out


@gluon.constexpr_function
def coefficient_memory(steps):
    """Shared memory [lanes, steps]: swizzled, for each lane reads its 16 bytes in its own row."""
    return gl.SwizzledSharedLayout(4, max(1, 32 // steps), max(1, steps // 4), [1, 0])


@gluon.constexpr_function
def copy_layout(steps, warps):
    """[lanes, steps]: 16 bytes a thread, contiguous in global memory."""
    parts = steps // 4
    return gl.BlockedLayout([1, 4], [32 // parts, parts], [warps, 1], [1, 0])


@gluon.constexpr_function
def read_layout(steps, lanes, channels, warps):
    """[lanes, steps]: a lane's steps in its registers, the same for all rows."""
    return gl.SliceLayout(0, tile_layout(steps, lanes, channels, warps))


@gluon.jit
def _fetch(
    memory, source, STATES: gl.constexpr, K: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr
):
    """Starts to copy [STATES * LANES, K]."""
    layout: gl.constexpr = copy_layout(K, WARPS)
    row = gl.arange(0, STATES * LANES, layout=gl.SliceLayout(1, layout))
    step = gl.arange(0, K, layout=gl.SliceLayout(0, layout))
    place = gl.expand_dims(row, 1) * K + gl.expand_dims(step, 0)
    copy_to_shared(memory, source + place, cache_modifier=".ca")


@gluon.jit
def fetch_states(
    B_memory, C_memory, B, C, row, batch_of_states, DESCENDING: gl.constexpr,
    TILES: gl.constexpr, NP: gl.constexpr, STATES: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts to copy B and C, or C alone if B is None, of STATES states, as one commit group.

    Args:
        B_memory, C_memory: shared float32 [STATES * LANES, K].
        B, C: float32 [rows, TILES, NP, LANES, K].
        row: int64, which of the rows.
        batch_of_states: its number in the walk over all tiles, NP / STATES in each; past the last
            the group is empty.
        DESCENDING: the walk starts at the last tile.
    """
    BATCHES: gl.constexpr = NP // STATES
    number = batch_of_states
    if DESCENDING:
        number = (TILES - 1 - number // BATCHES) * BATCHES + number % BATCHES
    source = row * (TILES * NP * K * LANES) + number.to(gl.int64) * (STATES * K * LANES)
    if batch_of_states < TILES * BATCHES:
        if B is not None:
            _fetch(B_memory, B + source, STATES, K, LANES, WARPS)
        _fetch(C_memory, C + source, STATES, K, LANES, WARPS)
    async_copy.commit_group()


@gluon.jit
def read_coefficients(
    memory, state, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """One state of what `fetch_states` copied as K float32 tensors [1, lanes]."""
    x = memory.slice(state * LANES, LANES).load(read_layout(K, LANES, CHANNELS, WARPS))
    return peel(gl.expand_dims(x, 0), row_layout(LANES, CHANNELS, WARPS))


@gluon.jit
def exp2(x):
    """2^x by one instruction, 2 ulp; results below 2^-126 are zero."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """1 / x by one instruction, 1 ulp."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def exp_minus_abs(x):
    """e^-|x|."""
    return exp2(gl.abs(x) * (-LOG2E))


@gluon.jit
def softplus(x, e):
    """log(1 + e^x), given e = e^-|x|, as max(x, 0) + log1p(e).

    log1p(e) = e p(e) on [0, 1] with the Chebyshev interpolant of degree 8, 1.2e-7 relative in
    float32. Above x = 20, where mamba_ssm returns x, the two agree to the last bit.
    """
    p = e * 0.005253457929939032 - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return p * e + gl.maximum(x, 0.0)


@gluon.jit
def softplus_slope(x, e):
    """The derivative of softplus, sigmoid(x), given e = e^-|x|."""
    r = reciprocal(1.0 + e)
    return gl.where(x >= 0, r, e * r)


@gluon.jit
def sigmoid(x):
    return reciprocal(1.0 + exp2(x * (-LOG2E)))


@gluon.constexpr_function
def _scan_assembly(lanes, directions, restarts, stride):
    """Independent scans, one a direction, step by step, so that their latencies overlap."""
    directions = directions.split()
    count = len(directions)
    lines = ["{ .reg .pred q; .reg .f32 th, tp;"]
    for i in range(count):
        lines.append(f".reg .f32 p{i}; mov.f32 ${i}, ${count + i}; mov.f32 p{i}, ${2 * count + i};")
    distance = 1
    while distance < lanes:
        for i, direction in enumerate(directions):
            h, p = f"${i}", f"p{i}"
            more = 2 * distance < lanes
            bound = (32 - lanes * stride) << 8 | (31 if direction == "down" else 0)
            end = f"{distance * stride}, {bound}, 0xffffffff;"
            lines.append(f"shfl.sync.{direction}.b32 th|q, {h}, {end}")
            if more:
                lines.append(f"shfl.sync.{direction}.b32 tp, {p}, {end}")
            if restarts:  # zero times an infinite state would be no number
                lines.append(f"setp.neu.and.f32 q, {p}, 0f00000000, q;")
            lines.append(f"@q fma.rn.f32 {h}, {p}, th, {h};")
            if more:
                lines.append(f"@q mul.f32 {p}, {p}, tp;")
        distance *= 2
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _shift_assembly(lanes, direction, stride):
    bound = (32 - lanes * stride) << 8 | (31 if direction == "down" else 0)
    return (
        "{ .reg .pred q; .reg .f32 t;"
        f" shfl.sync.{direction}.b32 t|q, $1, {stride}, {bound}, 0xffffffff;"
        " selp.f32 $0, t, $2, q; }"
    )


@gluon.constexpr_function
def _pick_assembly():
    return "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"


@gluon.constexpr_function
def _sum_assembly(lanes, stride):
    lines = ["{ .reg .f32 t; mov.f32 $0, $1;"]
    distance = lanes // 2
    while distance:
        lines.append(
            f"shfl.sync.bfly.b32 t, $0, {distance * stride}, 31, 0xffffffff; add.f32 $0, $0, t;"
        )
        distance //= 2
    return "\n".join([*lines, "}"])


@gluon.jit
def lane_scan(
    h, p, LANES: gl.constexpr, DIRECTIONS: gl.constexpr, RESTARTS: gl.constexpr,
    STRIDE: gl.constexpr,
):  # fmt: skip
    """Inclusive scans of h = p * h_before + h over the lanes of a row, one or two at a time.

    Args:
        h, p: tuples of one or two float32 [..., lanes].
        DIRECTIONS: "up" (h_before is the lane before) or "down" (the lane after) for each.
        RESTARTS: where p is zero h_before is not looked at, be it infinite.
    """
    if len(h) == 1:
        first = gl.inline_asm_elementwise(
            _scan_assembly(LANES, DIRECTIONS, RESTARTS, STRIDE), "=&f,f,f", [h[0], p[0]],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        out = (first,)
    else:
        first, second = gl.inline_asm_elementwise(
            _scan_assembly(LANES, DIRECTIONS, RESTARTS, STRIDE), "=&f,=&f,f,f,f,f",
            [h[0], h[1], p[0], p[1]],
            dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        out = (first, second)
    return out


@gluon.jit
def lane_shift(x, edge, LANES: gl.constexpr, DIRECTION: gl.constexpr, STRIDE: gl.constexpr):
    """x of the lane before ("up") or after ("down"); `edge` where there is none."""
    return gl.inline_asm_elementwise(
        _shift_assembly(LANES, DIRECTION, STRIDE), "=f,f,f", [x, edge],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def lane_pick(x, thread):
    """x of the warp's thread number `thread` (int32 [rows, lanes])."""
    return gl.inline_asm_elementwise(
        _pick_assembly(), "=f,f,r", [x, thread], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def at_borders(
    entered, start, lane, row_lane, state: gl.constexpr, SPLIT: gl.constexpr, REVERSE: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    """Collects what the SPLIT segments of a tile are entered with; nothing if SPLIT is 0.

    Args:
        entered: float32 [rows, lanes]; lane s * SPLIT + j is segment j's, of state s.
        start: float32 [rows, lanes], what each thread is entered with, of state `state`.
        row_lane: int32 [rows, lanes], the number of a row in its warp.
    """
    out = entered
    if SPLIT:
        border = (lane % SPLIT) * (LANES // SPLIT) + (LANES // SPLIT - 1 if REVERSE else 0)
        out = gl.where(
            lane // SPLIT == state, lane_pick(start, border * CHANNELS + row_lane), entered
        )
    return out


@gluon.jit
def store_borders(
    target, entered, lane, first_state, exists, SPLIT: gl.constexpr, STATES: gl.constexpr,
    N: gl.constexpr, SEGMENT_STRIDE: gl.constexpr,
):  # fmt: skip
    """Stores what `at_borders` collected of STATES states.

    Args:
        target: where the channel's states of the tile's first segment lie.
        first_state: number of the first of them.
    """
    if SPLIT:
        of_these = lane // SPLIT
        n = first_state + of_these
        place = target + (lane % SPLIT) * SEGMENT_STRIDE + n
        gl.store(place, entered, mask=exists & (of_these < STATES) & (n < N))


@gluon.jit
def lane_sum(x, LANES: gl.constexpr, STRIDE: gl.constexpr):
    """The sum over the lanes of a row, in all of them."""
    return gl.inline_asm_elementwise(
        _sum_assembly(LANES, STRIDE), "=&f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
