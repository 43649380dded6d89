"""Softmax attention of a sequence with itself and with a cache, laid out over the mesh.

Axis letters: B batch, S queries, T keys, H heads, K key-value heads, C head dim.
"""

import jax
import jax.numpy as jnp

from storm_jax.models import attention_kernels as kernels
from storm_jax.parallel.heads import by_heads


def self_attention(
    q_BSHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BS: jax.Array | None = None,
    *,
    causal: bool,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(scale * q k^T) v within a row; K key-value heads are shared by H query heads.

    Scores and softmax are float32. The platform's fused kernel is taken where it serves the call,
    see `attention_kernels`; no [S, S] array is made then, nor for long sequences elsewhere.

    Args:
      segments_BS: int32: a token sees those of its own segment alone. The tokens of a segment stand
        together and in order, padding (-1) is at the end of a row. None: a row is one segment.
      causal: a token sees itself and what is before it.
      window: number of keys seen, the token's own included; 0: no limit. With `causal` only.
      softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2); 0: off.

    Returns:
      [B, S, H, C] in the dtype of q.
    """
    pattern = kernels.Pattern(causal=causal, window=window, scale=scale, softcap=softcap)
    kernel = kernels.fused_for(q_BSHC, pattern) or kernels.xla_attention

    def local(q, k, v, *segments):
        return kernel(q, k, v, segments[0] if segments else None, pattern)

    rows = () if segments_BS is None else (segments_BS,)
    return by_heads(local, q_BSHC, k_BSKC, v_BSKC, *rows)


def cached_attention(
    q_BSHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention to the slots of a cache, of which slot t holds position t.

    Args:
      positions_BS: int32, positions of the queries: each sees the slots up to its own.
      window: number of slots seen, the query's own included; 0: all of them.

    See `self_attention` for the rest.
    """

    def local(q, k, v, positions):
        slots = jnp.arange(k.shape[1], dtype=jnp.int32)
        mask = kernels.causal_mask(positions, slots[None], window=window)
        return kernels.masked_attention(q, k, v, mask, scale, softcap)

    return by_heads(local, q_BSHC, k_BTKC, v_BTKC, positions_BS)
