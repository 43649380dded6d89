"""Several processes on this machine, as on a pod: killed, stopped, restarted in other numbers.

Every run has the model of configs/debug.py in float32, and is stopped by SIGTERM to one process.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storm_jax.config import RunConfig, from_json
from storm_jax.data import pipeline
from storm_jax.data.text import load_tokenizer
from storm_jax.parallel import processes
from storm_jax.training import exits
from tests.commands.kill_repeatedly import losses, whole
from tests.compilation import QUICK, without_shared_cache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EVERY, LAST = 3, 10  # steps between checkpoints; steps that are compared
# Losses of one run on another number of devices: sums of float32 in another order, through the
# steps of Adam. Measured: 1e-7 (docs/checkpoints.md).
TOLERANCE = 1e-5


class Run:
    """`launch/local_processes.sh` with the smallest run."""

    def __init__(self, videos: Path, workdir: Path, count: int, devices: int, *more: str):
        settings = {
            "data.train[0].path": videos / "train.jsonl",
            "data.tokenizer": videos / "tokenizer",
            "train.steps": 1000,
            "train.eval_samples": 0,
            "train.checkpoint.every": EVERY,
            "train.log_records": True,
        }
        self.workdir, self.log = workdir, workdir.with_name(f"{workdir.name}.log")
        with self.log.open("w") as out:
            self.launcher = subprocess.Popen(
                [
                    ROOT / "launch" / "local_processes.sh",
                    str(count),
                    str(devices),
                    *(sys.executable, "-m", "storm_jax.train", "--config=configs/debug.py"),
                    f"--workdir={workdir}",
                    *(f"--config.{name}={value}" for name, value in settings.items()),
                    *more,
                ],
                cwd=ROOT,
                env={
                    **without_shared_cache(),
                    "XLA_FLAGS": " ".join(QUICK),
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                    "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",  # what the cache had
                },
                stdout=out,
                stderr=out,
            )

    def until_step(self, step: int) -> None:
        """Waits until the metrics show a step."""
        limit = time.monotonic() + 400
        while max(losses(self.workdir), default=0) < step:
            assert self.launcher.poll() is None and time.monotonic() < limit, self.said()
            time.sleep(0.05)

    def send(self, number: int, process: int) -> None:
        """A signal to one process."""
        wanted = (f"STORM_PROCESS_ID={process}", f"--workdir={self.workdir}")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_text().split("\0")
                command = (folder / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if wanted[0] in environment and wanted[1] in command and "bash" not in command[0]:
                os.kill(int(folder.name), number)
                return
        raise AssertionError(f"no process {process}:\n{self.said()}")

    def finish(self) -> int:
        """The launcher's exit status."""
        return self.launcher.wait(300)

    def stop(self, process: int) -> int:
        """SIGTERM to one process; returns the step that was saved."""
        self.send(signal.SIGTERM, process)
        assert self.finish() == exits.PREEMPTED, self.said()
        assert f"process {process}: SIGTERM" in self.log.read_text(), self.said()
        return whole(self.workdir / "checkpoints")[-1]

    def said(self) -> str:
        return self.log.read_text()[-5000:]


def process_said(log: str, number: int) -> str:
    """The lines of one process: all but process 0 have a number in front."""
    lines = log.splitlines()
    if number:
        return "\n".join(line for line in lines if line.startswith(f"[{number}] "))
    return "\n".join(line for line in lines if not re.match(r"\[\d+\] ", line))


