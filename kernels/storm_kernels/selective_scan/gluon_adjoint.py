"""First kernel of the GPU scan's backward, in Gluon: the adjoint state at the borders of segments.

The gradient q with respect to the state runs against the scan: g = C dy + q of the later step,
q = a g. This kernel walks through it as `gluon_forward` walks through the states, without second
pass and without output at the steps, and keeps q where segments meet. With it and the states that
the forward saved there, all segments of the second kernel (`gluon_backward`) are independent.
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
    read_coefficients,
    row_layout,
    sigmoid,
    softplus,
    steps_of,
    store_borders,
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
    carry, dts, dys, total, restart, a_row, C_memory, first_state, lane, row_lane, edges, exists,
    block, RESTARTS: gl.constexpr, REVERSE: gl.constexpr, SPLIT: gl.constexpr, STATES: gl.constexpr,
    TOGETHER: gl.constexpr, N: gl.constexpr, SEGMENT_STRIDE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Runs STATES adjoint states of a tile; REVERSE is the adjoint's direction."""
    FIRST: gl.constexpr = LANES - 1 if REVERSE else 0
    HELD: gl.constexpr = LANES // SPLIT if SPLIT else STATES  # states whose borders fit a warp
    entered = lane.to(gl.float32) * 0
    for turn in gl.static_range(0, STATES // TOGETHER):
        a = ()
        q_in = ()
        q = ()
        C_n = ()
        total_decays = ()
        for i in gl.static_range(0, TOGETHER):
            n = first_state + turn * TOGETHER + i
            a = a + (lane_pick(a_row, row_lane + n * CHANNELS),)
            q_in = q_in + (lane_pick(carry, row_lane + n * CHANNELS),)
            C_n = C_n + (
                read_coefficients(C_memory, turn * TOGETHER + i, K, LANES, CHANNELS, WARPS),
            )
            q = q + (gl.where(lane == FIRST, q_in[i], 0.0),)
            total_decay = exp2(total * a[i])
            if RESTARTS:
                total_decay = gl.where(restart != 0, 0.0, total_decay)
            total_decays = total_decays + (total_decay,)
        for step in gl.static_range(0, K):
            later = ()
            for i in gl.static_range(0, TOGETHER):
                decay = exp2(dts[in_order(step, K, REVERSE)] * a[i])
                g = C_n[i][in_order(step, K, REVERSE)] * dys[in_order(step, K, REVERSE)] + q[i]
                before = unless(decay * g, restart, in_order(step, K, REVERSE), RESTARTS)
                later = later + (before,)
            q = later
        q = lane_scan(q, total_decays, LANES, onward(REVERSE, TOGETHER), RESTARTS, CHANNELS)
        for i in gl.static_range(0, TOGETHER):
            n = first_state + turn * TOGETHER + i
            end = lane_pick(q[i], row_lane + (LANES - 1 - FIRST) * CHANNELS)
            carry = gl.where(lane == n, end, carry)
            start = lane_shift(q[i], q_in[i], LANES, onward(REVERSE), CHANNELS)
            entered = at_borders(
                entered, start, lane, row_lane, (turn * TOGETHER + i) % HELD,
                SPLIT, REVERSE, LANES, CHANNELS,
            )  # fmt: skip
        if (turn + 1) * TOGETHER % HELD == 0 or (turn + 1) * TOGETHER == STATES:
            store_borders(
                edges, entered, lane, block + first_state + turn * TOGETHER // HELD * HELD, exists,
                SPLIT, min(HELD, STATES), N, SEGMENT_STRIDE,
            )  # fmt: skip
    return carry


@gluon.jit
def _all_states(
    carry, dts, dys, total, restart, a_row, C_here, C_there, C, BC_row, fetched, lane, row_lane,
    edges, exists, block, states,
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
            None, C_there, None, C, BC_row, fetched + 1, REVERSE, TILES, NP, STATES, K, LANES, WARPS
        )
        carry = _states(
            carry, dts, dys, total, restart, a_row, C_here, first_state, lane, row_lane, edges,
            exists, block,
            RESTARTS, REVERSE, SPLIT, STATES, TOGETHER, N, SEGMENT_STRIDE, K, LANES, CHANNELS,
            WARPS,
        )  # fmt: skip
        async_copy.wait_group(0)
        fetch_states(
            None, C_here, None, C, BC_row, fetched + 2, REVERSE, TILES, NP, STATES, K, LANES, WARPS
        )
        carry = _states(
            carry, dts, dys, total, restart, a_row, C_there, first_state + STATES, lane, row_lane,
            edges, exists, block,
            RESTARTS, REVERSE, SPLIT, STATES, TOGETHER, N, SEGMENT_STRIDE, K, LANES, CHANNELS,
            WARPS,
        )  # fmt: skip
        fetched = fetched + 2
    return carry, fetched


@gluon.jit
def scan_adjoint(
    delta, A2, C, bias, z, dy, dstate_out, marks, tile_marks, dstate_in, edges,
    progress,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, PER_GROUP: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_Z: gl.constexpr, HAS_MARKS: gl.constexpr,
    REVERSE: gl.constexpr, SEGMENT: gl.constexpr, STATES: gl.constexpr, TOGETHER: gl.constexpr,
    BATCH: gl.constexpr, UNIT: gl.constexpr, SEGMENTS: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: CHANNELS * WARPS channels of one group and batch row, UNIT tiles.

    Args:
        delta, A2, C, bias, z, marks, tile_marks: as in `scan_forward`.
        dy: [batch, E, L], the gradient of y.
        dstate_out, dstate_in: float32 [batch, E, N], the gradients of the final state (read) and
            of the initial state (written).
        edges: float32 [batch, SEGMENTS, E, N], the gradient with respect to the state
            with which the scan leaves every SEGMENT steps.
        progress: as in `scan_forward`.
        REVERSE: the direction of the adjoint, which is not the scan's.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    BLOCKS: gl.constexpr = (N + LANES - 1) // LANES  # of LANES states
    UNITS: gl.constexpr = (TILES + UNIT - 1) // UNIT
    GROUPS: gl.constexpr = E // PER_GROUP
    PROGRAMS: gl.constexpr = (PER_GROUP + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)  # a group
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % (CHANNELS * WARPS) == 0
    SPLIT: gl.constexpr = T // SEGMENT
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
    C_here = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    C_there = gl.allocate_shared_memory(gl.float32, [STATES * LANES, K], coefficient_memory(K))
    first_tile = unit * UNIT
    end_tile = gl.minimum(first_tile + UNIT, TILES)
    fetched = first_tile * (NP // STATES)
    fetch_states(
        None, C_here, None, C, BC_row, fetched, REVERSE, TILES, NP, STATES, K, LANES, WARPS
    )

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
    # The next tile's operands are under way while this one's states are worked on.
    first = ((TILES - 1 - first_tile) if REVERSE else first_tile) * T
    delta_tile = load_tile(delta, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    dy_tile = load_tile(dy, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    if HAS_Z:
        z_tile = load_tile(z, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)

    await_turn(progress, work, unit, UNITS)
    a_rows = ()
    carries = ()
    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        there = exists & (n < N)
        a_rows = a_rows + (gl.load(A2 + channel * N + n, mask=there, other=0.0),)
        state_place = (batch * E + channel) * N + n
        state = entering_state(dstate_out, dstate_in, state_place, there, unit, UNITS)
        carries = carries + (state,)

    for i in range(first_tile, end_tile):
        tile = i
        if REVERSE:
            tile = TILES - 1 - i
        first = tile * T
        dts = steps_of(delta_tile, LANES, CHANNELS, WARPS)
        dys = steps_of(dy_tile, LANES, CHANNELS, WARPS)
        finished = ()
        gated = ()
        if HAS_Z:
            zs = steps_of(z_tile, LANES, CHANNELS, WARPS)
        for k in gl.static_range(0, K):
            dt = dts[k] + bias_c
            if SOFTPLUS:
                dt = softplus(dt, exp_minus_abs(dt))
            if L % T:
                dt = gl.where(first + lane * K + k < L, dt, 0.0)
            finished = finished + (dt,)
            if HAS_Z:
                gated = gated + (dys[k] * (zs[k] * sigmoid(zs[k])),)
            else:
                gated = gated + (dys[k],)
        dts = finished
        dys = gated
        marked = 0
        restart = lane * 0
        if HAS_MARKS:
            marked = gl.load(tile_marks + batch * TILES + tile)
            if marked != 0:
                valid, restart = load_marks(marks, mark_row, first, L, K, LANES, CHANNELS, WARPS)
                dts = keep(dts, valid, K)
                dys = keep(dys, valid, K)
        total = zero
        for k in gl.static_range(0, K):
            total = total + dts[k]

        if REVERSE:
            following = gl.maximum(first - T, 0)
        else:
            following = gl.minimum(first + T, (TILES - 1) * T)
        delta_tile = load_tile(delta, row, following, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
        dy_tile = load_tile(dy, row, following, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            z_tile = load_tile(z, row, following, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)

        segment_row = ((batch * SEGMENTS + tile * SPLIT) * E + channel) * N
        new_carries = ()
        for block in gl.static_range(0, BLOCKS):
            carry = carries[block]
            if HAS_MARKS:
                if marked != 0:
                    carry, fetched = _all_states(
                        carry, dts, dys, total, restart, a_rows[block], C_here, C_there,
                        C, BC_row, fetched, lane, row_lane, edges + segment_row, exists,
                        block * LANES,
                        min(NP - block * LANES, LANES), True, REVERSE, SPLIT, TILES, N, NP, E * N,
                        STATES, 1, K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
                else:
                    carry, fetched = _all_states(
                        carry, dts, dys, total, restart, a_rows[block], C_here, C_there,
                        C, BC_row, fetched, lane, row_lane, edges + segment_row, exists,
                        block * LANES,
                        min(NP - block * LANES, LANES), False, REVERSE, SPLIT, TILES, N, NP, E * N,
                        STATES, TOGETHER, K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
            else:
                carry, fetched = _all_states(
                    carry, dts, dys, total, restart, a_rows[block], C_here, C_there,
                    C, BC_row, fetched, lane, row_lane, edges + segment_row, exists, block * LANES,
                    min(NP - block * LANES, LANES), False, REVERSE, SPLIT, TILES, N, NP, E * N,
                    STATES, TOGETHER, K, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            new_carries = new_carries + (carry,)
        carries = new_carries

    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        place = (batch * E + channel) * N + n
        gl.store(dstate_in + place, carries[block], mask=exists & (n < N))
    finish_unit(progress, work, UNITS)
