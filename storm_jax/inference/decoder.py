"""The text decoder with a cache: a whole prompt, a further stretch, or one token of every row.

It computes what `models.decoder.Decoder` computes; tests compare the two. Axis letters as there and
in `weights`: B rows, S tokens, D width, K key-value heads, G query heads of one, C head dim, T
slots.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.config import VISUAL, DecoderConfig
from storm_jax.inference import cache as slots
from storm_jax.inference.cache import Cache, LayerCache
from storm_jax.inference.linear import Matrix, apply, apply_to_token, kernel_serves
from storm_jax.inference.token_attention import token_attention, turned
from storm_jax.inference.weights import LayerWeights, Weights
from storm_jax.models.attention import self_attention
from storm_jax.models.attention_kernels import masked_attention
from storm_jax.models.decoder import capped, gated
from storm_jax.models.layers import rms_norm, rotary
from storm_jax.parallel import sharding
from storm_kernels.matvec import Norm

Angles = tuple[jax.Array, jax.Array]


class _Turns(NamedTuple):
    """Rotary angles of layers that see everything and of layers that see a window."""

    whole: Angles
    local: Angles


class CachedDecoder:
    """Functions of weights and cache, to be called inside `jax.jit`."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        self.config = config
        self.dtype = dtype

    def embed(
        self, weights: Weights, tokens_BS: jax.Array, visual_VD: jax.Array | None, first=0
    ) -> jax.Array:
        """Embeddings [B, S, D]; the i-th VISUAL position takes visual token `first` + i (B = 1)."""
        table = weights.embedding
        out = None
        if sharding.active_mesh() is not None:
            out = jax.sharding.PartitionSpec(None, None, None)
        ids = jnp.maximum(tokens_BS, 0)
        x_BSD = table.at[ids].get(mode="clip", out_sharding=out).astype(self.dtype)
        if self.config.scale_embeddings:
            x_BSD = x_BSD * jnp.asarray(math.sqrt(self.config.width), self.dtype)
        if visual_VD is None:
            return x_BSD
        is_visual = tokens_BS == VISUAL
        index = jnp.cumsum(is_visual, axis=1) - 1 + first
        there = visual_VD.at[index].get(mode="clip").astype(self.dtype)
        return jnp.where(is_visual[:, :, None], there, x_BSD)

    def prefill(
        self,
        weights: Weights,
        cache: Cache,
        row: jax.Array,
        tokens_S: jax.Array,
        count: jax.Array,
        visual_VD: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Runs a prompt and writes it into a row of the cache.

        Args:
          row: int32, of the cache.
          tokens_S: int32, VISUAL where a visual token stands; no longer than the context.
          count: tokens of the prompt; those behind are padding.
          visual_VD: visual tokens in order; or None, and there is no VISUAL.

        Returns:
          Scores of the token that follows, float32 [1, V], and the cache.
        """
        S = tokens_S.shape[0]
        x_BSD = self.embed(weights, tokens_S[None], visual_VD)
        turns = self._turns(jnp.arange(S, dtype=jnp.int32)[None])
        filled = []
        final = self.config.layers - 1
        for index, (layer, held) in enumerate(zip(weights.layers, cache, strict=True)):
            q, k, v = turned(self._qkv(layer, x_BSD), *self._angles(index, turns))
            filled.append(_write_row(held, k, v, row, 0, count))
            if index < final:
                h = self._attend_all(index, q, k, v)
            else:
                # Of the last layer nothing but the last token's result is used.
                x_BSD, q = (_at(x, count - 1) for x in (x_BSD, q))
                window = slots.window_of(self.config, index)
                distance = count - 1 - jnp.arange(S)
                mask = (distance >= 0) & ((distance < window) if window else True)
                h = self._attend_masked(q, k, v, mask[None, None])
            x_BSD = self._after(layer, x_BSD, h)
        return self.scores(weights, x_BSD)[:, 0], tuple(filled)

    def extend(
        self,
        weights: Weights,
        cache: Cache,
        row: jax.Array,
        tokens_S: jax.Array,
        start: jax.Array,
        count: jax.Array,
        visual_VD: jax.Array | None,
        first_visual: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """`prefill` of tokens that follow the first `start` ones of a row.

        Args:
          start: tokens that the row's cache holds.
          first_visual: visual token that the first VISUAL position takes.
        """
        S = tokens_S.shape[0]
        positions_S = start + jnp.arange(S, dtype=jnp.int32)
        x_BSD = self.embed(weights, tokens_S[None], visual_VD, first_visual)
        turns = self._turns(positions_S[None])
        filled = []
        for index, (layer, held) in enumerate(zip(weights.layers, cache, strict=True)):
            q, k, v = turned(self._qkv(layer, x_BSD), *self._angles(index, turns))
            old = (_row(x, row) for x in held)
            keys, values = (
                jnp.concatenate([o, n], axis=1) for o, n in zip(old, (k, v), strict=True)
            )
            at_T = slots.held_positions(held.k.shape[1], start)
            at = jnp.concatenate([at_T, positions_S])
            distance = positions_S[:, None] - at[None]
            window = slots.window_of(self.config, index)
            mask = (distance >= 0) & (at >= 0) & ((distance < window) if window else True)
            h = self._attend_masked(q, keys, values, mask[None])
            filled.append(_write_row(held, k, v, row, start, count))
            x_BSD = self._after(layer, x_BSD, h)
        return self.scores(weights, _at(x_BSD, count - 1))[:, 0], tuple(filled)

    def token(
        self,
        weights: Weights,
        cache: Cache,
        tokens_B: jax.Array,
        positions_B: jax.Array,
        wanted_B: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """One token of every row.

        Args:
          tokens_B: int32.
          positions_B: int32, place of the token in its row: the cache holds those before it.
          wanted_B: bool; scores of other rows mean nothing, and little of their cache is read.

        Returns:
          Scores of the token that follows, float32 [B, V], and the cache.
        """
        x_BSD = self.embed(weights, tokens_B[:, None], None)
        turns = self._turns(positions_B[:, None])
        filled = []
        for index, (layer, held) in enumerate(zip(weights.layers, cache, strict=True)):
            qkv = self._qkv(layer, x_BSD)
            angles = self._angles(index, turns)
            h, held = self._attend_token(qkv, angles, held, positions_B, wanted_B)
            filled.append(held)
            x_BSD = self._after(layer, x_BSD, h)
        return self.scores(weights, x_BSD)[:, 0], tuple(filled)

    def scores(self, weights: Weights, x_BSD: jax.Array) -> jax.Array:
        """The vocabulary's, float32 [B, S, V], whole on every device."""
        config = self.config
        matrix = weights.embedding if weights.head is None else weights.head
        scores = self._map(x_BSD, matrix, 1, norm=weights.norm, dtype=jnp.float32)
        scores = capped(config, scores)
        return sharding.shard(scores, None, None, None)

    def _turns(self, positions_BS: jax.Array) -> _Turns:
        config = self.config
        C = config.head_dim
        return _Turns(
            rotary(positions_BS, C, config.rope_theta, config.rope_scaling),
            rotary(positions_BS, C, config.rope_theta_local),
        )

    def _norm(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is None:
            return x
        return rms_norm(x, scale, self.config.norm_eps, plus_one=self.config.norm_plus_one)

    def _angles(self, index: int, turns: _Turns) -> Angles:
        return turns.local if slots.window_of(self.config, index) else turns.whole

    def _qkv(self, layer: LayerWeights, x_BSD: jax.Array) -> jax.Array:
        """Queries, a key and a value of each key-value head, before they are turned.

        [B, S, K, G + 2, C], as the kernel for one token takes them.
        """
        y = self._map(x_BSD, layer.qkv, 1, norm=layer.attention_norm, bias=layer.qkv_bias)
        if layer.query_norm is None:
            return y
        q, k, v = y[:, :, :, :-2], y[:, :, :, -2:-1], y[:, :, :, -1:]
        q, k = self._norm(q, layer.query_norm), self._norm(k, layer.key_norm)
        return jnp.concatenate([q, k, v], axis=3)

    def _after(self, layer: LayerWeights, x_BSD: jax.Array, h_BSKGC: jax.Array) -> jax.Array:
        """What follows attention in a layer."""
        x_BSD = self._add(x_BSD, h_BSKGC, layer.out, 3, layer.attention_post_norm)
        h = self._map(x_BSD, layer.gate_up, 1, norm=layer.mlp_norm, is_gated=True)
        return self._add(x_BSD, h, layer.down, 1, layer.mlp_post_norm)

    def _add(self, x_BSD, h: jax.Array, weight: Matrix, contracted: int, post_norm) -> jax.Array:
        """x + norm(weight h)."""
        if post_norm is None:
            return self._map(h, weight, contracted, residual=x_BSD)
        return x_BSD + self._norm(self._map(h, weight, contracted), post_norm)

    def _map(
        self,
        x: jax.Array,
        weight: Matrix,
        contracted: int,
        *,
        norm: jax.Array | None = None,
        bias: jax.Array | None = None,
        is_gated: bool = False,
        residual: jax.Array | None = None,
        dtype: jnp.dtype | None = None,
    ) -> jax.Array:
        """residual + gate(weight norm(x) + bias); for one token one kernel, where there is one."""
        config = self.config
        if kernel_serves(x, weight, contracted):
            return apply_to_token(
                x, weight, contracted,
                norm=None if norm is None else Norm(norm, config.norm_eps, config.norm_plus_one),
                bias=bias,
                activation=config.activation if is_gated else "",
                residual=residual,
                dtype=dtype,
            )  # fmt: skip
        y = apply(self._norm(x, norm), weight, contracted, dtype)
        if bias is not None:
            y = (y.astype(jnp.float32) + bias).astype(y.dtype)
        if is_gated:
            y = gated(config, y[:, :, 0], y[:, :, 1])
        return y if residual is None else residual + y

    @property
    def _scale(self) -> float:
        return self.config.query_scale or self.config.head_dim**-0.5

    def _attend_all(self, index: int, q_BSKGC, k_BSKC, v_BSKC) -> jax.Array:
        config = self.config
        B, S, K, G, C = q_BSKGC.shape
        h = self_attention(
            sharding.reshape(q_BSKGC, B, S, K * G, C),
            k_BSKC,
            v_BSKC,
            causal=True,
            scale=self._scale,
            window=slots.window_of(config, index),
            softcap=config.attention_softcap,
        )
        return sharding.reshape(h, B, S, K, G, C)

    def _attend_masked(self, q_BSKGC, k_BTKC, v_BTKC, mask_BST) -> jax.Array:
        config = self.config

        def local(q, k, v, mask):
            h = masked_attention(
                q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, mask, self._scale,
                config.attention_softcap,
            )  # fmt: skip
            return h.reshape(q.shape)

        keys = (None, None, "kv_heads", None)
        queries = (None, None, "kv_heads", None, None)
        call = sharding.per_device(local, (queries, keys, keys, (None, None, None)), queries)
        return call(q_BSKGC, k_BTKC, v_BTKC, mask_BST)

    def _attend_token(self, qkv_BSKHC, angles: Angles, held: LayerCache, positions_B, wanted_B):
        softcap = self.config.attention_softcap

        def local(qkv, cos, sin, held_k, held_v, positions, wanted):
            h, held_k, held_v = token_attention(
                qkv[:, 0], cos[:, 0], sin[:, 0], held_k, held_v, positions, wanted, self._scale,
                softcap,
            )  # fmt: skip
            return h[:, None], held_k, held_v

        heads = (None, None, "kv_heads", None, None)
        turns = (None, None, None)
        call = sharding.per_device(
            local,
            (heads, turns, turns, slots.AXES, slots.AXES, (None,), (None,)),
            (heads, slots.AXES, slots.AXES),
            checked=False,
        )
        h, k, v = call(qkv_BSKHC, *angles, held.k, held.v, positions_B, wanted_B)
        return h, LayerCache(k, v)


def _at(x_BS: jax.Array, index: jax.Array) -> jax.Array:
    """Position `index` of a sequence [B, S, ...], kept as an axis of one."""
    return jax.lax.dynamic_slice_in_dim(x_BS, index, 1, axis=1)


def _row(slots_BTKC: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(slots_BTKC, row, 1, axis=0)


def _write_row(held: LayerCache, k_BSKC, v_BSKC, row, start, count) -> LayerCache:
    """Writes a stretch of one sequence (B = 1) into its row."""

    def local(slots_BTKC, new_BSKC):
        written = slots.write(_row(slots_BTKC, row)[0], new_BSKC[0], jnp.int32(start), count)
        return jax.lax.dynamic_update_slice_in_dim(slots_BTKC, written[None], row, axis=0)

    call = sharding.per_device(local, (slots.AXES, (None, None, "kv_heads", None)), slots.AXES)
    return LayerCache(call(held.k, k_BSKC), call(held.v, v_BSKC))