def records(workdir: Path, batch: int) -> dict[int, list[list[str]]]:
    """The ids in each row of every global batch, from what all processes wrote."""
    steps: dict[int, dict[int, dict]] = {}
    for path in workdir.glob("records-*.jsonl"):
        process = int(path.stem.split("-")[1])
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], {})[process] = row  # the last one counts
    result = {}
    for step, by_process in steps.items():
        count = by_process[0]["processes"]
        assert all(by_process[number]["processes"] == count for number in range(count)), step
        rows = [by_process[number % count]["rows"][number // count] for number in range(batch)]
        result[step] = rows
    return result


def planned(workdir: Path) -> dict[int, list[list[str]]]:
    """The same from the data pipeline in this one process."""
    config = from_json(RunConfig, (workdir / "config.json").read_text())
    tokenizer = load_tokenizer(config.data.tokenizer)
    with pipeline.train_batches(
        config.data, config.model, tokenizer, batch=config.train.batch, steps=LAST
    ) as batches:
        return {
            step: [[sample.id for sample in row] for row in batch.info.rows]
            for step, batch in enumerate(batches, start=1)
        }


@pytest.fixture(scope="module")
def killed(videos, tmp_path_factory):
    """2 processes x 2 devices, one of which was killed: a copy of the workdir, and the losses until
    then. Beside it lie `run`, the workdir itself, and the log, under the copy's name.
    """
    workdir = tmp_path_factory.mktemp("killed") / "run"
    run = Run(videos, workdir, 2, 2)
    run.until_step(2 * EVERY + 2)
    run.send(signal.SIGKILL, 1)
    assert run.finish() not in (0, exits.PREEMPTED), run.said()
    assert whole(workdir / "checkpoints")
    left = workdir.with_name("left")
    shutil.copytree(workdir, left)
    shutil.copy(run.log, left.with_name("left.log"))
    return left, losses(left)


@pytest.fixture(scope="module")
def same_again(killed, videos):
    """The same command again after the kill, stopped in order: workdir and losses."""
    workdir = killed[0].with_name("run")
    newest = whole(workdir / "checkpoints")[-1]
    run = Run(videos, workdir, 2, 2)
    run.until_step(LAST)
    saved = run.stop(process=1)
    assert f"resumed at step {newest}" in run.log.read_text()
    assert saved >= LAST and max(losses(workdir)) == saved
    return workdir, losses(workdir)


def test_the_same_number_of_processes_goes_on_exactly(killed, same_again):
    before, after = killed[1], same_again[1]
    repeated = [step for step in before if step in after]
    assert sorted(before) == repeated and {s: after[s] for s in before} == before
    batches = records(same_again[0], 8)
    assert {step: batches[step] for step in range(1, LAST + 1)} == planned(same_again[0])


def test_a_restart_finds_what_was_compiled(killed, same_again):
    """And goes on exactly, as the test above shows.

    What JAX 0.10 keeps for a CPU names the process, and process 0 alone writes: the others compile
    again, for which process 0 waits.
    """
    first, again = (
        workdir.with_name(f"{workdir.name}.log").read_text() for workdir, _ in (killed, same_again)
    )
    hit = "Persistent compilation cache hit for 'jit_train_step'"
    miss = "PERSISTENT COMPILATION CACHE MISS for 'jit_train_step'"
    assert process_said(first, 0).count(miss) == 1 and hit not in first
    assert process_said(again, 0).count(hit) == 1 and miss not in process_said(again, 0)
    # Process 1 has the program from one place or the other, once.
    assert process_said(again, 1).count(hit) + process_said(again, 1).count(miss) == 1


@pytest.mark.parametrize("count, devices", [(1, 2), (4, 1)])
def test_other_numbers_of_processes_go_on_alike(
    killed, same_again, videos, tmp_path, count, devices
):
    workdir = tmp_path / "run"
    shutil.copytree(killed[0], workdir)
    newest = whole(workdir / "checkpoints")[-1]
    run = Run(videos, workdir, count, devices)
    run.until_step(LAST)
    run.stop(process=count - 1)
    assert f"resumed at step {newest}" in run.log.read_text()
    text = run.log.read_text()
    assert f"{count} process(es), {count * devices} device(s)" in text
    after = losses(workdir)
    differences = [abs(after[s] / same_again[1][s] - 1) for s in range(newest + 1, LAST + 1)]
    print(f"{count} x {devices}: losses differ by at most {max(differences):.1e}")
    for step in range(newest + 1, LAST + 1):
        assert after[step] == pytest.approx(same_again[1][step], rel=TOLERANCE), step
    batches = records(workdir, 8)
    assert {step: batches[step] for step in range(1, LAST + 1)} == planned(workdir)


def test_a_process_that_hangs_is_reported_by_the_others(videos, tmp_path):
    run = Run(videos, tmp_path / "run", 2, 1, "--config.train.watchdog=6")
    run.until_step(2)
    run.send(signal.SIGSTOP, 1)
    assert run.finish() == exits.STUCK, run.said()
    said = run.log.read_text()
    assert re.search(r"no progress for .*train.watchdog=6\): waiting for .*step \d+", said)
    assert "most recent call first" in said and "still waiting for" in said


def apart(
    videos: Path, workdir: Path, variants: list[dict[str, str]], folders: list[Path] | None = None
) -> list[tuple[int, str]]:
    """Starts one process for each variant of environment and overrides; status and error output.

    Args:
      folders: working directory of each, where it is not that of the repository.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number, variant in enumerate(variants):
        overrides = [f"--{name}={value}" for name, value in variant.items() if "." in name]
        environment = {name: value for name, value in variant.items() if "." not in name}
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "storm_jax.train"),
                    *(f"--config={ROOT}/configs/debug.py", f"--workdir={workdir}", *overrides),
                ],
                cwd=folders[number] if folders else ROOT,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": " ".join(QUICK),
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                    processes.COORDINATOR: f"127.0.0.1:{port}",
                    processes.COUNT: str(len(variants)),
                    processes.INDEX: str(number),
                    **environment,
                },
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [(process.returncode, err) for process in started for err in process.communicate()[1:]]


def test_hosts_with_another_configuration_are_told(videos, tmp_path):
    variants = [{}, {"config.train.batch": "16", "XLA_FLAGS": " ".join(QUICK[:-1])}, {}]
    for status, err in apart(videos, tmp_path / "run", variants):
        assert status == exits.MISTAKE, err
        assert "the processes of this run differ" in err
        assert "config.train.batch: '8' on process 0 (" in err and "'16' on process 1 (" in err
        assert "XLA_FLAGS: " in err and "config.train.steps" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_fewer_devices_than_the_launcher_says(videos, tmp_path):
    variants = [{processes.EXPECTED_DEVICES: "8"}] * 2
    for status, err in apart(videos, tmp_path / "run", variants):
        assert status == exits.MISTAKE, err
        assert "2 devices have come together, but STORM_EXPECT_DEVICES=8" in err


def test_a_file_that_is_broken_on_one_of_the_hosts_that_share_its_row(videos, tmp_path):
    """Each process reads the data set in its own folder; one video cannot be decoded in the second.

    Its header is whole, so that both plan the same rows.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(videos, folder)
    broken = folders[1] / "videos" / "train_000005.mp4"
    content = bytearray(broken.read_bytes())
    start = content.index(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    broken.write_bytes(content)
    settings = {
        "config.data.train[0].path": "train.jsonl",
        "config.data.tokenizer": "tokenizer",
        "config.mesh.fsdp": "1",
        "config.mesh.seq": "2",
        "config.train.eval_samples": "0",
        "config.train.steps": "40",
    }
    workdir = tmp_path / "run"
    for status, err in apart(videos, workdir, [settings] * 2, folders):
        assert status == exits.MISTAKE, err
        assert re.search(r"step \d+: 1 row\(s\) are not the same on all the processes", err), err
        [step] = map(int, re.findall(r"The batch of step (\d+):", err))
        assert "process 0 row " in err and "process 1 row " in err
        # What came before is good, and nothing after it was saved.
        assert all(saved < step for saved in whole(workdir / "checkpoints"))
    assert "train_000005" in (workdir / "bad_records-1.jsonl").read_text()
    assert not (workdir / "bad_records.jsonl").exists()
