"""`storm_jax.stream` as a user runs it, with a tiny model of random weights."""

import json
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from storm_jax import checkpoint
from storm_jax.data import text
from storm_jax.data.records import Turn
from storm_jax.data.video import decode
from storm_jax.inference.engine import Engine
from storm_jax.inference.load import load
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.text import AnswerText
from storm_jax.models.storm import StormModel
from tests.commands.conftest import Command
from tests.data.media_files import write
from tests.data.stream_servers import serving
from tests.tiny import run_config

FRAMES = 60  # of the clip, ten a second
QUESTION = "What is there to be seen?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a checkpoint and two clips: clip.mp4, and clip.ts as a camera sends it."""
    folder = tmp_path_factory.mktemp("stream")
    config = run_config(
        **{
            "model.temporal.direction": "forward",
            "model.decoder.tied_embeddings": False,  # else a random model repeats its last token
            "data.tokenizer": "bytes",
        }
    )
    params = jax.jit(StormModel(config.model).init)(jax.random.key(1))
    checkpoint.save_params(folder / "run", params, config)
    write(folder / "clip.mp4", FRAMES, fps=10, size=(64, 64))
    options = {"g": "5", "bf": "0"}
    write(folder / "clip.ts", FRAMES, fps=10, size=(64, 64), format="mpegts", options=options)
    return folder


@pytest.fixture(scope="module")
def offline(run):
    """Answers to QUESTION about frames given at once, by the engine that serves everything else."""
    loaded = load(run / "run", devices=jax.devices()[:1])
    engine = Engine(loaded, slots=1, context=512)
    tokenizer = text.load_tokenizer("bytes")

    def answer(frames: np.ndarray, new_tokens: int) -> str:
        visual = engine.encode(frames)
        turns = (Turn("user", f"<video>\n{QUESTION}"),)
        stop = text.stop_tokens(tokenizer, "gemma")
        tokens = text.encode_prompt(tokenizer, "gemma", turns, [visual.count])
        slot = engine.admit(tokens, [visual], Sampling(new_tokens, stop_tokens=stop))
        written, got = AnswerText(tokenizer), ""
        while progress := engine.step():
            got += written.push(progress[0].tokens)
        engine.release(slot)
        return got + written.close()

    return answer


def stream(run, source, *more, stdin=None) -> Command:
    command = Command(
        "stream",
        f"--checkpoint={run / 'run'}",
        f"--source={source}",
        "--max_new_tokens=12",
        f"--compile_cache={run / 'compiled'}",
        "--json",
        *more,
        stdin=stdin,
    )
    return command


def events(out: str) -> tuple[list[dict], dict]:
    """The answers and errors, and the summary."""
    *others, summary = [json.loads(line) for line in out.splitlines()]
    assert summary.pop("event") == "summary"
    return others, summary


