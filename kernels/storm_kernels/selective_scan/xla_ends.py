"""What a stretch of positions does to the state at its ends, in one XLA pass without y.

The scan over shards needs the state after a shard and, on the way back, the gradient with respect
to the state before it. Both are sums over positions in which each term decays over the positions
between it and the end, so a chunk is one exponential and a reduction: nothing in it is sequential.

Axis letters: see `xla_operands`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.selective_scan.call import ScanCall, promote_varying
from storm_kernels.selective_scan.xla_operands import (
    Loaded,
    load,
    over_chunks,
    prepared,
    state_in,
    state_out,
    weight_in,
    zero_padding,
)


def end_state(call: ScanCall) -> jax.Array:
    """The final state of a call, [batch, channels, state]; see `dispatch.Implementation`."""
    static, arrays, marks = prepared(promote_varying(call))
    A_NGP = weight_in(arrays)

    def body(h_NGP, start, steps, _):
        dt_TNP, x_TNP, B_TNG, _, restart_TN = Loaded(static, arrays, marks, start, steps).operands
        # What a step adds to the state decays over the steps after it and ends at a restart there.
        after_TNP = _sums(dt_TNP, not static.reverse, exclusive=True)
        alive_TN = None if restart_TN is None else ~_any(restart_TN, not static.reverse, True)
        return _carried(h_NGP, dt_TNP, restart_TN, A_NGP) + _collected(
            after_TNP, alive_TN, x_TNP, B_TNG, A_NGP
        ), None

    h_NGP = state_in(arrays.initial_state, arrays.B.shape[2])
    h_NGP, _ = over_chunks(body, h_NGP, static, call.length, static.reverse)
    return state_out(h_NGP, arrays.A.shape[0])


def entry_gradient(call: ScanCall, dy: jax.Array, dh: jax.Array) -> jax.Array:
    """The gradient of a call's initial state; see `dispatch.Implementation`.

    Args:
        call: the call; its initial state itself has no influence.
        dy: the gradient with respect to y, in y's shape.
        dh: the gradient with respect to the final state, [batch, channels, state].
    """
    static, arrays, marks = prepared(promote_varying(call))
    acc = arrays.initial_state.dtype
    A_NGP = weight_in(arrays)

    def body(g_NGP, start, steps, _):
        chunk = Loaded(static, arrays, marks, start, steps)
        dt_TNP, _, _, C_TNG, restart_TN = chunk.operands
        dy_TBE = load(dy, start, steps, static.length_axis).astype(acc)
        if marks is not None:
            dy_TBE = zero_padding(dy_TBE, chunk.valid_TB)
        if chunk.z_TBE is not None:
            dy_TBE *= jax.nn.silu(chunk.z_TBE)
        # A step reads the state before the chunk decayed over the steps up to it, itself included.
        until_TNP = _sums(dt_TNP, static.reverse, exclusive=False)
        alive_TN = None if restart_TN is None else ~_any(restart_TN, static.reverse, False)
        return _carried(g_NGP, dt_TNP, restart_TN, A_NGP) + _collected(
            until_TNP, alive_TN, dy_TBE.reshape(dt_TNP.shape), C_TNG, A_NGP
        ), None

    g_NGP = state_in(dh, arrays.B.shape[2])
    g_NGP, _ = over_chunks(body, g_NGP, static, call.length, not static.reverse)
    return state_out(g_NGP, arrays.A.shape[0])


def _sums(dt_TNP, from_the_end: bool, exclusive: bool):
    sums_TNP = lax.cumsum(dt_TNP, axis=0, reverse=from_the_end)
    return sums_TNP - dt_TNP if exclusive else sums_TNP


def _any(flag_TN, from_the_end: bool, exclusive: bool):
    count_TN = lax.cumsum(flag_TN.astype(jnp.int32), axis=0, reverse=from_the_end)
    return (count_TN - flag_TN if exclusive else count_TN) > 0


def _carried(state_NGP, dt_TNP, restart_TN, A_NGP):
    """What of a state, or of a gradient, gets through all steps of a chunk."""
    carried_NGP = jnp.exp(jnp.sum(dt_TNP, axis=0)[:, None, :] * A_NGP) * state_NGP
    if restart_TN is None:
        return carried_NGP
    # A select rather than a factor 0, as everywhere: an infinite state must not leak.
    return jnp.where(jnp.any(restart_TN, axis=0)[:, None, None], 0, carried_NGP)


def _collected(sums_TNP, alive_TN, x_TNP, weight_TNG, A_NGP):
    """The sum over the steps of exp(sums A) x weight."""
    if alive_TN is not None:
        x_TNP = jnp.where(alive_TN[..., None], x_TNP, 0)
        # Behind a restart the sum means nothing, and with A > 0 its exponential may be infinite.
        sums_TNP = jnp.where(alive_TN[..., None], sums_TNP, 0)
    decay_TNGP = jnp.exp(sums_TNP[:, :, None, :] * A_NGP)
    return jnp.sum(decay_TNGP * x_TNP[:, :, None, :] * weight_TNG[..., None], axis=0)
