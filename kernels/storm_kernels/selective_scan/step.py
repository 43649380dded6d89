"""One position of the selective scan, for streaming and decoding."""

import jax

from storm_kernels.selective_scan.checks import checked_step
from storm_kernels.selective_scan.reference import advance


def selective_scan_step(
    state: jax.Array,
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`selective_scan` over a single position: takes the state before it, returns the one after.

    Called position by position it gives what one `selective_scan` gives, values and gradients.
    It is written in plain JAX for all platforms: one position reads every operand once.

    Args:
        state: [batch, channels, state] float32 (or float64), zeros at the start of a sequence.
        u: [batch, channels], float16, bfloat16, float32 or float64, as all operands that have no
            dtype here; they need not agree.
        delta: [batch, channels], the time step before bias and softplus.
        A: [channels, state], usually negative.
        B: [batch, state], or [batch, groups, state]: channel d uses group
            d // (channels / groups).
        C: as B.
        D: [channels], the skip.
        z: [batch, channels], the gate.
        delta_bias: [channels].
        delta_softplus: apply softplus to delta + delta_bias.
        output_dtype: the dtype of y, u's when absent; at most as wide as the arithmetic.

    Returns:
        y: [batch, channels] in `output_dtype`.
        state: [batch, channels, state], float32 (float64 if an input is).

    Raises:
        ValueError: a shape is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Source: as `selective_scan`.
    """
    call = checked_step(
        state, u, delta, A, B, C, D, z, delta_bias,
        delta_softplus=delta_softplus, output_dtype=output_dtype,
    )  # fmt: skip
    h_BEG, y_BE = advance(call, call.initial_state, call.u, call.delta, call.B, call.C, call.z)
    return y_BE.astype(call.output_dtype), h_BEG
