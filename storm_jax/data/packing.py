"""Rows: how samples are laid out in the arrays of a batch.

A row is a dict of arrays (F = data.row_frames, S = data.sequence_length):

    frames          uint8 [F, H, W, 3]   the frames of all media, one after another; then 0
    frame_segments  int32 [F]            number of the medium within the row; -1 in padding
    frame_groups    int32 [F]            pooled frame within the row that the frame contributes to;
                                         -1 where temporal sampling drops it, and in padding
    tokens          int32 [S]            token ids, VISUAL where a visual token stands; 0 in padding
    segments        int32 [S]            number of the sample within the row; -1 in padding
    positions       int32 [S]            position within the sample; 0 in padding
    targets         int32 [S]            the token to predict at this position; -1: no loss here

The i-th VISUAL position of a row takes the i-th visual token of the row's pooled frames: groups in
order, `ModelConfig.group_tokens` tokens each. Samples are never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storm_jax.config import VISUAL, ModelConfig
from storm_jax.data.text import Encoded, expand

Row = dict[str, np.ndarray]


class SampleError(ValueError):
    """A sample that cannot be put in a row; the message says what it needed and what there was."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its decoded media.

    Attributes:
      text: the conversation with a single VISUAL for each medium.
      media: uint8 [F, H, W, 3] for each medium, in the order of the VISUAL positions.
    """

    text: Encoded
    media: tuple[np.ndarray, ...]


def check_fits(text_tokens: int, frames: Sequence[int], model: ModelConfig, limits: "Limits"):
    """Raises SampleError if a sample is too long for a row of its own.

    Args:
      text_tokens: tokens without the visual ones.
      frames: frames of each medium.
    """
    visual = sum(model.visual_tokens(f) for f in frames)
    if text_tokens + visual > limits.tokens:
        raise SampleError(
            f"needs {text_tokens + visual} tokens ({visual} visual, {text_tokens} of text), but"
            f" data.sequence_length={limits.tokens}; raise it, or lower data.frames.max_frames"
        )
    if sum(frames) > limits.frames:
        raise SampleError(
            f"needs {sum(frames)} frames ({len(frames)} media), but"
            f" data.row_frames={limits.frames}; raise it, or lower data.frames.max_frames"
        )


@dataclass(frozen=True)
class Limits:
    """What a row holds: tokens (text and visual), and frames."""

    tokens: int
    frames: int


def empty_row(model: ModelConfig, limits: Limits) -> Row:
    """A row of padding."""
    side = model.vit.image_size
    return {
        "frames": np.zeros((limits.frames, side, side, 3), np.uint8),
        "frame_segments": np.full(limits.frames, -1, np.int32),
        "frame_groups": np.full(limits.frames, -1, np.int32),
        "tokens": np.zeros(limits.tokens, np.int32),
        "segments": np.full(limits.tokens, -1, np.int32),
        "positions": np.zeros(limits.tokens, np.int32),
        "targets": np.full(limits.tokens, -1, np.int32),
    }


def row_bytes(model: ModelConfig, limits: Limits) -> int:
    """Bytes of a row's arrays."""
    return limits.frames * (3 * model.vit.image_size**2 + 2 * 4) + limits.tokens * 4 * 4


class RowBuilder:
    """Fills one row with samples, in the order in which they are added."""

    def __init__(self, model: ModelConfig, limits: Limits):
        self._model = model
        self._limits = limits
        self.row = empty_row(model, limits)
        self._tokens = self._frames = self._samples = self._media = self._groups = 0

    def add(self, sample: Sample, reserved: Limits = Limits(0, 0)):
        """Appends a sample, and leaves `reserved` free for the samples to come.

        Raises:
          SampleError: the sample does not fit; the row is as it was before.
        """
        lengths = [len(frames) for frames in sample.media]
        counts = [self._model.visual_tokens(length) for length in lengths]
        text = expand(sample.text, counts)
        size, frames = len(text.tokens), sum(lengths)
        free = Limits(
            self._limits.tokens - self._tokens - reserved.tokens,
            self._limits.frames - self._frames - reserved.frames,
        )
        if size > free.tokens or frames > free.frames:
            raise SampleError(
                f"needs {size} tokens and {frames} frames, but {free.tokens} tokens and"
                f" {free.frames} frames were planned for it: the media hold more than their probe"
                " says; run storm_jax.data.validate again"
            )
        row = self.row
        start, stop = self._tokens, self._tokens + size
        row["tokens"][start:stop] = text.tokens
        row["segments"][start:stop] = self._samples
        row["positions"][start:stop] = np.arange(size)
        row["targets"][start : stop - 1] = np.where(text.loss[1:], text.tokens[1:], -1)
        self._tokens = stop
        self._samples += 1
        for pixels, length in zip(sample.media, lengths, strict=True):
            start, stop = self._frames, self._frames + length
            row["frames"][start:stop] = pixels
            row["frame_segments"][start:stop] = self._media
            groups = self._model.reduction.frame_groups(length)
            row["frame_groups"][start:stop] = np.where(groups < 0, -1, groups + self._groups)
            self._frames = stop
            self._media += 1
            self._groups += self._model.reduction.groups(length)
        assert (text.tokens == VISUAL).sum() == sum(counts)
