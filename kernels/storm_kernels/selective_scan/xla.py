"""The scan in plain XLA, chunk by chunk, with a backward of its own.

The forward keeps one state per chunk; the backward recomputes the rest of a chunk from it. So
nothing of size [length, channels, state] exists in either. All layouts and directions read the
operands in place, one slice per chunk: there are no flipped or transposed copies.

Axis letters: T steps of a chunk, B batch, L length, E channels, K groups, P channels of a group,
N rows = B x K, G SSM state size. The last L % T positions are a shorter chunk of their own.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.selective_scan import xla_chunk
from storm_kernels.selective_scan.call import ScanCall, promote_varying
from storm_kernels.selective_scan.platforms import platform_of
from storm_kernels.selective_scan.segments import segment_marks
from storm_kernels.selective_scan.shapes import default_chunk


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known at trace time and the same in forward and backward."""

    delta_softplus: bool
    reverse: bool
    length_axis: int  # of u, delta, z and y: 1 in layout "bld", 2 in "bdl"
    chunk: int
    associative: bool
    output_dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Arrays:
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


def xla_scan(call: ScanCall) -> tuple[jax.Array, jax.Array]:
    """Runs a validated call in chunks; differentiable once.

    Args:
        call: the operands; see `ScanCall`. `chunk_size=None` takes the platform's default.

    Returns:
        y: in u's shape and `output_dtype`.
        h: [batch, channels, state] in the accumulation dtype.
    """
    call = promote_varying(call)
    platform = platform_of(call.u)
    static = _Static(
        delta_softplus=call.delta_softplus,
        reverse=call.reverse,
        length_axis=1 if call.layout == "bld" else 2,
        chunk=min(call.length, call.chunk_size or default_chunk(platform)),
        associative=platform in xla_chunk.ASSOCIATIVE_PLATFORMS,
        output_dtype=call.output_dtype,
    )
    arrays = _Arrays(**{f.name: getattr(call, f.name) for f in dataclasses.fields(_Arrays)})
    marks = None
    if call.segment_ids is not None:
        marks = segment_marks(call.segment_ids, call.reverse)
    return _scan(static, arrays, marks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, arrays, marks):
    y, h, _ = _forward(static, arrays, marks, keep_states=False)
    return y, h


def _scan_fwd(static, arrays, marks):
    y, h, states = _forward(static, arrays, marks, keep_states=True)
    return (y, h), (arrays, marks, states)


def _scan_bwd(static, residuals, cotangents):
    arrays, marks, states = residuals
    dy, dh = cotangents
    return _backward(static, arrays, marks, states, dy, dh), None


_scan.defvjp(_scan_fwd, _scan_bwd)


class _Loaded:
    """One chunk in the accumulation dtype, [T, B, ...], with its elementwise part worked out."""

    def __init__(self, static: _Static, arrays: _Arrays, marks, start, steps: int):
        acc = arrays.initial_state.dtype
        groups = arrays.B.shape[2]
        self.valid_TB = restart_TN = None
        if marks is not None:
            self.valid_TB = _load(marks[0], start, steps, 1)
            restart_TN = jnp.repeat(_load(marks[1], start, steps, 1), groups, axis=1)

        def load(x, axis):
            x = _load(x, start, steps, axis).astype(acc)
            return x if self.valid_TB is None else _zero_padding(x, self.valid_TB)

        def rows(x_TB):
            # The groups of a batch row become rows: [T, B, E] -> [T, N, P].
            return x_TB.reshape(steps, arrays.u.shape[0] * groups, -1)

        self.u_TBE = load(arrays.u, static.length_axis)
        self.z_TBE = None if arrays.z is None else load(arrays.z, static.length_axis)
        self.raw_dt_TBE = load(arrays.delta, static.length_axis)
        if arrays.delta_bias is not None:
            self.raw_dt_TBE += arrays.delta_bias.astype(acc)
        dt_TBE = _softplus(self.raw_dt_TBE) if static.delta_softplus else self.raw_dt_TBE
        # After the softplus: only dt = 0 leaves the state alone, and its gradient with it.
        self.dt_TBE = dt_TBE if marks is None else _zero_padding(dt_TBE, self.valid_TB)
        self.operands = xla_chunk.ChunkOperands(
            dt_TNP=rows(self.dt_TBE),
            x_TNP=rows(self.dt_TBE * self.u_TBE),
            B_TNG=rows(load(arrays.B, 1)),
            C_TNG=rows(load(arrays.C, 1)),
            restart_TN=restart_TN,
        )


