import dataclasses
import os

import numpy as np
import pytest

from storm_jax.data import video
from storm_jax.data.conversation import Media
from storm_jax.evidence_grid import clips
from storm_jax.evidence_grid.recipe import EvidenceError
from storm_jax.frames import FrameConfig


def test_fewer_frames_are_those_of_the_projects_own_rule(data, recipe):
    """Picking from decoded frames is decoding fewer, pixel for pixel."""
    folder = os.path.join(data, "long_4")
    for frames in (8, 16, 32):
        part = clips.joined([clips.load(folder, "test_seen")], frames)
        path = os.path.join(folder, "videos", "test_seen_000001.mp4")
        wanted, _ = video.sample(Media("video", path), FrameConfig(frames), recipe.videos.size)
        np.testing.assert_array_equal(part.frames[1], wanted)


def test_scales_are_named_and_options_counted(data):
    found = clips.joined(
        [clips.load(os.path.join(data, f"long_{scale}"), "test") for scale in (4, 16)], 8
    )
    assert set(found.tasks) == {"direction/4", "colour/4", "direction/16", "colour/16"}
    for task, options in zip(found.tasks, found.options, strict=True):
        assert options == {"direction": 2, "colour": 4}[task.split("/")[0]]
    assert found.frames.shape[:2] == (8, 8)


def test_sampled_groups_are_groups_of_events():
    """32 of 128 frames: pooling by fours pools within events of 16 frames, 8 of 128 within 64."""
    for frames, scale in ((32, 16), (8, 64)):
        picks = np.array(video.spread(128, frames))
        events = picks // scale
        assert (events.reshape(-1, 4) == np.arange(128 // scale)[:, None]).all()


def test_another_data_set_is_refused(data, recipe):
    other = dataclasses.replace(recipe.videos, seed=1)
    with pytest.raises(EvidenceError, match="seed is 0 there and 1 here"):
        clips.prepare(data, other, 1)
    with pytest.raises(EvidenceError, match="were not made"):  # who waits is told
        clips.load(os.path.join(data, "short_99"), "train")
    with pytest.raises(EvidenceError, match="seed is 0, not 1"):
        clips.check(data, other)
    clips.check(data, recipe.videos)
    clips.prepare(data, recipe.videos, 1)


def test_still_backgrounds_can_be_named(recipe, tmp_path):
    videos = dataclasses.replace(
        recipe.videos, backgrounds="still", scales=(), short_train=2, families=("direction",)
    )
    clips.prepare(str(tmp_path), videos, 1)
    frames = clips.load(str(tmp_path / "short_4"), "train").frames.astype(int)
    # The object shows in one group of four; the others hold the picture and noise alone.
    away = np.abs(frames[0] - np.median(frames[0], axis=0)).mean(axis=(1, 2, 3))
    assert sorted(away)[3] < 6
