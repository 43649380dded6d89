"""The oracle: one `lax.scan` over the positions, written for reading and not for speed.

JAX differentiates it, which stores every state: [length, batch, channels, state].

Axis letters: B batch, L length, E channels (Mamba inner width), K groups, G SSM state size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.selective_scan.call import ScanCall, promote_varying


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x) up to x = 20, and x itself above (`torch.nn.functional.softplus`)."""
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20))))


def reference_scan(call: ScanCall) -> tuple[jax.Array, jax.Array]:
    """Runs a validated call position by position.

    Source: kernels.md section 2, "Math", after mamba_ssm's `selective_scan_ref`.

    Args:
        call: the operands; see `ScanCall`.

    Returns:
        y: in u's shape and `output_dtype`.
        h: [batch, channels, state] in the accumulation dtype.
    """
    call = promote_varying(call)
    if call.layout == "bdl":
        return _in_layout_bdl(call)
    acc = call.accumulation_dtype

    def step(carry, position):
        h_BEG, last_id_B = carry
        u_BE, delta_BE, B_BKG, C_BKG, z_BE, id_B = position
        before_BEG = h_BEG
        if id_B is not None:
            restart_B = (last_id_B >= 0) & (id_B != last_id_B)
            before_BEG = jnp.where(restart_B[:, None, None], 0, h_BEG)
        new_BEG, y_BE = advance(call, before_BEG, u_BE, delta_BE, B_BKG, C_BKG, z_BE)
        if id_B is not None:
            valid_B = id_B >= 0
            new_BEG = jnp.where(valid_B[:, None, None], new_BEG, h_BEG)
            y_BE = jnp.where(valid_B[:, None], y_BE, 0)
            last_id_B = jnp.where(valid_B, id_B, last_id_B)
        return (new_BEG, last_id_B), y_BE

    valid_BL = None if call.segment_ids is None else call.segment_ids >= 0

    def by_position(x):
        if x is None:
            return None
        if valid_BL is not None and jnp.issubdtype(x.dtype, jnp.floating):
            # Whatever stands at padding, a NaN too, must not reach a gradient (0 * NaN is NaN).
            x = jnp.where(jnp.expand_dims(valid_BL, tuple(range(2, x.ndim))), x, 0)
        # Wide before the loop and narrow after it: XLA's CPU backend converts a whole bfloat16
        # array to float32 and back whenever one position of it is written.
        x = x.astype(acc) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jnp.moveaxis(x, 1, 0)

    operands = (call.u, call.delta, call.B, call.C, call.z, call.segment_ids)
    # The last id seen starts as padding: the first segment continues the initial state.
    no_id_B = None if call.segment_ids is None else jnp.full_like(call.segment_ids[:, 0], -1)
    (h_BEG, _), y_LBE = lax.scan(
        step,
        (call.initial_state.astype(acc), no_id_B),
        tuple(by_position(x) for x in operands),
        reverse=call.reverse,
    )
    return jnp.moveaxis(y_LBE, 0, 1).astype(call.output_dtype), h_BEG


def advance(
    call: ScanCall,
    h_BEG: jax.Array,
    u_BE: jax.Array,
    delta_BE: jax.Array,
    B_BKG: jax.Array,
    C_BKG: jax.Array,
    z_BE: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One position: the state after it and y, in the accumulation dtype.

    `call` gives A, D, delta_bias and delta_softplus; h is the state before the position.
    """
    acc = call.accumulation_dtype
    per_group = u_BE.shape[1] // B_BKG.shape[1]
    u_BE, dt_BE = u_BE.astype(acc), delta_BE.astype(acc)
    B_BEG = jnp.repeat(B_BKG.astype(acc), per_group, axis=1)
    C_BEG = jnp.repeat(C_BKG.astype(acc), per_group, axis=1)
    if call.delta_bias is not None:
        dt_BE += call.delta_bias.astype(acc)
    if call.delta_softplus:
        dt_BE = softplus(dt_BE)
    h_BEG = jnp.exp(dt_BE[..., None] * call.A.astype(acc)) * h_BEG
    h_BEG += (dt_BE * u_BE)[..., None] * B_BEG
    y_BE = jnp.einsum("beg,beg->be", h_BEG, C_BEG, precision=lax.Precision.HIGHEST)
    if call.D is not None:
        y_BE += call.D.astype(acc) * u_BE
    if z_BE is not None:
        y_BE *= jax.nn.silu(z_BE.astype(acc))
    return h_BEG, y_BE


def _in_layout_bdl(call: ScanCall) -> tuple[jax.Array, jax.Array]:
    def swap(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2)

    u, delta = swap(call.u), swap(call.delta)
    z = None if call.z is None else swap(call.z)
    y, h = reference_scan(dataclasses.replace(call, u=u, delta=delta, z=z, layout="bld"))
    return swap(y), h
