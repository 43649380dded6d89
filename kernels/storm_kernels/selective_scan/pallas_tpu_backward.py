"""The backward kernel of the TPU scan; `pallas_tpu_tiles` says how its work is laid out.

Time runs against the scan. For each span and each block of 1024 channels these loops run: dt,
dt * u and the gradient of y before the gate (natural form); the states of the span from the saved
one, kept in VMEM; the gradient of the state back through the span, half a span at a time, then
the sums over sublanes of what it left; the rest of the chain rule (natural form). One step back,
for every state n, with e = dt A and r = C dy:

    g += r             the gradient of the state after the step
    dC C = sum r h_after,  y dy = sum_n r h_after,  dB = sum g x,  dx = sum_n g B
    g *= exp(e);  s = g h_before;  dA A = sum s e,  ddt dt = sum_n s e

So one product serves two sums, and what is divided by (dt, A, C, and z for the gradient of the
gate) is kept `away_from_zero`. The sums over n are additions of registers. Those over channels, dB
and dC, are products stored as registers, added over sublanes later and over lanes once a span.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from storm_kernels.selective_scan import pallas_tpu_tiles as tiles
from storm_kernels.selective_scan.pallas_tpu_operands import (
    Arrays,
    Operands,
    Outputs,
    Specs,
    launch,
)
from storm_kernels.selective_scan.pallas_tpu_tiles import BLOCK, LANES, PITCH, TILES, Geometry


def backward(
    operands: Operands, states: jax.Array, dy: jax.Array, dfinal: jax.Array, interpret
) -> Arrays:
    """The gradients of a scan.

    Args:
        operands: as for `forward`.
        states: as `forward` returned them.
        dy: [batch, length, channels], the gradient of y.
        dfinal: [batch, channels, state], the gradient of the final state.
        interpret: as `pallas_call` takes it.

    Returns:
        The gradients of the arrays, in their dtypes; those of A, D and delta_bias float32 with one
        row per batch row, None for what is not differentiated.
    """
    # The kernel's sums for the gradients of A and C are those times A and C.
    arrays = dataclasses.replace(
        operands.arrays,
        A=tiles.away_from_zero(operands.arrays.A.astype(jnp.float32)),
        C=tiles.away_from_zero(operands.arrays.C),
    )
    operands = dataclasses.replace(operands, arrays=arrays)
    streams = {"du": arrays.u, "ddelta": arrays.delta}
    if arrays.z is not None:
        streams["dz"] = arrays.z
    sizes = [x.dtype.itemsize for x in streams.values()]
    geo = operands.geometry(2 * sum(sizes) + dy.dtype.itemsize, operands.cut.time_blocks[1])
    specs = Specs(geo, time_reversed=not geo.reverse)
    inputs = operands.common_inputs(geo, specs)
    inputs["dy"] = (operands.stream(dy, geo), specs.stream())
    inputs["dfinal"] = (operands.state_in(dfinal, geo), specs.state())
    inputs["states"] = (states, specs.states())
    shape = (geo.batch, geo.length, geo.channels)
    outputs: Outputs = {}
    for name, x in streams.items():
        outputs[name] = (shape, x.dtype, specs.stream())
    state_shape = (geo.batch, geo.rows, geo.channels)
    outputs["dA"] = (state_shape, jnp.float32, specs.state())
    outputs["dinitial"] = (state_shape, jnp.float32, specs.state())
    registers = pl.cdiv(geo.span * geo.rows, BLOCK)
    steps = geo.groups * geo.supers
    sums = (geo.batch, steps, geo.time_blocks * geo.spans, registers, TILES, LANES)
    outputs["dB"] = (sums, jnp.float32, specs.sums(registers))
    outputs["dC"] = (sums, jnp.float32, specs.sums(registers))
    for name in ("D", "delta_bias"):
        if name in inputs:
            vector = (geo.batch, TILES, geo.channels)
            outputs[f"d{name}"] = (vector, jnp.float32, specs.state(rows=TILES))
    scratch = {
        "A_rows": tiles.rows_scratch(geo.blocks * geo.rows),
        "g": tiles.rows_scratch(geo.blocks * geo.rows),
        "dA_rows": tiles.rows_scratch(geo.blocks * geo.rows),
        "h": tiles.rows_scratch(geo.rows),
        "history": ((geo.span + 1) * geo.used * TILES, LANES),
        "B_rows": tiles.columns_scratch(geo, geo.used),
        "C_rows": tiles.columns_scratch(geo, geo.used),
        "dt_rows": tiles.rows_scratch(geo.span),
        "x_rows": tiles.rows_scratch(geo.span),
        "dy_rows": tiles.rows_scratch(geo.span),
        "dx_rows": tiles.rows_scratch(geo.span),
        "ddt_rows": tiles.rows_scratch(geo.span),
        "slope_rows": tiles.rows_scratch(geo.span),
        "dB_parts": tiles.rows_scratch(_stretch(geo) * geo.rows),
        "dC_parts": tiles.rows_scratch(_stretch(geo) * geo.rows),
        "dB_sums": (geo.span * geo.rows, LANES),
        "dC_sums": (geo.span * geo.rows, LANES),
    }
    if arrays.z is not None:
        scratch["y_rows"] = tiles.rows_scratch(geo.span)
        scratch["gate_rows"] = tiles.rows_scratch(geo.span)
    if geo.marked:
        scratch["mark_rows"] = tiles.columns_scratch(geo, 2)
    results = launch(_kernel, "selective_scan_backward", geo, inputs, outputs, scratch, interpret)
    return _gradients(operands, geo, results)


def _gradients(operands: Operands, geo: Geometry, results: dict[str, jax.Array]) -> Arrays:
    """What the kernel wrote, in the shapes of the operands."""
    arrays = operands.arrays
    length = arrays.u.shape[1]

    def stream(name):
        return operands.cut_channels(results[name], -1)[:, :length]

    def column(x, like, times=None):
        # Sums lie as [register, sublane, lane], the lane counting slower than the sublane.
        x = x.reshape(geo.batch, geo.groups, geo.supers, *x.shape[2:]).sum(axis=2)
        x = x.swapaxes(-1, -2).reshape(geo.batch, geo.groups, geo.time_blocks * geo.spans, -1)
        x = x[..., : geo.span * geo.rows].reshape(geo.batch, geo.groups, -1, geo.rows)
        x = x[:, :, :length, : like.shape[-1]].swapaxes(1, 2)
        if times is not None:
            x = x / times.astype(jnp.float32)
        if arrays.valid is not None:
            x = jnp.where(arrays.valid[:, :, None, None], x, 0)
        return x.astype(like.dtype)

    def vector(name):
        if name not in results:
            return None
        return operands.cut_channels(jnp.sum(results[name], axis=1), -1)

    return Arrays(
        u=stream("du"),
        delta=stream("ddelta"),
        B=column(results["dB"], arrays.B),
        C=column(results["dC"], arrays.C, times=arrays.C),
        z=stream("dz") if "dz" in results else None,
        initial_state=operands.state_out(results["dinitial"]),
        valid=None,
        restart=None,
        A=operands.state_out(results["dA"]) / (arrays.A * tiles.LOG2_E),
        D=vector("dD"),
        delta_bias=vector("ddelta_bias"),
    )


def _kernel(geo: Geometry, r: SimpleNamespace) -> None:
    step = pl.program_id(2)
    channel_step = pl.program_id(1)
    live = geo.live_blocks(channel_step)
    last_block = geo.group_blocks - 1 - channel_step * geo.blocks

    @pl.when(step == 0)
    def _():
        def start(block):
            inside = _Inside(geo, block == last_block)
            for _, tile, at, begin in tiles.state_tiles(geo, block):
                tiles.rows_from_natural(r.A_rows, begin, tile, r.A[0, *at])
                tiles.rows_from_natural(r.g, begin, tile, inside(r.dfinal[0, *at], tile))
                tiles.rows_from_natural(r.dA_rows, begin, tile, jnp.zeros((TILES, LANES)))

        tiles.loop(live, start)
        for name in ("dD", "ddelta_bias"):
            if hasattr(r, name):
                ref = getattr(r, name)
                ref[...] = jnp.zeros_like(ref)
        if geo.used % TILES:
            # Rows between the states of two positions are added up with the others.
            for ref in (r.dB_parts, r.dC_parts):
                ref[...] = jnp.zeros_like(ref)

    def span(index):
        where = index if geo.reverse else geo.spans - 1 - index
        first = where * geo.span
        positions = pl.ds(pl.multiple_of(first, geo.span), geo.span)
        pairs = [(r.B.at[0, 0, positions], r.B_rows), (r.C.at[0, 0, positions], r.C_rows)]
        tiles.broadcast_columns(pairs, geo)
        if geo.marked:
            tiles.broadcast_columns([(r.marks.at[0, positions], r.mark_rows)], geo)
            marked = r.flags[0, 0, 0, where] != 0

        def block(index):
            def run(careful):
                inside = _Inside(geo, careful and index == last_block)
                for _, tile, at, begin in tiles.state_tiles(geo, index):
                    value = inside(r.states[0, where, *at], tile)
                    tiles.rows_from_natural(r.h, begin - index * geo.rows, tile, value)
                marks = careful and geo.marked
                _before(geo, r, index, first, inside, marks)
                _recompute(geo, r, index, marks)
                _reverse(geo, r, index, marks)
                _after(geo, r, index, first, inside, marks)

            if not geo.marked and not geo.tail:
                run(False)
                return
            special = jnp.bool_(False)
            if geo.tail:
                special |= index == last_block
            if geo.marked:
                special |= marked
            pl.when(jnp.logical_not(special))(lambda: run(False))
            pl.when(special)(lambda: run(True))

        tiles.loop(live, block)
        _finish_sums(geo, r.dB_sums, r.dB, where)
        _finish_sums(geo, r.dC_sums, r.dC, where)

    tiles.loop(geo.spans, span)

    @pl.when(step == geo.time_blocks - 1)
    def _():
        def finish(block):
            for _, tile, at, begin in tiles.state_tiles(geo, block):
                r.dA[0, *at] = tiles.natural_from_rows(r.dA_rows, begin, tile)
                r.dinitial[0, *at] = tiles.natural_from_rows(r.g, begin, tile)

        tiles.loop(live, finish)


class _Inside:
    """Zeros in place of what a block reads behind the last channel."""

    def __init__(self, geo: Geometry, applies):
        # In a block before the last one `applies` is False and everything counts.
        self.limit = None
        if geo.tail and applies is not False:
            self.limit = jnp.where(applies, geo.tail, BLOCK)

    def __call__(self, value: jax.Array, tile: int, and_valid=None) -> jax.Array:
        mask = and_valid
        if self.limit is not None:
            lane = lax.broadcasted_iota(jnp.int32, (TILES, LANES), 1) + tile * LANES
            inside = lane < self.limit
            mask = inside if mask is None else mask & inside
        return value if mask is None else jnp.where(mask, value, 0.0)


def _before(geo: Geometry, r, block, first, inside: _Inside, marks: bool) -> None:
    """dt, dt * u and the gradient of y before the gate, in row form, and slopes for `_after`."""
    view = tiles.views(geo, r, first, block)

    def eight(t):
        valid = tiles.valid(r.mark_rows, t) if marks else None

        def one(tile):
            at = (pl.ds(t, TILES), tiles.lanes_of(0, tile))

            def masked(value):
                return inside(value.astype(jnp.float32), tile, valid)

            dt = view.delta[at].astype(jnp.float32)
            if hasattr(r, "delta_bias"):
                dt += view.delta_bias[:, at[1]]
            if geo.softplus:
                dt, slope = tiles.softplus_and_slope(dt)
            else:
                dt = tiles.away_from_zero(dt)
                slope = tiles.reciprocal(dt)
            tiles.rows_from_natural(r.slope_rows, t, tile, slope)
            dt, dy = masked(dt), masked(view.dy[at])
            if hasattr(r, "z"):
                gate, slope = tiles.silu_and_slope(masked(view.z[at]))
                tiles.rows_from_natural(r.gate_rows, t, tile, slope)
                dy *= gate
            tiles.rows_from_natural(r.dt_rows, t, tile, dt)
            tiles.rows_from_natural(r.x_rows, t, tile, dt * masked(view.u[at]))
            tiles.rows_from_natural(r.dy_rows, t, tile, dy)

        tiles.each_tile(geo.cut.back_tiles, one)

    tiles.eights(geo, eight, unroll=min(4, geo.cut.eights))


def _recompute(geo: Geometry, r: SimpleNamespace, block, marks: bool) -> None:
    """The states of a span: the one before it, and those after each of its steps."""

    def part(n0, states: int, _) -> None:
        base = block * geo.rows + n0

        def some(steps, h):
            h = list(h)
            for _, index, t in steps:
                dt, x = tiles.row(r.dt_rows, t), tiles.row(r.x_rows, t)
                keep = tiles.keep(geo, r.mark_rows, t) if marks else None
                for n in range(states):
                    at = tiles.column(geo, t, n0 + n)
                    before = h[n] if keep is None else jnp.where(keep, h[n], 0.0)
                    decay = jnp.exp2(dt * tiles.row(r.A_rows, base + n))
                    h[n] = decay * before + x * tiles.splat(geo, r.B_rows, at)
                    r.history[_register(geo, index + 1, n0 + n), :] = h[n]
            return h

        h = [tiles.row(r.h, n0 + n) for n in range(states)]
        for n in range(states):
            r.history[_register(geo, 0, n0 + n), :] = h[n]
        tiles.carry_steps(geo, 0, geo.span, geo.cut.again_unroll, some, h)

    tiles.parts_of_states(geo, geo.cut.again_held, part)


def _register(geo: Geometry, index, n):
    """Where the register of state n at an index lies in `history` and `through`."""
    return pl.ds(tiles.value((index * geo.used + n) * TILES), TILES)


def _stretch(geo: Geometry) -> int:
    """Positions whose products are in VMEM at once."""
    return max(int(geo.span * geo.cut.stretch), TILES)


def _reverse(geo: Geometry, r: SimpleNamespace, block, marks: bool) -> None:
    """The gradient of the state back through a span, a stretch at a time, and its sums."""
    stretch = _stretch(geo)

    def some(number):
        first = geo.span - stretch - number * stretch

        def part(n0, states: int, first_part: bool) -> None:
            _carry_back(geo, r, block, first, n0, states, first_part, marks)

        tiles.parts_of_states(geo, geo.cut.back_held, part)
        _add_products(geo, r, block, first)

    tiles.loop(geo.span // stretch, some)


def _carry_back(
    geo: Geometry, r: SimpleNamespace, block, first, n0, states: int, first_part: bool, marks: bool
) -> None:
    """The recurrence of some states from n0 on, and the products and sums that it gives."""
    base = block * geo.rows + n0
    sums = [r.dx_rows, r.ddt_rows] + ([r.y_rows] if hasattr(r, "z") else [])

    def some(steps, carry):
        g, dA = list(carry[0]), list(carry[1])
        for place, index, t in steps:
            dt, x = tiles.row(r.dt_rows, t), tiles.row(r.x_rows, t)
            dy = tiles.row(r.dy_rows, t)
            keep = tiles.keep(geo, r.mark_rows, t) if marks else None
            totals = []
            for n in range(states):
                at = tiles.column(geo, t, n0 + n)
                part = place * geo.rows + (n0 + n)
                before = r.history[_register(geo, index, n0 + n), :]
                after = r.history[_register(geo, index + 1, n0 + n), :]
                read = dy * tiles.splat(geo, r.C_rows, at)
                total = g[n] + read
                read *= after
                tiles.set_row(r.dC_parts, part, read)
                tiles.set_row(r.dB_parts, part, total * x)
                exponent = dt * tiles.row(r.A_rows, base + n)
                g[n] = total * jnp.exp2(exponent)
                if keep is not None:
                    g[n] = jnp.where(keep, g[n], 0.0)
                    before = jnp.where(keep, before, 0.0)
                through = (g[n] * exponent) * before
                dA[n] = dA[n] + through
                terms = (total * tiles.splat(geo, r.B_rows, at), through, read)[: len(sums)]
                totals = [a + b for a, b in zip(totals, terms, strict=True)] if n else terms
            for ref, total in zip(sums, totals, strict=True):
                tiles.set_row(ref, t, total if first_part else total + tiles.row(ref, t))
        return g, dA

    g = [tiles.row(r.g, base + n) for n in range(states)]
    dA = [tiles.row(r.dA_rows, base + n) for n in range(states)]
    g, dA = tiles.carry_steps(
        geo, first, _stretch(geo), geo.cut.back_unroll, some, (g, dA), against=True
    )
    for n in range(states):
        tiles.set_row(r.g, base + n, g[n])
        tiles.set_row(r.dA_rows, base + n, dA[n])


def _add_products(geo: Geometry, r: SimpleNamespace, block, first) -> None:
    """Adds the products of dB and dC over sublanes."""

    def some(chunk, steps):
        for place, _, t in steps:
            for parts, sums in ((r.dB_parts, r.dB_sums), (r.dC_parts, r.dC_sums)):
                _add_sublanes(geo, parts, sums, block, place, t, chunk * geo.chunk)

    tiles.steps(geo, first, _stretch(geo), 16, some)


def _add_sublanes(geo: Geometry, parts, sums, block, place, t, n0) -> None:
    """Adds the products of one position over sublanes: 8 states become one register."""
    for first in range(0, pl.cdiv(geo.chunk, TILES) * TILES, TILES):
        source = (place * geo.rows + (n0 + first)) * PITCH
        to = pl.ds(tiles.value(t * geo.rows + (n0 + first)), TILES)
        terms = [jnp.where(block == 0, 0.0, sums[to, :])]
        for sublane in range(TILES):
            terms.append(parts[pl.ds(tiles.value(source + sublane), TILES, stride=PITCH), :])
        while len(terms) > 1:
            pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
            terms = pairs + terms[len(pairs) * 2 :]
        sums[to, :] = terms[0]


def _after(geo: Geometry, r, block, first, inside: _Inside, marks: bool) -> None:
    """The gradients of u, delta and z from those of dt * u, dt and y before the gate."""
    view = tiles.views(geo, r, first, block)

    def eight(t):
        valid = tiles.valid(r.mark_rows, t) if marks else None

        def one(tile):
            at = (pl.ds(t, TILES), tiles.lanes_of(0, tile))
            lanes = at[1]

            def natural(rows):
                return tiles.natural_from_rows(rows, t, tile)

            u = inside(view.u[at].astype(jnp.float32), tile, valid)
            du = natural(r.dx_rows) * natural(r.dt_rows)
            # The weights in VMEM are A log2(e).
            ddelta = du * u + natural(r.ddt_rows) * tiles.LN_2
            ddelta = inside(ddelta * natural(r.slope_rows), tile, valid)
            y = natural(r.y_rows) if hasattr(r, "z") else None
            if hasattr(r, "D"):
                D, dy = view.D[:, lanes], natural(r.dy_rows)
                du += D * dy
                read = dy * u
                view.dD[:, lanes] += read
                y = y if y is None else y + D * read
            if y is not None:
                dz = inside(y * natural(r.gate_rows), tile, valid)
                view.dz[at] = dz.astype(r.dz.dtype)
            if hasattr(r, "delta_bias"):
                view.ddelta_bias[:, lanes] += ddelta
            view.du[at] = inside(du, tile, valid).astype(r.du.dtype)
            view.ddelta[at] = ddelta.astype(r.ddelta.dtype)

        tiles.each_tile(geo.cut.back_tiles, one)

    tiles.eights(geo, eight, unroll=min(2, geo.cut.eights))


def _finish_sums(geo: Geometry, sums, out, where) -> None:
    """Adds over lanes; the sum of row 8 j + i comes to sublane i, lane j of a register."""
    count = geo.span * geo.rows // TILES
    lane = lax.broadcasted_iota(jnp.int32, (TILES, LANES), 1)
    for register in range(pl.cdiv(count, LANES)):
        inside = min(LANES, count - register * LANES)

        def eight(index, packed, register=register):
            for offset in range(TILES):
                j = index * TILES + offset
                rows = pl.ds(pl.multiple_of((register * LANES + j) * TILES, TILES), TILES)
                total = jnp.sum(sums[rows, :], axis=1, keepdims=True)
                packed = jnp.where(lane == j, total, packed)
            return packed

        zero = jnp.zeros((TILES, LANES), jnp.float32)
        out[0, 0, where, register] = lax.fori_loop(0, inside // TILES, eight, zero)
