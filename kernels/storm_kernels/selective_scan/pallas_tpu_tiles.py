"""How the TPU scan lays its work out: sizes of blocks, and the two forms of a tile in VMEM.

A vector register holds 8 sublanes x 128 lanes of float32. The arrays in HBM are [length, channels],
so a register loaded from them has 8 positions on its sublanes and 128 channels on its lanes: the
*natural* form, good for everything elementwise. The recurrence instead wants 1024 channels of one
position in a register (8 lane tiles on the sublanes), because then a register is one state n of
1024 channels, sums over the states are plain additions, and B and C are one number for a whole
register: the *row* form. One becomes the other through a scratch buffer written with a sublane
stride and read without, or the other way round.

Axis letters: B batch, L length, K groups, E channels, G SSM state size, T positions of a time
block, S positions of a span (between two saved states).
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from storm_kernels.selective_scan.shapes import TPU_CUT, TPU_V4_CUT, TpuCut

LANES = 128
TILES = 8  # lane tiles in a block, as many as a register has sublanes
BLOCK = LANES * TILES  # channels of one register in row form
# Rows of a position (or of a state) are 9 apart, not 8: VMEM has banks, and an access with a
# stride of 8 sublanes compiles to two instructions and an `or`, one with 9 to a single one
# (libtpu 0.0.42).
PITCH = TILES + 1

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# What the backward divides by is at least this far from 0, small enough to change no sum with it.
TINY = 1e-18

_SPAN = 64
# Interpreted kernels are compiled by XLA for CPUs, which takes minutes over unrolled loops.
INTERPRETED_UNROLL = 1
_SCOPED_VMEM = 16 << 20  # what every generation gives a kernel unasked


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one kernel launch.

    Attributes:
        batch, length, channels, groups, state: of the call; `length` includes padding where the
            call is shorter than a time block.
        steps: T, positions of a grid step.
        span: S, positions between two saved states.
        blocks: blocks of 1024 channels in a grid step; they share the broadcast of B and C.
        supers: grid steps that one group's channels take.
        reverse: the scan runs from the last position to the first.
        softplus: dt = softplus(delta + bias).
        marked: some positions are padding or restart the state, or the last time block is longer
            than what is left of the arrays.
        cut: how the loops are cut.
        unroll: the most positions that a loop's body holds.
        interpreted: the kernel is not compiled for a TPU.
    """

    batch: int
    length: int
    channels: int
    groups: int
    state: int
    steps: int
    span: int
    blocks: int
    supers: int
    reverse: bool
    softplus: bool
    marked: bool
    cut: TpuCut
    unroll: int = 32
    interpreted: bool = False

    @property
    def width(self) -> int:
        """Channels of a grid step."""
        return self.blocks * BLOCK

    @property
    def time_blocks(self) -> int:
        return pl.cdiv(self.length, self.steps)

    @property
    def spans(self) -> int:
        """Spans in a time block."""
        return self.steps // self.span

    @property
    def chunk(self) -> int:
        """States that live in registers at once."""
        return min(self.state, 16)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.state, self.chunk)

    @property
    def used(self) -> int:
        """States that are computed: `state`, filled up to whole chunks."""
        return self.chunk * self.chunks

    @property
    def rows(self) -> int:
        """Rows that the states take where they lie on sublanes."""
        return pl.cdiv(self.used, TILES) * TILES

    @property
    def group_blocks(self) -> int:
        """Blocks that hold channels of a group."""
        return pl.cdiv(self.channels // self.groups, BLOCK)

    @property
    def tail(self) -> int:
        """Channels in the last block of the last grid step, 0 if it is full."""
        return self.channels % BLOCK if self.groups == 1 else 0

    def live_blocks(self, channel_step: jax.Array) -> jax.Array | int:
        """Blocks with channels in them, in the grid step `channel_step` along the channels."""
        if self.group_blocks % self.blocks == 0:
            return self.blocks
        # Only with one group: `padded_channels` lets the blocks of several groups end together.
        return jnp.minimum(self.blocks, self.group_blocks - channel_step * self.blocks)


def padded_channels(channels: int, groups: int) -> int:
    """Channels of the arrays that a kernel reads: each of several groups starts a block."""
    return channels if groups == 1 else groups * pl.cdiv(channels // groups, BLOCK) * BLOCK


def cut_for(x: jax.Array) -> TpuCut:
    """How loops are cut for the TPU that computation on x is for.

    By the mesh in force or x's own, else by JAX's default device: as `platform_of`. So a program
    compiled ahead of time for a v4 needs a mesh.
    """
    kinds = [
        mesh.abstract_device.device_kind
        for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
        if not mesh.empty and mesh.abstract_device is not None
    ]
    kinds = kinds or [jax.devices()[0].device_kind]
    old = kinds[0].startswith(("TPU v2", "TPU v3", "TPU v4"))
    return TPU_V4_CUT if old else TPU_CUT


def span_of(state: int, length: int) -> int:
    """Positions between two saved states.

    64 with up to 16 states, so that the saved states of [65536, 2304] with 16 states take 151 MB
    and the states of one span and one block of channels 4 MiB of VMEM; fewer with more states.
    """
    rows = pl.cdiv(state, 16) * 16
    span = max(8, min(_SPAN, 1024 // rows))
    span = 1 << (span.bit_length() - 1)
    while span > 16 and span // 2 >= length:
        span //= 2
    return span


def geometry(
    *, batch: int, length: int, channels: int, groups: int, state: int, stream_bytes: int,
    steps: int, reverse: bool, softplus: bool, marked: bool, cut: TpuCut = TPU_CUT,
) -> Geometry:  # fmt: skip
    """Chooses the blocks of a launch.

    Args:
        channels: of the arrays, padded by `padded_channels`.
        stream_bytes: bytes per position and channel of all streamed operands and results.
        steps: the longest time block wanted.
        cut: how the loops are cut.
    """
    span = span_of(state, length)
    while steps > span and steps // 2 >= length:
        steps //= 2
    group_blocks = pl.cdiv(channels // groups, BLOCK)
    most = max(1, cut.stream_bytes // (stream_bytes * steps * BLOCK))
    if groups > 1:
        blocks = max(n for n in range(1, group_blocks + 1) if group_blocks % n == 0 and n <= most)
    else:
        supers = pl.cdiv(group_blocks, most)
        if batch == 1 and group_blocks > 1:
            supers = max(supers, 2)  # the two cores of a v4 or v5p chip share the channels
        blocks = pl.cdiv(group_blocks, supers)
    return Geometry(
        batch=batch, length=max(length, steps), channels=channels, groups=groups, state=state,
        steps=max(steps, span), span=span, blocks=blocks, supers=pl.cdiv(group_blocks, blocks),
        reverse=reverse, softplus=softplus, marked=marked, cut=cut,
    )  # fmt: skip


def vmem_limit(estimate: int) -> int | None:
    """The limit to ask for, or None where what is given unasked is enough."""
    return None if estimate <= _SCOPED_VMEM * 15 // 16 else estimate * 5 // 4


def away_from_zero(x: jax.Array) -> jax.Array:
    """x with what is nearer to 0 than TINY replaced by TINY, so that it can be divided by."""
    return jnp.where(jnp.abs(x) < TINY, TINY, x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x without the cases of 0, infinity and NaN, which cost 9 instructions before a v6e."""
    return pl.reciprocal(x, full_range=False)


def _softplus(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    e = jnp.exp2(jnp.minimum(x, 20.0) * LOG2_E)
    whole = 1.0 + e
    small = e + (e * e) * (-0.499899 + e * 0.322762)
    return jnp.maximum(x, jnp.where(e < 1 / 32, small, jnp.log(whole))), e, whole


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x), relative error below 2.5e-6; x itself above 20.

    log(1 + e) loses the digits of a small e, a quadratic takes its place below 1 / 32: there its
    error is 2.8e-7, and above it that of 1 + e at most 2.1e-6.
    """
    return _softplus(x)[0]


def softplus_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`softplus`, at least TINY, and its derivative 1 / (1 + e^-x) divided by it."""
    value, e, whole = _softplus(x)
    value = jnp.maximum(value, TINY)
    return value, e * reciprocal(whole * value)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x) in four instructions; absolute error about 1e-7."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x) in four instructions; absolute error about 1e-7 |x|."""
    half = 0.5 * x
    return half * jnp.tanh(half) + half


def silu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x * sigmoid(x), and its derivative divided by it; x is moved `away_from_zero` for that."""
    x = away_from_zero(x)
    value = x * sigmoid(x)
    return value, ((x - value) + 1.0) * reciprocal(x)


def loop(count: int | jax.Array, body) -> None:
    """Runs body(index) for its effects on references."""
    lax.fori_loop(0, count, lambda index, _: body(index), None)


def state_tiles(geo: Geometry, block):
    """The registers of a block of states in natural form: (first state, tile, index, row)."""
    for first in range(0, geo.rows, TILES):
        for tile in range(TILES):
            yield (
                first, tile, (pl.ds(first, TILES), lanes_of(block, tile)), block * geo.rows + first
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """An index begin + offset, of which only begin is known when the kernel runs.

    Multiplied out, so that all steps of an unrolled loop share one base address. Where each has an
    address of its own the compiler must assume that the stores of one step and those of the next
    overlap, and values wait for their turn in registers that are not there.
    """

    begin: jax.Array | int
    offset: int

    def __mul__(self, factor: int) -> "Step":
        return Step(self.begin * factor, self.offset * factor)

    def __add__(self, more) -> "Step":
        if isinstance(more, int):
            return Step(self.begin, self.offset + more)
        return Step(self.begin + more, self.offset)


def value(index) -> jax.Array | int:
    """The number that an index stands for."""
    return index.begin + index.offset if isinstance(index, Step) else index


def eights(geo: Geometry, body, unroll: int) -> None:
    """Runs body(t) for every eighth position t of a span."""
    count = geo.span // TILES
    unroll = min(unroll, count) if geo.unroll > 1 else 1

    def some(index):
        for offset in range(unroll):
            body(pl.multiple_of((index * unroll + offset) * TILES, TILES))

    if unroll == count:
        some(0)
    else:
        loop(count // unroll, some)


def each_tile(at_once: int, body) -> None:
    """Runs body(tile) for the lane tiles of a block, `at_once` in the body of a loop."""

    def some(index):
        for offset in range(at_once):
            body(index * at_once + offset)

    if at_once == TILES:
        some(0)
    else:
        loop(TILES // at_once, some)


STREAMS = ("u", "delta", "z", "y", "dy", "du", "ddelta", "dz")
VECTORS = ("D", "delta_bias", "dD", "ddelta_bias")


def views(geo: Geometry, r: SimpleNamespace, first, block) -> SimpleNamespace:
    """The streamed references cut to one span and block: then all offsets in them are constants.

    With offsets computed for every access the loops are bound by scalar instructions.
    """
    lanes = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
    positions = pl.ds(pl.multiple_of(first, geo.span), geo.span)
    cut = {name: getattr(r, name).at[0, positions, lanes] for name in STREAMS if hasattr(r, name)}
    cut |= {name: getattr(r, name).at[0, :, lanes] for name in VECTORS if hasattr(r, name)}
    return SimpleNamespace(**cut)


def steps(geo: Geometry, first, count: int, unroll: int, body, against: bool = False) -> None:
    """Runs body(number of states' chunk, steps) over positions, `unroll` at a time.

    Args:
        first: the first of the positions in scan order; a multiple of `unroll`.
        count: how many.
        body: gets a chunk's number and a list of (place from `first` on, index in scan order,
            position in the span), one for each step.
        against: from the last to the first in scan order.
    """

    def some(listed, _):
        if geo.chunks == 1:
            body(0, listed)
        else:
            loop(geo.chunks, lambda chunk: body(chunk, listed))

    carry_steps(geo, first, count, unroll, some, None, against)


def parts_of_states(geo: Geometry, held: int, body) -> None:
    """Runs body(first state, how many, whether it is the first part) for parts of all states.

    The compiler schedules first what a recurrence waits for, and keeps what the rest is made from
    in registers until then: with few states at a time there are enough of them.
    """
    body(0, min(held, geo.used), True)
    whole, rest = divmod(geo.used, held)
    if whole == 2:
        body(held, held, False)
    elif whole > 2:
        loop(whole - 1, lambda index: body((index + 1) * held, held, False))
    if rest and whole:
        body(geo.used - rest, rest, False)


def carry_steps(
    geo: Geometry, first, count: int, unroll: int, body, carry, against: bool = False
):  # fmt: skip
    """As `steps`, for carry = body(steps, carry), whose registers stay registers; returns it."""
    unroll = min(unroll, geo.unroll, count)

    def group(number, carry):
        begin = count - unroll - number * unroll if against else number * unroll
        listed = []
        for offset in range(unroll):
            place, index = Step(begin, offset), Step(first + begin, offset)
            position = index
            if geo.reverse:
                position = Step(geo.span - unroll - first - begin, unroll - 1 - offset)
            listed.append((place, index, position))
        return body(listed[::-1] if against else listed, carry)

    return lax.fori_loop(0, count // unroll, group, carry)


def lanes_of(block: jax.Array | int, tile: jax.Array | int):
    """The lanes of one lane tile of a block in an array in natural form."""
    start = block * BLOCK + tile * LANES
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), LANES)


def splat(geo: Geometry, ref, index) -> jax.Array:
    """One row of a reference on all 8 sublanes: a load with stride 0, no vector instruction."""
    if geo.interpreted:
        # Pallas' interpreters take a stride of 0 for 1.
        return jnp.broadcast_to(ref[pl.ds(value(index), 1), :], (TILES, LANES))
    # Said as a stride, because for a v4 a broadcast compiles to a load, a store and this load.
    return ref[pl.ds(value(index), TILES, stride=0), :]


def rows_from_natural(rows_ref, start, tile: int, register: jax.Array) -> None:
    """Stores a register in natural form: 8 positions (or states), one lane tile."""
    rows_ref[pl.ds(start * PITCH + tile, TILES, stride=PITCH), :] = register


def natural_from_rows(rows_ref, start, tile: int) -> jax.Array:
    """The inverse of `rows_from_natural`."""
    return rows_ref[pl.ds(start * PITCH + tile, TILES, stride=PITCH), :]


def row(rows_ref, index) -> jax.Array:
    """1024 channels of one position (or state)."""
    return rows_ref[pl.ds(value(index * PITCH), TILES), :]


def set_row(rows_ref, index, register: jax.Array) -> None:
    rows_ref[pl.ds(value(index * PITCH), TILES), :] = register


def rows_scratch(count: int) -> tuple[int, int]:
    """The shape of a buffer of `count` rows."""
    return (count * PITCH, LANES)


def columns_pitch(columns: int) -> int:
    """Rows from one position to the next in a buffer that `broadcast_columns` fills: odd."""
    return columns | 1


def column(geo: Geometry, t, n):
    """The row of state n at position t in such a buffer of all states."""
    return t * columns_pitch(geo.used) + n


def columns_scratch(geo: Geometry, columns: int) -> tuple[int, int]:
    """The shape of such a buffer."""
    return (geo.span * columns_pitch(columns), LANES)


def broadcast_columns(pairs, geo: Geometry) -> None:
    """Spreads arrays with positions on their sublanes: target[t * pitch + i] = source[t, i].

    Every number fills the 128 lanes of a row, so that the loop over positions can load any of
    them into a whole register.

    Args:
        pairs: (source reference [span, columns], target reference).
        geo: the span.
    """

    def eight(t):
        for source, target in pairs:
            values = source[pl.ds(t, TILES), :].astype(jnp.float32)
            pitch = columns_pitch(source.shape[1])
            for i in range(source.shape[1]):
                spread = jnp.broadcast_to(values[:, i : i + 1], (TILES, LANES))
                target[pl.ds(t * pitch + i, TILES, stride=pitch), :] = spread

    eights(geo, eight, unroll=8)


def valid(mark_rows, t) -> jax.Array:
    """Which of 8 positions count, in natural form."""
    pitch = columns_pitch(2)
    return mark_rows[pl.ds(t * pitch, TILES, stride=pitch), :] > 0


def keep(geo: Geometry, mark_rows, t) -> jax.Array:
    """Whether the state before a position counts, in row form."""
    return splat(geo, mark_rows, t * columns_pitch(2) + 1) > 0
