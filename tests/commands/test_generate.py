"""Generation as a user runs it, from a checkpoint that training wrote."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from storm_jax.data.drawing import write_video
from tests.commands.conftest import ROOT, called, command_environment, training
from tests.compilation import SHARED
from tests.data.media_files import write
from tests.inference.test_media import children, gone

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


@pytest.fixture(scope="module")
def known(checkpoint):
    """A video, the question about it, and the answer that was learnt."""
    records = checkpoint[1]
    assert len({r["conversations"][1]["value"] for r in records}) == VIDEOS
    record = records[1]
    question, answer = (turn["value"] for turn in record["conversations"])
    return record["media"][0]["path"], question.removeprefix("<video>\n"), answer


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    return write(path, 1, codec="png", format="image2", pix_fmt="rgb24")


@pytest.fixture(scope="module")
def flags(checkpoint):
    """What all calls have in common."""
    return [f"--checkpoint={checkpoint[0]}", "--max_new_tokens=12"]


def generate(*arguments, env=None):
    """The command as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "storm_jax.generate", *arguments],
        cwd=ROOT,
        env=env or command_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def calls(flags):
    """Several calls in one process: a list of (arguments, lines of standard input)."""

    def run(*wanted):
        return called("generate", [([*flags, *a], "".join(i)) for a, i in wanted])

    return run


