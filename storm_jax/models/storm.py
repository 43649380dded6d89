"""STORM put together: frames and tokens in, hidden states and logits out."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import VISUAL, ModelConfig, RematConfig
from storm_jax.models.decoder import Decoder
from storm_jax.models.projector import Projector
from storm_jax.models.reduction import reduce_into, reduce_tokens
from storm_jax.models.temporal import TemporalEncoder
from storm_jax.models.temporal_controls import ControlEncoder
from storm_jax.models.vit import Vit
from storm_jax.parallel import sharding
from storm_jax.parallel.frames import spread
from storm_jax.parallel.sharding import Axes

Params = dict[str, Any]  # nested, arrays at the leaves; the first level is one of PARTS
_KEEP_ALL = RematConfig()
PARTS = ("vit", "projector", "temporal", "decoder")


class Storm(nnx.Module):
    """The four parts. Use it through `StormModel.bind`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.vit = Vit(config.vit, rngs)
        self.projector = Projector(config, rngs)
        width = config.decoder.width
        encoder = TemporalEncoder if config.temporal.mixer == "mamba" else ControlEncoder
        has_temporal = config.temporal.layers > 0
        self.temporal = encoder(config.temporal, width, rngs) if has_temporal else None
        self.decoder = Decoder(config.decoder, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and matrix products."""
        return jnp.dtype(self.config.dtype)

    def mix(
        self,
        frames_BFHWC: jax.Array,
        frame_segments_BF: jax.Array,
        remat: RematConfig = _KEEP_ALL,
    ) -> jax.Array:
        """Tokens of every frame behind the temporal encoder, [B, F, N, D].

        Args: as `encode`.
        """
        return self.mixed(self.features(frames_BFHWC, remat), frame_segments_BF, remat)

    def features(self, frames_BFHWC: jax.Array, remat: RematConfig = _KEEP_ALL) -> jax.Array:
        """Tokens of every frame alone, behind the projector, [B, F, N, D]."""
        frames, collected = spread(frames_BFHWC)
        with jax.named_scope("vit"):
            x_BFND = self.vit(frames, self.dtype, remat.vit, remat.vit_calls)
        with jax.named_scope("projector"):
            return collected(self.projector(x_BFND))

    def mixed(
        self, x_BFND: jax.Array, frame_segments_BF: jax.Array, remat: RematConfig = _KEEP_ALL
    ) -> jax.Array:
        """`features` behind the temporal encoder."""
        if self.temporal is None:
            return x_BFND
        with jax.named_scope("temporal"):
            return self.temporal(x_BFND, frame_segments_BF, remat.temporal)

    def reduced(self, x_BFND: jax.Array, frame_groups_BF: jax.Array, groups: int) -> jax.Array:
        """The visual tokens of `mix`ed frames, see `reduce_tokens`."""
        with jax.named_scope("reduction"):
            pool = self.config.reduction.spatial_pool
            return reduce_tokens(x_BFND, frame_groups_BF, groups, pool)

    def encode(
        self,
        frames_BFHWC: jax.Array,
        frame_segments_BF: jax.Array,
        frame_groups_BF: jax.Array,
        groups: int,
        remat: RematConfig = _KEEP_ALL,
    ) -> jax.Array:
        """The visual tokens that the decoder sees.

        Args:
          frames_BFHWC: uint8 [B, F, image_size, image_size, 3].
          frame_segments_BF: int32, the video that a frame belongs to; -1: padding.
          frame_groups_BF: int32, see `reduce_tokens`.
          groups: pooled frames that a row has room for.
          remat: what the backward pass recomputes.

        Returns:
          [B, groups * group_tokens, D].
        """
        x_BFND = self.mix(frames_BFHWC, frame_segments_BF, remat)
        return self.reduced(x_BFND, frame_groups_BF, groups)

    def embed(self, tokens_BS: jax.Array, visual_BVD: jax.Array | None) -> jax.Array:
        """Token embeddings [B, S, D], the i-th `VISUAL` position of a row taking visual token i."""
        ids = sharding.shard(jnp.maximum(tokens_BS, 0), "batch", "length")
        text = self.decoder.embed(ids, self.dtype)
        if visual_BVD is None:
            return text

        def merge(text, visual, tokens):
            index = jnp.cumsum(tokens == VISUAL, axis=1) - 1
            there = jnp.take_along_axis(visual, index[:, :, None], axis=1, mode="clip")
            return jnp.where((tokens == VISUAL)[:, :, None], there, text)

        axes = ("batch", None, None)
        merge = sharding.per_device(merge, (axes, axes, ("batch", None)), axes)
        return merge(text, visual_BVD, tokens_BS)

    def __call__(self, batch: dict[str, jax.Array], remat: RematConfig = _KEEP_ALL) -> jax.Array:
        """Final hidden states of a packed batch (`data.packing` has the layout), [B, S, D]."""
        tokens, visual = batch["tokens"], None
        S = tokens.shape[1]
        frames, segments, frame_groups = _padded_frames(batch)
        F = frames.shape[1]
        groups = min(F, S // self.config.group_tokens)
        if groups and sharding.split_axis("length", S):
            x_BFND = self.mix(frames, segments, remat)
            with jax.named_scope("reduction"):
                pool = self.config.reduction.spatial_pool
                x_BSD = reduce_into(self.embed(tokens, None), x_BFND, frame_groups, tokens, pool)
        else:
            if groups:
                visual = self.encode(frames, segments, frame_groups, groups, remat)
            x_BSD = self.embed(tokens, visual)
        with jax.named_scope("decoder"):
            how = remat.decoder
            return self.decoder(x_BSD, batch["positions"], batch["segments"], remat=how)


def _padded_frames(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Frames, their segments and groups, as many as the devices along a row can share equally."""
    frames = batch["frames"]
    more = -frames.shape[1] % sharding.parts("frames")
    frames = jnp.pad(frames, ((0, 0), (0, more), *[(0, 0)] * 3))
    ids = (batch["frame_segments"], batch["frame_groups"])
    segments, groups = (jnp.pad(x, ((0, 0), (0, more)), constant_values=-1) for x in ids)
    return frames, segments, groups


@dataclass(frozen=True)
class StormModel:
    """A configuration's architecture without parameters, which stay a plain nested dict."""

    config: ModelConfig

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(jax.eval_shape(lambda: Storm(self.config, nnx.Rngs(0))))

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`)."""
        return nnx.to_pure_dict(self._split[1])

    def axes(self) -> Params:
        """Logical axes of every parameter, in the same tree, tuples at the leaves."""

        def logical(variable) -> Axes:
            axes = variable.get_metadata()["axes"]
            stacked = len(variable.get_value().shape) - len(axes)
            return ("layers",) * stacked + axes

        leaves = {path: logical(v) for path, v in nnx.to_flat_state(self._split[1])}
        return nnx.traversals.unflatten_mapping(leaves)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        return nnx.to_pure_dict(nnx.state(Storm(self.config, nnx.Rngs(key))))

    def bind(self, params: Params) -> Storm:
        """The model with these parameters, inside a traced function."""
        graph, abstract = self._split
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def apply(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Logits of a packed batch, float32 [B, S, V]; for training, `training.loss` needs less."""
        storm = self.bind(params)
        return storm.decoder.logits(storm(batch))


def count_parameters(params: Params) -> int:
    """Parameters of a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(x.size for x in jax.tree.leaves(params))
