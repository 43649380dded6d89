"""From a checkpoint, frames and a prompt to the first token's scores and a filled cache."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax import checkpoint
from storm_jax.config import MeshConfig, RunConfig
from storm_jax.models.decoder import Cache
from storm_jax.models.storm import Params, StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params

# Sequences are padded to a multiple of this, so that prompts of similar length share a compilation.
LENGTH_STEP = 128


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to answer: parameters in the dtype they are computed with."""

    config: RunConfig
    model: StormModel
    params: Params
    mesh: jax.sharding.Mesh


def load(path: str | Path, *, max_frames: int = 0, temporal_sampling: int = 0) -> LoadedModel:
    """Reads the configuration and the parameters of a checkpoint.

    Args:
      path: a training workdir, or one checkpoint in it.
      max_frames: frames taken from a video; 0: as in training.
      temporal_sampling: keep every so many pooled frames (paper eq. 8); 0: as in training.

    Raises:
      CheckpointError: there is none, or it is of another layout.
    """
    config = checkpoint.read_config(path)
    if max_frames:
        frames = dataclasses.replace(config.data.frames, max_frames=max_frames)
        data = dataclasses.replace(config.data, frames=frames, row_frames=max_frames)
        needed = config.model.visual_tokens(max_frames) + 1
        length = max(data.sequence_length, needed)
        data = dataclasses.replace(data, sequence_length=length)
        config = dataclasses.replace(config, data=data)
    if temporal_sampling:
        reduction = config.model.reduction
        reduction = dataclasses.replace(reduction, temporal_sampling=temporal_sampling)
        model_config = dataclasses.replace(config.model, reduction=reduction)
        config = dataclasses.replace(config, model=model_config)
    model = StormModel(config.model)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    abstract = abstract_params(model, mesh, jnp.dtype(config.model.dtype))
    return LoadedModel(config, model, checkpoint.load_params(path, abstract), mesh)


@dataclass(frozen=True)
class Prompt:
    """One sequence to answer.

    Attributes:
      tokens: int32 [n], `VISUAL` where a visual token stands.
      frames: uint8 [F, H, W, 3], the frames of all its media, one after another.
      frame_segments: int32 [F], the medium that a frame belongs to.
      frame_groups: int32 [F], see `models.reduction`.
    """

    tokens: np.ndarray
    frames: np.ndarray
    frame_segments: np.ndarray
    frame_groups: np.ndarray


@dataclass(frozen=True)
class Visual:
    """One medium, encoded; stays on the device."""

    tokens: jax.Array  # [V', D], V' >= count (padded to a bucket)
    count: int  # visual tokens that are real
    frames: int
    mixed: int  # tokens before reduction and pruning


class Prefill:
    """Encodes frames and fills the cache; compiled once for each number of frames and length."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        model = loaded.model

        @functools.partial(jax.jit, static_argnames="groups")
        def encode(params, frames, segments, frame_groups, groups):
            storm = model.bind(params)
            return storm.encode(frames, segments, frame_groups, groups)

        @functools.partial(jax.jit, static_argnames="slots")
        def prefill(params, tokens, visual, last, slots):
            storm = model.bind(params)
            cache = storm.decoder.empty_cache(tokens.shape[0], slots, storm.dtype)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, cache = storm.decoder(storm.embed(tokens, visual), positions, cache=cache)
            return storm.decoder.logits(hidden[:, last][:, None])[:, 0], cache

        self._encode, self._prefill = encode, prefill

    def encode(self, prompt: Prompt) -> jax.Array | None:
        """Visual tokens as the decoder sees them, [1, V, D]; None without frames."""
        if not len(prompt.frames):
            return None
        groups = int(prompt.frame_groups.max()) + 1
        with jax.set_mesh(self._loaded.mesh):
            return self._encode(
                self._loaded.params,
                prompt.frames[None],
                prompt.frame_segments[None],
                prompt.frame_groups[None],
                groups,
            )

    def fill(
        self, prompt: Prompt, visual: jax.Array | None, new_tokens: int
    ) -> tuple[jax.Array, Cache]:
        """Runs the decoder over the prompt.

        Args:
          prompt: the sequence.
          visual: from `encode`.
          new_tokens: room that the cache must have behind the prompt.

        Returns:
          Scores of the first new token, float32 [1, V], and the cache.
        """
        n = len(prompt.tokens)
        # What padding writes behind the prompt is overwritten before any later token sees it.
        length = -(-n // LENGTH_STEP) * LENGTH_STEP
        slots = -(-(n + new_tokens) // LENGTH_STEP) * LENGTH_STEP
        tokens = np.zeros((1, length), np.int32)
        tokens[0, :n] = prompt.tokens
        with jax.set_mesh(self._loaded.mesh):
            last = jnp.int32(n - 1)
            return self._prefill(self._loaded.params, tokens, visual, last, max(length, slots))