def _load(x, start, steps, axis):
    return jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, steps, axis), axis, 0)


def _store(buffer, x_T, start, axis):
    x = jnp.moveaxis(x_T.reshape(x_T.shape[0], *_without(buffer.shape, axis)), 0, axis)
    return lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), start, axis)


def _without(shape, axis):
    return shape[:axis] + shape[axis + 1 :]


def _zero_padding(x_TB, valid_TB):
    return jnp.where(jnp.expand_dims(valid_TB, tuple(range(2, x_TB.ndim))), x_TB, 0)


def _softplus(x):
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20))))


def _softplus_gradient(x):
    return jnp.where(x > 20, 1, jax.nn.sigmoid(x))


def _state_in(h_BEG, groups):
    """[B, E, G] -> [B * K, G, P], the order inside the chunks."""
    batch, channels, state = h_BEG.shape
    h_NPG = h_BEG.reshape(batch * groups, channels // groups, state)
    return h_NPG.swapaxes(1, 2)


def _state_out(h_NGP, channels):
    """The inverse of `_state_in`."""
    return h_NGP.swapaxes(1, 2).reshape(-1, channels, h_NGP.shape[1])


def _weight_in(arrays):
    """A as [1, G, P] where all rows share it, else [N, G, P]."""
    A_KGP = _state_in(arrays.A.astype(arrays.initial_state.dtype)[None], arrays.B.shape[2])
    return A_KGP if len(A_KGP) == 1 else jnp.tile(A_KGP, (arrays.u.shape[0], 1, 1))


def _over_chunks(body: Callable, carry, static: _Static, length: int, descending: bool, saved=None):
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


def _forward(static, arrays, marks, keep_states):
    """y, the final state and the states before each chunk (in chunk form)."""
    acc = arrays.initial_state.dtype
    groups, channels = arrays.B.shape[2], arrays.A.shape[0]
    A_NGP = _weight_in(arrays)
    run = xla_chunk.forward_associative if static.associative else xla_chunk.forward_steps

    def body(carry, start, steps, _):
        before_NGP, y = carry
        chunk = _Loaded(static, arrays, marks, start, steps)
        h_NGP, y_TNP = run(before_NGP, chunk.operands, A_NGP, static.reverse)
        y_TBE = y_TNP.reshape(chunk.u_TBE.shape)
        if arrays.D is not None:
            y_TBE += arrays.D.astype(acc) * chunk.u_TBE
        if chunk.z_TBE is not None:
            y_TBE *= jax.nn.silu(chunk.z_TBE)
        if marks is not None:
            y_TBE = _zero_padding(y_TBE, chunk.valid_TB)
        y = _store(y, y_TBE, start, static.length_axis)
        return (h_NGP, y), before_NGP if keep_states else None

    carry = (_state_in(arrays.initial_state, groups), jnp.zeros_like(arrays.u, static.output_dtype))
    (h_NGP, y), states = _over_chunks(body, carry, static, arrays.B.shape[1], static.reverse)
    return y, _state_out(h_NGP, channels), states


def _backward(static, arrays, marks, states, dy, dh_BEG):
    """The gradients of all operands, each in its operand's dtype."""
    acc = arrays.initial_state.dtype
    groups, channels = arrays.B.shape[2], arrays.A.shape[0]
    A_NGP = _weight_in(arrays)
    run = xla_chunk.backward_associative if static.associative else xla_chunk.backward_steps
    run_forward = xla_chunk.forward_associative if static.associative else xla_chunk.forward_steps

    def body(carry, start, steps, before_NGP):
        g_NGP, sums, grads = carry
        chunk = _Loaded(static, arrays, marks, start, steps)
        dy_TBE = _load(dy, start, steps, static.length_axis).astype(acc)
        if marks is not None:
            dy_TBE = _zero_padding(dy_TBE, chunk.valid_TB)
        dz = grads.z
        if chunk.z_TBE is not None:
            # y before the gate is recomputed and not saved: exact, and [B, L, E] less memory.
            _, y_TNP = run_forward(before_NGP, chunk.operands, A_NGP, static.reverse)
            y_TBE = y_TNP.reshape(dy_TBE.shape)
            if arrays.D is not None:
                y_TBE += arrays.D.astype(acc) * chunk.u_TBE
            gate_TBE = jax.nn.sigmoid(chunk.z_TBE)
            slope_TBE = gate_TBE * (1 + chunk.z_TBE * (1 - gate_TBE))
            dz = _store(dz, dy_TBE * y_TBE * slope_TBE, start, static.length_axis)
            dy_TBE *= chunk.z_TBE * gate_TBE
        g_NGP, d = run(
            before_NGP,
            g_NGP,
            chunk.operands,
            dy_TBE.reshape(chunk.operands.x_TNP.shape),
            A_NGP,
            static.reverse,
        )
        dx_TBE = d.x_TNP.reshape(dy_TBE.shape)
        du_TBE = dx_TBE * chunk.dt_TBE
        ddt_TBE = d.dt_TNP.reshape(dy_TBE.shape) + dx_TBE * chunk.u_TBE
        if static.delta_softplus:
            ddt_TBE *= _softplus_gradient(chunk.raw_dt_TBE)
        if marks is not None:
            ddt_TBE = _zero_padding(ddt_TBE, chunk.valid_TB)
        dA_KGP, dD_E, dbias_E = sums
        dA_KGP += jnp.sum(d.A_NGP.reshape(-1, *dA_KGP.shape), axis=0)
        if arrays.D is not None:
            du_TBE += arrays.D.astype(acc) * dy_TBE
            dD_E += jnp.sum(dy_TBE * chunk.u_TBE, axis=(0, 1))
        if arrays.delta_bias is not None:
            dbias_E += jnp.sum(ddt_TBE, axis=(0, 1))
        grads = dataclasses.replace(
            grads,
            u=_store(grads.u, du_TBE, start, static.length_axis),
            delta=_store(grads.delta, ddt_TBE, start, static.length_axis),
            B=_store(grads.B, d.B_TNG, start, 1),
            C=_store(grads.C, d.C_TNG, start, 1),
            z=dz,
        )
        return (g_NGP, (dA_KGP, dD_E, dbias_E), grads), None

    def sum_of(x):
        return None if x is None else jnp.zeros_like(x, dtype=acc)

    by_position = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, arrays), A=None, D=None, delta_bias=None, initial_state=None
    )
    dA_KGP = jnp.zeros_like(A_NGP[:groups])
    sums = (dA_KGP, sum_of(arrays.D), sum_of(arrays.delta_bias))
    carry = (_state_in(dh_BEG, groups), sums, by_position)
    (g_NGP, (dA_KGP, dD_E, dbias_E), grads), _ = _over_chunks(
        body, carry, static, arrays.B.shape[1], not static.reverse, states
    )
    return dataclasses.replace(
        grads,
        A=_state_out(dA_KGP, channels)[0].astype(arrays.A.dtype),
        D=None if dD_E is None else dD_E.astype(arrays.D.dtype),
        delta_bias=None if dbias_E is None else dbias_E.astype(arrays.delta_bias.dtype),
        initial_state=_state_out(g_NGP, channels),
    )