def test_a_file_answers_as_offline_at_any_time(run, offline):
    frames, _ = decode(str(run / "clip.mp4"), fps=2, size=32)
    ats = (1.5, 3.2, 100.0)  # the last one is behind the end
    command = stream(
        run,
        run / "clip.mp4",
        "--fps=2",
        "--batch=3",
        *(f"--ask={at}:{QUESTION}" for at in ats),
        stdin=subprocess.DEVNULL,
    )
    status, out, err = command.finish()
    assert status == 0, err
    answers, summary = events(out)
    assert [a["time"] for a in answers] == [1.0, 3.0, 5.5]
    for at, answer in zip(ats, answers, strict=True):
        seen = frames[: int(np.ceil(at * 2))]
        assert answer["frames"] == len(seen)
        # 4 frames are one visual token.
        assert answer["visual_tokens"] == min(-(-len(seen) // 4), 2)
        if len(seen) <= 8:  # the budget of the training run
            assert answer["answer"] == offline(seen, 12)
        assert answer["tokens"] == 12 and answer["finish"] == "length"
        assert 0 < answer["first_token_seconds"] <= answer["seconds"]
    assert summary["frames"] == len(frames) == 12 and summary["dropped"] == 0
    assert summary["answers"] == 3 and summary["groups_kept"] == 2
    assert "compiling" in err and "12 frames to 5.5 s" in err and "Traceback" not in err


@pytest.mark.slow
def test_raw_frames_and_repeated_questions(run, offline, tmp_path):
    frames, _ = decode(str(run / "clip.mp4"), fps=10, size=32)
    (tmp_path / "raw").write_bytes(frames.tobytes())
    with open(tmp_path / "raw", "rb") as raw:
        command = stream(
            run,
            "-",
            "--size=32x32",
            "--rate=10",
            "--fps=5",
            "--policy=spread",
            "--budget=100",
            f"--ask=1:{QUESTION}",
            "--ask_every=2",
            stdin=raw,
        )
        status, out, err = command.finish()
    assert status == 0, err
    answers, summary = events(out)
    assert [a["frames"] for a in answers] == [5, 15, 25]
    for answer in answers:
        assert answer["answer"] == offline(frames[::2][: answer["frames"]], 12)
    assert summary["frames"] == 30 and summary["groups_kept"] == 8


@pytest.mark.slow
def test_a_camera_that_is_asked_by_typing(run):
    """Text on standard output; the source stays open until it is cut."""
    clip = (run / "clip.ts").read_bytes()

    def sending(connection, number):
        connection.sendall(clip)
        connection.recv(1)  # until the client goes away

    with serving(sending) as server:
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        command = Command(
            "stream",
            f"--checkpoint={run / 'run'}",
            f"--source={address}",
            "--fps=0",
            "--max_new_tokens=6",
            "--compile_cache=",
            stdin=subprocess.PIPE,
        )
        errors = []
        while "watching" not in "".join(errors):
            errors.append(command.process.stderr.readline())
        command.process.stdin.write(f"{QUESTION}\nWho says <video> to whom?\nAnd now?\n")
        command.process.stdin.close()
        command.process.stdin = None
        status, out, err = command.finish()
    assert status == 0, err  # nobody can ask any more
    assert QUESTION in out and "And now?" in out and "to whom" not in out
    assert "cannot hold <video>" in err and "2 answers" in err


@pytest.mark.slow
def test_interrupted_and_lost(run):
    clip = (run / "clip.ts").read_bytes()
    with serving(lambda connection, number: connection.sendall(clip)) as server:
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        options = ("--fps=0", "--ask=inf:Then?", "--reconnect=1", "--timeout=1")
        command = stream(run, address, *options, stdin=subprocess.DEVNULL)
        while "attempt 1 of 1" not in (command.process.stderr.readline() or "attempt 1 of 1"):
            pass
        server.shutdown()
        server.server_close()
        status, out, err = command.finish()
    assert status == 1 and "not back in 1 attempts" in err, err
    answers, summary = events(out)
    assert len(answers) == 1 and summary["frames"] + summary["dropped"] >= FRAMES

    held = subprocess.PIPE  # nobody types, and the pipe stays open
    command = stream(run, run / "clip.mp4", stdin=held)
    while "watching" not in command.process.stderr.readline():
        pass
    time.sleep(1)
    command.process.send_signal(signal.SIGTERM)
    status, out, err = command.finish()
    assert status == 130 and "Traceback" not in err, err
    assert events(out)[1]["frames"] == 6


def test_mistakes(run, tmp_path):
    clip = f"--source={run / 'clip.mp4'}"
    (tmp_path / "text.mp4").write_text("not a video")
    cases = [
        (2, ["--source=-", "--ask=1:What?"], "--size=None: raw frames need --size"),
        (2, ["--source=-", "--size=32x32"], "--source=- leaves no place to type"),
        (2, [clip, "--ask=soon:What?"], '--ask="soon:What?" is not SECONDS:QUESTION'),
        (2, [clip, "--policy=newest"], "policy=newest"),
        (2, [clip, "--top_p=0"], "--top_p=0"),
        (1, [f"--source={tmp_path / 'text.mp4'}"], "text.mp4: cannot be opened"),
        (1, [clip, "--budget=0", "--checkpoint=nowhere"], "no checkpoint at"),
    ]
    for few in (cases[:3], cases[3:]):  # together: most of the time goes into imports
        commands = [
            Command(
                "stream",
                f"--checkpoint={run / 'run'}",
                "--compile_cache=",
                *flags,
                stdin=subprocess.DEVNULL,
            )
            for _, flags, _ in few
        ]
        for command, (expected, flags, message) in zip(commands, few, strict=True):
            status, _, err = command.finish()
            assert status == expected, (flags, err)
            assert message in err and "Traceback" not in err, (flags, err)


@pytest.mark.slow
def test_a_question_that_is_too_long(run):
    asks = (f"--ask=1:{'long ' * 30}", f"--ask=2:{QUESTION}")
    command = stream(run, run / "clip.mp4", "--question_tokens=64", *asks, stdin=subprocess.DEVNULL)
    status, out, err = command.finish()
    assert status == 3, err
    (error, answer), summary = events(out)
    assert error["event"] == "error" and error["needed"] > error["available"] == 2 + 64 + 12
    assert "--question_tokens makes room" in err
    assert answer["event"] == "answer" and summary["answers"] == 1
