"""The text decoder: Gemma 2 (arXiv 2408.00118), Gemma 3 (2503.19786) and Qwen2 (2407.10671).

One implementation; `DecoderConfig` says in what the families differ. `inference.decoder` runs the
same layers with a cache.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from storm_jax.config import DecoderConfig, Remat
from storm_jax.models.attention import self_attention
from storm_jax.models.layers import (
    KEEP_ALL,
    Embedding,
    Head,
    Linear,
    RMSNorm,
    Stack,
    rotary,
    rotate,
    vocabulary_scores,
)
from storm_jax.parallel.sharding import shard


def output_scores(config: DecoderConfig, weight: jax.Array, x_BSD: jax.Array) -> jax.Array:
    """Scores of the vocabulary, float32 [B, S, V], from `Decoder.output_weight`."""
    return capped(config, vocabulary_scores(x_BSD, weight, transposed=config.tied_embeddings))


def capped(config: DecoderConfig, scores: jax.Array) -> jax.Array:
    """Scores of the vocabulary under the family's soft cap."""
    cap = config.logit_softcap
    return cap * jnp.tanh(scores / cap) if cap else scores


def gated(config: DecoderConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Hidden units of the gated MLP: activation(gate) * up, in the dtype of `up`."""
    gate = gate.astype(jnp.float32)
    if config.activation == "silu":
        gate = jax.nn.silu(gate)
    else:
        gate = jax.nn.gelu(gate, approximate=True)
    return (gate * up).astype(up.dtype)


class LayerInputs(NamedTuple):
    """What all layers share."""

    angles: tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # local, global
    segments: jax.Array | None  # int32 [B, S]


class DecoderBlock(nnx.Module):
    """Attention and gated MLP, each with a norm before it and, in Gemma, one after it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_dim

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, config.norm_eps, plus_one=config.norm_plus_one)

        bias = config.qkv_bias
        kv_axes = ("embed", "kv_heads", None)
        self.attention_norm = norm(D)
        self.query = Linear((D,), (H, C), ("embed", "heads", None), bias=bias, rngs=rngs)
        self.key = Linear((D,), (K, C), kv_axes, bias=bias, rngs=rngs)
        self.value = Linear((D,), (K, C), kv_axes, bias=bias, rngs=rngs)
        self.query_norm = norm(C) if config.qk_norm else None
        self.key_norm = norm(C) if config.qk_norm else None
        self.out = Linear((H, C), (D,), ("heads", None, "embed"), rngs=rngs)
        self.attention_post_norm = norm(D) if config.post_norms else None
        self.mlp_norm = norm(D)
        self.gate = Linear((D,), (config.mlp,), ("embed", "mlp"), rngs=rngs)
        self.up = Linear((D,), (config.mlp,), ("embed", "mlp"), rngs=rngs)
        self.down = Linear((config.mlp,), (D,), ("mlp", "embed"), rngs=rngs)
        self.mlp_post_norm = norm(D) if config.post_norms else None

    def __call__(self, x_BSD: jax.Array, is_global: jax.Array, shared: LayerInputs) -> jax.Array:
        """One layer; `is_global` is a traced bool, since layers run in one scan."""
        h = self.attention_norm(x_BSD)
        q, k, v = self.query(h), self.key(h), self.value(h)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        local, whole = shared.angles
        cos, sin = (jnp.where(is_global, w, n) for w, n in zip(whole, local, strict=True))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = self.out(self._attend(q, k, v, is_global, shared))
        x_BSD = x_BSD + (h if self.attention_post_norm is None else self.attention_post_norm(h))

        h = self.mlp_norm(x_BSD)
        gate, up = (checkpoint_name(linear(h), "mlp") for linear in (self.gate, self.up))
        h = self.down(gated(self.config, gate, up))
        return x_BSD + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))

    def _attend(self, q, k, v, is_global, shared: LayerInputs) -> jax.Array:
        config = self.config
        scale = config.query_scale or config.head_dim**-0.5

        def attend(window: int):
            def call(q, k, v):
                return self_attention(
                    q,
                    k,
                    v,
                    shared.segments,
                    causal=True,
                    scale=scale,
                    window=window,
                    softcap=config.attention_softcap,
                )

            return call

        if config.global_every == 1:
            return attend(0)(q, k, v)
        # The window is part of a kernel; one of the two runs.
        return jax.lax.cond(is_global, attend(0), attend(config.window), q, k, v)


class Decoder(nnx.Module):
    """Embeddings in, final hidden states out; `logits` scores the vocabulary."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        # Embeddings have unit size where they enter the first layer of a Gemma model.
        scale = config.width**-0.5 if config.scale_embeddings else 0.02
        self.embedding = Embedding(config.vocab_size, config.width, scale, rngs=rngs)
        self.blocks = Stack(lambda r: DecoderBlock(config, r), config.layers, rngs=rngs)
        self.norm = RMSNorm(config.width, config.norm_eps, plus_one=config.norm_plus_one)
        tied = config.tied_embeddings
        self.head = None if tied else Head(config.width, config.vocab_size, rngs=rngs)

    def embed(self, ids_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token embeddings [B, S, D], as the first layer takes them."""
        x = self.embedding(ids_BS, dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.width), dtype)
        return x

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array | None = None,
        remat: Remat = KEEP_ALL,
    ) -> jax.Array:
        """Runs all layers.

        Args:
          x_BSD: embeddings.
          positions_BS: int32, position within the sample.
          segments_BS: int32, attention stays within a segment.
          remat: what the backward pass recomputes, see `Remat`.

        Returns:
          Hidden states after the final norm [B, S, D].
        """
        config = self.config
        C = config.head_dim
        # Queries and keys are turned where they are made, on a stretch of the sequence.
        turned_BS = shard(positions_BS, "batch", "length")
        shared = LayerInputs(
            angles=(
                rotary(turned_BS, C, config.rope_theta_local),
                rotary(turned_BS, C, config.rope_theta, config.rope_scaling),
            ),
            segments=segments_BS,
        )

        def body(block, x, is_global):
            return block(x, is_global, shared), None

        x_BSD, _ = self.blocks.scan(body, x_BSD, jnp.asarray(self.global_layers), remat=remat)
        return self.norm(x_BSD)

    @property
    def global_layers(self) -> list[bool]:
        """Which layers attend globally: every `global_every`-th."""
        every = self.config.global_every
        return [(layer + 1) % every == 0 for layer in range(self.config.layers)]

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """Scores of the vocabulary, float32 [B, S, V]."""
        return output_scores(self.config, self.output_weight, x_BSD)

    @property
    def output_weight(self) -> jax.Array:
        """The matrix that gives the scores, as `output_scores` takes it."""
        return (self.embedding.table if self.head is None else self.head.weight)[...]
