"""Keys and values of every layer and row: static arrays, a ring for layers that see a window.

Slot t of a layer holds the newest position p with p mod T = t. A layer that attends to everything
has a slot for each position of the context; one with a window has as many slots as the window.

Axis letters: B rows, K key-value heads, T slots, S tokens, C head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.config import DecoderConfig
from storm_jax.parallel import sharding


class LayerCache(NamedTuple):
    """Of one layer."""

    k: jax.Array  # [B, T, K, C]
    v: jax.Array  # [B, T, K, C]


Cache = tuple[LayerCache, ...]

AXES: sharding.Axes = (None, None, "kv_heads", None)


def window_of(config: DecoderConfig, layer: int) -> int:
    """How many tokens a layer sees, a token's own included; 0: all."""
    return 0 if (layer + 1) % config.global_every == 0 else config.window


def empty_cache(config: DecoderConfig, rows: int, context: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros, for `rows` sequences of up to `context` tokens."""

    def layer(index: int) -> LayerCache:
        slots = min(context, window_of(config, index) or context)
        shape = (rows, slots, config.kv_heads, config.head_dim)
        return LayerCache(*(sharding.shard(jnp.zeros(shape, dtype), *AXES) for _ in range(2)))

    return tuple(layer(index) for index in range(config.layers))


def held_positions(slots: int, filled: jax.Array) -> jax.Array:
    """The position that each slot holds of a sequence of `filled` tokens, int32 [T]; < 0: none."""
    last = filled - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def write(
    slots_TKC: jax.Array, new_SKC: jax.Array, start: jax.Array, count: jax.Array
) -> jax.Array:
    """Puts positions start .. start + count of one row into their slots.

    Args:
      new_SKC: of positions from `start` on; those behind the first `count` are padding.
    """
    T, S = slots_TKC.shape[0], new_SKC.shape[0]
    j = jnp.arange(S, dtype=jnp.int32)
    # Of positions that share a slot the last one stays; nothing else may be written twice.
    lives = (j < count) & (j >= count - T)
    where = jnp.where(lives, (start + j) % T, T)
    return slots_TKC.at[where].set(new_SKC.astype(slots_TKC.dtype), mode="drop")


def write_token(slots_BTKC: jax.Array, new_BKC: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Puts one token of each row into its slot."""
    B, T = slots_BTKC.shape[:2]
    new = new_BKC.astype(slots_BTKC.dtype)
    return slots_BTKC.at[jnp.arange(B), positions_B % T].set(new, mode="promise_in_bounds")
