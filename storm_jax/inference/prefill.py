"""From frames to the visual tokens that the decoder sees.

The ViT runs on a fixed number of frames at a time, so that one program serves any video, and starts
on the first ones while later ones are still being decoded. A temporal encoder of Mamba layers that
run forward only carries its state from batch to batch; any other, and the reduction, see all frames
at once, padded to one of a few lengths.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import ModelConfig
from storm_jax.inference import vit
from storm_jax.inference.load import LoadedModel
from storm_jax.inference.options import Options
from storm_jax.inference.programs import Family, Programs, described
from storm_jax.inference.prune import DuplicateFilter, kept_tokens, prune_static
from storm_jax.inference.weights import Weights
from storm_jax.models.storm import Storm
from storm_jax.models.temporal import TemporalEncoder, empty_state
from storm_jax.parallel.frames import spread
from storm_jax.parallel.sharding import named, reshape, shard

_FRAMES_PER_CALL = 64  # where the configuration names no number
# Frames of a call for what is left over: 32 for more than 24 frames, 8 for more than one.
_LEFT_OVER = ((24, 32), (1, 8), (0, 1))
AS_TRAINED = Options()


def bucket(n: int, steps: int) -> int:
    """The smallest of a few sizes that holds n: `steps` of them between two powers of two."""
    if n <= steps:
        return max(n, 1)
    step = max(1 << (n - 1).bit_length() - 1, 1) // steps
    return -(-n // step) * step


@dataclass(frozen=True)
class Visual:
    """One medium, encoded.

    Attributes:
      tokens: [V, D], on the device; V >= count, and what is behind is padding.
      count: visual tokens that the decoder sees.
      frames: frames that were encoded, near-duplicates left out.
      mixed: tokens before the reduction.
    """

    tokens: jax.Array
    count: int
    frames: int
    mixed: int


def frame_tokens(storm: Storm, weights: Weights, frames_FHWC: jax.Array) -> jax.Array:
    """Tokens of every frame alone, behind the projector, [F, N, D]. Traced.

    Args:
      storm: bound to the encoder of `weights`.
      frames_FHWC: uint8 [F, side, side, 3].
    """
    x, collected = spread(frames_FHWC[None])
    F = x.shape[1]
    x = vit.encode(storm.vit, weights.vit, reshape(x, F, *x.shape[2:]), storm.dtype)
    return collected(storm.projector(reshape(x, 1, F, *x.shape[1:])))[0]


def _segments(real: int, length: int) -> np.ndarray:
    """`length` frames of one video, of which those behind the first `real` are padding."""
    return np.where(np.arange(length) < real, 0, -1).astype(np.int32)


class Encoder:
    """Encodes one medium after another."""

    def __init__(self, loaded: LoadedModel, programs: Programs | None = None):
        """
        Args:
          programs: where compiled programs are kept; None: in some of its own.
        """
        self._loaded = loaded
        config, model = loaded.config.model, loaded.model
        options = vit.compiler_options(loaded.mesh)
        self._per_call = config.vit.frames_per_call or _FRAMES_PER_CALL
        group_tokens = config.group_tokens
        dtype, width = jnp.dtype(config.dtype), config.decoder.width
        side, tokens = config.vit.image_size, config.frame_tokens

        @functools.partial(jax.jit, compiler_options=options)
        def features(weights, frames_FHWC):
            return frame_tokens(model.bind(weights.encoder), weights, frames_FHWC)

        @functools.partial(jax.jit, donate_argnums=3)
        def carried(params, x_FND, frame_segments, state):
            temporal = model.bind(params).temporal
            assert isinstance(temporal, TemporalEncoder)
            x_BFND, state = temporal.carry(x_FND[None], frame_segments[None], state)
            return x_BFND[0], state

        @functools.partial(jax.jit, static_argnums=0)
        def blank(length):
            return shard(jnp.zeros((length, tokens, width), dtype), None, None, None)

        @functools.partial(jax.jit, donate_argnums=0)
        def put(all_FND, x_FND, first):
            return jax.lax.dynamic_update_slice_in_dim(all_FND, x_FND, first, axis=0)

        @functools.partial(jax.jit, static_argnums=(6, 7))
        def reduced(params, x_FND, frame_segments, frame_groups, count, quota, groups, keep):
            storm, x_BFND = model.bind(params), x_FND[None]
            if not self._forward:
                x_BFND = storm.mixed(x_BFND, frame_segments[None])
            x_VD = storm.reduced(x_BFND, frame_groups[None], groups)[0]
            if keep == len(x_VD):
                return x_VD
            return prune_static(x_VD, group_tokens, keep, count, quota)[0]

        temporal = config.temporal
        carries = temporal.mixer == "mamba" and temporal.direction == "forward"
        self._forward = temporal.layers > 0 and carries
        state = None
        if self._forward:
            with jax.set_mesh(loaded.mesh):
                self._empty = jax.jit(lambda: empty_state(temporal, width, 1, dtype))
                state = described(self._empty())
        whole = named((None, None, None), (1, tokens, width), loaded.mesh)

        def features_of(frames: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((frames, tokens, width), dtype, sharding=whole)

        def numbers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        weights = loaded.weights
        pixels = jnp.uint8
        if programs is None:
            programs = Programs(loaded.mesh)
        family = functools.partial(Family, programs)
        # Sizes: frames of a batch; frames of a medium, padded; pooled frames; tokens kept.
        self._features = family(
            "ViT",
            features,
            lambda size: (weights, jax.ShapeDtypeStruct((size, side, side, 3), pixels)),
        )
        self._carried = family(
            "temporal encoder, in batches",
            carried,
            lambda size: (weights.encoder, features_of(size), numbers(size), state),
        )
        self._blank = family("empty frames", blank, lambda length: (length,))
        self._put = family(
            "joining batches",
            put,
            lambda length, size: (features_of(length), features_of(size), numbers()),
        )
        self._reduced = family(
            "temporal encoder and reduction",
            reduced,
            lambda length, groups, keep: (
                weights.encoder, features_of(length), numbers(length), numbers(length),
                numbers(), numbers(), groups, keep,
            ),
        )  # fmt: skip

    def ahead(self, frames: int, options: Options = AS_TRAINED) -> bool:
        """Whether all programs for a medium are there; else those missing are compiled beside.

        Args:
          frames: that are encoded, at least one.
        """
        config = options.apply(self._loaded.config).model
        sizes = self._sizes(frames)
        length = self._length(sizes)
        there = [self._blank.ahead(length)]
        there.append(self._reduced.ahead(length, *self._reduction(frames, config, options)[1:]))
        for size in dict.fromkeys(sizes):
            there.append(self._features.ahead(size))
            there.append(self._put.ahead(length, size))
            if self._forward:
                there.append(self._carried.ahead(size))
        return all(there)

    def kinds(self, most: int) -> list[int]:
        """Numbers of frames up to `most` that together need every program, each another set."""
        config, kinds = self._loaded.config.model, {}
        for count in range(1, most + 1):
            sizes = self._sizes(count)
            reduction = self._reduction(count, config, AS_TRAINED)[1:]
            kinds.setdefault((self._length(sizes), reduction, frozenset(sizes)), count)
        return list(kinds.values())

    def features(self, frames_FHWC: np.ndarray | jax.Array) -> jax.Array:
        """Tokens of every frame alone, [F, N, D], before the temporal encoder."""
        return self._features(len(frames_FHWC))(self._loaded.weights, frames_FHWC)

    def _sizes(self, count: int) -> list[int]:
        """Of the batches that so many frames make."""
        sizes = [self._per_call] * (count // self._per_call)
        left = count % self._per_call
        while left > 0:
            few = next(few for more, few in _LEFT_OVER if left > more)
            sizes.append(min(self._per_call, few))
            left -= sizes[-1]
        return sizes

    @staticmethod
    def _length(sizes: list[int]) -> int:
        """Frames to which a medium is padded: few lengths, whatever the batches were."""
        return bucket(sum(sizes), 4)

    @staticmethod
    def _reduction(count: int, config: ModelConfig, options: Options) -> tuple[int, int, int]:
        """Visual tokens of so many frames; the pooled frames and the tokens that have room."""
        groups = int(config.reduction.frame_groups(count).max()) + 1
        room = bucket(groups, 4)
        keep = kept_tokens(room * config.group_tokens, config.group_tokens, options.keep_tokens)
        return config.visual_tokens(count), room, keep

    def __call__(
        self, frames: np.ndarray | Iterable[np.ndarray], options: Options = AS_TRAINED
    ) -> Visual:
        """Visual tokens of one medium; does not wait for the device.

        Args:
          frames: uint8 [F, side, side, 3]; or chunks of them, in order, of which the device gets
            each as it comes.
          options: test-time options; how many frames there are has been decided before.

        Raises:
          ValueError: there is no frame.
          ConfigError: an option that the checkpoint was not trained for.
        """
        config = options.apply(self._loaded.config).model
        chunks = [frames] if isinstance(frames, np.ndarray) else frames
        if options.duplicate_threshold:
            chunks = DuplicateFilter(options.duplicate_threshold).filtered(chunks)
        weights = self._loaded.weights
        parts, count, state = [], 0, None
        with jax.set_mesh(self._loaded.mesh):
            if self._forward:
                state = self._empty()
            for batch, real in self._batches(chunks):
                count += real
                part = self.features(batch)
                if self._forward:
                    segments = _segments(real, len(batch))
                    carried = self._carried(len(batch))
                    part, state = carried(weights.encoder, part, segments, state)
                parts.append(part)
            if not count:
                raise ValueError("no frame to encode")
            return self.reduce(parts, count, config, options)

    def _batches(self, chunks: Iterable[np.ndarray]):
        """Batches of a fixed size, padded at the end with zeros; and how many are real of each."""
        waiting: list[np.ndarray] = []
        ready = 0
        for chunk in itertools.chain(chunks, [None]):
            if chunk is not None:
                waiting.append(chunk)
                ready += len(chunk)
                if ready < self._per_call:
                    continue
            if not ready:
                return
            frames = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            at = 0
            for size in self._sizes(ready):
                if size < self._per_call and chunk is not None:
                    break  # more comes
                batch = frames[at : at + size]
                padding = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
                yield (np.concatenate([batch, padding]) if len(padding) else batch), len(batch)
                at += len(batch)
            waiting, ready = ([frames[at:]] if at < len(frames) else []), len(frames) - at

    def reduce(
        self, parts: list[jax.Array], count: int, config: ModelConfig, options: Options = AS_TRAINED
    ) -> Visual:
        """What follows the features of all batches.

        Args:
          parts: [F, N, D] each, behind `features` and, where it runs forward, the temporal encoder;
            they leave the list as they are used.
          count: frames that are no padding.
          config: with `options` applied.
        """
        # Few lengths, and none that depends on how the frames were cut into batches.
        length, first = self._length([len(part) for part in parts]), 0
        x_FND = self._blank(length)()
        while parts:
            part = parts.pop(0)
            x_FND = self._put(length, len(part))(x_FND, part, np.int32(first))
            first += len(part)
        groups = np.full(length, -1, np.int32)
        groups[:count] = config.reduction.frame_groups(count)
        real, room, keep = self._reduction(count, config, options)
        quota = kept_tokens(real, config.group_tokens, options.keep_tokens)
        tokens = self._reduced(length, room, keep)(
            self._loaded.weights.encoder, x_FND, _segments(count, length), groups,
            np.int32(real), np.int32(quota),
        )  # fmt: skip
        return Visual(tokens, quota, count, count * config.frame_tokens)
