"""The public selective scan: one signature, its meaning, its checks, and who serves the call."""

from typing import Literal

import jax

from storm_kernels.selective_scan import dispatch
from storm_kernels.selective_scan.checks import checked_call


def selective_scan(
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
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    output_dtype: jax.typing.DTypeLike | None = None,
    implementation: dispatch.Name | None = None,
    layout: Literal["bld", "bdl"] = "bld",
    chunk_size: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs the Mamba-1 recurrence along the length axis.

    For each batch row b, channel d, state n and position l, in scan direction:

        dt = delta[l, d] + delta_bias[d];  dt = softplus(dt) if delta_softplus (dt itself above 20)
        h[d, n] = exp(dt * A[d, n]) * h[d, n] + dt * B[l, n] * u[l, d]
        y[l, d] = (sum_n C[l, n] * h[d, n] + D[d] * u[l, d]) * silu(z[l, d])

    with absent D, z and delta_bias left out. The arithmetic and the state are float32 whatever
    the inputs are, float64 if an input is (with jax_enable_x64); y is rounded once, at the end.

    Segments. `segment_ids` lets several sequences share a row. A negative id is padding: the
    state passes through unchanged, y is zero, whatever the operands hold there (a NaN too) is
    not read, and their gradients are zero. At any other position the state restarts from zero if
    the nearest earlier position (in scan direction) that is not padding has another id. So
    `5 5 -1 5` is one segment, padding in its middle and all; `5 5 -1 6` and `5 5 6 5` are two and
    three. The first position that is not padding never restarts: the first segment continues
    `initial_state`, and no other sees it. The final state is the last segment's. Ids are compared
    within a call only: a caller who cuts a row into several calls and carries the state passes
    zeros where a cut coincides with the border of two segments.

    Everything is differentiable in reverse mode, the initial and the final state included.
    Gradients have their operands' dtypes; sums over positions are accumulated in float32. Second
    derivatives are taken through "reference" and "xla", which then keep every state; the kernels
    refuse them.

    Args:
        u: [batch, length, channels], float16, bfloat16, float32 or float64, as all operands that
            have no dtype here; they need not agree.
        delta: [batch, length, channels], the time step before bias and softplus.
        A: [channels, state], usually negative.
        B: [batch, length, state], or [batch, length, groups, state]: channel d uses group
            d // (channels / groups).
        C: as B.
        D: [channels], the skip.
        z: [batch, length, channels], the gate.
        delta_bias: [channels].
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: [batch, channels, state] float32 (or float64), zeros when absent.
        segment_ids: int32 [batch, length].
        reverse: run from the last position to the first. `initial_state` then comes in at the
            end, and the final state is the one after position 0. Nothing is flipped in memory.
        return_final_state: return (y, h) instead of y.
        output_dtype: the dtype of y, u's when absent; at most as wide as the arithmetic. float32
            with 16-bit operands keeps what rounding would lose.
        implementation: "reference" (a plain loop, differentiated by JAX: slow, keeps every
            state), "xla" (chunked, keeps one state a chunk), "pallas_tpu" (a TPU kernel) or
            "triton_gpu" (an NVIDIA GPU kernel, needs jax-triton). None takes the fastest that
            serves the call on the platform of the mesh in force, or else of JAX's default device:
            the platform's kernel, or "xla" with a warning that says why.
        layout: "bld" as above, or "bdl": u, delta, z and y are [batch, channels, length].
        chunk_size: positions in a chunk, a hint about speed and memory, not about the result;
            None takes the platform's default and "reference" has no chunks.

    Returns:
        y with the shape of u, in `output_dtype`; with `return_final_state` also h, [batch,
        channels, state], float32 (float64 if an input is).

    Raises:
        ValueError: a shape, layout, chunk size or implementation is wrong, or the implementation
            does not serve the call; the message says which and why.
        TypeError: a dtype is wrong; the message names the argument.

    Source: Gu and Dao 2023 (arXiv:2312.00752), section 3.2 and `selective_scan_ref` of mamba_ssm,
    with dt * B for the input (Euler); initial state, segments and reverse are ours.
    """
    call = checked_call(
        u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
        delta_softplus=delta_softplus, reverse=reverse, layout=layout, chunk_size=chunk_size,
        output_dtype=output_dtype,
    )  # fmt: skip
    y, h = dispatch.implementation_for(call, implementation).scan(call)
    return (y, h) if return_final_state else y
