"""Row layout of storm_jax.data.packing, against arrays worked out by hand."""

import dataclasses

import numpy as np
import pytest

from storm_jax.data import packing
from storm_jax.data.packing import Limits, RowBuilder, Sample, SampleError
from storm_jax.data.text import Encoded
from tests.data.small_model import small_model

V = -1


def encoded(tokens, loss):
    return Encoded(np.array(tokens, np.int32), np.array(loss, bool))


def frames(count, value):
    return np.full((count, 4, 4, 3), value, np.uint8)


def test_row_with_a_video_two_images_and_text_only():
    """4 visual tokens (2 x 2 patches) a pooled frame, two frames a group."""
    builder = RowBuilder(small_model(), Limits(tokens=36, frames=8))
    # 5 frames: groups of 2, 2 and 1 -> 12 visual tokens.
    video = Sample(encoded([10, V, 11, 12, 13], [0, 0, 0, 1, 1]), (frames(5, 50),))
    # 1 frame each: one group of one frame -> 4 visual tokens each.
    images = Sample(
        encoded([20, V, 21, V, 22, 23], [0, 0, 0, 0, 1, 0]), (frames(1, 60), frames(1, 70))
    )
    text_only = Sample(encoded([30, 31, 32], [0, 1, 1]), ())
    for sample in (video, images, text_only):
        builder.add(sample)
    row = builder.row

    pad = -1
    assert row["frame_segments"].tolist() == [0, 0, 0, 0, 0, 1, 2, pad]
    assert row["frame_groups"].tolist() == [0, 0, 1, 1, 2, 3, 4, pad]
    assert row["frames"].shape == (8, 4, 4, 3)
    assert row["frames"][:, 0, 0, 0].tolist() == [50, 50, 50, 50, 50, 60, 70, 0]
    assert row["tokens"].tolist() == (
        [10] + [V] * 12 + [11, 12, 13]  # 16
        + [20] + [V] * 4 + [21] + [V] * 4 + [22, 23]  # 12
        + [30, 31, 32]  # 3
        + [0] * 5
    )  # fmt: skip
    assert row["segments"].tolist() == [0] * 16 + [1] * 12 + [2] * 3 + [pad] * 5
    assert row["positions"].tolist() == [*range(16), *range(12), *range(3), *([0] * 5)]
    assert row["targets"].tolist() == (
        [-1] * 13 + [12, 13, -1]  # 11 predicts 12, 12 predicts 13
        + [-1] * 9 + [22, -1, -1]  # the last visual token predicts 22; 23 is not learnt
        + [31, 32, -1]
        + [-1] * 5
    )  # fmt: skip
    visual = (row["tokens"] == V).sum()
    assert visual == (row["frame_groups"].max() + 1) * small_model().group_tokens == 20


def test_frames_dropped_by_temporal_sampling():
    builder = RowBuilder(small_model(temporal_sampling=2), Limits(tokens=30, frames=12))
    builder.add(Sample(encoded([V, 1], [0, 1]), (frames(7, 1),)))  # pooled 0 1 2 3, kept 0 and 2
    builder.add(Sample(encoded([V, 1], [0, 1]), (frames(3, 2),)))  # pooled 0 1, kept 0
    row = builder.row
    assert row["frame_groups"].tolist() == [0, 0, -1, -1, 1, 1, -1, 2, 2, -1, -1, -1]
    assert row["frame_segments"].tolist() == [0] * 7 + [1] * 3 + [-1] * 2
    assert (row["tokens"] == V).sum() == 3 * 4


def test_dtypes_and_bytes():
    limits = Limits(tokens=7, frames=3)
    row = packing.empty_row(small_model(), limits)
    assert {name: str(array.dtype) for name, array in row.items()} == {
        "frames": "uint8",
        "frame_segments": "int32",
        "frame_groups": "int32",
        "tokens": "int32",
        "segments": "int32",
        "positions": "int32",
        "targets": "int32",
    }
    assert packing.row_bytes(small_model(), limits) == sum(array.nbytes for array in row.values())


def test_sample_that_does_not_fit_leaves_the_row_as_it_was():
    builder = RowBuilder(small_model(), Limits(tokens=12, frames=4))
    builder.add(Sample(encoded([1, V, 2], [0, 0, 1]), (frames(2, 9),)))
    before = {name: array.copy() for name, array in builder.row.items()}
    with pytest.raises(SampleError, match="needs 7 tokens and 0 frames, but 6 tokens and 2 frames"):
        builder.add(Sample(encoded([1] * 7, [0] * 7), ()))
    with pytest.raises(SampleError, match="needs 9 tokens and 3 frames"):
        builder.add(Sample(encoded([V, 1], [0, 1]), (frames(3, 9),)))
    with pytest.raises(SampleError, match="needs 4 tokens and 0 frames, but 3 tokens and 1 frames"):
        builder.add(Sample(encoded([1] * 4, [0] * 4), ()), Limits(tokens=3, frames=1))
    for name, array in builder.row.items():
        np.testing.assert_array_equal(array, before[name])
    builder.add(Sample(encoded([3] * 6, [1] * 6), ()))  # exactly full
    assert builder.row["segments"].tolist() == [0] * 6 + [1] * 6


def test_too_long_says_what_was_needed_and_what_there_is():
    limits = Limits(tokens=20, frames=8)
    packing.check_fits(4, [8], small_model(), limits)  # 4 groups of 4 tokens, and 4 of text
    with pytest.raises(
        SampleError,
        match=r"needs 21 tokens \(16 visual, 5 of text\), but data.sequence_length=20",
    ):
        packing.check_fits(5, [8], small_model(), limits)
    with pytest.raises(SampleError, match=r"needs 9 frames \(2 media\), but data.row_frames=8"):
        packing.check_fits(1, [4, 5], small_model(), Limits(tokens=100, frames=8))


def test_limits_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits(1, 2).tokens = 3
