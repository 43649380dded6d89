"""Device functions of the GPU scan's backward: the states of one party, and all that is summed.

The states come from the saved ones by the scan of `gluon_forward`, the adjoint from its edges by
the same scan the other way. The lanes' own steps from zero, the scan over the lanes and the second
run are done for both chains side by side.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from storm_kernels.selective_scan.gluon_lanes import (
    exp2,
    in_order,
    onward,
    ordered,
    unless,
)
from storm_kernels.selective_scan.gluon_operands import read_states
from storm_kernels.selective_scan.gluon_parties import half_number, read_coefficients


@gluon.constexpr_function
def levels(lanes):
    """Steps of a scan over the lanes."""
    return lanes.bit_length() - 1


@gluon.constexpr_function
def _bound(lanes, stride, direction):
    """A shuffle's fourth operand: where a row of `lanes` threads, `stride` apart, ends."""
    return (32 - lanes * stride) << 8 | (31 if direction == "down" else 0)


@gluon.constexpr_function
def _enter_assembly(levels, stride, reverse, restarts):
    """The states with which the lanes are entered, the scan's and the adjoint's, side by side."""
    lanes = 1 << levels
    directions = ("down", "up") if reverse else ("up", "down")
    lines = ["{ .reg .pred p; .reg .f32 h, g, d, t0, t1;", "mov.f32 h, $2; mov.f32 g, $3;"]

    def shuffle(i, target, source, distance):
        end = f"{distance * stride}, {_bound(lanes, stride, directions[i])}, 0xffffffff;"
        lines.append(f"shfl.sync.{directions[i]}.b32 {target}, {source}, {end}")

    def add(i, predicate, decay, source):
        if restarts:  # zero times an infinite state would be no number
            lines.append(f"setp.neu.and.f32 p, {decay}, 0f00000000, {predicate};")
            predicate = "p"
        lines.append(f"@{predicate} fma.rn.f32 {'hg'[i]}, {decay}, {source}, {'hg'[i]};")

    # Which lanes have another so far before or after them is known. Shuffles would tell it too, but
    # ptxas gives all their answers one register, and the two chains would wait for each other.
    for i in range(2):
        for level in range(levels):
            up = directions[i] == "up"
            how, limit = ("ge", 1 << level) if up else ("lt", lanes - (1 << level))
            lines.append(f".reg .pred q{i}{level}; setp.{how}.u32 q{i}{level}, $6, {limit};")
        add(i, f"!q{i}0", "$7", f"${4 + i}")
    for level in range(levels):
        distance = 1 << level
        if level:
            # The decay of the lanes from this one onward is that of the last of them backward.
            shuffle(1, "d", f"${7 + level}", distance - 1)
        for i in range(2):
            shuffle(i, f"t{i}", "hg"[i], distance)
        for i in range(2):
            add(i, f"q{i}{level}", "d" if i and level else f"${7 + level}", f"t{i}")
    for i in range(2):
        shuffle(i, f"t{i}", "hg"[i], 1)
    for i in range(2):
        lines.append(f"selp.f32 ${i}, t{i}, ${4 + i}, q{i}0;")
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
        _enter_assembly(levels(LANES), CHANNELS, REVERSE, RESTARTS),
        _enter_constraints(levels(LANES)),
        operands,
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


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
def spans_of(x, LANES: gl.constexpr, CHANNELS: gl.constexpr, REVERSE: gl.constexpr):
    """Sums of x over the 1, 2, 4 ... lanes up to this one, in the direction of the scan.

    Where there are fewer lanes a sum is anything finite.
    """
    out = (x,)
    for level in gl.static_range(1, levels(LANES)):
        x = x + gl.inline_asm_elementwise(
            _far_assembly(LANES, CHANNELS, 1 << (level - 1), onward(REVERSE)), "=f,f", [x],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        out = out + (x,)
    return out


@gluon.jit
def total_of(steps, K: gl.constexpr):
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
def four_sums(x, lane, LANES: gl.constexpr, CHANNELS: gl.constexpr):
    """The sums of four tensors over the lanes of a row: lane i has that of number 4 i // LANES."""
    return gl.inline_asm_elementwise(
        _four_sums_assembly(LANES, CHANNELS), "=&f,f,f,f,f,r", [x[0], x[1], x[2], x[3], lane],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def add_party(
    dts, xs, dys, spans, ys, dxs, exponents, dBs, dCs, states, slot, mine, warp, coefficients,
    restart, restarts, lane3, zero,
    EVERY: gl.constexpr, RESTARTS: gl.constexpr, REVERSE: gl.constexpr, HAS_Z: gl.constexpr,
    STATES: gl.constexpr, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Adds each warp's states of one party to all sums.

    Args:
        dts, xs, dys: see `step_operands`; spans: of dts, see `spans_of`.
        ys, dxs, exponents: sums over states: y, and the gradients of dt u and of dt A2.
        dBs, dCs: sums over channels, STATES * K of them.
        states: A2, saved states and edges in registers, or where `fetch` put them (EVERY).
        slot, mine, warp: which of those are meant.
        coefficients: shared [2 * STATES, WARPS, K / 4, LANES, 4], B and C in turn.
        restart: bits of steps before which the state restarts; restarts: its `spans_of`.

    Returns:
        ys, dxs, exponents: with these states added.
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
                As = read_states(
                    states[0], slot, mine, warp, 2, j, TOGETHER, STATES, LANES, CHANNELS, WARPS
                )
                # Only the row's first lane needs the state, only its last one the adjoint.
                ends = read_states(
                    states[1], 2 * slot + half_number(REVERSE), mine, warp, 4, j, TOGETHER,
                    STATES, LANES, CHANNELS, WARPS,
                )  # fmt: skip
            a = As[j % TOGETHER]
            h_in = ends[j % TOGETHER]
            q_in = h_in
        else:
            a = states[0][j]
            h_in = states[1][j]
            q_in = states[2][j]
        B_n = read_coefficients(coefficients.index(2 * j), K, LANES, CHANNELS, WARPS)
        C_n = read_coefficients(coefficients.index(2 * j + 1), K, LANES, CHANNELS, WARPS)
        decays = ()
        inflows = ()
        for k in gl.static_range(0, K):
            decays = decays + (exp2(dts[k] * a),)
            inflows = inflows + (xs[k] * B_n[k],)
        span_decays = ()
        for i in gl.static_range(0, levels(LANES)):
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
