"""The short causal depthwise convolution that stands before a Mamba scan.

Axis letters: B batch, L length, E channels (Mamba inner width), K conv width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from storm_kernels.selective_scan.segments import segment_marks


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    activation: Literal["silu"] | None = None,
    return_final_state: bool = False,
    layout: Literal["bld", "bdl"] = "bld",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Convolves every channel with its own K weights over the positions up to its own.

        y[l] = activation(bias + sum_k weight[k] * x[l - (K - 1) + k])

    so `weight[K - 1]` meets the position itself. With `reverse` the others come after it:
    x[l + (K - 1) - k]; nothing is flipped in memory. The arithmetic is float32 (float64 if x is)
    and y is rounded once.

    Segments are those of `selective_scan`: they end where the id changes, seen over any padding
    (a negative id) in between, and an id that comes back later is a new segment. A tap counts only
    if it lies in the segment of its output and is not padding; y at padding is zero, and what x
    holds there, a NaN too, is not read. Taps are counted by place: padding inside a segment
    contributes nothing but takes up its positions. The initial state belongs to the first segment.

    Args:
        x: [batch, length, channels], float16, bfloat16, float32 or float64, as the others.
        weight: [K, channels], K >= 1.
        bias: [channels].
        segment_ids: int32 [batch, length].
        initial_state: [batch, K - 1, channels], the inputs at the K - 1 places before position 0
            (with `reverse`: after the last), in the order of their positions. Zeros when absent.
        reverse: convolve towards the end instead of the beginning.
        activation: None or "silu".
        return_final_state: return (y, state) instead of y.
        layout: "bld" as above, or "bdl": x and y are [batch, channels, length], and nothing is
            transposed but the state, which is [batch, K - 1, channels] in both.

    Returns:
        y in the shape and dtype of x; with `return_final_state` also [batch, K - 1, channels] in
        x's dtype: the `initial_state` of a call on the positions that follow (with `reverse`: that
        come before), zero where a place is padding or is not in the last segment.

    Raises:
        ValueError: a shape, the layout or the activation is wrong; the message names it.
        TypeError: a dtype is wrong; the message names the argument.

    Source: `causal_conv1d_fn` of causal-conv1d (Dao-AILab), whose weight is [channels, K].
    """
    x, weight, bias, segment_ids, initial_state = _checked(
        x, weight, bias, segment_ids, initial_state, activation, layout
    )
    axis = 1 if layout == "bld" else 2
    length, width = x.shape[axis], weight.shape[0]
    acc = jnp.promote_types(x.dtype, jnp.float32)

    def by_place(flag_BL):  # broadcasts over the channels
        return jnp.expand_dims(flag_BL, 3 - axis)

    def by_channel(weight_E):  # broadcasts over the positions
        return jnp.expand_dims(weight_E.astype(acc), axis - 1)

    valid = number = None
    if segment_ids is not None:
        valid, restart = segment_marks(segment_ids, reverse)
        # Segments numbered from 0 in scan direction; the initial state is part of number 0.
        number = jax.lax.cumsum(restart.astype(jnp.int32), axis=1, reverse=reverse)
        x = jnp.where(by_place(valid), x, 0)

    def extend(body, state, axis):
        return jnp.concatenate([body, state] if reverse else [state, body], axis)

    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(x.shape[0], width - 1, x.shape[3 - axis]))
    places = extend(x, _oriented(initial_state.astype(x.dtype), axis), axis)
    numbers = None
    if number is not None:
        before = jnp.zeros_like(number, shape=(x.shape[0], width - 1))
        numbers = extend(number, before, 1)

    y = jnp.zeros((), acc)
    for k in range(width):
        first = width - 1 - k if reverse else k
        tap = jax.lax.slice_in_dim(places, first, first + length, axis=axis)
        if number is not None and numbers is not None and k < width - 1:
            same = numbers[:, first : first + length] == number
            tap = jnp.where(by_place(same), tap, 0)
        y = y + by_channel(weight[k]) * tap.astype(acc)
    if bias is not None:
        y = y + by_channel(bias)
    if activation == "silu":
        y = jax.nn.silu(y)
    if valid is not None:
        y = jnp.where(by_place(valid), y, 0)
    y = y.astype(x.dtype)
    if not return_final_state:
        return y
    end = slice(None, width - 1) if reverse else slice(length, None)
    state = _oriented(places[:, end] if axis == 1 else places[:, :, end], axis)
    if number is not None and numbers is not None:
        last = number[:, :1] if reverse else number[:, -1:]
        state = jnp.where((numbers[:, end] == last)[..., None], state, 0)
    return y, state


def _oriented(state, axis):
    """Between [batch, K - 1, channels] and the order of x with its positions on `axis`."""
    return state if axis == 1 else jnp.swapaxes(state, 1, 2)


def _checked(x, weight, bias, segment_ids, initial_state, activation, layout):
    if layout not in ("bld", "bdl"):
        raise ValueError(f"layout={layout!r}, expected 'bld' or 'bdl'")
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    if x.ndim != 3 or 0 in x.shape:
        names = "[batch, length, channels]" if layout == "bld" else "[batch, channels, length]"
        raise ValueError(f"x has shape {x.shape}, expected {names}, none empty")
    batch = x.shape[0]
    length, channels = x.shape[1:] if layout == "bld" else x.shape[:0:-1]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != channels:
        raise ValueError(f"weight has shape {weight.shape}, expected (K, {channels}), K >= 1")
    expected = {
        "bias": (bias, (channels,), "[channels]"),
        "initial_state": (
            initial_state,
            (batch, weight.shape[0] - 1, channels),
            "[batch, K - 1, channels]",
        ),
        "segment_ids": (segment_ids, (batch, length), "[batch, length]"),
    }
    for name, (value, shape, axes) in expected.items():
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(value)}, expected {shape}: {axes}")
    bias = None if bias is None else jnp.asarray(bias)
    initial_state = None if initial_state is None else jnp.asarray(initial_state)
    floats = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, value in floats.items():
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point one")
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.dtype != jnp.int32:
            raise TypeError(f"segment_ids has dtype {segment_ids.dtype}, expected int32")
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r}, expected None or 'silu'")
    return x, weight, bias, segment_ids, initial_state
