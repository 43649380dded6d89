"""Second kernel of the GPU scan's backward, in Gluon: all gradients of one segment.

A program owns a segment of T = K * LANES steps and a block of channels of one group, CHANNELS of
which it works on at a time. Its warps share the states: each takes STATES of them for all
channels. That settles the two kinds of sums without atomics and almost without communication:

- dB and dC, over the channels: accumulated in registers from one group of channels to the next,
- du, d delta and y, over the states: in registers over a warp's states, then over the warps
  through shared memory, once a channel.

The elementwise part (softplus, gates, their derivatives) is done once for each channel and step,
spread over all threads, and handed to the warps through shared memory. The states are recomputed
from the saved ones and the adjoint from its edges, both by the scan of `gluon_forward`; the two
chains run side by side. y before the gate is recomputed too, which makes dz exact and saves its
memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.selective_scan.gluon_lanes import (
    LN2,
    copy_to_shared,
    exp2,
    exp_minus_abs,
    in_order,
    lane_scan,
    lane_shift,
    lane_sum,
    load_marks,
    onward,
    ordered,
    peel,
    sigmoid,
    softplus,
    softplus_slope,
    tile_layout,
    unless,
    wrap,
)


@gluon.constexpr_function
def _cube(lanes, channels, warps):
    """[warps, channels, lanes]: one register a thread."""
    return gl.BlockedLayout([1, 1, 1], [1, channels, lanes], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _steps(steps, lanes, channels, warps):
    """[channels, lanes, steps], the same in every warp."""
    return gl.SliceLayout(
        0,
        gl.BlockedLayout([1, 1, 1, steps], [1, channels, lanes, 1], [warps, 1, 1, 1], [3, 2, 1, 0]),
    )


@gluon.constexpr_function
def _coefficients(steps, lanes, channels, warps):
    """[warps, steps / 4, lanes, 4], the same for every channel."""
    return gl.SliceLayout(
        1,
        gl.BlockedLayout(
            [1, 1, steps // 4, 1, 4], [1, channels, 1, lanes, 1], [warps, 1, 1, 1, 1],
            [4, 3, 2, 1, 0],
        ),
    )  # fmt: skip


@gluon.constexpr_function
def _points(steps, channels, warps):
    """[warps, channels, T]: the warps' sums in registers, channels and steps over the threads."""
    return gl.BlockedLayout(
        [warps, 1, steps // warps], [1, 1, 32], [1, channels, warps // channels], [2, 1, 0]
    )


@gluon.jit
def _read_steps(
    memory, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """Shared [CHANNELS, LANES, K] -> K tensors [1, CHANNELS, LANES]."""
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    x = peel(memory.load(_steps(K, LANES, CHANNELS, WARPS)), gl.SliceLayout(0, cube))
    out = ()
    for k in gl.static_range(0, K):
        out = out + (gl.expand_dims(x[k], 0),)
    return out


@gluon.jit
def _read_coefficients(
    memory, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """Shared [WARPS, K / 4, LANES, 4] -> K tensors [WARPS, 1, LANES]."""
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    x = memory.load(_coefficients(K, LANES, CHANNELS, WARPS))
    x = peel(gl.reshape(gl.permute(x, (0, 2, 1, 3)), [WARPS, LANES, K]), gl.SliceLayout(1, cube))
    out = ()
    for k in gl.static_range(0, K):
        out = out + (gl.expand_dims(x[k], 1),)
    return out


@gluon.jit
def _write_steps(
    memory, steps,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """K tensors [WARPS, CHANNELS, LANES] -> shared [WARPS * CHANNELS, LANES, K]."""
    rows = ()
    for k in gl.static_range(0, K):
        rows = rows + (gl.reshape(steps[k], [WARPS * CHANNELS, LANES]),)
    memory.store(wrap(rows, K, tile_layout(K, LANES, CHANNELS, WARPS)))


@gluon.jit
def _load_points(
    u, delta, dy, z, batch, channel, end_channel, place,
    E: gl.constexpr, L: gl.constexpr, HAS_Z: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """u, delta, dy and z [CHANNELS, T] as they are in memory, zero where there is none."""
    row = (batch * E + channel) * L + place
    there = (channel < end_channel) & (place < L)
    pointers = (u, delta, dy)
    if HAS_Z:
        pointers = (u, delta, dy, z)
    out = ()
    for i in gl.static_range(0, 4 if HAS_Z else 3):
        if WHOLE:
            out = out + (gl.load(pointers[i] + row),)
        else:
            out = out + (gl.load(pointers[i] + row, mask=there, other=0.0),)
    return out


@gluon.jit
def _load_states(
    A2, saved, edges, segment, channel, end_channel, warp,
    E: gl.constexpr, N: gl.constexpr, STATES: gl.constexpr,
):  # fmt: skip
    """For each of a warp's states A, the state coming in and the adjoint coming in, [W, C, 1]."""
    out = ()
    for j in gl.static_range(0, STATES):
        n = warp * STATES + j
        there = (channel < end_channel) & (n < N)
        place = (segment * E + channel) * N + n
        a = gl.load(A2 + channel * N + n, mask=there, other=0.0)
        h = gl.load(saved + place, mask=there, other=0.0)
        q = gl.load(edges + place, mask=there, other=0.0)
        out = out + (a, h, q)
    return out


@gluon.jit
def _store_sums(
    target, x, segment, first_channel, end_channel,
    E: gl.constexpr, T: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Sums [CHANNELS, T] over the steps of each warp, without a word between the warps."""
    PARTS: gl.constexpr = WARPS // CHANNELS
    sums = gl.sum(gl.reshape(x, [CHANNELS, PARTS, T // PARTS]), 2)
    layout: gl.constexpr = sums.type.layout
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, layout)) + first_channel
    channel = gl.expand_dims(channel, 1)
    part = gl.expand_dims(gl.arange(0, PARTS, layout=gl.SliceLayout(0, layout)), 0)
    place = (segment * PARTS + part) * E + channel
    gl.store(target + place, sums, mask=(channel < end_channel) & (part >= 0))


@gluon.jit
def _channels(
    u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, results, restart,
    du, ddelta, dz, dA, dD, dbias, batch, tile, first_channel, end_channel,
    dBs, dCs,
    RESTARTS: gl.constexpr,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, SEGMENTS: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    REVERSE: gl.constexpr, WHOLE: gl.constexpr, BLOCK: gl.constexpr, STATES: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Works through the block's channels; returns the sums dBs and dCs over them."""
    T: gl.constexpr = K * LANES
    FIRST: gl.constexpr = LANES - 1 if REVERSE else 0
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    points: gl.constexpr = gl.SliceLayout(0, _points(K, CHANNELS, WARPS))
    warp3 = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    warp3 = gl.expand_dims(gl.expand_dims(warp3, 1), 2)
    part3 = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, cube)))
    part3 = gl.expand_dims(gl.expand_dims(part3, 0), 2)
    lane3 = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    lane3 = gl.expand_dims(gl.expand_dims(lane3, 0), 1)
    zero = (warp3 + part3 + lane3).to(gl.float32) * 0
    part2 = gl.expand_dims(gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, points)), 1)
    step2 = gl.expand_dims(gl.arange(0, T, layout=gl.SliceLayout(0, points)), 0)
    place2 = tile * T + step2
    segment = batch * SEGMENTS + tile
    ROUNDS: gl.constexpr = (BLOCK + CHANNELS - 1) // CHANNELS
    # The next channels' operands are under way while these ones' states are worked on.
    next_points = _load_points(
        u, delta, dy, z, batch, first_channel + part2, end_channel, place2, E, L, HAS_Z, WHOLE
    )
    next_states = _load_states(
        A2, saved, edges, segment, first_channel + part3, end_channel, warp3, E, N, STATES
    )
    for i in range(0, ROUNDS):
        channel2 = first_channel + i * CHANNELS + part2
        row = (batch * E + channel2) * L + place2
        there = (channel2 < end_channel) & (place2 < L)
        raw = next_points
        states = next_states
        following = first_channel + gl.minimum(i + 1, ROUNDS - 1) * CHANNELS
        next_points = _load_points(
            u, delta, dy, z, batch, following + part2, end_channel, place2, E, L, HAS_Z, WHOLE
        )
        next_states = _load_states(
            A2, saved, edges, segment, following + part3, end_channel, warp3, E, N, STATES
        )
        u_p = raw[0].to(gl.float32)
        delta_p = raw[1].to(gl.float32)
        dy_p = raw[2].to(gl.float32)
        if HAS_Z:
            z_p = raw[3].to(gl.float32)
        valid = there
        if RESTARTS:
            mark = gl.load(marks + batch * L + place2, mask=place2 < L, other=0).to(gl.int32)
            valid = there & (mark > 0)
            delta_p = gl.where(valid, delta_p, 0.0)
            u_p = gl.where(valid, u_p, 0.0)
            dy_p = gl.where(valid, dy_p, 0.0)
            if HAS_Z:
                z_p = gl.where(valid, z_p, 0.0)
        D_p = u_p * 0
        if HAS_D:
            D_p = gl.load(D + channel2 + step2 * 0, mask=channel2 < end_channel, other=0.0)
        if HAS_BIAS:
            delta_p = delta_p + gl.load(
                bias + channel2 + step2 * 0, mask=channel2 < end_channel, other=0.0
            )
        dt_p = delta_p
        slope_p = u_p * 0 + 1.0
        if SOFTPLUS:
            e_p = exp_minus_abs(delta_p)
            dt_p = softplus(delta_p, e_p)
            slope_p = softplus_slope(delta_p, e_p)
        if (not WHOLE) or RESTARTS:
            dt_p = gl.where(valid, dt_p, 0.0)
        gated_p = dy_p
        if HAS_Z:
            s_p = sigmoid(z_p)
            gated_p = dy_p * (z_p * s_p)
        operands.index(0).store(gl.reshape(dt_p, [CHANNELS, LANES, K]))
        operands.index(1).store(gl.reshape(dt_p * u_p, [CHANNELS, LANES, K]))
        operands.index(2).store(gl.reshape(gated_p, [CHANNELS, LANES, K]))

        dts = _read_steps(operands.index(0), K, LANES, CHANNELS, WARPS)
        xs = _read_steps(operands.index(1), K, LANES, CHANNELS, WARPS)
        dys = _read_steps(operands.index(2), K, LANES, CHANNELS, WARPS)
        total = dts[0]
        for k in gl.static_range(1, K):
            total = total + dts[k]
        ys = ()
        dxs = ()
        exponents = ()  # the gradients of dt * A2, summed over the states
        for _ in gl.static_range(0, K):
            ys = ys + (zero,)
            dxs = dxs + (zero,)
            exponents = exponents + (zero,)
        new_dBs = ()
        new_dCs = ()
        for j in gl.static_range(0, STATES):
            n = warp3 * STATES + j
            channel3 = first_channel + i * CHANNELS + part3
            state = (channel3 < end_channel) & (n < N)
            place = (segment * E + channel3) * N + n
            a = states[3 * j]
            h_in = states[3 * j + 1] + zero
            q_in = states[3 * j + 2] + zero
            B_n = _read_coefficients(coefficients.index(2 * j), K, LANES, CHANNELS, WARPS)
            C_n = _read_coefficients(coefficients.index(2 * j + 1), K, LANES, CHANNELS, WARPS)
            decays = ()
            inflows = ()
            for k in gl.static_range(0, K):
                decays = decays + (exp2(dts[k] * a),)
                inflows = inflows + (xs[k] * B_n[k],)
            total_decay = exp2(total * a)
            if RESTARTS:
                total_decay = gl.where(restart != 0, 0.0, total_decay)
            # Everything in the scan's order and in the adjoint's.
            on_decays = ordered(decays, K, REVERSE)
            on_inflows = ordered(inflows, K, REVERSE)
            on_C = ordered(C_n, K, REVERSE)
            on_dys = ordered(dys, K, REVERSE)
            back_decays = ordered(decays, K, not REVERSE)
            back_C = ordered(C_n, K, not REVERSE)
            back_dys = ordered(dys, K, not REVERSE)
            h = gl.where(lane3 == FIRST, h_in, 0.0)
            q = gl.where(lane3 == LANES - 1 - FIRST, q_in, 0.0)
            for step in gl.static_range(0, K):
                h = unless(h, restart, in_order(step, K, REVERSE), RESTARTS)
                h = on_decays[step] * h + on_inflows[step]
                q = back_decays[step] * (back_C[step] * back_dys[step] + q)
                q = unless(q, restart, in_order(step, K, not REVERSE), RESTARTS)
            h, q = lane_scan(
                (h, q), (total_decay + zero, total_decay + zero), LANES, opposed(REVERSE), RESTARTS
            )
            h = lane_shift(h, h_in, LANES, onward(REVERSE))
            q = lane_shift(q, q_in, LANES, onward(not REVERSE))
            # Forward again: the state before each step, y and dC.
            before = ()
            y_sums = ()
            dC_sums = ()
            on_ys = ordered(ys, K, REVERSE)
            for step in gl.static_range(0, K):
                h = unless(h, restart, in_order(step, K, REVERSE), RESTARTS)
                before = before + (h,)
                h = on_decays[step] * h + on_inflows[step]
                if HAS_Z:
                    y_sums = y_sums + (h * on_C[step] + on_ys[step],)
                else:
                    y_sums = y_sums + (zero,)
                dC_sum = dCs[j * K + in_order(step, K, REVERSE)]
                dC_sums = dC_sums + (h * on_dys[step] + dC_sum,)
            ys = ordered(y_sums, K, REVERSE)
            new_dCs = new_dCs + ordered(dC_sums, K, REVERSE)
            # Back again: g, and with it all that is left.
            dA_n = zero
            dx_sums = ()
            exponent_sums = ()
            dB_sums = ()
            back_B = ordered(B_n, K, not REVERSE)
            back_xs = ordered(xs, K, not REVERSE)
            back_dts = ordered(dts, K, not REVERSE)
            back_dxs = ordered(dxs, K, not REVERSE)
            back_exponents = ordered(exponents, K, not REVERSE)
            for step in gl.static_range(0, K):
                g = back_C[step] * back_dys[step] + q
                dx_sums = dx_sums + (g * back_B[step] + back_dxs[step],)
                dB_sum = dBs[j * K + in_order(step, K, not REVERSE)]
                dB_sums = dB_sums + (g * back_xs[step] + dB_sum,)
                q = unless(back_decays[step] * g, restart, in_order(step, K, not REVERSE), RESTARTS)
                exponent = q * before[K - 1 - step]
                exponent_sums = exponent_sums + (exponent * a + back_exponents[step],)
                dA_n = exponent * back_dts[step] + dA_n
            dxs = ordered(dx_sums, K, not REVERSE)
            exponents = ordered(exponent_sums, K, not REVERSE)
            new_dBs = new_dBs + ordered(dB_sums, K, not REVERSE)
            gl.store(dA + place + lane3 * 0, lane_sum(dA_n, LANES), mask=state & (lane3 == 0))
        dBs = new_dBs
        dCs = new_dCs

        if HAS_Z:
            _write_steps(results.index(0), ys, K, LANES, CHANNELS, WARPS)
        _write_steps(results.index(1), dxs, K, LANES, CHANNELS, WARPS)
        _write_steps(results.index(2), exponents, K, LANES, CHANNELS, WARPS)
        cubes: gl.constexpr = _points(K, CHANNELS, WARPS)
        dx_p = gl.sum(results.index(1).reshape([WARPS, CHANNELS, T]).load(cubes), 0)
        exponent_p = gl.sum(results.index(2).reshape([WARPS, CHANNELS, T]).load(cubes), 0)
        du_p = dx_p * dt_p + D_p * gated_p
        ddelta_p = (dx_p * u_p + exponent_p * LN2) * slope_p
        if (not WHOLE) or RESTARTS:
            ddelta_p = gl.where(valid, ddelta_p, 0.0)
        if HAS_Z:
            y_p = gl.sum(results.index(0).reshape([WARPS, CHANNELS, T]).load(cubes), 0)
            y_p = y_p + D_p * u_p
            dz_p = dy_p * y_p * (s_p * (1.0 + z_p * (1.0 - s_p)))
            if RESTARTS:
                dz_p = gl.where(valid, dz_p, 0.0)  # an infinite state may pass through padding
        if WHOLE:
            gl.store(du + row, du_p.to(du.dtype.element_ty))
            gl.store(ddelta + row, ddelta_p.to(ddelta.dtype.element_ty))
            if HAS_Z:
                gl.store(dz + row, dz_p.to(dz.dtype.element_ty))
        else:
            gl.store(du + row, du_p.to(du.dtype.element_ty), mask=there)
            gl.store(ddelta + row, ddelta_p.to(ddelta.dtype.element_ty), mask=there)
            if HAS_Z:
                gl.store(dz + row, dz_p.to(dz.dtype.element_ty), mask=there)
        if HAS_D:
            _store_sums(
                dD, gated_p * u_p, segment, first_channel + i * CHANNELS, end_channel,
                E, T, CHANNELS, WARPS,
            )  # fmt: skip
        if HAS_BIAS:
            _store_sums(
                dbias, ddelta_p, segment, first_channel + i * CHANNELS, end_channel,
                E, T, CHANNELS, WARPS,
            )  # fmt: skip
    return dBs, dCs


@gluon.constexpr_function
def opposed(reverse):
    """The directions of the scan and of its adjoint."""
    return "down up" if reverse else "up down"


@gluon.constexpr_function
def _channel_sum_assembly(lanes):
    lines = ["{ .reg .f32 t; mov.f32 $0, $1;"]
    distance = lanes
    while distance < 32:
        lines.append(f"shfl.sync.bfly.b32 t, $0, {distance}, 31, 0xffffffff; add.f32 $0, $0, t;")
        distance *= 2
    return "\n".join([*lines, "}"])


@gluon.jit
def scan_backward(
    u, delta, A2, BC, D, bias, z, saved, edges, dy, marks, tile_marks,
    du, ddelta, dz, dBC, dA, dD, dbias,
    E: gl.constexpr, L: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, PER_GROUP: gl.constexpr,
    SEGMENTS: gl.constexpr, SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr,
    HAS_Z: gl.constexpr, HAS_MARKS: gl.constexpr, REVERSE: gl.constexpr, BLOCK: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: a segment of K * LANES steps, BLOCK channels of one group, one batch row.

    Args:
        u, delta, A2, D, bias, z, marks: as in `scan_forward`, REVERSE too.
        BC: float32 [batch, groups, segments, NP, 2, K / 4, LANES, 4].
        saved, edges: float32 [batch, SEGMENTS, E, N], see `scan_forward` and `scan_adjoint`.
        dy: [batch, E, L], the gradient of y.
        tile_marks: int32 [batch, segments].
        du, ddelta, dz: [batch, E, L].
        dBC: float32 [blocks, batch, groups, segments, NP, 2, K * LANES], to be summed over the
            channel blocks of a group.
        dA: float32 [batch, SEGMENTS, E, N], to be summed over batch and segments.
        dD, dbias: float32 [batch, SEGMENTS, WARPS / CHANNELS, E], likewise.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    PROGRAMS: gl.constexpr = (PER_GROUP + BLOCK - 1) // BLOCK  # a group
    GROUPS: gl.constexpr = E // PER_GROUP
    STATES: gl.constexpr = NP // WARPS
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % BLOCK == 0 and BLOCK % CHANNELS == 0
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    copied: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 4], [1, 32 // LANES, LANES, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]
    )
    batch = gl.program_id(2).to(gl.int64)
    tile = gl.program_id(1)
    group = gl.program_id(0) // PROGRAMS
    block = gl.program_id(0) % PROGRAMS
    first_channel = group * PER_GROUP + block * BLOCK
    end_channel = gl.minimum(first_channel + BLOCK, (group + 1) * PER_GROUP)

    coefficients = gl.allocate_shared_memory(
        gl.float32, [STATES * 2, WARPS, K // 4, LANES, 4],
        gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
    )  # fmt: skip
    warp4 = gl.arange(
        0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, copied)))
    )
    part4 = gl.arange(
        0, K // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, copied)))
    )
    lane4 = gl.arange(
        0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, copied)))
    )
    word4 = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, copied))))
    place4 = gl.expand_dims(gl.expand_dims(gl.expand_dims(warp4, 1), 2), 3) * (STATES * 2 * T)
    place4 = place4 + gl.expand_dims(gl.expand_dims(gl.expand_dims(part4, 0), 2), 3) * (LANES * 4)
    place4 = place4 + gl.expand_dims(gl.expand_dims(gl.expand_dims(lane4, 0), 1), 3) * 4
    place4 = place4 + gl.expand_dims(gl.expand_dims(gl.expand_dims(word4, 0), 1), 2)
    source = BC + ((batch * GROUPS + group) * TILES + tile) * (NP * 2 * T)
    for i in gl.static_range(0, STATES * 2):
        copy_to_shared(coefficients.index(i), source + i * T + place4, cache_modifier=".ca")
    async_copy.commit_group()
    operands = gl.allocate_shared_memory(
        gl.float32, [3, CHANNELS, LANES, K], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    results = gl.allocate_shared_memory(
        gl.float32, [3, WARPS * CHANNELS, LANES, K], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    async_copy.wait_group(0)

    warp3 = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    warp3 = gl.expand_dims(gl.expand_dims(warp3, 1), 2)
    part3 = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, cube)))
    part3 = gl.expand_dims(gl.expand_dims(part3, 0), 2)
    lane3 = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    lane3 = gl.expand_dims(gl.expand_dims(lane3, 0), 1)
    zero = (warp3 + part3 + lane3).to(gl.float32) * 0
    dBs = ()
    dCs = ()
    for _ in gl.static_range(0, STATES * K):
        dBs = dBs + (zero,)
        dCs = dCs + (zero,)
    restart = zero.to(gl.int32)
    if HAS_MARKS:
        marked = gl.load(tile_marks + batch * TILES + tile)
        if marked != 0:
            rows: gl.constexpr = gl.SliceLayout(
                1, gl.SliceLayout(2, tile_layout(K, LANES, CHANNELS, WARPS))
            )
            row = batch * L + gl.arange(0, CHANNELS * WARPS, layout=rows) * 0
            row = gl.expand_dims(gl.expand_dims(row, 1), 2)
            valid, restart = load_marks(marks, row, tile * T, L, K, LANES, CHANNELS, WARPS)
            restart = gl.convert_layout(
                gl.reshape(restart, [WARPS, CHANNELS, LANES]), cube, assert_trivial=True
            )
            dBs, dCs = _channels(
                u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, results,
                restart, du, ddelta, dz, dA, dD, dbias, batch, tile, first_channel, end_channel,
                dBs, dCs, True, E, L, N, SEGMENTS, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE,
                WHOLE, BLOCK, STATES, K, LANES, CHANNELS, WARPS,
            )  # fmt: skip
        else:
            dBs, dCs = _channels(
                u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, results,
                restart, du, ddelta, dz, dA, dD, dbias, batch, tile, first_channel, end_channel,
                dBs, dCs, False, E, L, N, SEGMENTS, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE,
                WHOLE, BLOCK, STATES, K, LANES, CHANNELS, WARPS,
            )  # fmt: skip
    else:
        dBs, dCs = _channels(
            u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, results,
            restart, du, ddelta, dz, dA, dD, dbias, batch, tile, first_channel, end_channel,
            dBs, dCs, False, E, L, N, SEGMENTS, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE,
            WHOLE, BLOCK, STATES, K, LANES, CHANNELS, WARPS,
        )  # fmt: skip

    batches = gl.num_programs(2)
    base = ((block * batches + batch) * GROUPS + group) * TILES + tile
    target = dBC + base.to(gl.int64) * (NP * 2 * T)
    for j in gl.static_range(0, STATES):
        for k in gl.static_range(0, K):
            place = ((warp3 * STATES + j) * 2) * T + lane3 * K + k + part3 * 0
            for x in gl.static_range(0, 2):
                value = dBs[j * K + k] if x == 0 else dCs[j * K + k]
                value = gl.inline_asm_elementwise(
                    _channel_sum_assembly(LANES), "=&f,f", [value],
                    dtype=gl.float32, is_pure=True, pack=1,
                )  # fmt: skip
                gl.store(target + place + x * T, value, mask=(part3 + lane3 * 0 + warp3 * 0) == 0)
