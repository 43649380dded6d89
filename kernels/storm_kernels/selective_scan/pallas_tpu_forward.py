"""The forward kernel of the TPU scan; `pallas_tpu_tiles` says how its work is laid out.

A grid step holds T positions of `blocks` x 1024 channels of one batch row; time is the last and
sequential grid axis and the state stays in VMEM between its steps. For each span of S positions
B and C are broadcast to registers once. Then for each block of 1024 channels these loops run: dt
and dt * u, elementwise in natural form; the recurrence, some states at a time and some positions
unrolled (`shapes.TpuCut`); y, elementwise.
"""

import functools
from types import SimpleNamespace

import jax.numpy as jnp
from jax.experimental import pallas as pl

from storm_kernels.selective_scan import pallas_tpu_tiles as tiles
from storm_kernels.selective_scan.pallas_tpu_operands import Operands, Outputs, Specs, launch
from storm_kernels.selective_scan.pallas_tpu_tiles import TILES, Geometry


def forward(operands: Operands, output_dtype: jnp.dtype, keep_states: bool, interpret) -> tuple:
    """Runs the scan.

    Args:
        operands: what the kernel reads; see `Operands`.
        output_dtype: of y.
        keep_states: also return the states that the backward starts from.
        interpret: as `pallas_call` takes it.

    Returns:
        y [batch, length, channels], the final state [batch, rows, channels] and the states before
        each span [batch, spans, rows, channels] or None, all with the channels as padded.
    """
    arrays = operands.arrays
    streams = [x for x in (arrays.u, arrays.delta, arrays.z) if x is not None]
    stream_bytes = sum(x.dtype.itemsize for x in streams) + jnp.dtype(output_dtype).itemsize
    geo = operands.geometry(stream_bytes, operands.cut.time_blocks[0])
    specs = Specs(geo, time_reversed=geo.reverse)
    inputs = operands.common_inputs(geo, specs)
    inputs["initial"] = (operands.state_in(arrays.initial_state, geo), specs.state())
    outputs: Outputs = {
        "y": ((geo.batch, geo.length, geo.channels), output_dtype, specs.stream()),
        "final": ((geo.batch, geo.rows, geo.channels), jnp.float32, specs.state()),
    }
    if keep_states:
        count = geo.time_blocks * geo.spans
        shape = (geo.batch, count, geo.rows, geo.channels)
        outputs["states"] = (shape, jnp.float32, specs.states())
    scratch = {
        "h": tiles.rows_scratch(geo.blocks * geo.rows),
        "A_rows": tiles.rows_scratch(geo.blocks * geo.rows),
        "dt_rows": tiles.rows_scratch(geo.span),
        "x_rows": tiles.rows_scratch(geo.span),
        "y_rows": tiles.rows_scratch(geo.span),
        "B_rows": tiles.columns_scratch(geo, geo.used),
        "C_rows": tiles.columns_scratch(geo, geo.used),
    }
    if geo.marked:
        scratch["mark_rows"] = tiles.columns_scratch(geo, 2)
    results = launch(_kernel, "selective_scan_forward", geo, inputs, outputs, scratch, interpret)
    return results["y"], results["final"], results.get("states")


def _kernel(geo: Geometry, r: SimpleNamespace) -> None:
    step = pl.program_id(2)
    live = geo.live_blocks(pl.program_id(1))

    @pl.when(step == 0)
    def _():
        def start(block):
            for _, tile, at, begin in tiles.state_tiles(geo, block):
                tiles.rows_from_natural(r.h, begin, tile, r.initial[0, *at])
                tiles.rows_from_natural(r.A_rows, begin, tile, r.A[0, *at])

        tiles.loop(live, start)

    def save(ref, where, block):
        for _, tile, at, begin in tiles.state_tiles(geo, block):
            ref[*where, *at] = tiles.natural_from_rows(r.h, begin, tile)

    def span(index):
        where = geo.spans - 1 - index if geo.reverse else index
        first = where * geo.span
        positions = pl.ds(pl.multiple_of(first, geo.span), geo.span)
        pairs = [(r.B.at[0, 0, positions], r.B_rows), (r.C.at[0, 0, positions], r.C_rows)]
        tiles.broadcast_columns(pairs, geo)

        def block(careful, block):
            if hasattr(r, "states"):
                save(r.states, (0, where), block)
            _before(geo, r, block, first, careful)
            _recurrence(geo, r, block, careful)
            _after(geo, r, block, first, careful)

        def blocks(careful):
            tiles.loop(live, functools.partial(block, careful))

        if not geo.marked:
            blocks(False)
            return
        plain = r.flags[0, 0, 0, where] == 0
        pl.when(plain)(lambda: blocks(False))

        @pl.when(jnp.logical_not(plain))
        def _():
            tiles.broadcast_columns([(r.marks.at[0, positions], r.mark_rows)], geo)
            blocks(True)

    tiles.loop(geo.spans, span)

    @pl.when(step == geo.time_blocks - 1)
    def _():
        tiles.loop(live, functools.partial(save, r.final, (0,)))


