"""Training as a user runs it: to the end, killed in mid-run, on bad data, with mistakes."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from storm_jax.training import exits
from tests.commands import kill_repeatedly
from tests.commands.conftest import training


def losses(workdir) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    command = training(videos, workdir, "--config.train.steps=12")
    status, _, err = command.finish()
    assert status == 0, err
    return workdir, err


def test_runs_to_the_end(trained):
    workdir, err = trained
    values = losses(workdir)
    assert sorted(values) == list(range(1, 13))
    assert values[12] < values[1] - 0.5
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "loss" in row)
    for name in ("step_seconds", "tokens_per_second", "frames_per_second", "bad_records"):
        assert name in last
    assert rows[-1]["restarts"] == 0 and rows[-1]["seconds/lost"] == 0
    for phase in ("start", "compile", "data", "step", "checkpoint", "evaluate"):
        assert rows[-1][f"seconds/{phase}"] > 0
    said = float(re.search(r"goodput ([\d.]+)% of start", err)[1])
    assert said == pytest.approx(100 * rows[-1]["goodput"], abs=1)  # told a moment later
    assert "mfu" not in last  # the peak of a CPU is not known
    assert "held-out accuracy  direction" in err and "8 frames are 8 tokens" in err
    assert list((workdir / "tensorboard").iterdir())
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 12


def test_killed_run_goes_on_bit_for_bit(trained, videos, tmp_path):
    """kill -9 after a checkpoint, then the same command, with other data workers."""
    workdir = tmp_path / "killed"
    arguments = ("--config.train.steps=12", "--config.train.checkpoint.every=4")
    command = training(videos, workdir, *arguments)
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "4" / "commit_success.txt").exists():
        assert command.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    command.process.kill()
    command.finish()
    assert max(losses(workdir)) < 12, "the run ended before it was killed"

    status, _, err = training(videos, workdir, *arguments, "--config.data.workers=2").finish()
    assert status == 0, err
    assert "resumed at step" in err
    assert losses(workdir) == losses(trained[0])  # float32 as JSON: equal to the last bit
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["restarts"] == 1 and last["seconds/down"] > 0


@pytest.mark.slow
def test_a_lost_loss_ends_the_run_with_its_records_and_is_not_saved(videos, tmp_path):
    status, _, err = training(
        videos,
        tmp_path,
        "--config.train.optimizer.rates.decoder=1e30",
        "--config.train.optimizer.warmup_fraction=0.0",
        "--config.train.checkpoint.every=1",
        "--config.train.eval_samples=0",
    ).finish()
    assert status == exits.MISTAKE
    assert "error: step 2: " in err and "loss" in err and "the forward pass is at fault" in err
    assert "The batch of step 2:\n  process 0 row 0: train_" in err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.slow
def test_out_of_memory_is_explained(videos, tmp_path):
    status, _, err = training(
        videos, tmp_path, "--config.model.decoder.vocab_size=2000000000"
    ).finish()
    assert status == exits.MISTAKE
    assert "error: out of memory while making the training state: " in err
    assert "512000000000 bytes" in err and "mesh.fsdp (now -1)" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_data_worker_that_hangs_is_reported(videos, tmp_path):
    command = training(
        videos,
        tmp_path,
        "--config.train.steps=100000",
        "--config.train.eval_samples=0",
        "--config.train.watchdog=8",
        "--config.data.workers=1",
        "--config.data.prefetch_megabytes=1",
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics.jsonl").exists() or max(losses(tmp_path), default=0) < 3:
        assert command.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    tasks = Path(f"/proc/{command.process.pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    (worker,) = [c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(worker, signal.SIGSTOP)
    try:
        command.process.wait(120)
    finally:
        command.process.kill()
        os.kill(worker, signal.SIGKILL)  # it holds the pipes open
    status, _, err = command.finish()
    assert status == exits.STUCK, err[-3000:]
    assert re.search(r"waiting for the batch of step \d+", err) and "in train" in err


@pytest.mark.slow
def test_five_kills(videos, tmp_path):
    """The shorter version of `python -m tests.commands.kill_repeatedly`."""
    tally = kill_repeatedly.run(videos, tmp_path / "run", kills=5, seed=3)
    assert tally.kills == 5 and tally.last_checkpoint > 0


def test_later_stage_starts_from_parts_of_an_earlier_one(trained, videos, tmp_path):
    source = trained[0]
    status, _, err = training(
        videos,
        tmp_path / "next",
        "--config.train.steps=1",
        "--config.train.eval_samples=0",
        f"--config.init_from.vit={source}",
        f"--config.init_from.decoder={source / 'checkpoints' / '12'}",
    ).finish()
    assert status == 0, err
    assert "vit starts from" in err and "decoder starts from" in err
    assert "temporal starts from" not in err


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.model.temporal.layer=0", 'Did you mean "layers"'),
        ("--config.train.steps=many", "train.steps"),
        (
            "--config.mesh.fsdp=3",
            "mesh data=1 x fsdp=3 x seq=1 x tensor=1 needs 3 devices, but there are 1",
        ),
        ("--config.data.train[0].path=nowhere.jsonl", "nowhere.jsonl"),
        (
            "--config.model.decoder.vocab_size=100",
            "tokens, the decoder only model.decoder.vocab_size=100",
        ),
    ],
)
def test_mistakes_end_with_their_reason(override, message, videos, tmp_path):
    status, _, err = training(videos, tmp_path / "run", override).finish()
    assert status != 0
    assert message in err


def test_checkpoint_of_another_architecture_is_named(trained, videos):
    status, _, err = training(videos, trained[0], "--config.model.decoder.mlp=96").finish()
    assert status != 0
    assert (
        "parameter decoder/blocks/layers/down/weight is (2, 128, 64) there and (2, 96, 64)" in err
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_workdir_by_permission(videos, tmp_path):
    tmp_path.chmod(0o500)
    status, _, err = training(videos, tmp_path / "run").finish()
    assert status != 0 and "cannot be written" in err


def test_unwritable_workdir(videos, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = training(videos, tmp_path / "file" / "run").finish()
    assert status != 0
    assert "cannot be written" in err and "give a folder" in err


def spoiled(videos, tmp_path, count: int):
    """The training set with `count` of its videos cut short."""
    lines = []
    for number, line in enumerate((videos / "train.jsonl").read_text().splitlines()):
        record = json.loads(line)
        path = videos / record["media"][0]["path"]
        if number < count:
            broken = tmp_path / f"broken_{number}.mp4"
            broken.write_bytes(path.read_bytes()[:300])
            path = broken
        record["media"][0]["path"] = str(path)
        lines.append(json.dumps(record) + "\n")
    target = tmp_path / "train.jsonl"
    target.write_text("".join(lines))
    return target


def test_bad_records_are_skipped_counted_and_listed(videos, tmp_path):
    path = spoiled(videos, tmp_path, 2)
    status, _, err = training(
        videos,
        tmp_path / "run",
        f"--config.data.train[0].path={path}",
        "--config.train.steps=4",
        "--config.data.max_bad_fraction=0.1",
    ).finish()
    assert status == 0, err
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["bad_records"] == 2
    listed = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert len(listed) == 2 and "broken_0.mp4" in listed[0]


def test_too_many_bad_records_stop_the_run(videos, tmp_path):
    path = spoiled(videos, tmp_path, 20)
    status, _, err = training(
        videos, tmp_path / "run", f"--config.data.train[0].path={path}"
    ).finish()
    assert status != 0
    assert "20 of 64 records are bad" in err
    assert "data.max_bad_fraction=0.02" in err
