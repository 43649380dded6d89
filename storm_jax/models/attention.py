"""Softmax attention: grouped queries, causal and local masks, packed rows, soft caps."""

import jax
import jax.numpy as jnp

from storm_jax.parallel import sharding


def causal_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Which keys each query may see.

    Args:
      query_positions: int32 [B, S], positions within the sample.
      key_positions: int32 [B, T].
      query_segments: int32 [B, S] or None: queries see keys of their own segment alone.
      key_segments: int32 [B, T] or None.
      window: number of keys seen, the query's own position included; 0: all earlier ones.

    Returns:
      bool [B, S, T].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window:
        mask &= distance < window
    if query_segments is not None:
        assert key_segments is not None, "query_segments without key_segments"
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def attention(
    q_BSHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    mask_BST: jax.Array | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(scale * q k^T) v with K key-value heads shared by H query heads (H % K == 0).

    Scores and softmax are float32. A query whose mask is empty gets the mean of all values; the
    caller discards it (padding).

    Args:
      softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2); 0: off.

    Returns:
      [B, S, H, C] in the dtype of q.
    """
    k_BTKC, v_BTKC = (_divisible_heads(x, q_BSHC.shape[2]) for x in (k_BTKC, v_BTKC))
    q_axes = ("batch", None, "heads", None)
    kv_axes = ("batch", None, "kv_heads", None)

    def local(q, k, v, *mask):
        return _attention(q, k, v, mask[0] if mask else None, scale, softcap)

    masks = () if mask_BST is None else (mask_BST,)
    mask_axes = () if mask_BST is None else (("batch", None, None),)
    call = sharding.per_device(local, (q_axes, kv_axes, kv_axes, *mask_axes), q_axes)
    return call(q_BSHC, k_BTKC, v_BTKC, *masks)


def _attention(q_BSHC, k_BTKC, v_BTKC, mask_BST, scale: float, softcap: float) -> jax.Array:
    mask = None if mask_BST is None else mask_BST[:, None]
    if not softcap:
        return jax.nn.dot_product_attention(q_BSHC, k_BTKC, v_BTKC, mask=mask, scale=scale)
    # JAX's attention has no soft cap.
    B, S, H, C = q_BSHC.shape
    K = k_BTKC.shape[2]
    q = q_BSHC.reshape(B, S, K, H // K, C)
    scores = jnp.einsum("BSKGC,BTKC->BKGST", q, k_BTKC, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKC.dtype)
    return jnp.einsum("BKGST,BTKC->BSKGC", weights, v_BTKC).reshape(B, S, H, C)


def _divisible_heads(x_BTKC: jax.Array, heads: int) -> jax.Array:
    """Repeats key-value heads where the tensor axis has more devices than there are of them."""
    mesh = sharding.active_mesh()
    parts = 1 if mesh is None else mesh.shape["tensor"]
    kv_heads = x_BTKC.shape[2]
    if kv_heads % parts == 0 or heads % parts:
        return x_BTKC
    repeats = next(r for r in range(2, heads + 1) if kv_heads * r % parts == 0)
    return jnp.repeat(x_BTKC, repeats, axis=2)
