"""The scan in plain XLA, chunk by chunk, with a backward of its own.

The forward keeps one state per chunk; the backward recomputes the rest of a chunk from it. So
nothing of size [length, channels, state] exists in either. All layouts and directions read the
operands in place, one slice per chunk: there are no flipped or transposed copies.

Axis letters: see `xla_operands`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from storm_kernels.selective_scan import xla_chunk
from storm_kernels.selective_scan.call import ScanCall, promote_varying
from storm_kernels.selective_scan.xla_operands import (
    Loaded,
    empty,
    load,
    over_chunks,
    prepared,
    softplus_gradient,
    state_in,
    state_out,
    store,
    weight_in,
    zero_padding,
)


def xla_scan(call: ScanCall) -> tuple[jax.Array, jax.Array]:
    """Runs a validated call in chunks. Its gradients are differentiated by JAX, state by state.

    Args:
        call: the operands; see `ScanCall`. `chunk_size=None` takes the platform's default.

    Returns:
        y: in u's shape and `output_dtype`.
        h: [batch, channels, state] in the accumulation dtype.
    """
    call = promote_varying(call)
    return _scan(*prepared(call))


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


def _forward(static, arrays, marks, keep_states):
    """y, the final state and the states before each chunk (in chunk form)."""
    acc = arrays.initial_state.dtype
    groups, channels = arrays.B.shape[2], arrays.A.shape[0]
    A_NGP = weight_in(arrays)
    run = xla_chunk.forward_associative if static.associative else xla_chunk.forward_steps

    def body(carry, start, steps, _):
        before_NGP, y = carry
        chunk = Loaded(static, arrays, marks, start, steps)
        h_NGP, y_TNP = run(before_NGP, chunk.operands, A_NGP, static.reverse)
        y_TBE = y_TNP.reshape(chunk.u_TBE.shape)
        if arrays.D is not None:
            y_TBE += arrays.D.astype(acc) * chunk.u_TBE
        if chunk.z_TBE is not None:
            y_TBE *= jax.nn.silu(chunk.z_TBE)
        if marks is not None:
            y_TBE = zero_padding(y_TBE, chunk.valid_TB)
        y = store(y, y_TBE, start, static.length_axis)
        return (h_NGP, y), before_NGP if keep_states else None

    carry = (
        state_in(arrays.initial_state, groups),
        empty(static, arrays.u, static.output_dtype),
    )
    (h_NGP, y), states = over_chunks(body, carry, static, arrays.B.shape[1], static.reverse)
    return y.astype(static.output_dtype), state_out(h_NGP, channels), states


def _backward(static, arrays, marks, states, dy, dh_BEG):
    """The gradients of all operands, each in its operand's dtype."""
    acc = arrays.initial_state.dtype
    groups, channels = arrays.B.shape[2], arrays.A.shape[0]
    A_NGP = weight_in(arrays)
    run = xla_chunk.backward_associative if static.associative else xla_chunk.backward_steps
    run_forward = xla_chunk.forward_associative if static.associative else xla_chunk.forward_steps

    def body(carry, start, steps, before_NGP):
        g_NGP, sums, grads = carry
        chunk = Loaded(static, arrays, marks, start, steps)
        dy_TBE = load(dy, start, steps, static.length_axis).astype(acc)
        if marks is not None:
            dy_TBE = zero_padding(dy_TBE, chunk.valid_TB)
        dz = grads.z
        if chunk.z_TBE is not None:
            # y before the gate is recomputed and not saved: exact, and [B, L, E] less memory.
            _, y_TNP = run_forward(before_NGP, chunk.operands, A_NGP, static.reverse)
            y_TBE = y_TNP.reshape(dy_TBE.shape)
            if arrays.D is not None:
                y_TBE += arrays.D.astype(acc) * chunk.u_TBE
            gate_TBE = jax.nn.sigmoid(chunk.z_TBE)
            slope_TBE = gate_TBE * (1 + chunk.z_TBE * (1 - gate_TBE))
            dz = store(dz, dy_TBE * y_TBE * slope_TBE, start, static.length_axis)
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
            ddt_TBE *= softplus_gradient(chunk.raw_dt_TBE)
        if marks is not None:
            ddt_TBE = zero_padding(ddt_TBE, chunk.valid_TB)
        dA_KGP, dD_E, dbias_E = sums
        dA_KGP += jnp.sum(d.A_NGP.reshape(-1, *dA_KGP.shape), axis=0)
        if arrays.D is not None:
            du_TBE += arrays.D.astype(acc) * dy_TBE
            dD_E += jnp.sum(dy_TBE * chunk.u_TBE, axis=(0, 1))
        if arrays.delta_bias is not None:
            dbias_E += jnp.sum(ddt_TBE, axis=(0, 1))
        grads = dataclasses.replace(
            grads,
            u=store(grads.u, du_TBE, start, static.length_axis),
            delta=store(grads.delta, ddt_TBE, start, static.length_axis),
            B=store(grads.B, d.B_TNG, start, 1),
            C=store(grads.C, d.C_TNG, start, 1),
            z=dz,
        )
        return (g_NGP, (dA_KGP, dD_E, dbias_E), grads), None

    def sum_of(x):
        return None if x is None else jnp.zeros_like(x, dtype=acc)

    alone = dataclasses.replace(arrays, A=None, D=None, delta_bias=None, initial_state=None)
    by_position = jax.tree.map(lambda x: empty(static, x, x.dtype), alone)
    dA_KGP = jnp.zeros_like(A_NGP[:groups])
    sums = (dA_KGP, sum_of(arrays.D), sum_of(arrays.delta_bias))
    carry = (state_in(dh_BEG, groups), sums, by_position)
    (g_NGP, (dA_KGP, dD_E, dbias_E), grads), _ = over_chunks(
        body, carry, static, arrays.B.shape[1], not static.reverse, states
    )
    return dataclasses.replace(
        jax.tree.map(lambda x, like: x.astype(like.dtype), grads, alone),
        A=state_out(dA_KGP, channels)[0].astype(arrays.A.dtype),
        D=None if dD_E is None else dD_E.astype(arrays.D.dtype),
        delta_bias=None if dbias_E is None else dbias_E.astype(arrays.delta_bias.dtype),
        initial_state=state_out(g_NGP, channels),
    )
