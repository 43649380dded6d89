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

Which party a warp takes differs from warp to warp, and a shared memory descriptor's index may not,
says Gluon; but it is a register of each thread like any other. `_warp` gives one.
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
    keep,
    lane_sum,
    load_marks,
    onward,
    ordered,
    peel,
    row_layout,
    sigmoid,
    softplus,
    softplus_slope,
    steps_of,
    tile_layout,
    unless,
    wrap,
)

# Triton 3.9 renamed it.
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)


@gluon.constexpr_function
def _cube(lanes, channels, warps):
    """[warps, channels, lanes]: one register a thread."""
    return gl.BlockedLayout([1, 1, 1], [1, channels, lanes], [warps, 1, 1], [1, 2, 0])


@gluon.constexpr_function
def _tiles(steps, lanes, channels, warps):
    """[warps, lanes, channels, steps]: `steps` in registers, as in `tile_layout`."""
    return gl.BlockedLayout(
        [1, 1, 1, steps], [1, lanes, channels, 1], [warps, 1, 1, 1], [3, 2, 1, 0]
    )


@gluon.constexpr_function
def _party(steps, lanes, channels, warps):
    """[steps / 4, lanes, channels, 4] of the party that a warp looks at."""
    return gl.SliceLayout(
        0,
        gl.BlockedLayout(
            [1, steps // 4, 1, 1, 4], [1, 1, lanes, channels, 1], [warps, 1, 1, 1, 1],
            [4, 3, 2, 1, 0],
        ),
    )  # fmt: skip


@gluon.constexpr_function
def _coefficients(steps, lanes, channels, warps):
    """[warps, steps / 4, lanes, 4], the same for every channel."""
    return gl.SliceLayout(
        1,
        gl.BlockedLayout(
            [1, 1, steps // 4, 1, 4], [1, channels, 1, lanes, 1], [warps, 1, 1, 1, 1],
            [4, 1, 3, 2, 0],
        ),
    )  # fmt: skip


@gluon.constexpr_function
def _levels(lanes):
    return lanes.bit_length() - 1


@gluon.constexpr_function
def _padded(states):
    """The next power of two."""
    return 1 << (states - 1).bit_length()


@gluon.jit
def _warp():
    """The number of a thread's warp, as a scalar that differs between warps."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", "=r", [],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _half_assembly(reverse):
    flip = " xor.b32 t, t, 1;" if reverse else ""
    return (
        "{ .reg .u32 t; mov.u32 t, %tid.x;"
        f" shr.u32 t, t, 4; and.b32 t, t, 1;{flip} mov.b32 $0, t; }}"
    )


@gluon.jit
def _half(REVERSE: gl.constexpr):
    """0 in the half of a row's lanes that the scan meets first, 1 in the other; see `_warp`."""
    return gl.inline_asm_elementwise(
        _half_assembly(REVERSE), "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _in_cube(x, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr):
    """[rows, lanes] -> [warps, channels, lanes]."""
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    return gl.convert_layout(gl.reshape(x, [WARPS, CHANNELS, LANES]), cube, assert_trivial=True)


@gluon.jit
def _read_party(
    memory, party,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Number `party` of shared [W, K / 4, LANES, C, 4] -> K tensors [1, CHANNELS, LANES]."""
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    parties = _reinterpret(memory, gl.float32, [WARPS, K // 4, LANES, CHANNELS, 4], plain)
    x = parties.index(party).load(_party(K, LANES, CHANNELS, WARPS))
    x = peel(gl.reshape(gl.permute(x, (2, 1, 0, 3)), [CHANNELS, LANES, K]), gl.SliceLayout(0, cube))
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
def _write_rows(
    memory, steps,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """K tensors [rows, lanes] or [warps, channels, lanes] -> shared [W, K / 4, LANES, C, 4].

    16 bytes of neighbouring threads are neighbours: no bank conflicts.
    """
    ROWS: gl.constexpr = WARPS * CHANNELS
    rows = ()
    for k in gl.static_range(0, K):
        rows = rows + (gl.reshape(steps[k], [ROWS, LANES]),)
    x = wrap(rows, K, tile_layout(K, LANES, CHANNELS, WARPS))
    x = gl.permute(gl.reshape(x, [WARPS, CHANNELS, LANES, K // 4, 4]), (0, 3, 2, 1, 4))
    memory.store(x)


@gluon.constexpr_function
def _bound(lanes, stride, direction):
    return (32 - lanes * stride) << 8 | (31 if direction == "down" else 0)


@gluon.constexpr_function
def _enter_assembly(levels, stride, reverse, restarts):
    """The states with which the lanes are entered, the scan's and the adjoint's, side by side."""
    lanes = 1 << levels
    directions = ("down", "up") if reverse else ("up", "down")
    firsts = (lanes - 1, 0) if reverse else (0, lanes - 1)
    lines = ["{ .reg .pred p; .reg .f32 t, d, h, g;"]
    lines.append("mov.f32 h, $2; mov.f32 g, $3;")

    def shuffle(i, target, source, distance):
        end = f"{distance * stride}, {_bound(lanes, stride, directions[i])}, 0xffffffff;"
        lines.append(f"shfl.sync.{directions[i]}.b32 {target}, {source}, {end}")

    def add(i, decay, source):
        if restarts:  # zero times an infinite state would be no number
            lines.append(f"setp.neu.and.f32 p, {decay}, 0f00000000, p;")
        lines.append(f"@p fma.rn.f32 {'hg'[i]}, {decay}, {source}, {'hg'[i]};")

    for i in range(2):
        lines.append(f"setp.eq.u32 p, $6, {firsts[i]};")
        add(i, "$7", f"${4 + i}")
    for level in range(levels):
        distance = 1 << level
        if level:
            # The decay of the lanes from this one onward is that of the last of them backward.
            shuffle(1, "d", f"${7 + level}", distance - 1)
        for i in range(2):
            shuffle(i, "t|p", "hg"[i], distance)
            add(i, "d" if i and level else f"${7 + level}", "t")
    for i in range(2):
        shuffle(i, "t|p", "hg"[i], 1)
        lines.append(f"selp.f32 ${i}, t, ${4 + i}, p;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _enter_constraints(levels):
    return "=&f,=&f,f,f,f,f,r" + ",f" * levels


@gluon.jit
def _enter(
    h, q, h_in, q_in, lane, decays,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, REVERSE: gl.constexpr, RESTARTS: gl.constexpr,
):  # fmt: skip
    """The state before a lane's first step, and the adjoint after its last.

    Args:
        h, q: what a lane's steps make of zero.
        h_in, q_in: what the first lane (the last) is entered with; not looked at in others.
        decays: a tuple, of the 1, 2, 4 ... lanes up to this one. Where one is zero nothing from
            before is looked at, be it infinite (RESTARTS).
    """
    operands = (h, q, h_in, q_in, lane) + decays
    return gl.inline_asm_elementwise(
        _enter_assembly(_levels(LANES), CHANNELS, REVERSE, RESTARTS),
        _enter_constraints(_levels(LANES)), operands, dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _pin_constraints(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.jit
def _pinned(steps, K: gl.constexpr):
    """K tensors, computed here and not later.

    What is only needed at the end of a loop LLVM computes there, and keeps all that goes into it
    in registers until then.
    """
    return gl.inline_asm_elementwise(
        "// pinned", _pin_constraints(K), steps, dtype=_floats(K), is_pure=False, pack=1
    )


@gluon.constexpr_function
def _far_assembly(lanes, stride, distance, direction):
    bound = _bound(lanes, stride, direction)
    return f"shfl.sync.{direction}.b32 $0, $1, {distance * stride}, {bound}, 0xffffffff;"


@gluon.jit
def _spans(x, LANES: gl.constexpr, CHANNELS: gl.constexpr, REVERSE: gl.constexpr):
    """Sums of x over the 1, 2, 4 ... lanes up to this one, in the direction of the scan.

    Where there are fewer lanes a sum is anything finite.
    """
    out = (x,)
    for level in gl.static_range(1, _levels(LANES)):
        x = x + gl.inline_asm_elementwise(
            _far_assembly(LANES, CHANNELS, 1 << (level - 1), onward(REVERSE)), "=f,f", [x],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        out = out + (x,)
    return out


@gluon.jit
def _total(steps, K: gl.constexpr):
    """The sum of K tensors, pairwise: a short chain."""
    parts = steps
    for level in gl.static_range(0, 5):
        if (K >> level) > 1:
            sums = ()
            for i in gl.static_range(0, K >> (level + 1)):
                sums = sums + (parts[2 * i] + parts[2 * i + 1],)
            parts = sums
    return parts[0]


@gluon.constexpr_function
def _four_sums_assembly(lanes, stride):
    half, quarter = lanes // 2, lanes // 4
    far, near = half * stride, quarter * stride
    lines = [
        "{ .reg .pred p, r; .reg .u32 l; .reg .f32 a, b, c, d;",
        f"and.b32 l, $5, {half}; setp.ne.u32 p, l, 0;",
        f"and.b32 l, $5, {quarter}; setp.ne.u32 r, l, 0;",
        "selp.f32 a, $3, $1, p; selp.f32 b, $4, $2, p;",
        "selp.f32 c, $1, $3, p; selp.f32 d, $2, $4, p;",
        f"shfl.sync.bfly.b32 c, c, {far}, 31, 0xffffffff; add.f32 a, a, c;",
        f"shfl.sync.bfly.b32 d, d, {far}, 31, 0xffffffff; add.f32 b, b, d;",
        "selp.f32 c, b, a, r; selp.f32 d, a, b, r;",
        f"shfl.sync.bfly.b32 d, d, {near}, 31, 0xffffffff; add.f32 $0, c, d;",
    ]
    distance = near // 2
    while distance >= stride:
        lines.append(f"shfl.sync.bfly.b32 d, $0, {distance}, 31, 0xffffffff; add.f32 $0, $0, d;")
        distance //= 2
    return "\n".join([*lines, "}"])


@gluon.jit
def _four_sums(x, lane, LANES: gl.constexpr, CHANNELS: gl.constexpr):
    """The sums of four tensors over the lanes of a row: lane i has that of number 4 i // LANES."""
    return gl.inline_asm_elementwise(
        _four_sums_assembly(LANES, CHANNELS), "=&f,f,f,f,f,r", [x[0], x[1], x[2], x[3], lane],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _is_staged(pointer_type, whole):
    """Whether an operand is copied to shared memory ahead: float32 would take too much of it."""
    return whole and pointer_type.element_ty.primitive_bitwidth == 16


@gluon.jit
def _stage(
    pointer, WHOLE: gl.constexpr, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Shared memory for `_fetch_rows`; for operands that are not staged anything."""
    if _is_staged(pointer.dtype, WHOLE):
        out = gl.allocate_shared_memory(
            pointer.dtype.element_ty, [WARPS, LANES, CHANNELS, K],
            gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
        )  # fmt: skip
    else:
        out = pointer
    return out


@gluon.jit
def _fetch_rows(stage, pointer, place, WHOLE: gl.constexpr):
    """Starts to copy the parties' steps."""
    if _is_staged(pointer.dtype, WHOLE):
        copy_to_shared(stage, pointer + place)


@gluon.jit
def _load_rows(
    stage, pointer, place, there, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The parties' steps [warps, lanes, channels, K], copied before or loaded now.

    One offset serves all operands and is added last: a sum of pointer and lane would stay in two
    registers of each thread, for every operand.
    """
    if _is_staged(pointer.dtype, WHOLE):
        x = stage.load(_tiles(K, LANES, CHANNELS, WARPS))
    elif WHOLE:
        x = gl.load(pointer + place)
    else:
        x = gl.load(pointer + place, mask=there, other=0.0)
    return x


@gluon.jit
def _steps_of(
    x, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """What `_load_rows` gave as K float32 tensors [rows, lanes]."""
    x = gl.reshape(gl.permute(x, (0, 2, 1, 3)), [WARPS * CHANNELS, LANES, K])
    x = gl.convert_layout(x, tile_layout(K, LANES, CHANNELS, WARPS), assert_trivial=True)
    return steps_of(x, LANES, CHANNELS, WARPS)


@gluon.jit
def _store_rows(
    pointer, place, there, steps, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """K float32 tensors [rows, lanes], rounded, to where `_load_rows` reads."""
    x = wrap(steps, K, tile_layout(K, LANES, CHANNELS, WARPS)).to(pointer.dtype.element_ty)
    x = gl.permute(gl.reshape(x, [WARPS, CHANNELS, LANES, K]), (0, 2, 1, 3))
    x = gl.convert_layout(x, _tiles(K, LANES, CHANNELS, WARPS), assert_trivial=True)
    if WHOLE:
        gl.store(pointer + place, x)
    else:
        gl.store(pointer + place, x, mask=there)


@gluon.jit
def _load_channels(pointer, channel, there, WHOLE: gl.constexpr):
    if WHOLE:
        x = gl.load(pointer + channel)
    else:
        x = gl.load(pointer + channel, mask=there, other=0.0)
    return x


@gluon.jit
def _read_sums(
    memory, giver, HAS_Z: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The three sums over states that warp number `giver` left; without z the third is nothing."""
    dxs = _read_party(memory[0], giver, K, LANES, CHANNELS, WARPS)
    exponents = _read_party(memory[1], giver, K, LANES, CHANNELS, WARPS)
    ys = dxs
    if HAS_Z:
        ys = _read_party(memory[2], giver, K, LANES, CHANNELS, WARPS)
    return dxs, exponents, ys


@gluon.jit
def _load_states(
    source, place, there, SP: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A warp's states of a party from [.., E, N]: SP tensors [warps, channels, lanes]."""
    x = gl.load(source + place, mask=there, other=0.0)
    if SP == 1:
        rows = (gl.reshape(x, [WARPS * CHANNELS, LANES]),)
    else:
        rows = peel(x, row_layout(LANES, CHANNELS, WARPS))
    out = ()
    for j in gl.static_range(0, SP):
        out = out + (_in_cube(rows[j], LANES, CHANNELS, WARPS),)
    return out


@gluon.constexpr_function
def _copied_states(states, channels, warps):
    """[parties, warps, channels, states] for copies of a thread's `states` at once."""
    return gl.BlockedLayout(
        [1, 1, 1, states], [1, 32 // channels, channels, 1], [warps, 1, 1, 1], [3, 2, 1, 0]
    )


@gluon.constexpr_function
def _own_states(states, lanes, channels, warps):
    """[channels, states] of a warp, the same in all lanes of a channel."""
    return gl.SliceLayout(
        1,
        gl.SliceLayout(
            0,
            gl.BlockedLayout(
                [1, 1, 1, states], [1, channels, lanes, 1], [warps, 1, 1, 1], [3, 1, 2, 0]
            ),
        ),
    )


@gluon.jit
def _fetch_states(
    memory, slot, A2, saved, edges, first_channel,
    N: gl.constexpr, STATES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Starts to copy A2, the saved states and the edges of all parties.

    Args:
        memory: shared float32 [2, parties, warps, channels, states] for A2 and [4, ...] for the
            others: slots of saved states and edges alternate.
        slot: 0 or 1, where they go.
    """
    layout: gl.constexpr = _copied_states(STATES, CHANNELS, WARPS)
    three: gl.constexpr = gl.SliceLayout(3, layout)
    party = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, three)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, three)))
    part = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, three)))
    j = gl.arange(0, STATES, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    place = gl.expand_dims(gl.expand_dims(party, 1), 2) * (CHANNELS * N)
    place = place + gl.expand_dims(gl.expand_dims(warp, 0), 2) * STATES
    place = place + gl.expand_dims(gl.expand_dims(part, 0), 1) * N
    place = gl.expand_dims(place, 3) + gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 1), 2)
    place = first_channel * N + place
    copy_to_shared(memory[0].index(slot), A2 + place, cache_modifier=".ca")
    copy_to_shared(memory[1].index(2 * slot), saved + place, cache_modifier=".ca")
    copy_to_shared(memory[1].index(2 * slot + 1), edges + place, cache_modifier=".ca")


@gluon.jit
def _fetch(
    stages, u, delta, dy, z, fetched, slot, A2, saved, edges, first_channel, step, row,
    L: gl.constexpr, N: gl.constexpr, STATES: gl.constexpr, WHOLE: gl.constexpr,
    EVERY: gl.constexpr, HAS_Z: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts to copy what the parties from `first_channel` need, as one commit group."""
    place = (first_channel + row) * L + step
    _fetch_rows(stages[0], u, place, WHOLE)
    _fetch_rows(stages[1], delta, place, WHOLE)
    _fetch_rows(stages[2], dy, place, WHOLE)
    if HAS_Z:
        _fetch_rows(stages[3], z, place, WHOLE)
    if EVERY:
        _fetch_states(
            fetched, slot, A2, saved, edges, first_channel, N, STATES, CHANNELS, WARPS
        )
    async_copy.commit_group()


@gluon.jit
def _read_states(
    memory, slot, party, warp, SLOTS: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, STATES: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """COUNT of a warp's states of a party, from number FIRST: tensors [1, channels, 1]."""
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    mine = _reinterpret(memory, gl.float32, [SLOTS * WARPS * WARPS, CHANNELS, STATES], plain)
    mine = mine.index((slot * WARPS + party) * WARPS + warp)
    x = mine.slice(FIRST, COUNT, 1).load(_own_states(COUNT, LANES, CHANNELS, WARPS))
    x = gl.expand_dims(x, 1)
    if COUNT == 1:
        rows = (gl.reshape(x, [CHANNELS, 1]),)
    else:
        rows = peel(x, gl.SliceLayout(0, cube))
    out = ()
    for j in gl.static_range(0, COUNT):
        row = gl.convert_layout(rows[j], gl.SliceLayout(0, cube), assert_trivial=True)
        out = out + (gl.expand_dims(row, 0),)
    return out


@gluon.jit
def _turn(
    dts, xs, dys, spans, ys, dxs, exponents, dBs, dCs, states, slot, mine, warp, coefficients,
    restart, restarts, lane3, zero,
    EVERY: gl.constexpr, RESTARTS: gl.constexpr, REVERSE: gl.constexpr, HAS_Z: gl.constexpr, STATES: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Each warp's states of one party.

    Returns:
        ys, dxs, exponents: with these states added. `exponents` are the gradients of dt * A2.
        dBs, dCs: with these channels added.
        dAs: four sums over a lane's steps; zeros where there are fewer states.
    """
    new_dBs = ()
    new_dCs = ()
    dAs = ()
    TOGETHER: gl.constexpr = min(STATES, 2)
    for j in gl.static_range(0, STATES):
        if EVERY:
            if j % TOGETHER == 0:
                As = _read_states(
                    states[0], slot, mine, warp, 2, j, TOGETHER, STATES, LANES, CHANNELS, WARPS
                )
                # Only the row's first lane needs the state, only its last one the adjoint.
                ends = _read_states(
                    states[1], 2 * slot + _half(REVERSE), mine, warp, 4, j, TOGETHER,
                    STATES, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            a = As[j % TOGETHER]
            h_in = ends[j % TOGETHER]
            q_in = h_in
        else:
            a = states[0][j]
            h_in = states[1][j]
            q_in = states[2][j]
        B_n = _read_coefficients(coefficients.index(2 * j), K, LANES, CHANNELS, WARPS)
        C_n = _read_coefficients(coefficients.index(2 * j + 1), K, LANES, CHANNELS, WARPS)
        decays = ()
        inflows = ()
        for k in gl.static_range(0, K):
            decays = decays + (exp2(dts[k] * a),)
            inflows = inflows + (xs[k] * B_n[k],)
        span_decays = ()
        for i in gl.static_range(0, _levels(LANES)):
            span_decay = exp2(spans[i] * a)
            if RESTARTS:
                span_decay = gl.where(restarts[i] > 0, 0.0, span_decay)
            span_decays = span_decays + (span_decay,)
        # Everything in the scan's order and in the adjoint's.
        on_decays = ordered(decays, K, REVERSE)
        on_inflows = ordered(inflows, K, REVERSE)
        on_C = ordered(C_n, K, REVERSE)
        on_dys = ordered(dys, K, REVERSE)
        back_decays = ordered(decays, K, not REVERSE)
        back_C = ordered(C_n, K, not REVERSE)
        back_dys = ordered(dys, K, not REVERSE)
        h = on_inflows[0]
        g = back_C[0] * back_dys[0]
        for step in gl.static_range(1, K):
            h = unless(h, restart, in_order(step, K, REVERSE), RESTARTS)
            h = on_decays[step] * h + on_inflows[step]
            g_n = back_C[step] * back_dys[step]
            if RESTARTS:
                q = back_decays[step - 1] * g
                g = g_n + unless(q, restart, in_order(step - 1, K, not REVERSE), RESTARTS)
            else:
                g = back_decays[step - 1] * g + g_n
        q = back_decays[K - 1] * g
        q = unless(q, restart, in_order(K - 1, K, not REVERSE), RESTARTS)
        h, q = _enter(h, q, h_in, q_in, lane3, span_decays, LANES, CHANNELS, REVERSE, RESTARTS)
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
        ys = _pinned(ordered(y_sums, K, REVERSE), K)
        new_dCs = new_dCs + _pinned(ordered(dC_sums, K, REVERSE), K)
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
            if step == 0:
                dA_n = exponent * back_dts[step]
            else:
                dA_n = exponent * back_dts[step] + dA_n
        dxs = _pinned(ordered(dx_sums, K, not REVERSE), K)
        exponents = _pinned(ordered(exponent_sums, K, not REVERSE), K)
        new_dBs = new_dBs + _pinned(ordered(dB_sums, K, not REVERSE), K)
        dAs = dAs + (dA_n,)
    for _ in gl.static_range(STATES, 4):
        dAs = dAs + (zero,)
    return ys, dxs, exponents, new_dBs, new_dCs, dAs


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
    SP: gl.constexpr = _padded(STATES)
    SPANS: gl.constexpr = _padded(_levels(LANES))
    EVERY: gl.constexpr = WHOLE and N == STATES * WARPS and SP == STATES
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
    tiles: gl.constexpr = _tiles(K, LANES, CHANNELS, WARPS)
    flat: gl.constexpr = row_layout(LANES, CHANNELS, WARPS)
    several: gl.constexpr = tile_layout(SP, LANES, CHANNELS, WARPS)
    warp = _warp()
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
    step_t = gl.arange(
        0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, tiles)))
    )
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
        restarts = _spans(gl.where(restart != 0, 1.0, 0.0), LANES, CHANNELS, REVERSE)
    ROUNDS: gl.constexpr = (BLOCK + ROWS - 1) // ROWS
    if WHOLE:
        _fetch(
            stages, u, delta, dy, z, fetched, 0, A2, saved, edges, 0, offset_t, row_t,
            L, N, STATES, WHOLE, EVERY, HAS_Z, CHANNELS, WARPS,
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
        u_t = _load_rows(stages[0], u, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        delta_t = _load_rows(stages[1], delta, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        dy_t = _load_rows(stages[2], dy, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            z_t = _load_rows(stages[3], z, place_t, there_t, WHOLE, K, LANES, CHANNELS, WARPS)
        if WHOLE:  # the next parties', under way during these ones' turns
            following = gl.minimum(i + 1, ROUNDS - 1) * ROWS
            _fetch(
                stages, u, delta, dy, z, fetched, (i + 1) % 2, A2, saved, edges, following,
                offset_t, row_t, L, N, STATES, WHOLE, EVERY, HAS_Z, CHANNELS, WARPS,
            )  # fmt: skip
        us = _steps_of(u_t, K, LANES, CHANNELS, WARPS)
        deltas = _steps_of(delta_t, K, LANES, CHANNELS, WARPS)
        given = _steps_of(dy_t, K, LANES, CHANNELS, WARPS)
        zs = given
        if HAS_Z:
            zs = _steps_of(z_t, K, LANES, CHANNELS, WARPS)
        valid = exists_f.to(gl.int32) * 0
        if (not WHOLE) or RESTARTS:
            for k in gl.static_range(0, K):
                inside = exists_f & (first + lane_f * K + k < L)
                valid = valid | (inside.to(gl.int32) << k)
        if RESTARTS:
            marked, no_restarts = load_marks(marks, row_m, first, L, K, LANES, CHANNELS, WARPS)
            valid = valid & marked
            us = keep(us, valid, K)
            deltas = keep(deltas, valid, K)
            given = keep(given, valid, K)
            zs = keep(zs, valid, K)
        D_c = lane_f.to(gl.float32) * 0
        bias_c = D_c
        if HAS_D:
            D_c = _load_channels(D, channel_f, exists_f, WHOLE)
        if HAS_BIAS:
            bias_c = _load_channels(bias, channel_f, exists_f, WHOLE)
        dts = ()
        xs = ()
        dys = ()
        slopes = ()
        factors = ()
        for k in gl.static_range(0, K):
            delta_k = deltas[k]
            if HAS_BIAS:
                delta_k = delta_k + bias_c
            dt = delta_k
            slope = dt * 0 + 1.0
            if SOFTPLUS:
                e = exp_minus_abs(delta_k)
                dt = softplus(delta_k, e)
                slope = softplus_slope(delta_k, e)
            dts = dts + (dt,)
            slopes = slopes + (slope,)
            gated = given[k]
            factor = gated
            if HAS_Z:
                s = sigmoid(zs[k])
                gated = given[k] * (zs[k] * s)
                factor = given[k] * (s * (1.0 + zs[k] * (1.0 - s)))
            dys = dys + (gated,)
            factors = factors + (factor,)
        if (not WHOLE) or RESTARTS:
            dts = keep(dts, valid, K)
        for k in gl.static_range(0, K):
            xs = xs + (dts[k] * us[k],)
        spans = _spans(_total(dts, K), LANES, CHANNELS, REVERSE)
        for _ in gl.static_range(_levels(LANES), SPANS):
            spans = spans + (dts[0],)
        _write_rows(far, spans, SPANS, LANES, CHANNELS, WARPS)
        _write_rows(operands[0], dts, K, LANES, CHANNELS, WARPS)
        _write_rows(operands[1], xs, K, LANES, CHANNELS, WARPS)
        _write_rows(operands[2], dys, K, LANES, CHANNELS, WARPS)
        _write_rows(kept[0], us, K, LANES, CHANNELS, WARPS)
        if SOFTPLUS:
            _write_rows(kept[1], slopes, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            _write_rows(kept[2], factors, K, LANES, CHANNELS, WARPS)

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
                    As = _load_states(A2, place_s, there, SP, LANES, CHANNELS, WARPS)
                    hs = _load_states(saved, place_s, there, SP, LANES, CHANNELS, WARPS)
                    qs = _load_states(edges, place_s, there, SP, LANES, CHANNELS, WARPS)
                    states = (As, hs, qs)
                source = sums if half == 0 else even_sums
                target = even_sums if half == 0 else sums
                dts_t = _read_party(operands[0], mine, K, LANES, CHANNELS, WARPS)
                xs_t = _read_party(operands[1], mine, K, LANES, CHANNELS, WARPS)
                dys_t = _read_party(operands[2], mine, K, LANES, CHANNELS, WARPS)
                spans_t = _read_party(far, mine, SPANS, LANES, CHANNELS, WARPS)
                if half == 0:
                    dxs_t, exponents_t, ys_t = zeros, zeros, zeros
                    if pair > 0:
                        dxs_t, exponents_t, ys_t = _read_sums(
                            source, giver, HAS_Z, K, LANES, CHANNELS, WARPS
                        )
                else:
                    dxs_t, exponents_t, ys_t = _read_sums(
                        source, giver, HAS_Z, K, LANES, CHANNELS, WARPS
                    )
                ys, dxs, exponents, dBs, dCs, dAs = _turn(
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
                gl.store(dA + channel3 * N + n3, _four_sums(dAs, lane3, LANES, CHANNELS), mask=here)
                _write_rows(target[0], dxs, K, LANES, CHANNELS, WARPS)
                _write_rows(target[1], exponents, K, LANES, CHANNELS, WARPS)
                if HAS_Z:
                    _write_rows(target[2], ys, K, LANES, CHANNELS, WARPS)

        # The rest of the chain rule, of the warps' own parties.
        dts = _read_party(operands[0], warp, K, LANES, CHANNELS, WARPS)
        dys = _read_party(operands[2], warp, K, LANES, CHANNELS, WARPS)
        us = _read_party(kept[0], warp, K, LANES, CHANNELS, WARPS)
        slopes = us
        factors = us
        if SOFTPLUS:
            slopes = _read_party(kept[1], warp, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            factors = _read_party(kept[2], warp, K, LANES, CHANNELS, WARPS)
        D_3 = _in_cube(D_c + row_f * 0, LANES, CHANNELS, WARPS)
        valid3 = _in_cube(valid, LANES, CHANNELS, WARPS)
        dus = ()
        ddeltas = ()
        dzs = ()
        dD_c = zero
        dbias_c = zero
        for k in gl.static_range(0, K):
            du_k = dxs[k] * dts[k]
            ddelta_k = dxs[k] * us[k] + exponents[k] * LN2
            if SOFTPLUS:
                ddelta_k = ddelta_k * slopes[k]
            if (not WHOLE) or RESTARTS:
                ddelta_k = gl.where((valid3 & (1 << k)) != 0, ddelta_k, 0.0)
            if HAS_D:
                du_k = D_3 * dys[k] + du_k
                dD_c = dys[k] * us[k] + dD_c
            dus = dus + (gl.reshape(du_k, [ROWS, LANES]),)
            ddeltas = ddeltas + (gl.reshape(ddelta_k, [ROWS, LANES]),)
            dbias_c = dbias_c + ddelta_k
            if HAS_Z:
                y = ys[k]
                if HAS_D:
                    y = D_3 * us[k] + y
                dz_k = factors[k] * y
                if RESTARTS:  # an infinite state may pass through padding
                    dz_k = gl.where((valid3 & (1 << k)) != 0, dz_k, 0.0)
                dzs = dzs + (gl.reshape(dz_k, [ROWS, LANES]),)
        _store_rows(du, place_t, there_t, dus, WHOLE, K, LANES, CHANNELS, WARPS)
        _store_rows(ddelta, place_t, there_t, ddeltas, WHOLE, K, LANES, CHANNELS, WARPS)
        if HAS_Z:
            _store_rows(dz, place_t, there_t, dzs, WHOLE, K, LANES, CHANNELS, WARPS)
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
    cube: gl.constexpr = _cube(LANES, CHANNELS, WARPS)
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
        _stage(u, WHOLE, K, LANES, CHANNELS, WARPS),
        _stage(delta, WHOLE, K, LANES, CHANNELS, WARPS),
        _stage(dy, WHOLE, K, LANES, CHANNELS, WARPS),
        _stage(z, WHOLE and HAS_Z, K, LANES, CHANNELS, WARPS),
    )
    far = gl.allocate_shared_memory(
        gl.float32, [WARPS, _padded(_levels(LANES)) // 4, LANES, CHANNELS, 4], plain
    )
    for _ in gl.static_range(0, 3):  # in one, any two accesses would get a barrier between them
        operands = operands + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        sums = sums + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        even_sums = even_sums + (gl.allocate_shared_memory(gl.float32, parties, plain),)
        kept = kept + (gl.allocate_shared_memory(gl.float32, parties, plain),)
    if WHOLE and N == NP and STATES == _padded(STATES):
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