def _before(geo: Geometry, r: SimpleNamespace, block, first, careful: bool) -> None:
    """dt and dt * u of a span, in row form."""
    view = tiles.views(geo, r, first, block)

    def eight(t):
        positions = pl.ds(t, TILES)
        valid = tiles.valid(r.mark_rows, t) if careful else None

        def one(tile):
            lanes = tiles.lanes_of(0, tile)
            dt = view.delta[positions, lanes].astype(jnp.float32)
            u = view.u[positions, lanes].astype(jnp.float32)
            if hasattr(r, "delta_bias"):
                dt += view.delta_bias[:, lanes]
            if geo.softplus:
                dt = tiles.softplus(dt)
            if valid is not None:
                # Only after the softplus: dt = 0 alone leaves the state as it is.
                dt, u = jnp.where(valid, dt, 0.0), jnp.where(valid, u, 0.0)
            tiles.rows_from_natural(r.dt_rows, t, tile, dt)
            tiles.rows_from_natural(r.x_rows, t, tile, dt * u)

        tiles.each_tile(TILES, one)

    tiles.eights(geo, eight, unroll=min(4, geo.cut.eights))


def _recurrence(geo: Geometry, r: SimpleNamespace, block, careful: bool) -> None:
    """The state through a span, and y before skip and gate, in row form."""

    def part(n0, states: int, first: bool) -> None:
        base = block * geo.rows + n0

        def some(steps, h):
            h = list(h)
            for _, _, t in steps:
                dt, x = tiles.row(r.dt_rows, t), tiles.row(r.x_rows, t)
                if careful:
                    # A select and not a product: an infinite state must not leak.
                    keep = tiles.keep(geo, r.mark_rows, t)
                    h = [jnp.where(keep, before, 0.0) for before in h]
                y = None
                for n in range(states):
                    at = tiles.column(geo, t, n0 + n)
                    decay = jnp.exp2(dt * tiles.row(r.A_rows, base + n))
                    # The order of operands is the compiler's of work: with the products the other
                    # way round it spills a register on a v4.
                    h[n] = x * tiles.splat(geo, r.B_rows, at) + h[n] * decay
                    term = tiles.splat(geo, r.C_rows, at) * h[n]
                    y = term if y is None else term + y
                assert y is not None  # a part is never empty
                tiles.set_row(r.y_rows, t, y if first else y + tiles.row(r.y_rows, t))
            return h

        h = [tiles.row(r.h, base + n) for n in range(states)]
        h = tiles.carry_steps(geo, 0, geo.span, geo.cut.unroll, some, h)
        for n in range(states):
            tiles.set_row(r.h, base + n, h[n])

    tiles.parts_of_states(geo, geo.cut.held, part)


def _after(geo: Geometry, r: SimpleNamespace, block, first, careful: bool) -> None:
    """Skip, gate and rounding of a span."""
    view = tiles.views(geo, r, first, block)

    def eight(t):
        positions = pl.ds(t, TILES)
        valid = tiles.valid(r.mark_rows, t) if careful else None

        def one(tile):
            lanes = tiles.lanes_of(0, tile)
            y = tiles.natural_from_rows(r.y_rows, t, tile)
            if hasattr(r, "D"):
                y += view.D[:, lanes] * view.u[positions, lanes].astype(jnp.float32)
            if hasattr(r, "z"):
                y *= tiles.silu(view.z[positions, lanes].astype(jnp.float32))
            if valid is not None:
                y = jnp.where(valid, y, 0.0)
            view.y[positions, lanes] = y.astype(r.y.dtype)

        tiles.each_tile(TILES, one)

    tiles.eights(geo, eight, unroll=min(8, geo.cut.eights))