def test_answers_what_it_was_trained_on(flags, known):
    path, question, answer = known
    process = generate(*flags, f"--video={path}", f"--prompt={question}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == answer + "\n"
    (line,) = [x for x in err.splitlines() if "sampled" in x]
    kept = "8 mixed, 2 pooled, 2 sampled, 2 in the decoder"
    assert line.startswith(f"8 frames sampled, 8 encoded; visual tokens: {kept}; ")
    for part in ("load", "frames", "encode", "prefill", "answer", "compile"):
        assert f" {part} " in line, part
    assert line.endswith(" tokens/s")


def test_a_chat_encodes_the_video_once(flags, known, calls):
    path, question, answer = known
    lines = [f"{question}\n", "\n", "And then?\n", question]
    too_long = [lines[0], "and " * 40 + "\n", "never read\n"]
    (status, out, err), (_, again, _), (_, small, _), (ended, answered, why) = calls(
        ([f"--video={path}", "--json"], lines),
        ([f"--video={path}"], lines[:1]),
        ([f"--video={path}", "--quantization=fp8_dynamic"], lines[:1]),
        ([f"--video={path}", "--context=60"], too_long),
    )
    assert status == 0, err
    first, second, third = map(json.loads, out.splitlines())
    assert first["answer"] == answer and again == small == answer + "\n"
    assert first["finish"] == "stop" and first["media"][0]["path"] == path
    assert {"load", "frames", "encode", "prefill", "answer"} <= first["seconds"].keys()
    assert first["tokens_per_second"] > 0
    # Further questions neither encode nor prefill what is in the cache.
    assert second["prompt"] == "And then?" and third["prompt"] == question
    assert second["seconds"].keys() == {"prefill", "answer", "compile"}
    assert second["prompt_tokens"] < first["prompt_tokens"]
    assert (ended, answered) == (3, answer + "\n")
    assert "but the context holds 60" in why


@pytest.mark.slow
def test_media_subtitles_and_options(checkpoint, known, calls, image, tmp_path):
    path, question, answer = known
    other = checkpoint[1][0]["media"][0]["path"]
    write_video(str(tmp_path / "still.mp4"), np.full((8, 32, 32, 3), 90, np.uint8))
    (tmp_path / "a.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\nfirst\n\n2\n00:09:00,000 --> 00:09:01,000\nlate\n"
    )
    prompt = f"--prompt={question}"
    several, named, titled, cut, sampled, still, half = calls(
        ([f"--video={path}", f"--video={other}", f"--image={image}", prompt, "--json"], ""),
        ([f"--video={path}", f"--image={image}", "--prompt=<image> or <video>?", "--json"], ""),
        ([f"--video={path}", f"--subtitles={tmp_path / 'a.srt'}", prompt, "--json",
          "--context=200"], ""),
        ([f"--video={path}", "--start=0", "--end=0.3", prompt, "--json"], ""),
        # 5 frames are two groups; every second group stays.
        ([f"--video={path}", "--temporal_sampling=2", "--frames=5", prompt], ""),
        ([f"--video={tmp_path / 'still.mp4'}", "--duplicate_threshold=1", prompt], ""),
        ([f"--video={path}", "--keep_tokens=0.5", "--stop=" + answer[1:3], prompt], ""),
    )  # fmt: skip
    for status, _, err in (several, named, titled, cut, sampled, still, half):
        assert status == 0, err
    record = json.loads(several[1])
    assert [m["path"] for m in record["media"]] == [path, other, str(image)]
    assert [m["pruned"] for m in record["media"]] == [2, 2, 1]
    plain = json.loads(cut[1])["prompt_tokens"] - json.loads(cut[1])["media"][0]["pruned"]
    # Two videos and an image more, each behind a line break.
    assert record["prompt_tokens"] >= plain + 5
    assert json.loads(cut[1])["media"][0]["frames"] < 8
    titled_tokens = json.loads(titled[1])["prompt_tokens"]
    assert plain + 2 < titled_tokens < plain + 100
    assert (
        "5 frames sampled, 5 encoded; visual tokens: 5 mixed, 2 pooled, 1 sampled, 1 in"
        in (sampled[2])
    )
    assert "8 frames sampled, 1 encoded; visual tokens: 1 mixed, 1 pooled, 1 sampled" in still[2]
    assert "8 mixed, 2 pooled, 2 sampled, 1 in the decoder" in half[2]
    assert json.loads(named[1])["prompt"] == "<image> or <video>?"


@pytest.mark.slow
def test_stop_strings_and_random_choices(known, calls):
    path, question, answer = known
    ask = [f"--video={path}", f"--prompt={question}"]
    warm = ["--temperature=5", "--top_k=50", "--top_p=0.99", "--repetition_penalty=1.1"]
    found = calls(
        ([*ask, f"--stop={answer[-2:]}"], ""),
        ([*ask, *warm, "--seed=1"], ""),
        ([*ask, *warm, "--seed=1"], ""),
        ([*ask, *warm, "--seed=2"], ""),
        ([*ask, "--temperature=5", "--top_k=1"], ""),
    )
    assert [status for status, _, _ in found] == [0] * 5, found
    stopped, one, same, other, greedy = (out for _, out, _ in found)
    assert stopped == answer[:-2] + "\n"
    assert one == same != other
    assert greedy == answer + "\n"


def test_mistakes(checkpoint, known, calls, tmp_path):
    path, question, _ = known
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "bad.srt").write_text("1\nno times\n")
    video, prompt = f"--video={path}", "--prompt=?"
    cases = [
        (1, "none.mp4: cannot be opened: No such file", [f"--video={tmp_path}/none.mp4", prompt]),
        (1, "text.mp4: cannot be opened", [f"--video={tmp_path}/text.mp4", prompt]),
        (1, "start=100 s is outside the video", [video, prompt, "--start=100"]),
        (1, "bad.srt:1: expected", [video, prompt, f"--subtitles={tmp_path}/bad.srt"]),
        (1, "no checkpoint at", [video, prompt, f"--checkpoint={tmp_path}"]),
        (2, "give --video or --image", [prompt]),
        (2, "--prompt is empty", [video, "--prompt= "]),
        (2, "no question: give --prompt", [video]),
        (2, "Unknown command line flag 'vidoe'", ["--vidoe=x"]),
        (2, "arguments not understood: x", ["x", video, prompt]),
        (2, "--temporal_pool=2: this checkpoint was trained with temporal_pool=4",
         [video, prompt, "--temporal_pool=2"]),
        (2, "--keep_tokens=2 is not a share", [video, prompt, "--keep_tokens=2"]),
        (2, "--temperature=-1.0: it must be", [video, prompt, "--temperature=-1"]),
        (2, "--start is given 3 times, --video 1",
         [video, prompt, "--start=0", "--start=0", "--start=0"]),
        (2, "the prompt has <image>, but there are <video>", [video, "--prompt=<image>?"]),
        (3, "but the context holds 8: take fewer frames", [video, prompt, "--context=8"]),
    ]  # fmt: skip
    found = calls(*[(arguments, "") for _, _, arguments in cases])
    for (status, message, arguments), (got, out, err) in zip(cases, found, strict=True):
        assert (got, out) == (status, ""), (arguments, err)
        assert message in err and "Traceback" not in err, (arguments, err)
        assert err.count("\n") == 1, err


@pytest.mark.slow
def test_interrupted_while_it_waits(flags, known, tmp_path):
    path, question, answer = known
    env = {name: value for name, value in command_environment().items() if name != SHARED}
    process = generate(*flags, f"--video={path}", f"--compile_cache={tmp_path}", env=env)
    until = time.monotonic() + 60
    while not (workers := children(process.pid)) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers
    process.stdin.write(question + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == answer + "\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted" and "Traceback" not in err
    assert gone(workers)
    assert any("fill" in x.name for x in tmp_path.iterdir())  # of the compiled programs
