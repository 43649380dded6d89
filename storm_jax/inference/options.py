"""What can be chosen at test time without training, and what it leaves of a video.

Frame count, temporal sampling (paper eq. 8), skipped near-duplicate frames and pruned static tokens
work with every checkpoint. Pooling changes what the decoder was trained to read: only the trained
value is accepted.
"""

import dataclasses
from dataclasses import dataclass

from storm_jax.config import ConfigError, ModelConfig, RunConfig
from storm_jax.inference.prune import kept_tokens


@dataclass(frozen=True)
class TokensKept:
    """What each stage leaves of one video or image, or of several."""

    frames_sampled: int  # taken from the file
    frames: int  # without near-duplicates: what the ViT sees
    mixed: int  # tokens that the temporal encoder mixes
    pooled: int  # behind temporal and spatial pooling
    sampled: int  # behind temporal sampling
    pruned: int  # without static tokens: what the decoder sees

    def __add__(self, other: "TokensKept") -> "TokensKept":
        sums = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TokensKept(*(a + b for a, b in sums))

    def __str__(self) -> str:
        return (
            f"{self.frames_sampled} frames sampled, {self.frames} encoded;"
            f" visual tokens: {self.mixed} mixed, {self.pooled} pooled, {self.sampled} sampled,"
            f" {self.pruned} in the decoder"
        )


@dataclass(frozen=True)
class Options:
    """Test-time options of one request; zeros and 1.0 leave everything as it was trained."""

    frames: int = 0  # largest number taken from a video; 0: as in training
    temporal_sampling: int = 0  # keep every so many pooled frames; 0: as in training
    temporal_pool: int = 0  # frames averaged into one; 0: as in training, else only that value
    spatial_pool: int = 0  # side of the window of tokens averaged into one; as temporal_pool
    # Frames are skipped whose mean absolute luma difference to the last kept frame is below this,
    # in levels of 255 on a 32 x 32 picture (`prune.DuplicateFilter`); 0: none. Compression noise
    # of a still scene is below 0.5.
    duplicate_threshold: float = 0.0
    # Share of the visual tokens that the decoder gets, the least static ones of each video
    # (`prune.prune_static`); 1: all. The first pooled frame always stays whole.
    keep_tokens: float = 1.0

    def __post_init__(self):
        for name in ("frames", "temporal_sampling", "temporal_pool", "spatial_pool"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name}={value} is negative; 0 leaves it as in training")
        if not 0 <= self.duplicate_threshold < 256:
            raise ConfigError(
                f"duplicate_threshold={self.duplicate_threshold:g} is not between 0 (off) and 255"
            )
        if not 0 < self.keep_tokens <= 1:
            raise ConfigError(
                f"keep_tokens={self.keep_tokens:g} is not a share above 0 and up to 1 (all)"
            )

    def apply(self, trained: RunConfig) -> RunConfig:
        """The configuration of a checkpoint with these options in it.

        Raises:
          ConfigError: a pooling that the checkpoint was not trained for.
        """
        reduction = trained.model.reduction
        for name in ("temporal_pool", "spatial_pool"):
            asked, known = getattr(self, name), getattr(reduction, name)
            if asked not in (0, known):
                raise ConfigError(
                    f"{name}={asked}: this checkpoint was trained with {name}={known}, and reads no"
                    f" other; leave {name} out, or use temporal_sampling, which needs no training"
                )
        if self.temporal_sampling:
            reduction = dataclasses.replace(reduction, temporal_sampling=self.temporal_sampling)
        model = dataclasses.replace(trained.model, reduction=reduction)
        data = trained.data
        if self.frames:
            frames = dataclasses.replace(data.frames, max_frames=self.frames)
            # A row of training need not be as long as what is asked here: text keeps its room.
            text = data.sequence_length - trained.model.visual_tokens(data.frames.max_frames)
            length = max(data.sequence_length, model.visual_tokens(self.frames) + text)
            data = dataclasses.replace(
                data, frames=frames, row_frames=self.frames, sequence_length=length
            )
        return dataclasses.replace(trained, model=model, data=data)

    def tokens_kept(self, model: ModelConfig, sampled: int, encoded: int) -> TokensKept:
        """What each stage leaves.

        Args:
          model: with the options applied.
          sampled: frames taken from the medium.
          encoded: frames of these that are no near-duplicates.
        """
        unsampled = dataclasses.replace(model.reduction, temporal_sampling=1)
        tokens = model.visual_tokens(encoded)
        return TokensKept(
            frames_sampled=sampled,
            frames=encoded,
            mixed=encoded * model.frame_tokens,
            pooled=unsampled.groups(encoded) * model.group_tokens,
            sampled=tokens,
            pruned=kept_tokens(tokens, model.group_tokens, self.keep_tokens),
        )
