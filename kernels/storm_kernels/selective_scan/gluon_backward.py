"""Second kernel of the GPU scan's backward, in Gluon: all gradients of one segment.

A program owns a segment of T = K * LANES steps and a block of channels of one group. It works on
WARPS parties of CHANNELS channels at a time, and its warps share the states: each takes STATES of
them for all channels. That settles the two kinds of sums without atomics:

- dB and dC, over the channels: accumulated in a warp's registers from party to party,
- du, d delta and y, over the states: the parties go around. Every warp works on another party,
  adds its states to the sums so far and hands them, through shared memory, to the warp that takes
  the party next. After WARPS turns a party's sums are complete, in registers of the warp that
  owns it.

The owner does the elementwise part (softplus, gates, their derivatives) for its party before the
first turn and after the last. The states are recomputed from the saved ones and the adjoint from
its edges, both by the scan of `gluon_forward`; the two chains run side by side. y before the gate
is recomputed too, which makes dz exact and saves its memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.gluon_copies import copy_to_shared
from storm_kernels.selective_scan.gluon_elementwise import step_gradients, step_operands
from storm_kernels.selective_scan.gluon_gradients import (
    add_party,
    four_sums,
    levels,
    spans_of,
    total_of,
)
from storm_kernels.selective_scan.gluon_lanes import (
    keep,
    lane_sum,
    load_marks,
    row_layout,
    tile_layout,
)
from storm_kernels.selective_scan.gluon_operands import (
    fetch,
    load_channels,
    load_rows,
    load_states,
    stage,
    stage_channels,
    steps_of_rows,
    store_rows,
    tiles_layout,
)
from storm_kernels.selective_scan.gluon_parties import (
    cube_layout,
    in_cube,
    padded,
    read_party,
    read_sums,
    warp_number,
    write_rows,
)


@gluon.jit
def _channels(
    u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, sums, even_sums,
    kept, far, stages, fetched, restart,
    du, ddelta, dz, dA, dD, dbias, tile, channels, dBs, dCs,
    RESTARTS: gl.constexpr,
    L: gl.constexpr, N: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    REVERSE: gl.constexpr, WHOLE: gl.constexpr, BLOCK: gl.constexpr, STATES: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Works through the block's channels; returns the sums dBs and dCs over them.

    All pointers but those of marks point to the block's first channel and the segment's first
    step, so that offsets fit in 32 bits. `channels` are those that exist.
    """
    T: gl.constexpr = K * LANES
    ROWS: gl.constexpr = WARPS * CHANNELS
    SP: gl.constexpr = padded(STATES)
    SPANS: gl.constexpr = padded(levels(LANES))
    MASKED: gl.constexpr = (not WHOLE) or RESTARTS
    EVERY: gl.constexpr = WHOLE and N == STATES * WARPS and SP == STATES
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    tiles: gl.constexpr = tiles_layout(K, LANES, CHANNELS, WARPS)
    flat: gl.constexpr = row_layout(LANES, CHANNELS, WARPS)
    several: gl.constexpr = tile_layout(SP, LANES, CHANNELS, WARPS)
    warp = warp_number()
    warp3 = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    warp3 = gl.expand_dims(gl.expand_dims(warp3, 1), 2)
    part3 = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, cube)))
    part3 = gl.expand_dims(gl.expand_dims(part3, 0), 2)
    lane3 = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    lane3 = gl.expand_dims(gl.expand_dims(lane3, 0), 1)
    zero = (warp3 + part3 + lane3).to(gl.float32) * 0
    # Rows of whole tiles, rows and lanes, and rows, lanes and states.
    three: gl.constexpr = gl.SliceLayout(3, tiles)
    warp_t = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, three)))
    part_t = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, three)))
    row_t = gl.expand_dims(gl.expand_dims(warp_t, 1), 2) * CHANNELS
    row_t = gl.expand_dims(row_t + gl.expand_dims(gl.expand_dims(part_t, 0), 1), 3)
    offset_t = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(2, three)))
    offset_t = gl.expand_dims(gl.expand_dims(gl.expand_dims(offset_t, 0), 2), 3) * K
    step_t = gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, tiles))))
    offset_t = offset_t + gl.expand_dims(gl.expand_dims(gl.expand_dims(step_t, 0), 1), 2)
    row_f = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat)), 1)
    lane_f = gl.expand_dims(gl.arange(0, LANES, layout=gl.SliceLayout(0, flat)), 0)
    row_s = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, several)))
    row_s = gl.expand_dims(gl.expand_dims(row_s, 1), 2)
    lane_s = gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(2, several)))
    lane_s = gl.expand_dims(gl.expand_dims(lane_s, 0), 2)
    j_s = gl.arange(0, SP, layout=gl.SliceLayout(0, gl.SliceLayout(1, several)))
    j_s = gl.expand_dims(gl.expand_dims(j_s, 0), 1)
    n_s = (row_s // CHANNELS) * STATES + j_s + lane_s * 0
    j3 = lane3 * 4 // LANES
    first = tile * T
    nothing = ()
    zeros = ()
    for _ in gl.static_range(0, K):
        nothing = nothing + (zero,)
        zeros = zeros + ((part3 + lane3).to(gl.float32) * 0,)
    restarts = ()
    if RESTARTS:
        rows: gl.constexpr = tile_layout(K, LANES, CHANNELS, WARPS)
        row_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, rows))) * 0
        row_m = gl.expand_dims(gl.expand_dims(row_m, 1), 2)
        restarts = spans_of(gl.where(restart != 0, 1.0, 0.0), LANES, CHANNELS, REVERSE)
    ROUNDS: gl.constexpr = (BLOCK + ROWS - 1) // ROWS
    if WHOLE:
        fetch(
            stages, u, delta, dy, z, D, bias, fetched, 0, A2, saved, edges, 0, offset_t, row_t,
            L, N, STATES, WHOLE, EVERY, HAS_BIAS, HAS_D, HAS_Z, CHANNELS, WARPS,
        )  # fmt: skip
    for i in range(0, ROUNDS):
        if WHOLE:
            async_copy.wait_group(0)
        # The elementwise part of the warps' own parties.
        owned = i * ROWS
        exists_t = owned + row_t < channels
        channel_f = owned + row_f + lane_f * 0
        exists_f = channel_f < channels
        place_t = (owned + row_t) * L + offset_t
        there_t = exists_t & (first + offset_t < L)
        u_t = load_rows(stages[0], u, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        delta_t = load_rows(stages[1], delta, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        dy_t = load_rows(stages[2], dy, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            z_t = load_rows(stages[3], z, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        D_c = lane_f.to(gl.float32) * 0
        bias_c = D_c
        if HAS_D:
            D_c = load_channels(stages[4], D, channel_f, exists_f, WHOLE, LANES, CHANNELS, WARPS)
        if HAS_BIAS:
            bias_c = load_channels(
                stages[5], bias, channel_f, exists_f, WHOLE, LANES, CHANNELS, WARPS
            )
        if WHOLE:  # the next parties', under way during these ones' turns
            following = gl.minimum(i + 1, ROUNDS - 1) * ROWS
            fetch(
                stages, u, delta, dy, z, D, bias, fetched, (i + 1) % 2, A2, saved, edges,
                following, offset_t, row_t, L, N, STATES, WHOLE, EVERY, HAS_BIAS, HAS_D, HAS_Z,
                CHANNELS, WARPS,
            )  # fmt: skip
        us = steps_of_rows(u_t, K, LANES, CHANNELS, WARPS)
        deltas = steps_of_rows(delta_t, K, LANES, CHANNELS, WARPS)
        given = steps_of_rows(dy_t, K, LANES, CHANNELS, WARPS)
        zs = given
        if HAS_Z:
            zs = steps_of_rows(z_t, K, LANES, CHANNELS, WARPS)
        valid = exists_f.to(gl.int32) * 0
        if MASKED:
            for k in gl.static_range(0, K):
                inside = exists_f & (first + lane_f * K + k < L)
                valid = valid | (inside.to(gl.int32) << k)
        if RESTARTS:
            marked, ignored = load_marks(marks, row_m, first, L, K, LANES, CHANNELS, WARPS)
            valid = valid & marked
            us = keep(us, valid, K)
            deltas = keep(deltas, valid, K)
            given = keep(given, valid, K)
            zs = keep(zs, valid, K)
        dts, xs, dys, slopes, factors = step_operands(
            us, deltas, given, zs, bias_c, valid, SOFTPLUS, HAS_BIAS, HAS_Z, MASKED, K
        )
        spans = spans_of(total_of(dts, K), LANES, CHANNELS, REVERSE)
        for _ in gl.static_range(levels(LANES), SPANS):
            spans = spans + (dts[0],)
        write_rows(far, spans, SPANS, LANES, CHANNELS, WARPS)
        write_rows(operands[0], dts, K, LANES, CHANNELS, WARPS)
        write_rows(operands[1], xs, K, LANES, CHANNELS, WARPS)
        write_rows(operands[2], dys, K, LANES, CHANNELS, WARPS)
        write_rows(kept[0], us, K, LANES, CHANNELS, WARPS)
        if SOFTPLUS:
            write_rows(kept[1], slopes, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            write_rows(kept[2], factors, K, LANES, CHANNELS, WARPS)

        ys = nothing
        dxs = nothing
        exponents = nothing
        for pair in range(0, WARPS // 2):
            for half in gl.static_range(0, 2):
                # In its last turn a warp has its own party.
                turn = pair * 2 + half
                party = (turn + 1) & (WARPS - 1)
                giver = warp ^ ((turn ^ (turn + 1)) & (WARPS - 1))
                mine = warp ^ party
                if EVERY:
                    states = fetched
                else:
                    channel_s = owned + ((row_s // CHANNELS) ^ party) * CHANNELS + row_s % CHANNELS
                    there = (channel_s < channels) & (n_s < N) & (j_s < STATES)
                    place_s = channel_s * N + n_s
                    As = load_states(A2, place_s, there, SP, LANES, CHANNELS, WARPS)
                    hs = load_states(saved, place_s, there, SP, LANES, CHANNELS, WARPS)
                    qs = load_states(edges, place_s, there, SP, LANES, CHANNELS, WARPS)
                    states = (As, hs, qs)
                source = sums if half == 0 else even_sums
                target = even_sums if half == 0 else sums
                dts_t = read_party(operands[0], mine, K, LANES, CHANNELS, WARPS)
                xs_t = read_party(operands[1], mine, K, LANES, CHANNELS, WARPS)
                dys_t = read_party(operands[2], mine, K, LANES, CHANNELS, WARPS)
                spans_t = read_party(far, mine, SPANS, LANES, CHANNELS, WARPS)
                if half == 0:
                    dxs_t, exponents_t, ys_t = zeros, zeros, zeros
                    if pair > 0:
                        dxs_t, exponents_t, ys_t = read_sums(
                            source, giver, HAS_Z, K, LANES, CHANNELS, WARPS
                        )
                else:
                    dxs_t, exponents_t, ys_t = read_sums(
                        source, giver, HAS_Z, K, LANES, CHANNELS, WARPS
                    )
                ys, dxs, exponents, dBs, dCs, dAs = add_party(
                    dts_t, xs_t, dys_t, spans_t, ys_t, dxs_t, exponents_t, dBs, dCs, states, i % 2,
                    mine, warp, coefficients, restart, restarts, lane3, zero, EVERY, RESTARTS,
                    REVERSE, HAS_Z, STATES, K, LANES, CHANNELS, WARPS,
                )  # fmt: skip
                channel3 = owned + (warp3 ^ party) * CHANNELS + part3
                n3 = warp3 * STATES + j3
                here = (lane3 % (LANES // 4) == 0) & (warp3 + part3 >= 0)
                if STATES < 4:
                    here = here & (j3 < STATES)
                if not EVERY:
                    here = here & (channel3 < channels) & (n3 < N)
                gl.store(dA + channel3 * N + n3, four_sums(dAs, lane3, LANES, CHANNELS), mask=here)
                write_rows(target[0], dxs, K, LANES, CHANNELS, WARPS)
                write_rows(target[1], exponents, K, LANES, CHANNELS, WARPS)
                if HAS_Z:
                    write_rows(target[2], ys, K, LANES, CHANNELS, WARPS)

        # The rest of the chain rule, of the warps' own parties.
        dts = read_party(operands[0], warp, K, LANES, CHANNELS, WARPS)
        dys = read_party(operands[2], warp, K, LANES, CHANNELS, WARPS)
        us = read_party(kept[0], warp, K, LANES, CHANNELS, WARPS)
        slopes = us
        factors = us
        if SOFTPLUS:
            slopes = read_party(kept[1], warp, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            factors = read_party(kept[2], warp, K, LANES, CHANNELS, WARPS)
        D_3 = in_cube(D_c + row_f * 0, LANES, CHANNELS, WARPS)
        valid3 = in_cube(valid, LANES, CHANNELS, WARPS)
        dus, ddeltas, dzs, dD_c, dbias_c = step_gradients(
            dxs, exponents, ys, dts, us, dys, slopes, factors, D_3, valid3, zero,
            SOFTPLUS, HAS_D, HAS_Z, MASKED, RESTARTS, K, ROWS, LANES,
        )  # fmt: skip
        store_rows(du, place_t, there_t, dus, WHOLE, K, LANES, CHANNELS, WARPS)
        store_rows(ddelta, place_t, there_t, ddeltas, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            store_rows(dz, place_t, there_t, dzs, WHOLE, K, LANES, CHANNELS, WARPS)
        own3 = owned + warp3 * CHANNELS + part3
        last = (own3 < channels) & (lane3 == 0)
        if HAS_D:
            gl.store(dD + own3 + lane3 * 0, lane_sum(dD_c, LANES, CHANNELS), mask=last)
        if HAS_BIAS:
            gl.store(dbias + own3 + lane3 * 0, lane_sum(dbias_c, LANES, CHANNELS), mask=last)
    return dBs, dCs


@gluon.constexpr_function
def _channel_sum_assembly(channels):
    lines = ["{ .reg .f32 t; mov.f32 $0, $1;"]
    distance = 1
    while distance < channels:
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
        dD, dbias: float32 [batch, SEGMENTS, E], likewise.
    """
    T: gl.constexpr = K * LANES
    TILES: gl.constexpr = (L + T - 1) // T
    PROGRAMS: gl.constexpr = (PER_GROUP + BLOCK - 1) // BLOCK  # a group
    GROUPS: gl.constexpr = E // PER_GROUP
    STATES: gl.constexpr = NP // WARPS
    WHOLE: gl.constexpr = L % T == 0 and PER_GROUP % BLOCK == 0 and BLOCK % (WARPS * CHANNELS) == 0
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    copied: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 4], [1, 32 // LANES, LANES, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]
    )
    batch = gl.program_id(2).to(gl.int64)
    tile = gl.program_id(1)
    group = gl.program_id(0) // PROGRAMS
    block = gl.program_id(0) % PROGRAMS
    first_channel = group * PER_GROUP + block * BLOCK
    channels = gl.minimum(BLOCK, PER_GROUP - block * BLOCK)
    base = (batch * E + first_channel) * L + tile * T
    u += base
    delta += base
    dy += base
    du += base
    ddelta += base
    if HAS_Z:
        z += base
        dz += base
    base = ((batch * SEGMENTS + tile) * E + first_channel) * N
    saved += base
    edges += base
    dA += base
    base = (batch * SEGMENTS + tile) * E + first_channel
    dD += base
    dbias += base
    A2 += first_channel * N
    D += first_channel
    bias += first_channel
    marks += batch * L

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
    parties: gl.constexpr = [WARPS, K // 4, LANES, CHANNELS, 4]
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    quads: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    operands = ()
    sums = ()
    even_sums = ()
    kept = ()
    fetched = ()
    stages = (
        stage(u, WHOLE, K, LANES, CHANNELS, WARPS),
        stage(delta, WHOLE, K, LANES, CHANNELS, WARPS),
        stage(dy, WHOLE, K, LANES, CHANNELS, WARPS),
        stage(z, WHOLE and HAS_Z, K, LANES, CHANNELS, WARPS),
        stage_channels(D, WHOLE and HAS_D, CHANNELS, WARPS),
        stage_channels(bias, WHOLE and HAS_BIAS, CHANNELS, WARPS),
    )
    far = gl.allocate_shared_memory(
        gl.float32, [WARPS, padded(levels(LANES)) // 4, LANES, CHANNELS, 4], plain
    )
    for _ in gl.static_range(0, 3):  # in one, any two accesses would get a barrier between them
        operands = operands + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        sums = sums + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        even_sums = even_sums + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        kept = kept + (gl.allocate_shared_memory(gl.float32, parties, plain),)
    if WHOLE and N == NP and STATES == padded(STATES):
        fetched = (
            gl.allocate_shared_memory(gl.float32, [2, WARPS, WARPS, CHANNELS, STATES], quads),
            gl.allocate_shared_memory(gl.float32, [4, WARPS, WARPS, CHANNELS, STATES], quads),
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
            row = gl.arange(0, CHANNELS * WARPS, layout=rows) * 0
            row = gl.expand_dims(gl.expand_dims(row, 1), 2)
            valid, restart = load_marks(marks, row, tile * T, L, K, LANES, CHANNELS, WARPS)
            restart = gl.convert_layout(
                gl.reshape(restart, [WARPS, CHANNELS, LANES]), cube, assert_trivial=True
            )
            dBs, dCs = _channels(
                u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, sums,
                even_sums, kept, far, stages, fetched, restart, du, ddelta, dz, dA, dD, dbias, tile,
                channels, dBs, dCs, True, L, N, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE, WHOLE,
                BLOCK, STATES, K, LANES, CHANNELS, WARPS,
            )  # fmt: skip
        else:
            dBs, dCs = _channels(
                u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, sums,
                even_sums, kept, far, stages, fetched, restart, du, ddelta, dz, dA, dD, dbias, tile,
                channels, dBs, dCs, False, L, N, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE, WHOLE,
                BLOCK, STATES, K, LANES, CHANNELS, WARPS,
            )  # fmt: skip
    else:
        dBs, dCs = _channels(
            u, delta, A2, D, bias, z, saved, edges, dy, marks, coefficients, operands, sums,
            even_sums, kept, far, stages, fetched, restart, du, ddelta, dz, dA, dD, dbias, tile,
            channels, dBs, dCs, False, L, N, SOFTPLUS, HAS_BIAS, HAS_D, HAS_Z, REVERSE, WHOLE,
            BLOCK, STATES, K, LANES, CHANNELS, WARPS,
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
                    _channel_sum_assembly(CHANNELS), "=&f,f", [value],
                    dtype=gl.float32, is_pure=True, pack=1,
                )  # fmt: skip
                gl.store(target + place + x * T, value, mask=(part3 + lane3 * 0 + warp3 * 0) == 0)
