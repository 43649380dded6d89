"""The GPU scan forward, in Gluon: one warp takes a few channels through the whole sequence.

A warp goes through tiles of T = K * LANES steps; K steps are a thread's, LANES threads one
channel's. For every state n a thread

1. computes the K decays a = 2^(dt A log2 e) and inflows x B, and runs its own steps from zero,
2. learns the state at its first step by a scan over the lanes of its channel, in which the decay
   over a thread's steps is one exponential of their summed dt,
3. runs its steps again from there, two fused multiply-adds each, and adds C h to y.

So there is one exponential and about nine instructions for a state element and nothing of size
[length, channels, state] anywhere. The exponentials of the next TOGETHER states stand between the
steps of 3 of these. The states between the tiles live in one register a thread: lane i of a
channel keeps state i. B and C come through a ring in shared
memory, copied some states ahead: read directly, each waited for L2 (measured: 2.3 times slower).

In reverse everything stays in the order of memory: the tiles, a thread's steps and the lanes are
walked from the last to the first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.selective_scan.gluon_lanes import (
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
    store_steps,
    tile_layout,
    unless,
)


@gluon.jit
def _states(
    ys, carry, middle, dts, xs, total, restart, a_row, ring, coefficients, slot, lane, states,
    RESTARTS: gl.constexpr, REVERSE: gl.constexpr, SPLIT: gl.constexpr, TILES: gl.constexpr,
    NP: gl.constexpr, SLOTS: gl.constexpr, STATES: gl.constexpr, TOGETHER: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Runs `states` states of a tile: adds C h to ys, moves the carry to the tile's end."""
    FIRST: gl.constexpr = LANES - 1 if REVERSE else 0
    a = ()
    for i in gl.static_range(0, TOGETHER):
        a = a + (lane_pick(a_row, lane * 0 + i, LANES),)
    decays = ()
    for step in gl.static_range(0, K):
        for i in gl.static_range(0, TOGETHER):
            decays = decays + (exp2(dts[in_order(step, K, REVERSE)] * a[i]),)
    for group in range(0, states // STATES):
        async_copy.wait_group(SLOTS - 2)
        fetch_states(
            ring, coefficients, slot + (SLOTS - 1), True, REVERSE, TILES, NP, SLOTS, STATES,
            K, LANES, WARPS,
        )  # fmt: skip
        for part in gl.static_range(0, STATES // TOGETHER):
            place = ((slot % SLOTS) * STATES + part * TOGETHER) * 2
            h_in = ()
            B_n = ()
            h = ()
            total_decays = ()
            for i in gl.static_range(0, TOGETHER):
                n = group * STATES + part * TOGETHER + i
                h_in = h_in + (lane_pick(carry, lane * 0 + n, LANES),)
                B_n = B_n + (read_coefficients(ring, place + 2 * i, K, LANES, CHANNELS, WARPS),)
                h = h + (gl.where(lane == FIRST, h_in[i], 0.0),)
                total_decay = exp2(total * a[i])
                if RESTARTS:
                    total_decay = gl.where(restart != 0, 0.0, total_decay)
                total_decays = total_decays + (total_decay,)
            inflows = ()
            for step in gl.static_range(0, K):
                later = ()
                for i in gl.static_range(0, TOGETHER):
                    inflow = xs[in_order(step, K, REVERSE)] * B_n[i][in_order(step, K, REVERSE)]
                    before = unless(h[i], restart, in_order(step, K, REVERSE), RESTARTS)
                    later = later + (decays[step * TOGETHER + i] * before + inflow,)
                    inflows = inflows + (inflow,)
                h = later
            h = lane_scan(h, total_decays, LANES, onward(REVERSE, TOGETHER), RESTARTS)
            starts = ()
            C_n = ()
            next_a = ()
            for i in gl.static_range(0, TOGETHER):
                n = group * STATES + part * TOGETHER + i
                end = lane_pick(h[i], lane * 0 + (LANES - 1 - FIRST), LANES)
                carry = gl.where(lane == n, end, carry)
                start = lane_shift(h[i], h_in[i], LANES, onward(REVERSE))
                boundaries = ()
                for j in gl.static_range(0, SPLIT - 1):
                    boundary = (j + 1) * (LANES // SPLIT) - (1 if REVERSE else 0)
                    at_boundary = lane_pick(start, lane * 0 + boundary, LANES)
                    boundaries = boundaries + (gl.where(lane == n, at_boundary, middle[j]),)
                middle = boundaries
                starts = starts + (start,)
                C_n = C_n + (read_coefficients(ring, place + 2 * i + 1, K, LANES, CHANNELS, WARPS),)
                next_a = next_a + (lane_pick(a_row, lane * 0 + (n + TOGETHER) % LANES, LANES),)
            # The second run of these states, and between it the exponentials of the next ones.
            h = starts
            a = next_a
            summed = ()
            next_decays = ()
            for step in gl.static_range(0, K):
                y = ys[in_order(step, K, REVERSE)]
                later = ()
                for i in gl.static_range(0, TOGETHER):
                    before = unless(h[i], restart, in_order(step, K, REVERSE), RESTARTS)
                    state = decays[step * TOGETHER + i] * before + inflows[step * TOGETHER + i]
                    y = state * C_n[i][in_order(step, K, REVERSE)] + y
                    later = later + (state,)
                    next_decays = next_decays + (exp2(dts[in_order(step, K, REVERSE)] * a[i]),)
                h = later
                summed = summed + (y,)
            decays = next_decays
            ys = ordered(summed, K, REVERSE)
        slot = slot + 1
    return ys, carry, middle, slot


@gluon.jit
def scan_forward(
    u, delta, A2, BC, D, bias, z, state_in, marks, tile_marks, y, state_out, saved,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, PER_GROUP: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_MARKS: gl.constexpr, REVERSE: gl.constexpr, SEGMENT: gl.constexpr, SLOTS: gl.constexpr,
    STATES: gl.constexpr, TOGETHER: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: CHANNELS * WARPS channels of one group and batch row, all tiles.

    Args:
        u, delta, z, y: [batch, E, L], any floating type.
        A2: float32 [E, N], A * log2 e.
        BC: float32 [batch, groups, tiles, NP, 2, K / 4, LANES, 4], zero past L and N: what
            16-byte reads of the lanes take is one contiguous piece.
        D, bias: float32 [E].
        state_in, state_out: float32 [batch, E, N].
        marks: int8 [batch, L]: 0 padding, 1 valid, 3 valid and the state restarts here.
        tile_marks: int32 [batch, tiles], 0 where all marks of a tile are 1.
        saved: float32 [batch, tiles * T / SEGMENT, E, N], the state with which the scan enters
            every SEGMENT steps; nothing is saved if SEGMENT is 0.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    BLOCKS: gl.constexpr = (N + LANES - 1) // LANES  # of LANES states
    PROGRAMS: gl.constexpr = (PER_GROUP + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)  # a group
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % (CHANNELS * WARPS) == 0
    SPLIT: gl.constexpr = T // SEGMENT if SEGMENT else 1
    rows: gl.constexpr = gl.SliceLayout(
        1, gl.SliceLayout(2, tile_layout(K, LANES, CHANNELS, WARPS))
    )
    flat: gl.constexpr = row_layout(LANES, CHANNELS, WARPS)

    batch = gl.program_id(1).to(gl.int64)
    group = gl.program_id(0) // PROGRAMS
    first_channel = group * PER_GROUP + (gl.program_id(0) % PROGRAMS) * (CHANNELS * WARPS)
    end_channel = (group + 1) * PER_GROUP
    channel3 = first_channel + gl.arange(0, CHANNELS * WARPS, layout=rows)
    row = gl.expand_dims(gl.expand_dims((batch * E + channel3) * L, 1), 2)
    exists3 = gl.expand_dims(gl.expand_dims(channel3 < end_channel, 1), 2)
    mark_row = gl.expand_dims(gl.expand_dims(batch * L + channel3 * 0, 1), 2)
    coefficients = BC + (batch * (E // PER_GROUP) + group) * (TILES * NP * 2 * T)
    ring = gl.allocate_shared_memory(
        gl.float32, [SLOTS * STATES * 2, K // 4, LANES, 4], coefficient_memory()
    )
    slot = gl.program_id(0) * 0
    if TILES * (NP // STATES) < SLOTS:
        # Zero too, but Triton 3.6 cannot tell: it fails on copies that are plainly never made.
        slot = gl.program_id(2)
    for ahead in gl.static_range(0, SLOTS - 1):
        fetch_states(
            ring, coefficients, slot + ahead, True, REVERSE, TILES, NP, SLOTS, STATES,
            K, LANES, WARPS,
        )  # fmt: skip

    lane = gl.expand_dims(gl.arange(0, LANES, layout=gl.SliceLayout(0, flat)), 0)
    channel = first_channel + gl.arange(0, CHANNELS * WARPS, layout=gl.SliceLayout(1, flat))
    channel = gl.expand_dims(channel, 1)
    lane = lane + channel * 0
    exists = channel < end_channel
    zero = lane.to(gl.float32) * 0
    bias_c = zero
    if HAS_BIAS:
        bias_c = gl.load(bias + channel + lane * 0, mask=exists, other=0.0)
    D_c = zero
    if HAS_D:
        D_c = gl.load(D + channel + lane * 0, mask=exists, other=0.0)
    a_rows = ()
    carries = ()
    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        there = exists & (n < N)
        a_rows = a_rows + (gl.load(A2 + channel * N + n, mask=there, other=0.0),)
        state_place = (batch * E + channel) * N + n
        carries = carries + (gl.load(state_in + state_place, mask=there, other=0.0),)

    # The next tile's operands are under way while this one's states are worked on.
    first = (TILES - 1) * T if REVERSE else 0
    delta_tile = load_tile(delta, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    u_tile = load_tile(u, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    for i in range(0, TILES):
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

        new_carries = ()
        for block in gl.static_range(0, BLOCKS):
            carry = carries[block]
            n = block * LANES + lane
            there = exists & (n < N)
            segment = (batch * TILES + tile) * SPLIT
            if SEGMENT:
                entered = segment + (SPLIT - 1 if REVERSE else 0)
                gl.store(saved + (entered * E + channel) * N + n, carry, mask=there)
            middle = ()
            for _ in gl.static_range(0, SPLIT - 1):
                middle = middle + (zero,)
            if HAS_MARKS:
                if marked != 0:
                    ys, carry, middle, slot = _states(
                        ys, carry, middle, dts, xs, total, restart, a_rows[block], ring,
                        coefficients, slot, lane, min(NP - block * LANES, LANES),
                        True, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, 1,
                        K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
                else:
                    ys, carry, middle, slot = _states(
                        ys, carry, middle, dts, xs, total, restart, a_rows[block], ring,
                        coefficients, slot, lane, min(NP - block * LANES, LANES),
                        False, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, TOGETHER,
                        K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
            else:
                ys, carry, middle, slot = _states(
                    ys, carry, middle, dts, xs, total, restart, a_rows[block], ring,
                    coefficients, slot, lane, min(NP - block * LANES, LANES),
                    False, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, TOGETHER,
                    K, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            if SEGMENT:
                for j in gl.static_range(0, SPLIT - 1):
                    entered = segment + j + (0 if REVERSE else 1)
                    gl.store(saved + (entered * E + channel) * N + n, middle[j], mask=there)
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
