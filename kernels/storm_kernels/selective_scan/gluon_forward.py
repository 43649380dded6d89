"""The GPU scan forward, in Gluon: one warp takes a few channels through a stretch of the sequence.

A warp goes through tiles of T = K * LANES steps; K steps are a thread's, LANES threads one
channel's. For every state n a thread

1. computes the K decays a = 2^(dt A log2 e) and inflows x B, and runs its own steps from zero,
2. learns the state at its first step by a scan over the lanes of its channel, in which the decay
   over a thread's steps is one exponential of their summed dt,
3. runs its steps again from there, two fused multiply-adds each, and adds C h to y.

So there is one exponential and about eight instructions for a state element and nothing of size
[length, channels, state] anywhere. The states between the tiles live in one register a thread: lane
i of a channel keeps state i. B and C come through two buffers in shared memory, one filled while
the other is worked on: read directly, each would wait for L2 (measured: 2.3 times slower).

In reverse everything stays in the order of memory: the tiles, a thread's steps and the lanes are
walked from the last to the first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.selective_scan.gluon_lanes import (
    at_borders,
    coefficient_memory,
    exp2,
    exp_minus_abs,
    fetch_states,
    in_order,
    keep,
    lane_pick,
    lane_scan,
    lane_shift,
    load_marks,
    load_tile,
    onward,
    ordered,
    read_coefficients,
    row_layout,
    sigmoid,
    softplus,
    steps_of,
    store_borders,
    store_steps,
    tile_layout,
    unless,
)
from storm_kernels.selective_scan.gluon_units import (
    await_turn,
    entering_state,
    finish_unit,
    take_unit,
)


@gluon.jit
def _states(
    ys, carry, dts, xs, total, restart, a_row, B_memory, C_memory, first_state, lane, row_lane,
    saved, exists, block,
    RESTARTS: gl.constexpr, REVERSE: gl.constexpr, SPLIT: gl.constexpr, STATES: gl.constexpr,
    TOGETHER: gl.constexpr, N: gl.constexpr, SEGMENT_STRIDE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Runs STATES states of a tile: adds C h to ys, moves the carry to the tile's end.

    If SPLIT is not 0, the states with which the SPLIT segments of the tile are entered are saved.
    """
    FIRST: gl.constexpr = LANES - 1 if REVERSE else 0
    HELD: gl.constexpr = LANES // SPLIT if SPLIT else STATES  # states whose borders fit a warp
    entered = lane.to(gl.float32) * 0
    for turn in gl.static_range(0, STATES // TOGETHER):
        a = ()
        h_in = ()
        B_n = ()
        C_n = ()
        h = ()
        total_decays = ()
        for i in gl.static_range(0, TOGETHER):
            n = first_state + turn * TOGETHER + i
            a = a + (lane_pick(a_row, row_lane + n * CHANNELS),)
            h_in = h_in + (lane_pick(carry, row_lane + n * CHANNELS),)
            B_n = B_n + (
                read_coefficients(B_memory, turn * TOGETHER + i, K, LANES, CHANNELS, WARPS),
            )
            C_n = C_n + (
                read_coefficients(C_memory, turn * TOGETHER + i, K, LANES, CHANNELS, WARPS),
            )
            h = h + (gl.where(lane == FIRST, h_in[i], 0.0),)
            total_decay = exp2(total * a[i])
            if RESTARTS:
                total_decay = gl.where(restart != 0, 0.0, total_decay)
            total_decays = total_decays + (total_decay,)
        decays = ()
        inflows = ()
        for step in gl.static_range(0, K):
            later = ()
            for i in gl.static_range(0, TOGETHER):
                decay = exp2(dts[in_order(step, K, REVERSE)] * a[i])
                inflow = xs[in_order(step, K, REVERSE)] * B_n[i][in_order(step, K, REVERSE)]
                before = unless(h[i], restart, in_order(step, K, REVERSE), RESTARTS)
                later = later + (decay * before + inflow,)
                decays = decays + (decay,)
                inflows = inflows + (inflow,)
            h = later
        h = lane_scan(h, total_decays, LANES, onward(REVERSE, TOGETHER), RESTARTS, CHANNELS)
        starts = ()
        for i in gl.static_range(0, TOGETHER):
            n = first_state + turn * TOGETHER + i
            end = lane_pick(h[i], row_lane + (LANES - 1 - FIRST) * CHANNELS)
            carry = gl.where(lane == n, end, carry)
            start = lane_shift(h[i], h_in[i], LANES, onward(REVERSE), CHANNELS)
            entered = at_borders(
                entered, start, lane, row_lane, (turn * TOGETHER + i) % HELD,
                SPLIT, REVERSE, LANES, CHANNELS,
            )  # fmt: skip
            starts = starts + (start,)
        if (turn + 1) * TOGETHER % HELD == 0 or (turn + 1) * TOGETHER == STATES:
            store_borders(
                saved, entered, lane, block + first_state + turn * TOGETHER // HELD * HELD, exists,
                SPLIT, min(HELD, STATES), N, SEGMENT_STRIDE,
            )  # fmt: skip
        h = starts
        summed = ()
        for step in gl.static_range(0, K):
            y = ys[in_order(step, K, REVERSE)]
            later = ()
            for i in gl.static_range(0, TOGETHER):
                before = unless(h[i], restart, in_order(step, K, REVERSE), RESTARTS)
                state = decays[step * TOGETHER + i] * before + inflows[step * TOGETHER + i]
                y = state * C_n[i][in_order(step, K, REVERSE)] + y
                later = later + (state,)
            h = later
            summed = summed + (y,)
        ys = ordered(summed, K, REVERSE)
    return ys, carry


@gluon.jit
def _all_states(
    ys, carry, dts, xs, total, restart, a_row, B_here, C_here, B_there, C_there, B, C, BC_row,
    fetched, lane, row_lane, saved, exists, block, states,
    RESTARTS: gl.constexpr, REVERSE: gl.constexpr, SPLIT: gl.constexpr, TILES: gl.constexpr,
    N: gl.constexpr, NP: gl.constexpr, SEGMENT_STRIDE: gl.constexpr, STATES: gl.constexpr,
    TOGETHER: gl.constexpr, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Runs `states` states, STATES at a time from two buffers in turn; `fetched` counts these."""
    for pair in range(0, states // (2 * STATES)):
        first_state = pair * (2 * STATES)
        async_copy.wait_group(0)
        fetch_states(
            B_there, C_there, B, C, BC_row, fetched + 1, REVERSE, TILES, NP, STATES, K, LANES, WARPS
        )
        ys, carry = _states(
            ys, carry, dts, xs, total, restart, a_row, B_here, C_here, first_state, lane, row_lane,
            saved, exists, block, RESTARTS, REVERSE, SPLIT, STATES, TOGETHER, N, SEGMENT_STRIDE,
            K, LANES, CHANNELS, WARPS,
        )  # fmt: skip
        async_copy.wait_group(0)
        fetch_states(
            B_here, C_here, B, C, BC_row, fetched + 2, REVERSE, TILES, NP, STATES, K, LANES, WARPS
        )
        ys, carry = _states(
            ys, carry, dts, xs, total, restart, a_row, B_there, C_there, first_state + STATES,
            lane, row_lane,
            saved, exists, block, RESTARTS, REVERSE, SPLIT, STATES, TOGETHER, N, SEGMENT_STRIDE,
            K, LANES, CHANNELS, WARPS,
        )  # fmt: skip
        fetched = fetched + 2
    return ys, carry, fetched


@gluon.jit
def scan_forward(
    u, delta, A2, B, C, D, bias, z, state_in, marks, tile_marks, y, state_out, saved,
    progress,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, PER_GROUP: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_MARKS: gl.constexpr, REVERSE: gl.constexpr, SEGMENT: gl.constexpr, STATES: gl.constexpr,
    TOGETHER: gl.constexpr,
    BATCH: gl.constexpr, UNIT: gl.constexpr, SEGMENTS: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: CHANNELS * WARPS channels of one group and batch row, UNIT tiles.

    Args:
        u, delta, z, y: [batch, E, L], any floating type.
        A2: float32 [E, N], A * log2 e.
        B, C: float32 [batch * groups, tiles, NP, T], zero past L and N.
        D, bias: float32 [E].
        state_in, state_out: float32 [batch, E, N].
        marks: int8 [batch, L]: 0 padding, 1 valid, 3 valid and the state restarts here.
        tile_marks: int32 [batch, tiles], 0 where all marks of a tile are 1.
        saved: float32 [batch, SEGMENTS, E, N], the state with which the scan enters
            every SEGMENT steps; nothing is saved if SEGMENT is 0.
        progress: see `gluon_units`; not touched if UNIT is the whole sequence.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    BLOCKS: gl.constexpr = (N + LANES - 1) // LANES  # of LANES states
    UNITS: gl.constexpr = (TILES + UNIT - 1) // UNIT
    GROUPS: gl.constexpr = E // PER_GROUP
    PROGRAMS: gl.constexpr = (PER_GROUP + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)  # a group
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % (CHANNELS * WARPS) == 0
    SPLIT: gl.constexpr = T // SEGMENT if SEGMENT else 0
    rows: gl.constexpr = gl.SliceLayout(
        1, gl.SliceLayout(2, tile_layout(K, LANES, CHANNELS, WARPS))
    )
    flat: gl.constexpr = row_layout(LANES, CHANNELS, WARPS)

    work, unit = take_unit(progress, BATCH * GROUPS * PROGRAMS, UNITS)
    batch = (work // (GROUPS * PROGRAMS)).to(gl.int64)
    program = work % (GROUPS * PROGRAMS)
    group = program // PROGRAMS
    first_channel = group * PER_GROUP + (program % PROGRAMS) * (CHANNELS * WARPS)
    end_channel = (group + 1) * PER_GROUP
    channel3 = first_channel + gl.arange(0, CHANNELS * WARPS, layout=rows)
    row = gl.expand_dims(gl.expand_dims((batch * E + channel3) * L, 1), 2)
    exists3 = gl.expand_dims(gl.expand_dims(channel3 < end_channel, 1), 2)
    mark_row = gl.expand_dims(gl.expand_dims(batch * L + channel3 * 0, 1), 2)
    BC_row = batch * GROUPS + group
    B_here = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    C_here = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    B_there = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    C_there = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    first_tile = unit * UNIT
    end_tile = gl.minimum(first_tile + UNIT, TILES)
    fetched = first_tile * (NP // STATES)
    fetch_states(B_here, C_here, B, C, BC_row, fetched, REVERSE, TILES, NP, STATES, K, LANES, WARPS)

    lane = gl.expand_dims(gl.arange(0, LANES, layout=gl.SliceLayout(0, flat)), 0)
    channel = first_channel + gl.arange(0, CHANNELS * WARPS, layout=gl.SliceLayout(1, flat))
    channel = gl.expand_dims(channel, 1)
    lane = lane + channel * 0
    row_lane = (channel - first_channel + lane * 0) % CHANNELS
    exists = channel < end_channel
    zero = lane.to(gl.float32) * 0
    bias_c = zero
    if HAS_BIAS:
        bias_c = gl.load(bias + channel + lane * 0, mask=exists, other=0.0)
    D_c = zero
    if HAS_D:
        D_c = gl.load(D + channel + lane * 0, mask=exists, other=0.0)
    # The next tile's operands are under way while this one's states are worked on.
    first = ((TILES - 1 - first_tile) if REVERSE else first_tile) * T
    delta_tile = load_tile(delta, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    u_tile = load_tile(u, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)

    await_turn(progress, work, unit, UNITS)
    a_rows = ()
    carries = ()
    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        there = exists & (n < N)
        a_rows = a_rows + (gl.load(A2 + channel * N + n, mask=there, other=0.0),)
        state_place = (batch * E + channel) * N + n
        state = entering_state(state_in, state_out, state_place, there, unit, UNITS)
        carries = carries + (state,)

    for i in range(first_tile, end_tile):
        tile = i
        if REVERSE:
            tile = TILES - 1 - i
        first = tile * T
        dts = steps_of(delta_tile, LANES, CHANNELS, WARPS)
        us = steps_of(u_tile, LANES, CHANNELS, WARPS)
        finished = ()
        for k in gl.static_range(0, K):
            dt = dts[k] + bias_c
            if SOFTPLUS:
                dt = softplus(dt, exp_minus_abs(dt))
            if L % T:
                dt = gl.where(first + lane * K + k < L, dt, 0.0)
            finished = finished + (dt,)
        dts = finished
        marked = 0
        valid = lane * 0
        restart = lane * 0
        if HAS_MARKS:
            marked = gl.load(tile_marks + batch * TILES + tile)
            if marked != 0:
                valid, restart = load_marks(marks, mark_row, first, L, K, LANES, CHANNELS, WARPS)
                dts = keep(dts, valid, K)
                us = keep(us, valid, K)
        total = zero
        xs = ()
        ys = ()
        for k in gl.static_range(0, K):
            total = total + dts[k]
            xs = xs + (dts[k] * us[k],)
            if HAS_D:
                ys = ys + (us[k] * D_c,)
            else:
                ys = ys + (zero,)

        if REVERSE:
            following = gl.maximum(first - T, 0)
        else:
            following = gl.minimum(first + T, (TILES - 1) * T)
        delta_tile = load_tile(delta, row, following, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
        u_tile = load_tile(u, row, following, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            z_tile = load_tile(z, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)

        segment_row = ((batch * SEGMENTS + tile * SPLIT) * E + channel) * N
        new_carries = ()
        for block in gl.static_range(0, BLOCKS):
            carry = carries[block]
            if HAS_MARKS:
                if marked != 0:
                    ys, carry, fetched = _all_states(
                        ys, carry, dts, xs, total, restart, a_rows[block], B_here, C_here,
                        B_there, C_there, B, C, BC_row, fetched, lane, row_lane,
                        saved + segment_row, exists, block * LANES,
                        min(NP - block * LANES, LANES), True, REVERSE, SPLIT, TILES, N, NP, E * N,
                        STATES, 1, K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
                else:
                    ys, carry, fetched = _all_states(
                        ys, carry, dts, xs, total, restart, a_rows[block], B_here, C_here,
                        B_there, C_there, B, C, BC_row, fetched, lane, row_lane,
                        saved + segment_row, exists, block * LANES,
                        min(NP - block * LANES, LANES), False, REVERSE, SPLIT, TILES, N, NP, E * N,
                        STATES, TOGETHER, K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
            else:
                ys, carry, fetched = _all_states(
                    ys, carry, dts, xs, total, restart, a_rows[block], B_here, C_here,
                    B_there, C_there, B, C, BC_row, fetched, lane, row_lane, saved + segment_row,
                    exists, block * LANES,
                    min(NP - block * LANES, LANES), False, REVERSE, SPLIT, TILES, N, NP, E * N,
                    STATES, TOGETHER, K, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            new_carries = new_carries + (carry,)
        carries = new_carries

        if HAS_Z:
            zs = steps_of(z_tile, LANES, CHANNELS, WARPS)
            gated = ()
            for k in gl.static_range(0, K):
                gated = gated + (ys[k] * (zs[k] * sigmoid(zs[k])),)
            ys = gated
        if HAS_MARKS:
            if marked != 0:
                ys = keep(ys, valid, K)
        store_steps(y, row, first, L, exists3, ys, WHOLE, K, LANES, CHANNELS, WARPS)

    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        place = (batch * E + channel) * N + n
        gl.store(state_out + place, carries[block], mask=exists & (n < N))
    finish_unit(progress, work, UNITS)
