"""The public selective scan: one signature, its meaning, its checks, and who serves the call."""

from typing import Literal

import jax
import jax.numpy as jnp

from storm_kernels.selective_scan.call import ScanCall
from storm_kernels.selective_scan.reference import reference_scan
from storm_kernels.selective_scan.xla import xla_scan

IMPLEMENTATIONS = ("reference", "xla")
"""The names that `implementation` takes."""


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
    implementation: Literal["reference", "xla"] | None = None,
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
    Gradients have their operands' dtypes; sums over positions are accumulated in float32.

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
        implementation: "reference" (a plain loop, differentiated by JAX: slow, keeps every state)
            or "xla" (chunked, keeps one state a chunk). None takes the platform's fastest that
            serves the call, which is "xla" on all platforms.
        layout: "bld" as above, or "bdl": u, delta, z and y are [batch, channels, length].
        chunk_size: positions in a chunk, a hint about speed and memory, not about the result;
            None takes the platform's default and "reference" has no chunks.

    Returns:
        y with the shape and dtype of u; with `return_final_state` also h, [batch, channels,
        state], float32 (float64 if an input is).

    Raises:
        ValueError: a shape, layout, chunk size or implementation is wrong; the message names it.
        TypeError: a dtype is wrong; the message names the argument.

    Source: Gu and Dao 2023 (arXiv:2312.00752), section 3.2 and `selective_scan_ref` of mamba_ssm,
    with dt * B for the input (Euler); initial state, segments and reverse are ours.
    """
    call = _checked_call(
        u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
        delta_softplus=delta_softplus, reverse=reverse, layout=layout, chunk_size=chunk_size,
    )  # fmt: skip
    if implementation is None or implementation == "xla":
        y, h = xla_scan(call)
    elif implementation == "reference":
        y, h = reference_scan(call)
    else:
        raise ValueError(
            f"implementation={implementation!r} does not exist; there are "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, and None for the platform's default"
        )
    return (y, h) if return_final_state else y


def _checked_call(
    u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
    *, delta_softplus, reverse, layout, chunk_size,
) -> ScanCall:  # fmt: skip
    """Checks every argument, u first, and brings B, C and the state into their general form."""
    if layout not in ("bld", "bdl"):
        raise ValueError(f"layout={layout!r}, expected 'bld' or 'bdl'")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}, expected a positive int or None")
    names = "[batch, length, channels]" if layout == "bld" else "[batch, channels, length]"
    u = _floating("u", u)
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(
            f"u has shape {u.shape}, expected {names}, no axis empty (layout={layout!r})"
        )
    batch, length, channels = u.shape if layout == "bld" else (u.shape[0], u.shape[2], u.shape[1])
    delta = _shaped("delta", _floating("delta", delta), u.shape, f"{names}, as u")
    A = _floating("A", A)
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {A.shape}, expected ({channels}, state): [channels, state]")
    state = A.shape[1]
    B = _grouped("B", _floating("B", B), batch, length, channels, state)
    C = _grouped("C", _floating("C", C), batch, length, channels, state)
    if B.shape != C.shape:
        raise ValueError(f"C has {C.shape[2]} groups, expected {B.shape[2]}, as B")
    if D is not None:
        D = _shaped("D", _floating("D", D), (channels,), "[channels]")
    if z is not None:
        z = _shaped("z", _floating("z", z), u.shape, f"{names}, as u")
    if delta_bias is not None:
        delta_bias = _floating("delta_bias", delta_bias)
        delta_bias = _shaped("delta_bias", delta_bias, (channels,), "[channels]")
    floats = [x for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None]
    acc = jnp.float64 if any(x.dtype == jnp.float64 for x in floats) else jnp.float32
    shape = (batch, channels, state)
    if initial_state is None:
        initial_state = jnp.zeros(shape, acc)
    else:
        initial_state = jnp.asarray(initial_state)
        if initial_state.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"initial_state has dtype {initial_state.dtype}, expected float32")
        _shaped("initial_state", initial_state, shape, "[batch, channels, state]")
        initial_state = initial_state.astype(acc)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.dtype != jnp.int32:
            raise TypeError(f"segment_ids has dtype {segment_ids.dtype}, expected int32")
        _shaped("segment_ids", segment_ids, (batch, length), "[batch, length]")
    return ScanCall(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state, segment_ids=segment_ids, delta_softplus=delta_softplus,
        reverse=reverse, layout=layout, chunk_size=chunk_size,
    )  # fmt: skip


def _floating(name: str, x) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{name} has dtype {x.dtype}, expected float16, bfloat16, float32 or float64"
        )
    return x


def _shaped(name: str, x: jax.Array, expected: tuple[int, ...], axes: str) -> jax.Array:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}: {axes}")
    return x


def _grouped(name, x, batch, length, channels, state) -> jax.Array:
    """B or C as [batch, length, groups, state]."""
    expected = f"({batch}, {length}, {state}) or ({batch}, {length}, groups, {state})"
    if x.ndim not in (3, 4) or x.shape[:2] != (batch, length) or x.shape[-1] != state:
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}")
    x = x if x.ndim == 4 else x[:, :, None, :]
    groups = x.shape[2]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{name} has shape {x.shape}: {groups} groups do not divide {channels} channels"
        )
    return x
