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
    tile_layout,
    unless,
)


@gluon.jit
def _states(
    carry, middle, dts, dys, total, restart, a_row, ring, coefficients, slot, lane, states,
    RESTARTS: gl.constexpr, REVERSE: gl.constexpr, SPLIT: gl.constexpr, TILES: gl.constexpr,
    NP: gl.constexpr, SLOTS: gl.constexpr, STATES: gl.constexpr, TOGETHER: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Runs `states` adjoint states of a tile; REVERSE is the adjoint's direction."""
    FIRST: gl.constexpr = LANES - 1 if REVERSE else 0
    for group in range(0, states // STATES):
        async_copy.wait_group(SLOTS - 2)
        fetch_states(
            ring, coefficients, slot + (SLOTS - 1), False, REVERSE, TILES, NP, SLOTS, STATES,
            K, LANES, WARPS,
        )  # fmt: skip
        for part in gl.static_range(0, STATES // TOGETHER):
            place = (slot % SLOTS) * STATES + part * TOGETHER
            a = ()
            q_in = ()
            q = ()
            C_n = ()
            total_decays = ()
            for i in gl.static_range(0, TOGETHER):
                n = group * STATES + part * TOGETHER + i
                a = a + (lane_pick(a_row, lane * 0 + n, LANES),)
                q_in = q_in + (lane_pick(carry, lane * 0 + n, LANES),)
                C_n = C_n + (read_coefficients(ring, place + i, K, LANES, CHANNELS, WARPS),)
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
            q = lane_scan(q, total_decays, LANES, onward(REVERSE, TOGETHER), RESTARTS)
            for i in gl.static_range(0, TOGETHER):
                n = group * STATES + part * TOGETHER + i
                end = lane_pick(q[i], lane * 0 + (LANES - 1 - FIRST), LANES)
                carry = gl.where(lane == n, end, carry)
                if SPLIT > 1:
                    start = lane_shift(q[i], q_in[i], LANES, onward(REVERSE))
                    boundaries = ()
                    for j in gl.static_range(0, SPLIT - 1):
                        boundary = (j + 1) * (LANES // SPLIT) - (1 if REVERSE else 0)
                        at_boundary = lane_pick(start, lane * 0 + boundary, LANES)
                        boundaries = boundaries + (gl.where(lane == n, at_boundary, middle[j]),)
                    middle = boundaries
        slot = slot + 1
    return carry, middle, slot


@gluon.jit
def scan_adjoint(
    delta, A2, BC, bias, z, dy, dstate_out, marks, tile_marks, dstate_in, edges,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, PER_GROUP: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_Z: gl.constexpr, HAS_MARKS: gl.constexpr,
    REVERSE: gl.constexpr, SEGMENT: gl.constexpr, SLOTS: gl.constexpr, STATES: gl.constexpr,
    TOGETHER: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: CHANNELS * WARPS channels of one group and batch row, all tiles.

    Args:
        delta, A2, BC, bias, z, marks, tile_marks: as in `scan_forward`.
        dy: [batch, E, L], the gradient of y.
        dstate_out, dstate_in: float32 [batch, E, N], the gradients of the final state (read) and
            of the initial state (written).
        edges: float32 [batch, tiles * T / SEGMENT, E, N], the gradient with respect to the state
            with which the scan leaves every SEGMENT steps.
        REVERSE: the direction of the adjoint, which is not the scan's.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    BLOCKS: gl.constexpr = (N + LANES - 1) // LANES  # of LANES states
    PROGRAMS: gl.constexpr = (PER_GROUP + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)  # a group
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % (CHANNELS * WARPS) == 0
    SPLIT: gl.constexpr = T // SEGMENT
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
        gl.float32, [SLOTS * STATES, K // 4, LANES, 4], coefficient_memory()
    )
    slot = gl.program_id(0) * 0
    if TILES * (NP // STATES) < SLOTS:
        # Zero too, but Triton 3.6 cannot tell: it fails on copies that are plainly never made.
        slot = gl.program_id(2)
    for ahead in gl.static_range(0, SLOTS - 1):
        fetch_states(
            ring, coefficients, slot + ahead, False, REVERSE, TILES, NP, SLOTS, STATES,
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
    a_rows = ()
    carries = ()
    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        there = exists & (n < N)
        a_rows = a_rows + (gl.load(A2 + channel * N + n, mask=there, other=0.0),)
        state_place = (batch * E + channel) * N + n
        carries = carries + (gl.load(dstate_out + state_place, mask=there, other=0.0),)

    # The next tile's operands are under way while this one's states are worked on.
    first = (TILES - 1) * T if REVERSE else 0
    delta_tile = load_tile(delta, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    dy_tile = load_tile(dy, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    if HAS_Z:
        z_tile = load_tile(z, row, first, L, exists3, WHOLE, K, LANES, CHANNELS, WARPS)
    for i in range(0, TILES):
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

        new_carries = ()
        for block in gl.static_range(0, BLOCKS):
            carry = carries[block]
            n = block * LANES + lane
            there = exists & (n < N)
            segment = (batch * TILES + tile) * SPLIT
            entered = segment + (SPLIT - 1 if REVERSE else 0)
            gl.store(edges + (entered * E + channel) * N + n, carry, mask=there)
            middle = ()
            for _ in gl.static_range(0, SPLIT - 1):
                middle = middle + (zero,)
            if HAS_MARKS:
                if marked != 0:
                    carry, middle, slot = _states(
                        carry, middle, dts, dys, total, restart, a_rows[block], ring,
                        coefficients, slot, lane, min(NP - block * LANES, LANES),
                        True, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, 1,
                        K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
                else:
                    carry, middle, slot = _states(
                        carry, middle, dts, dys, total, restart, a_rows[block], ring,
                        coefficients, slot, lane, min(NP - block * LANES, LANES),
                        False, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, TOGETHER,
                        K, LANES, CHANNELS, WARPS,
                    )  # fmt: skip
            else:
                carry, middle, slot = _states(
                    carry, middle, dts, dys, total, restart, a_rows[block], ring,
                    coefficients, slot, lane, min(NP - block * LANES, LANES),
                    False, REVERSE, SPLIT, TILES, NP, SLOTS, STATES, TOGETHER,
                    K, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            for j in gl.static_range(0, SPLIT - 1):
                entered = segment + j + (0 if REVERSE else 1)
                gl.store(edges + (entered * E + channel) * N + n, middle[j], mask=there)
            new_carries = new_carries + (carry,)
        carries = new_carries

    for block in gl.static_range(0, BLOCKS):
        n = block * LANES + lane
        place = (batch * E + channel) * N + n
        gl.store(dstate_in + place, carries[block], mask=exists & (n < N))
