"""What computes attention on one device: cuDNN on NVIDIA GPUs, splash on TPUs, XLA for the rest.

On Hopper GPUs `storm_kernels.attention` serves the ViT's heads of 72 channels.
cuDNN, through `jax.nn.dot_product_attention`, serves bfloat16 and float16 and head dims that are
multiples of 8, and no soft cap. A row of one segment is causal; packed rows get a mask, which costs
memory [B, S, S]. Splash, of JAX's Pallas operations, serves everything and takes segment ids. XLA
serves everything; queries go in chunks, so its memory is [B, H, chunk, S].

Axis letters: B batch, S queries, T keys, H heads, K key-value heads, C head dim.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from storm_kernels import attention as hopper
from storm_kernels.platforms import platform_of

# Names for remat policies (`config.SAVED_NAMES`).
RESULT = "attention"
OPERANDS = "qkv"

_CHUNK = 512  # queries whose scores exist at one time in `xla_attention`
_BLOCK = 512  # queries and keys of a block in splash; not tuned, for no TPU was at hand
_LANES = 128  # splash works on multiples of it


class Pattern(NamedTuple):
    """Which keys a query sees, and how scores are made; see `attention.self_attention`."""

    causal: bool
    window: int
    scale: float
    softcap: float


Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Pattern], jax.Array]


def fused_for(q_BSHC: jax.Array, pattern: Pattern, plain: bool = False) -> Kernel | None:
    """The fused kernel of the platform that this is traced for, or None: it has none for this.

    Args:
      plain: there are no segments, and each query head has keys and values of its own.
    """
    platform = platform_of(q_BSHC)
    if platform == "tpu":
        return splash_attention
    plain &= not (pattern.causal or pattern.softcap)
    if plain and hopper.unsupported(q_BSHC) is None:
        return hopper_attention
    if platform == "gpu" and cudnn_serves(q_BSHC, pattern.softcap):
        return cudnn_attention
    return None


def cudnn_serves(q_BSHC: jax.Array, softcap: float) -> bool:
    """Whether cuDNN computes attention of such queries on the GPUs of this process."""
    head_dim = q_BSHC.shape[-1]
    fits = head_dim % 8 == 0 and not softcap
    fits &= q_BSHC.dtype in (jnp.bfloat16, jnp.float16)
    return fits and head_dim <= _largest_head_of_cudnn()


def _largest_head_of_cudnn() -> int:
    """Channels of a head that cuDNN serves on the GPUs of this process.

    0 without one, as when a step is compiled ahead for GPUs on a machine that has none: JAX asks
    the library for its version while it traces.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return 0
    return 256 if float(device.compute_capability) >= 9 else 128


# --------------------------------------------------------------------------------------- NVIDIA GPU


def cudnn_attention(q_BSHC, k_BSKC, v_BSKC, segments_BS, pattern: Pattern) -> jax.Array:
    """cuDNN's fused attention; arguments and result as in `attention.self_attention`."""
    window = (pattern.window - 1, 0) if pattern.window else None
    cudnn = functools.partial(
        jax.nn.dot_product_attention, scale=pattern.scale, implementation="cudnn"
    )

    def one_segment(q, k, v, _):
        return cudnn(q, k, v, is_causal=pattern.causal, local_window_size=window)

    if segments_BS is None:
        return _saved(one_segment)(q_BSHC, k_BSKC, v_BSKC, None)

    def packed(q, k, v, segments):
        mask = segments[:, :, None] == segments[:, None, :]
        if pattern.causal:
            places = jnp.arange(segments.shape[1])[None]
            mask = causal_mask(places, places, segments, segments, pattern.window)
        return cudnn(q, k, v, mask=mask[:, None])

    def call(q, k, v, segments):
        # What padding at the end of a row sees does not matter, and nothing sees it.
        same = (segments == segments[:, :1]) | (segments < 0)
        return jax.lax.cond(jnp.all(same), one_segment, packed, q, k, v, segments)

    # Without the causal mask padding would be seen.
    call = call if pattern.causal else packed
    return _saved(call)(q_BSHC, k_BSKC, v_BSKC, segments_BS)


def hopper_attention(q_BSHC, k_BSHC, v_BSHC, _, pattern: Pattern) -> jax.Array:
    """Our own kernel for every query seeing every key of its row; there are no segments."""
    attend = functools.partial(hopper.attention, scale=pattern.scale)
    return _saved(attend)(q_BSHC, k_BSHC, v_BSHC)


def _saved(f: Callable) -> Callable:
    """`f`, whose result and whose backward pass's other inputs carry the name `RESULT`."""

    @jax.custom_vjp
    def call(*args):
        return f(*args)

    def forward(*args):
        out, pull = jax.vjp(f, *args)
        named = checkpoint_name(out, RESULT)

        def keep(x):
            if any(x is arg for arg in args):
                return x
            # The result itself is kept once where JAX knows that it is the same array.
            return named if x is out else checkpoint_name(x, RESULT)

        return named, jax.tree.map(keep, pull)

    call.defvjp(forward, lambda pull, gradient: pull(gradient))
    return call


