"""Temporal sampling (paper eq. 8) of a medium that is encoded already."""

import functools

import jax
import jax.numpy as jnp

from storm_jax.inference.prefill import Visual, bucket


def sampled(visual: Visual, group_tokens: int, every: int) -> Visual:
    """What `Encoder` returns where the configuration keeps every `every`-th pooled frame.

    Pooled frames are mixed before they are sampled, so that dropping them later is the same.

    Args:
      visual: of all pooled frames.
      group_tokens: tokens of a pooled frame.
      every: 1 keeps all.
    """
    groups = -(-visual.count // group_tokens)
    kept = -(-groups // every)
    tokens = _sampled(visual.tokens, group_tokens, every, bucket(kept, 4))
    return Visual(tokens, kept * group_tokens, visual.frames, visual.mixed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sampled(tokens_VD: jax.Array, group_tokens: int, every: int, room: int) -> jax.Array:
    x_TND = tokens_VD.reshape(-1, group_tokens, tokens_VD.shape[-1])[::every]
    x_TND = jnp.pad(x_TND, ((0, max(room - len(x_TND), 0)), (0, 0), (0, 0)))[:room]
    return x_TND.reshape(-1, tokens_VD.shape[-1])
