"""What the chunked XLA passes share: a chunk's operands, loading and storing, the walk over chunks.

Axis letters: T steps of a chunk, B batch, L length, E channels, K groups, P channels of a group,
N rows = B x K, G SSM state size. The last L % T positions are a shorter chunk of their own.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.platforms import platform_of
from storm_kernels.selective_scan import xla_chunk
from storm_kernels.selective_scan.call import ScanCall
from storm_kernels.selective_scan.reference import softplus
from storm_kernels.selective_scan.segments import segment_marks
from storm_kernels.selective_scan.shapes import default_chunk


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known at trace time and the same in forward and backward."""

    delta_softplus: bool
    reverse: bool
    length_axis: int  # of u, delta, z and y: 1 in layout "bld", 2 in "bdl"
    chunk: int
    associative: bool
    wide_buffers: bool  # results in bfloat16 are collected in float32
    output_dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """The differentiable operands, with the shapes of `ScanCall`."""

    u: jax.Array
    delta: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    delta_bias: jax.Array | None
    initial_state: jax.Array


def prepared(call: ScanCall) -> tuple[Static, Arrays, tuple[jax.Array, jax.Array] | None]:
    """A call in three parts: static, differentiable, and its segment marks or None."""
    platform = platform_of(call.u)
    static = Static(
        delta_softplus=call.delta_softplus,
        reverse=call.reverse,
        length_axis=1 if call.layout == "bld" else 2,
        chunk=min(call.length, call.chunk_size or default_chunk(platform)),
        associative=platform in xla_chunk.ASSOCIATIVE_PLATFORMS,
        # XLA's CPU backend has no update of a bfloat16 array in place: for every chunk it would
        # convert the whole array to float32 and back (measured: time grows as length squared).
        wide_buffers=platform == "cpu",
        output_dtype=call.output_dtype,
    )
    arrays = Arrays(**{f.name: getattr(call, f.name) for f in dataclasses.fields(Arrays)})
    marks = None
    if call.segment_ids is not None:
        marks = segment_marks(call.segment_ids, call.reverse)
    return static, arrays, marks


class Loaded:
    """One chunk in the accumulation dtype, [T, B, ...], with its elementwise part worked out."""

    def __init__(self, static: Static, arrays: Arrays, marks, start, steps: int):
        acc = arrays.initial_state.dtype
        groups = arrays.B.shape[2]
        self.valid_TB = restart_TN = None
        if marks is not None:
            self.valid_TB = load(marks[0], start, steps, 1)
            restart_TN = jnp.repeat(load(marks[1], start, steps, 1), groups, axis=1)

        def taken(x, axis):
            x = load(x, start, steps, axis).astype(acc)
            return x if self.valid_TB is None else zero_padding(x, self.valid_TB)

        def rows(x_TB):
            # The groups of a batch row become rows: [T, B, E] -> [T, N, P].
            return x_TB.reshape(steps, arrays.u.shape[0] * groups, -1)

        self.u_TBE = taken(arrays.u, static.length_axis)
        self.z_TBE = None if arrays.z is None else taken(arrays.z, static.length_axis)
        self.raw_dt_TBE = taken(arrays.delta, static.length_axis)
        if arrays.delta_bias is not None:
            self.raw_dt_TBE += arrays.delta_bias.astype(acc)
        dt_TBE = softplus(self.raw_dt_TBE) if static.delta_softplus else self.raw_dt_TBE
        # After the softplus: only dt = 0 leaves the state alone, and its gradient with it.
        self.dt_TBE = dt_TBE if marks is None else zero_padding(dt_TBE, self.valid_TB)
        self.operands = xla_chunk.ChunkOperands(
            dt_TNP=rows(self.dt_TBE),
            x_TNP=rows(self.dt_TBE * self.u_TBE),
            B_TNG=rows(taken(arrays.B, 1)),
            C_TNG=rows(taken(arrays.C, 1)),
            restart_TN=restart_TN,
        )


def load(x, start, steps, axis):
    return jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, steps, axis), axis, 0)


def empty(static: Static, x, dtype):
    """What results of x's shape are collected in, one chunk after the other."""
    wide = static.wide_buffers and dtype == jnp.bfloat16
    return jnp.zeros_like(x, dtype=jnp.float32 if wide else dtype)


def store(buffer, x_T, start, axis):
    x = jnp.moveaxis(x_T.reshape(x_T.shape[0], *_without(buffer.shape, axis)), 0, axis)
    return lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), start, axis)


def _without(shape, axis):
    return shape[:axis] + shape[axis + 1 :]


def zero_padding(x_TB, valid_TB):
    return jnp.where(jnp.expand_dims(valid_TB, tuple(range(2, x_TB.ndim))), x_TB, 0)


def softplus_gradient(x):
    return jnp.where(x > 20, 1, jax.nn.sigmoid(x))


def state_in(h_BEG, groups):
    """[B, E, G] -> [B * K, G, P], the order inside the chunks."""
    batch, channels, state = h_BEG.shape
    h_NPG = h_BEG.reshape(batch * groups, channels // groups, state)
    return h_NPG.swapaxes(1, 2)


def state_out(h_NGP, channels):
    """The inverse of `state_in`."""
    return h_NGP.swapaxes(1, 2).reshape(-1, channels, h_NGP.shape[1])


def weight_in(arrays):
    """A as [1, G, P] where all rows share it, else [N, G, P]."""
    A_KGP = state_in(arrays.A.astype(arrays.initial_state.dtype)[None], arrays.B.shape[2])
    return A_KGP if len(A_KGP) == 1 else jnp.tile(A_KGP, (arrays.u.shape[0], 1, 1))


def over_chunks(body: Callable, carry, static: Static, length: int, descending: bool, saved=None):
    """Runs body(carry, start, steps, saved) -> (carry, to_save) over all chunks, in order.

    `saved` and the second result are (one entry per whole chunk, one for the shorter last chunk).
    """
    count, tail_steps = divmod(length, static.chunk)
    saved_whole, saved_tail = (None, None) if saved is None else saved

    def whole(carry):
        def one(carry, index_and_saved):
            index, saved = index_and_saved
            return body(carry, index * static.chunk, static.chunk, saved)

        xs = (jnp.arange(count), saved_whole)
        return lax.scan(one, carry, xs, reverse=descending)

    def tail(carry):
        if not tail_steps:
            return carry, None
        return body(carry, count * static.chunk, tail_steps, saved_tail)

    if descending:
        carry, kept_tail = tail(carry)
        carry, kept_whole = whole(carry)
    else:
        carry, kept_whole = whole(carry)
        carry, kept_tail = tail(carry)
    return carry, (kept_whole, kept_tail)