# ---------------------------------------------------------------------------------------------- TPU


def splash_attention(
    q_BSHC, k_BSKC, v_BSKC, segments_BS, pattern: Pattern, *, interpret: bool = False
) -> jax.Array:
    """JAX's splash attention; arguments and result as in `attention.self_attention`.

    Args:
      interpret: runs the kernel in Pallas' interpreter, for tests on a CPU.
    """
    B, S, H, C = q_BSHC.shape
    more = -S % _LANES
    if more:
        if segments_BS is None:
            segments_BS = jnp.zeros((B, S), jnp.int32)
        # Padding must be no segment of the row's: -1 is the row's own padding.
        segments_BS = jnp.pad(segments_BS, ((0, 0), (0, more)), constant_values=-2)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, -C % _LANES))).swapaxes(1, 2)
        for x in ((q_BSHC * jnp.asarray(pattern.scale, jnp.float32)).astype(q_BSHC.dtype),
                  k_BSKC, v_BSKC)
    )  # fmt: skip
    kernel = _splash_kernel(S + more, H, pattern.causal, pattern.window, pattern.softcap, interpret)
    if segments_BS is None:
        out_BHSC = cast(jax.Array, jax.vmap(kernel)(q, k, v))
    else:
        out_BHSC = cast(jax.Array, jax.vmap(kernel)(q, k, v, _splash_segments(segments_BS)))
    return jnp.swapaxes(out_BHSC, 1, 2)[:, :S, :, :C]


def _splash_segments(segments_BS: jax.Array):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    return splash.SegmentIds(segments_BS, segments_BS)


def _splash_kernel(S: int, heads: int, causal: bool, window: int, softcap: float, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if causal and window:
        mask = masks.LocalMask((S, S), (window - 1, 0), 0)
    else:
        mask = masks.CausalMask((S, S)) if causal else masks.FullMask((S, S))
    # The largest multiple of the lanes that divides the length, up to the block size.
    block = next(b for b in range(min(_BLOCK, S), 0, -_LANES) if S % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESULT,
        interpret=interpret,
    )


# --------------------------------------------------------------------------- any platform, by XLA


def xla_attention(q_BSHC, k_BSKC, v_BSKC, segments_BS, pattern: Pattern) -> jax.Array:
    """Plain attention; arguments and result as in `attention.self_attention`."""
    B, S = q_BSHC.shape[:2]
    places = jnp.arange(S)[None]

    def rows(q, places_q, segments_q):
        mask = None
        if pattern.causal:
            mask = causal_mask(places_q, places, segments_q, segments_BS, pattern.window)
        elif segments_BS is not None:
            mask = segments_q[:, :, None] == segments_BS[:, None, :]
        return masked_attention(q, k_BSKC, v_BSKC, mask, pattern.scale, pattern.softcap)

    chunks = -(-S // _CHUNK)
    if chunks == 1:
        return checkpoint_name(rows(q_BSHC, places, segments_BS), RESULT)
    more = chunks * _CHUNK - S

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0], chunks, _CHUNK, *x.shape[2:]).swapaxes(0, 1)

    inputs = jax.tree.map(cut, (q_BSHC, places, segments_BS))
    # The backward pass makes a chunk's scores again instead of keeping all of them.
    out = jax.lax.map(lambda chunk: jax.checkpoint(rows)(*chunk), inputs)
    out = out.swapaxes(0, 1).reshape(B, S + more, *out.shape[3:])[:, :S]
    return checkpoint_name(out, RESULT)


def masked_attention(q_BSHC, k_BTKC, v_BTKC, mask_BST, scale: float, softcap: float) -> jax.Array:
    """Attention with a mask, bool [B, S, T] or None, whose scores [B, H, S, T] are all there.

    A query whose mask is empty gets the mean of all values; the caller discards it (padding).
    """
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
        scores = jnp.where(mask[:, None], scores, np.finfo(np.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKC.dtype)
    return jnp.einsum("BKGST,BTKC->BSKGC", weights, v_BTKC).reshape(B, S, H, C)


def causal_mask(
    query_places: jax.Array,
    key_places: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Which keys each query may see.

    Args:
      query_places: int32 [B, S], places in the row or in the cache.
      key_places: int32 [B, T].
      query_segments: int32 [B, S] or None: queries see keys of their own segment alone.
      key_segments: int32 [B, T] or None.
      window: number of keys seen, the query's own place included; 0: all earlier ones.

    Returns:
      bool [B, S, T]; B is 1 if it is in all arguments.
    """
    distance = query_places[:, :, None] - key_places[:, None, :]
    mask = distance >= 0
    if window:
        mask &= distance < window
    if query_segments is not None:
        assert key_segments is not None, "query_segments without key_segments"
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask
