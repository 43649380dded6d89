"""Which frames of a video are taken, and which visual tokens remain of them.

Beside `config`, of which this is a part, because it also travels with a model that is exported:
nothing but NumPy is needed here.
"""

import math
from dataclasses import dataclass

import numpy as np

VISUAL = -1  # token id at a position of a sequence where a visual token stands


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class FrameConfig:
    """The one frame-sampling policy of training, evaluation and generation.

    With fps=0 the times are evenly spaced from the first frame to the last, both included (as in
    VILA, the paper's code base). With fps > 0 they are 1/fps apart from the first frame on, and
    spread evenly again where that would give more than max_frames.
    """

    max_frames: int
    fps: float = 0.0
    keyframes_only: bool = False  # decode key frames alone: fast, up to one GOP too early

    def __post_init__(self):
        require(self.max_frames >= 1, f"data.frames.max_frames={self.max_frames} is below 1")
        require(self.fps >= 0, f"data.frames.fps={self.fps} is negative")


@dataclass(frozen=True)
class ReductionConfig:
    """Which tokens reach the decoder (paper section 3.3)."""

    temporal_pool: int = 1  # mean over this many consecutive frames (eq. 6-7)
    spatial_pool: int = 1  # mean over windows of spatial_pool x spatial_pool tokens
    temporal_sampling: int = 1  # at test time only: keep every s-th pooled frame (eq. 8)

    def __post_init__(self):
        for name in ("temporal_pool", "spatial_pool", "temporal_sampling"):
            value = getattr(self, name)
            require(value >= 1, f"reduction.{name}={value}: 1 means none, smaller is not defined")

    def frame_groups(self, frames: int) -> np.ndarray:
        """The pooled frame that each of `frames` frames contributes to.

        Returns int32 [frames]: 0, 0, 0, 0, 1, 1, ... for temporal_pool=4; -1 for a frame that
        temporal sampling drops. The last group averages what is there.
        """
        pooled = np.arange(frames, dtype=np.int32) // self.temporal_pool
        kept = pooled % self.temporal_sampling == 0
        return np.where(kept, pooled // self.temporal_sampling, -1).astype(np.int32)

    def groups(self, frames: int) -> int:
        """Pooled frames that reach the decoder from a video of `frames` frames."""
        pooled = math.ceil(frames / self.temporal_pool)
        return math.ceil(pooled / self.temporal_sampling)
