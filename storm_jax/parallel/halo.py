"""What a device needs of the stretches of a sequence beside its own. Inside `jax.shard_map`."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def conv_state(
    x: jax.Array,
    segments_BL: jax.Array,
    width: int,
    *,
    axis_name: str,
    reverse: bool,
    layout: str,
) -> jax.Array:
    """The `initial_state` of `causal_conv1d` on this device's stretch of a longer sequence.

    Args:
      x: [B, L, E] in layout "bld", [B, E, L] in "bdl": this device's positions.
      segments_BL: int32, those of the whole sequence; negative: padding.
      width: K - 1, the positions that the convolution looks back (with `reverse`: ahead).
      axis_name: the mesh axis over which the sequence is split, in its order.

    Returns:
      [B, width, E] in the dtype of x: the inputs beside the stretch, zero where they lie outside
      the sequence, are padding, or are of another segment than the stretch's first position (with
      `reverse`: its last) that is not padding.
    """
    length_axis = 1 if layout == "bld" else 2
    beside = _beside(x, width, length_axis, axis_name, reverse)
    if layout == "bdl":
        beside = jnp.swapaxes(beside, 1, 2)
    # Outside the sequence there are zeros: with ids one higher they say padding.
    ids = _beside(segments_BL + 1, width, 1, axis_name, reverse) - 1
    here = jnp.flip(segments_BL, 1) if reverse else segments_BL
    valid = here >= 0
    first = jnp.take_along_axis(here, jnp.argmax(valid, axis=1)[:, None], axis=1)
    other = (ids >= 0) & (ids != first)
    # A segment ends where another one begins: what lies beyond does not count either.
    beyond = lax.cumsum(other.astype(jnp.int32), axis=1, reverse=not reverse) > 0
    return jnp.where(((ids >= 0) & ~beyond)[..., None], beside, 0)


def _beside(x: jax.Array, width: int, axis: int, axis_name: str, reverse: bool) -> jax.Array:
    """The `width` positions before this device's (with `reverse`: behind), zeros past the ends."""
    devices, length = lax.axis_size(axis_name), x.shape[axis]
    parts = []
    for hop in range(1, math.ceil(width / length) + 1):
        size = min(length, width - (hop - 1) * length)
        start = 0 if reverse else length - size
        edge = lax.slice_in_dim(x, start, start + size, axis=axis)
        step = -hop if reverse else hop
        pairs = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
        parts.append(lax.ppermute(edge, axis_name, pairs))
    if not parts:
        return lax.slice_in_dim(x, 0, 0, axis=axis)
    return jnp.concatenate(parts if reverse else parts[::-1], axis)
