"""What the TPU kernels read and write: arrays in HBM, the blocks of a grid step, the launch.

The grid is (batch, groups x channel steps, time blocks), the last one sequential. The large arrays
u, delta, z and y are read and written as they are, in their own dtypes, a block of [T, channels]
at a time. Small ones are brought into the kernel's form by XLA first: A, the states and the skip
with the channels on lanes, B and C as [batch, group, length, state].
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from storm_kernels.selective_scan import pallas_tpu_tiles as tiles
from storm_kernels.selective_scan.pallas_tpu_tiles import LANES, TILES, Geometry
from storm_kernels.selective_scan.shapes import TPU_CUT, TpuCut


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a call.

    Attributes:
        u, delta, z: [batch, length, channels]; z may be None.
        B, C: [batch, length, groups, state].
        initial_state: [batch, channels, state] float32.
        valid, restart: bool [batch, length] as `segment_marks` returns them, or both None.
        A: [1 or batch, channels, state] float32.
        D, delta_bias: [1 or batch, channels] float32, or None.
    """

    u: jax.Array
    delta: jax.Array
    B: jax.Array
    C: jax.Array
    z: jax.Array | None
    initial_state: jax.Array
    valid: jax.Array | None
    restart: jax.Array | None
    A: jax.Array
    D: jax.Array | None
    delta_bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Operands:
    """`Arrays` with the channels of each group padded to whole blocks, and the options."""

    arrays: Arrays
    channels: int  # before padding
    reverse: bool
    softplus: bool
    cut: TpuCut = TPU_CUT

    @property
    def groups(self) -> int:
        return self.arrays.B.shape[2]

    def geometry(self, stream_bytes: int, steps: int) -> Geometry:
        """The blocks of a launch with time blocks of at most `steps` positions."""
        batch, length, _ = self.arrays.u.shape
        geo = tiles.geometry(
            batch=batch, length=length, channels=tiles.padded_channels(self.channels, self.groups),
            groups=self.groups, state=self.arrays.A.shape[-1], stream_bytes=stream_bytes,
            steps=steps, reverse=self.reverse, softplus=self.softplus, marked=True,
            cut=self.cut,
        )  # fmt: skip
        return dataclasses.replace(
            geo, marked=self.arrays.valid is not None or length % geo.steps != 0
        )

    def stream(self, x: jax.Array, geo: Geometry) -> jax.Array:
        """[batch, length, channels] in its own dtype, padded only where blocks would not fit."""
        return _pad_axis(self.pad_channels(x, -1), 1, geo.length)

    def pad_channels(self, x: jax.Array, axis: int) -> jax.Array:
        """Zeros behind the channels of each group; with one group nothing changes."""
        if self.groups == 1:
            return x
        axis %= x.ndim
        size = self.channels // self.groups
        padded = tiles.padded_channels(self.channels, self.groups) // self.groups
        x = x.reshape(*x.shape[:axis], self.groups, size, *x.shape[axis + 1 :])
        x = _pad_axis(x, axis + 1, padded)
        return x.reshape(*x.shape[:axis], self.groups * padded, *x.shape[axis + 2 :])

    def cut_channels(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `pad_channels`."""
        axis %= x.ndim
        size = self.channels // self.groups
        x = x.reshape(*x.shape[:axis], self.groups, -1, *x.shape[axis + 1 :])
        x = lax.slice_in_dim(x, 0, size, axis=axis + 1)
        return x.reshape(*x.shape[:axis], self.channels, *x.shape[axis + 2 :])

    def state_in(self, x: jax.Array, geo: Geometry) -> jax.Array:
        """[batch, channels, state] as [batch, rows, channels]."""
        return _pad_axis(self.pad_channels(x.swapaxes(1, 2), -1), 1, geo.rows)

    def state_out(self, x: jax.Array) -> jax.Array:
        """[..., rows, channels] as [..., channels, state]."""
        x = self.cut_channels(x, -1)[..., : self.arrays.A.shape[-1], :]
        return x.swapaxes(-1, -2)

    def common_inputs(self, geo: Geometry, specs: "Specs") -> dict[str, tuple]:
        """What forward and backward both read, by name: (array, block)."""
        arrays = self.arrays
        streams = {"u": arrays.u, "delta": arrays.delta, "z": arrays.z}
        inputs = {
            name: (self.stream(x, geo), specs.stream())
            for name, x in streams.items()
            if x is not None
        }
        weights = self.state_in(arrays.A.astype(jnp.float32) * tiles.LOG2_E, geo)
        if geo.groups == 1:
            # A block reaches past the last channel, where the backward needs finite numbers.
            weights = _pad_axis(weights, 2, geo.supers * geo.width)
        inputs["A"] = (weights, specs.weight(weights.shape[0]))
        for name, x in {"D": arrays.D, "delta_bias": arrays.delta_bias}.items():
            if x is not None:
                x = self.pad_channels(x.astype(jnp.float32), -1)[:, None]
                inputs[name] = (x, specs.weight(x.shape[0], rows=1))
        for name, x in {"B": arrays.B, "C": arrays.C}.items():
            if arrays.valid is not None:
                x = jnp.where(arrays.valid[:, :, None, None], x, 0)
            inputs[name] = (self._columns(x, geo), specs.columns())
        if geo.marked:
            marks, flags = self._marks(geo)
            inputs["marks"] = (marks, specs.marks())
            inputs["flags"] = (flags, specs.flags())
        return inputs

    def _columns(self, x: jax.Array, geo: Geometry) -> jax.Array:
        """[batch, length, groups, state] as [batch, groups, length, used], zeros behind."""
        x = _pad_axis(_pad_axis(x, 1, geo.time_blocks * geo.steps), 3, geo.used)
        return x.swapaxes(1, 2)

    def _marks(self, geo: Geometry) -> tuple[jax.Array, jax.Array]:
        """[batch, length, 2]: the position counts; the state before it does. Spans with a zero."""
        batch, length = self.arrays.u.shape[:2]
        if self.arrays.valid is None or self.arrays.restart is None:
            valid = keep = jnp.ones((batch, length), jnp.float32)
        else:
            valid = self.arrays.valid.astype(jnp.float32)
            keep = 1.0 - self.arrays.restart.astype(jnp.float32)
        padded = geo.time_blocks * geo.steps
        marks = jnp.stack([_pad_axis(valid, 1, padded), _pad_axis(keep, 1, padded, 1.0)], axis=2)
        all_one = jnp.min(marks.reshape(batch, geo.time_blocks, geo.spans, -1), axis=3)
        return marks, (all_one == 0).astype(jnp.int32)[:, :, None, :]


def _pad_axis(x: jax.Array, axis: int, size: int, value: float = 0.0) -> jax.Array:
    if x.shape[axis] >= size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


@dataclasses.dataclass(frozen=True)
class Specs:
    """The blocks of a grid step (batch row, channel step, time step).

    `time_reversed` runs the time blocks from the last to the first: that is all that a reverse
    scan and a backward need, nothing is flipped in memory.
    """

    geo: Geometry
    time_reversed: bool

    def _spec(self, block: tuple[int, ...], index: Callable, smem: bool = False) -> pl.BlockSpec:
        last = self.geo.time_blocks - 1

        def index_map(row, channel, step):
            return index(row, channel, last - step if self.time_reversed else step)

        if smem:
            return pl.BlockSpec(block, index_map, memory_space=pltpu.SMEM)
        return pl.BlockSpec(block, index_map)

    def stream(self) -> pl.BlockSpec:
        return self._spec((1, self.geo.steps, self.geo.width), lambda b, c, t: (b, t, c))

    def weight(self, batch: int, rows: int | None = None) -> pl.BlockSpec:
        """Of [1 or batch, rows, channels]: the same block at all times."""
        block = (1, self.geo.rows if rows is None else rows, self.geo.width)
        return self._spec(block, lambda b, c, t: (b if batch > 1 else 0, 0, c))

    def state(self, rows: int | None = None) -> pl.BlockSpec:
        block = (1, self.geo.rows if rows is None else rows, self.geo.width)
        return self._spec(block, lambda b, c, t: (b, 0, c))

    def states(self) -> pl.BlockSpec:
        block = (1, self.geo.spans, self.geo.rows, self.geo.width)
        return self._spec(block, lambda b, c, t: (b, t, 0, c))

    def columns(self) -> pl.BlockSpec:
        block = (1, 1, self.geo.steps, self.geo.used)
        return self._spec(block, lambda b, c, t: (b, lax.div(c, self.geo.supers), t, 0))

    def sums(self, registers: int) -> pl.BlockSpec:
        """Of the gradients of B and C: [batch, channel steps, spans, registers, 8, 128]."""
        block = (1, 1, self.geo.spans, registers, TILES, LANES)
        return self._spec(block, lambda b, c, t: (b, c, t, 0, 0, 0))

    def marks(self) -> pl.BlockSpec:
        return self._spec((1, self.geo.steps, 2), lambda b, c, t: (b, t, 0))

    def flags(self) -> pl.BlockSpec:
        return self._spec((1, 1, 1, self.geo.spans), lambda b, c, t: (b, t, 0, 0), smem=True)


Outputs = dict[str, tuple[tuple[int, ...], jnp.dtype, pl.BlockSpec]]
"""Results of a kernel by name: shape, dtype and block."""


def _block_bytes(shape, dtype) -> int:
    """VMEM of a block; 128 lanes are the least that its last axis takes."""
    return math.prod(shape[:-1]) * max(shape[-1], LANES) * jnp.dtype(dtype).itemsize


def launch(
    kernel: Callable[[Geometry, SimpleNamespace], None],
    name: str,
    geo: Geometry,
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Outputs,
    scratch: Mapping[str, tuple[int, ...]],
    interpret,
) -> dict[str, jax.Array]:
    """Runs a kernel whose references are attributes of one object.

    Args:
        kernel: called with the geometry and all references by name.
        inputs: array and block.
        outputs: shape, dtype and block.
        scratch: shapes of float32 buffers in VMEM.
        interpret: as `pallas_call` takes it; None interprets on CPU and compiles elsewhere.
    """
    names = [*inputs, *outputs, *scratch]
    arrays = [array for array, _ in inputs.values()]
    # Inside shard_map the results vary over the mesh axes over which the operands do.
    axes = jax.typeof(arrays[0]).manual_axis_type
    blocks = [(spec.block_shape, array.dtype) for array, spec in inputs.values()]
    blocks += [(spec.block_shape, dtype) for _, dtype, spec in outputs.values()]
    vmem = 2 * sum(_block_bytes(shape, dtype) for shape, dtype in blocks)
    vmem += sum(4 * math.prod(shape) for shape in scratch.values())

    def run(*arrays, interpret):
        unroll = tiles.INTERPRETED_UNROLL if interpret else geo.unroll
        sizes = dataclasses.replace(geo, unroll=unroll, interpreted=bool(interpret))
        return pl.pallas_call(
            lambda *refs: kernel(sizes, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
            grid=(geo.batch, geo.groups * geo.supers, geo.time_blocks),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, _, spec in outputs.values()],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
                for shape, dtype, _ in outputs.values()
            ],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=tiles.vmem_limit(vmem),
            ),
            interpret=interpret,
            name=name,
        )(*arrays)

    if interpret is None:
        # Where a program runs is known when it is lowered: one traced on this host may be
        # compiled ahead of time for a TPU.
        results = lax.platform_dependent(
            *arrays,
            cpu=lambda *arrays: run(*arrays, interpret=True),
            default=lambda *arrays: run(*arrays, interpret=False),
        )
    else:
        results = run(*arrays, interpret=interpret)
    return dict(zip(outputs, results, strict=True))
