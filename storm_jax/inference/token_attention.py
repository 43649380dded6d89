"""Attention of one token of each row to its cache, to which the token is written.

Axis letters as in `inference.decoder`; H G queries, a key and a value.
"""

import jax
import jax.numpy as jnp

from storm_jax.inference import cache as slots
from storm_jax.models.attention_kernels import cudnn_serves, masked_attention
from storm_jax.models.layers import rotate
from storm_kernels import token_attention as one_row
from storm_kernels.platforms import platform_of

_FEW_ROWS = 4  # below it XLA's products, of which one serves a row, are faster than cuDNN


def turned(qkv_BSKHC: jax.Array, cos_BSA: jax.Array, sin_BSA: jax.Array):
    """Queries [B, S, K, G, C] and keys [B, S, K, C] turned by their angles, and values."""
    qk = rotate(qkv_BSKHC[:, :, :, :-1], cos_BSA[:, :, None], sin_BSA[:, :, None])
    return qk[:, :, :, :-1], qk[:, :, :, -1], qkv_BSKHC[:, :, :, -1]


def token_attention(
    qkv_BKHC: jax.Array,
    cos_BA: jax.Array,
    sin_BA: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    positions_B: jax.Array,
    wanted_B: jax.Array,
    scale: float,
    softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes each row's token to its slot and attends to what the row then holds.

    On NVIDIA GPUs our kernel, for one row, does it all, rotary angles included; it and cuDNN read
    no slot that is empty; XLA reads all.

    Args:
      qkv_BKHC: G queries of each key-value head, a key, not turned yet, and a value.
      cos_BA, sin_BA: float32 [B, C / 2].
      k_BTKC, v_BTKC: the slots.
      positions_B: int32, of the tokens; the slots hold those before.
      wanted_B: bool; results of other rows mean nothing, and one slot is read at most.
      softcap: see `models.attention.self_attention`.

    Returns:
      [B, K, G, C] in the dtype of the queries, and the slots.
    """
    if one_row.unsupported(qkv_BKHC, k_BTKC) is None:
        held_B = jnp.where(wanted_B, positions_B, 0)
        return one_row.token_attention(
            qkv_BKHC, cos_BA, sin_BA, k_BTKC, v_BTKC, positions_B, held_B,
            scale=scale, softcap=softcap,
        )  # fmt: skip
    q, k, v = turned(qkv_BKHC[:, None], cos_BA[:, None], sin_BA[:, None])
    k_BTKC = slots.write_token(k_BTKC, k[:, 0], positions_B)
    v_BTKC = slots.write_token(v_BTKC, v[:, 0], positions_B)
    # A ring that is full holds the window and nothing else.
    valid_B = jnp.where(wanted_B, jnp.minimum(positions_B + 1, k_BTKC.shape[1]), 1)
    return _attend(q[:, 0], k_BTKC, v_BTKC, valid_B, scale, softcap), k_BTKC, v_BTKC


def _attend(q_BKGC, k_BTKC, v_BTKC, valid_B, scale: float, softcap: float) -> jax.Array:
    """softmax(scale * q k^T) v over the first `valid_B` slots of each row, at least one."""
    B, K, G, C = q_BKGC.shape
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
