"""Visual tokens of an endless video: cost per frame and memory do not grow with its length.

Frames go through the ViT, the projector and the temporal encoder in batches of one size, the
encoder's state being carried from batch to batch. Their tokens are summed into the group of
consecutive frames that they are averaged in, and the means lie in a fixed number of slots on the
device. `History` says which groups keep a slot when there are more. What the decoder is shown at a
question are the groups in their slots, oldest first, as if they had come from a file.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import ConfigError
from storm_jax.inference import vit
from storm_jax.inference.history import History
from storm_jax.inference.load import LoadedModel
from storm_jax.inference.prefill import Visual, frame_tokens
from storm_jax.inference.weights import Weights
from storm_jax.models.reduction import group_sums
from storm_jax.models.temporal import TemporalEncoder, TemporalState, empty_state
from storm_jax.parallel import sharding


class _State(NamedTuple):
    """What is on the device between two batches."""

    temporal: TemporalState | None
    open_ND: jax.Array  # float32, sums of the group that the last frame is in
    groups_SND: jax.Array  # mean of the group in each slot


class _Plan(NamedTuple):
    """Where the frames of a batch belong, all int32."""

    groups_F: np.ndarray  # groups counted from the first of this batch; -1: padding
    slots_M: np.ndarray  # slot of each of these groups; S: none
    counts_M: np.ndarray  # frames that each group has with this batch, 1 where it has none
    last: int  # group of the last frame
    continues: bool  # the first group has frames of earlier batches


class Stream:
    """One video that never ends, at one checkpoint.

    Attributes:
      frames: frames taken so far.
      batch: frames that go through the model together.
      capacity: groups of frames that there are slots for.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        budget: int = 0,
        policy: str = "recent",
        batch: int = 8,
    ):
        """Allocates everything that the stream will ever need on the device.

        Args:
          loaded: a checkpoint whose temporal encoder runs forward only, or that has none.
          budget: visual tokens that the decoder is shown at most; 0: as many as in training.
          policy: what is kept when the budget is full, one of `history.POLICIES`, see `History`.
          batch: frames that go through the model together; padding takes the place of missing ones.

        Raises:
          ConfigError: the temporal encoder runs in both directions, or the budget is smaller than
            one group of frames.
        """
        config = loaded.config.model
        budget = budget or config.visual_tokens(loaded.config.data.frames.max_frames)
        if budget < config.group_tokens:
            raise ConfigError(
                f"budget={budget} visual tokens is less than the {config.group_tokens} of one"
                " pooled frame; raise it"
            )
        if batch < 1:
            raise ConfigError(f"batch={batch}: at least one frame at a time")
        self._loaded = loaded
        self._config = config
        self.batch = batch
        self.capacity = budget // config.group_tokens
        self.frames = 0
        self._history = History(self.capacity, policy)
        side = config.vit.image_size
        self._waiting = np.zeros((batch, side, side, 3), np.uint8)
        self._count = 0  # frames in `_waiting`
        self._finished: jax.Array | None = None
        with jax.set_mesh(loaded.mesh):
            self._state = self._empty()
        options = vit.compiler_options(loaded.mesh)
        self._step = jax.jit(self._advance, donate_argnums=1, compiler_options=options)
        self._gather = jax.jit(
            lambda groups_SND, order_S: groups_SND[order_S].reshape(-1, groups_SND.shape[-1])
        )

    def push(self, frames: np.ndarray) -> None:
        """Takes the next frames.

        They are on their way through the model when this returns; it waits for those before them.

        Args:
          frames: uint8 [F, image_size, image_size, 3], any number of them.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._waiting.shape[1:]:
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}, expected uint8"
                f" [F, {', '.join(map(str, self._waiting.shape[1:]))}]"
            )
        while len(frames):
            taken = min(len(frames), self.batch - self._count)
            self._waiting[self._count : self._count + taken] = frames[:taken]
            self._count += taken
            self.frames += taken
            frames = frames[taken:]
            if self._count == self.batch:
                self._run()

    def warm_up(self) -> None:
        """Compiles the program that takes frames, by running it on none; waits for it."""
        most = self._most_groups()
        slots, counts = np.full(most, self.capacity, np.int32), np.ones(most, np.int32)
        nothing = _Plan(np.full(self.batch, -1, np.int32), slots, counts, 0, True)
        self._send(np.zeros_like(self._waiting), nothing)
        self.visual()
        self.wait()

    def visual(self) -> Visual:
        """What the decoder is shown of all frames so far; `tokens` has room for the whole budget.

        The group that the last frame is in is the mean of the frames that it has.
        """
        if self._count:
            self._run()
        kept = list(self._history.kept.values())
        order = np.array(kept + [0] * (self.capacity - len(kept)), np.int32)
        with jax.set_mesh(self._loaded.mesh):
            tokens = self._gather(self._state.groups_SND, order)
        mixed = self.frames * self._config.frame_tokens
        return Visual(tokens, len(kept) * self._config.group_tokens, self.frames, mixed)

    def wait(self) -> None:
        """Returns when all frames that were sent to the model have gone through it."""
        jax.block_until_ready(self._state)

    @property
    def groups(self) -> list[int]:
        """The pooled frames that `visual` last showed, in order.

        They are counted as they would reach the decoder if none were left out: group g holds the
        frames whose entry in `ReductionConfig.frame_groups` is g.
        """
        return list(self._history.kept)

    # ------------------------------------------------------------------------------------- batches

    def _empty(self) -> _State:
        config = self._config
        width, dtype = config.decoder.width, jnp.dtype(config.dtype)
        temporal = None
        if config.temporal.layers:
            temporal = empty_state(config.temporal, width, 1, dtype)
        shape = (config.group_tokens, width)
        return _State(
            temporal,
            sharding.shard(jnp.zeros(shape, jnp.float32), None, None),
            sharding.shard(jnp.zeros((self.capacity, *shape), dtype), None, None, None),
        )

    def _run(self) -> None:
        """Sends the waiting frames through the model, padded to a batch."""
        plan = self._plan(self.frames - self._count, self._count)
        # A copy, since the next frames are written while these are read.
        self._send(self._waiting.copy(), plan)
        self._count = 0

    def _send(self, frames: np.ndarray, plan: _Plan) -> None:
        if self._finished is not None:
            jax.block_until_ready(self._finished)  # never more than two batches on the device
        with jax.set_mesh(self._loaded.mesh):
            self._state, self._finished = self._step(
                self._loaded.weights, self._state, frames, plan
            )

    def _most_groups(self) -> int:
        """Groups that a batch can touch."""
        pool = self._config.reduction.temporal_pool
        return (self.batch + pool - 2) // pool + 1

    def _plan(self, first: int, count: int) -> _Plan:
        """Of `count` frames, of which `first` is the first one's number in the stream."""
        pool, sampling = (
            self._config.reduction.temporal_pool,
            self._config.reduction.temporal_sampling,
        )
        numbers = np.arange(first, first + count) // pool
        start = first // pool
        groups = np.full(self.batch, -1, np.int32)
        groups[:count] = numbers - start
        most = self._most_groups()
        slots = np.full(most, self.capacity, np.int32)
        counts = np.ones(most, np.int32)
        touched = range(start, int(numbers[-1]) + 1)
        for group in touched:
            new = group * pool >= first
            if new and group % sampling == 0:
                self._history.add(group // sampling)
        for group in touched:
            counts[group - start] = min(first + count, (group + 1) * pool) - group * pool
            # Asked for when all of them are in: a later one may have taken an earlier one's slot.
            slot = self._history.slot(group // sampling) if group % sampling == 0 else None
            slots[group - start] = self.capacity if slot is None else slot
        return _Plan(groups, slots, counts, int(numbers[-1]) - start, first % pool != 0)

    def _advance(self, weights: Weights, state: _State, frames_FHWC, plan: _Plan):
        storm = self._loaded.model.bind(weights.encoder)
        groups_BF = jnp.asarray(plan.groups_F)[None]
        x_BFND, temporal = frame_tokens(storm, weights, frames_FHWC)[None], state.temporal
        if temporal is not None:
            assert isinstance(storm.temporal, TemporalEncoder), "`empty_state` gives no other one"
            with jax.named_scope("temporal"):
                x_BFND, temporal = storm.temporal.carry(x_BFND, groups_BF, temporal)
        with jax.named_scope("reduction"):
            most = plan.slots_M.shape[0]
            pool = self._config.reduction.spatial_pool
            sums_MND = group_sums(x_BFND, groups_BF, most, pool)[0]
            before = jnp.where(plan.continues, state.open_ND, 0)
            sums_MND = sums_MND.at[0].add(before)
            means_MND = sums_MND / plan.counts_M[:, None, None]
            groups_SND = state.groups_SND.at[plan.slots_M].set(
                means_MND.astype(state.groups_SND.dtype), mode="drop"
            )
        open_ND = sums_MND[plan.last]
        return _State(temporal, open_ND, groups_SND), open_ND[0, 0]
