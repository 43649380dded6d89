"""Generation as a user runs it, from a checkpoint that training wrote."""

import json

import pytest

from tests.commands.conftest import Command, training

# One video of each task: learned by heart within some tens of steps.
VIDEOS, STEPS = 4, 40


@pytest.fixture(scope="module")
def checkpoint(videos, tmp_path_factory):
    """A run that knows its training videos by heart, and those videos' records."""
    folder = tmp_path_factory.mktemp("generate")
    records = [json.loads(x) for x in (videos / "train.jsonl").read_text().splitlines()][:VIDEOS]
    for record in records:
        record["media"][0]["path"] = str(videos / record["media"][0]["path"])
    (folder / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    status, _, err = training(
        videos,
        folder / "run",
        f"--config.data.train[0].path={folder / 'few.jsonl'}",
        f"--config.train.steps={STEPS}",
        "--config.train.checkpoint.every=1000",
        "--config.train.eval_samples=0",
        f"--config.train.batch={VIDEOS}",
    ).finish()
    assert status == 0, err
    return folder / "run", records


def ask(checkpoint, video, prompt, *more):
    command = Command(
        "generate",
        f"--checkpoint={checkpoint}",
        f"--video={video}",
        f"--prompt={prompt}",
        "--max_new_tokens=16",
        *more,
    )
    return command.finish()


def test_answers_what_it_was_trained_on(checkpoint):
    run, records = checkpoint
    assert len({record["conversations"][1]["value"] for record in records}) == VIDEOS
    record = records[1]
    question = record["conversations"][0]["value"].removeprefix("<video>\n")
    status, out, err = ask(run, record["media"][0]["path"], question)
    assert status == 0, err
    assert out.strip() == record["conversations"][1]["value"]
    assert "8 frames, 8 tokens mixed, 2 visual tokens in the decoder" in err
    for part in ("decode video", "encode", "prefill", "answer"):
        assert part in err


def test_temporal_sampling_and_frames(checkpoint):
    run, records = checkpoint
    path = records[0]["media"][0]["path"]
    status, _, err = ask(run, path, "What moved?", "--temporal_sampling=2", "--frames=5")
    assert status == 0, err
    # 5 frames are two groups; every second group stays.
    assert "5 frames, 5 tokens mixed, 1 visual tokens in the decoder" in err


def test_mistakes(checkpoint, tmp_path):
    run, records = checkpoint
    video = records[0]["media"][0]["path"]
    status, _, err = ask(run, tmp_path / "none.mp4", "?")
    assert status == 1 and "none.mp4" in err and "Traceback" not in err
    (tmp_path / "text.mp4").write_text("not a video")
    status, _, err = ask(run, tmp_path / "text.mp4", "?")
    assert status == 1 and "text.mp4" in err and "Traceback" not in err
    status, _, err = ask(run, video, "?", "--start=100")
    assert status == 1 and "100" in err and "Traceback" not in err
    status, _, err = ask(tmp_path, video, "?")
    assert status == 1 and "no checkpoint at" in err and "Traceback" not in err
