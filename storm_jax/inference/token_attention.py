"""Attention of one token of each row to its cache."""

import jax
import jax.numpy as jnp

from storm_jax.models.attention_kernels import cudnn_serves, masked_attention
from storm_kernels import token_attention as one_row
from storm_kernels.platforms import platform_of

_FEW_ROWS = 4  # below it XLA's products, of which one serves a row, are faster than cuDNN


def token_attention(
    q_BKGC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    valid_B: jax.Array,
    scale: float,
    softcap: float,
) -> jax.Array:
    """softmax(scale * q k^T) v over the first `valid_B` slots of each row.

    On NVIDIA GPUs our kernel, for one row, and cuDNN read no slot behind them; XLA reads all.

    Args:
      q_BKGC: G queries of each key-value head.
      k_BTKC, v_BTKC: the slots.
      valid_B: int32, at least 1.
      softcap: see `models.attention.self_attention`.

    Returns:
      [B, K, G, C] in the dtype of q.
    """
    B, K, G, C = q_BKGC.shape
    if B == 1 and one_row.unsupported(q_BKGC[0], k_BTKC[0]) is None:
        return one_row.token_attention(
            q_BKGC[0], k_BTKC[0], v_BTKC[0], valid_B, scale=scale, softcap=softcap
        )[None]
    q = q_BKGC.reshape(B, 1, K * G, C)
    if B >= _FEW_ROWS and platform_of(q) == "gpu" and cudnn_serves(q, softcap):
        out = jax.nn.dot_product_attention(
            q,
            k_BTKC,
            v_BTKC,
            scale=scale,
            query_seq_lengths=jnp.ones(B, jnp.int32),
            key_value_seq_lengths=valid_B,
            implementation="cudnn",
        )
    else:
        mask = jnp.arange(k_BTKC.shape[1])[None] < valid_B[:, None]
        out = masked_attention(q, k_BTKC, v_BTKC, mask[:, None], scale, softcap)
    return out.reshape(B, K, G, C)
