"""Softmax attention of a sequence with itself, laid out over the mesh.

Axis letters: B batch, S tokens, H heads, K key-value heads, C head dim.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

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
    plain = segments_BS is None and k_BSKC.shape == q_BSHC.shape
    fused = kernels.fused_for(q_BSHC, pattern, plain)
    kernel = fused or kernels.xla_attention

    def local(q, k, v, *segments):
        q, k, v = (checkpoint_name(x, kernels.OPERANDS) for x in (q, k, v))
        return kernel(q, k, v, segments[0] if segments else None, pattern)

    rows = () if segments_BS is None else (segments_BS,)
    return by_heads(local, q_BSHC, k_BSKC, v_BSKC, *rows)
