"""Attention of one token of each row to its cache.

On NVIDIA GPUs JAX's own flash-decoding kernel, which reads no slot behind the last valid one; else
XLA, which reads all of them.
"""

import jax
import jax.numpy as jnp

from storm_jax.models.attention_kernels import masked_attention
from storm_kernels.selective_scan.platforms import platform_of

_SPLITS = 16  # parts of the slots that are summed side by side
_BLOCK = 128  # slots that a part reads at once


def token_attention(
    q_BKGC: jax.Array,
    k_BKTC: jax.Array,
    v_BKTC: jax.Array,
    valid_B: jax.Array,
    scale: float,
    softcap: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T) v over the first `valid_B` slots of each row.

    Args:
      q_BKGC: G queries of each key-value head.
      k_BKTC, v_BKTC: the slots.
      valid_B: int32, at least 1.
      softcap: see `models.attention.self_attention`.
      interpret: runs the GPU's kernel in Pallas' interpreter, for tests on a CPU.

    Returns:
      [B, K, G, C] in the dtype of q.
    """
    B, K, G, C = q_BKGC.shape
    T = k_BKTC.shape[2]
    fits = T % (_SPLITS * _BLOCK) == 0 and C & (C - 1) == 0 and C >= 16 and not softcap
    if (interpret or platform_of(q_BKGC) == "gpu") and fits:
        from jax.experimental.pallas.ops.gpu import decode_attention

        heads = (x.reshape(B * K, *x.shape[2:]) for x in (q_BKGC, k_BKTC, v_BKTC))
        out = decode_attention.mqa(
            *heads,
            kv_seq_len=jnp.repeat(valid_B, K),
            sm_scale=scale,
            block_k=_BLOCK,
            k_splits=_SPLITS,
            interpret=interpret,
        )
        return out.reshape(B, K, G, C)
    mask = jnp.arange(T)[None] < valid_B[:, None]
    out = masked_attention(
        q_BKGC.reshape(B, 1, K * G, C),
        k_BKTC.swapaxes(1, 2),
        v_BKTC.swapaxes(1, 2),
        mask[:, None],
        scale,
        softcap,
    )
    return out.reshape(B, K, G, C)
