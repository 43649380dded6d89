"""Kills a training run with SIGKILL at random moments, again and again, and checks every restart.

    python -m tests.commands.kill_repeatedly --kills=200 --out=result.json

Each restart must go on from the newest checkpoint that was whole when the process died, and that is
never older than one seen before. A step that is done again must give the same loss to the last bit.
At the end nothing unfinished may lie about.
"""

import argparse
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from storm_jax.training import exits
from tests.compilation import QUICK, without_shared_cache

ROOT = Path(__file__).parents[2]
EVERY = 3  # steps between checkpoints
STEPS = 1_000_000  # never reached
FIRST_STEP = "compiled and ran the first step"


@dataclasses.dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    before_first_step: int = 0
    in_mid_save: int = 0  # an unfinished checkpoint was left behind
    steps_lost: list[int] = dataclasses.field(default_factory=list)  # done and logged, then redone
    steps_repeated_alike: int = 0
    last_checkpoint: int = 0


def command(videos: Path, workdir: Path) -> list[str]:
    """The smallest model that has every part, one device, a checkpoint every few steps."""
    settings = {
        "data.train[0].path": videos / "train.jsonl",
        "data.eval[0].path": videos / "test.jsonl",
        "data.tokenizer": videos / "tokenizer",
        "train.steps": STEPS,
        "train.batch": 2,
        "train.eval_samples": 0,
        "train.checkpoint.every": EVERY,
        "train.checkpoint.keep": 2,
        "train.divergence.factor": 0.0,
        "train.log_every": 1,
    }
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    head = [sys.executable, "-m", "storm_jax.train", "--config=configs/debug.py"]
    return [*head, f"--workdir={workdir}", *overrides]


def whole(folder: Path) -> list[int]:
    """Steps of complete checkpoints, found without Orbax."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdigit())


def unfinished(folder: Path) -> list[str]:
    """What a kill in mid-save left behind."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in found if "tmp" in p.name)


def losses(workdir: Path) -> dict[int, float]:
    """Of every step in metrics.jsonl; a line that is being written is left out."""
    path, values = workdir / "metrics.jsonl", {}
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        row = json.loads(line)
        if "loss" in row:
            assert row["step"] not in values, f"step {row['step']} twice"
            values[row["step"]] = row["loss"]
    return values


def start(videos: Path, workdir: Path) -> tuple[subprocess.Popen, Path]:
    """The run and the file of what it says."""
    environment = {
        **without_shared_cache(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(QUICK),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    log = workdir.with_suffix(".log")
    with log.open("w") as err:
        process = subprocess.Popen(
            command(videos, workdir), cwd=ROOT, env=environment, stdout=err, stderr=err
        )
    return process, log


def wait_for(process: subprocess.Popen, log: Path, happened: Callable[[], bool]) -> None:
    """Looks until something has happened in the run."""
    limit = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, f"the run ended:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < limit, f"nothing happens:\n{log.read_text()[-3000:]}"
        time.sleep(0.001)


def kill_once(videos: Path, workdir: Path, rng: random.Random, tally: Tally, seen: dict) -> None:
    """Starts the run, kills it at a random moment, and compares with what was there before."""
    folder = workdir / "checkpoints"
    before = whole(folder)
    process, log = start(videos, workdir)
    # One in eight dies while it starts, one in four as it writes a checkpoint, the others at any
    # time of their first seconds.
    how = rng.random()
    if how < 1 / 8:
        time.sleep(rng.uniform(0, 8))
    else:
        wait_for(process, log, lambda: FIRST_STEP in log.read_text())
        if how < 3 / 8:
            time.sleep(rng.uniform(0, 1))
            wait_for(process, log, lambda: bool(unfinished(folder)))
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 3))
    assert process.poll() is None, log.read_text()[-3000:]
    process.send_signal(signal.SIGKILL)
    process.wait()

    tally.kills += 1
    text = log.read_text()
    tally.before_first_step += FIRST_STEP not in text
    tally.in_mid_save += bool(unfinished(folder))
    compare(workdir, before, text, tally, seen)


def compare(workdir: Path, before: list[int], text: str, tally: Tally, seen: dict) -> None:
    """Holds what a run says and leaves against what was there before it.

    Args:
      before: steps of the checkpoints when it started.
      text: what it said.
      seen: losses by step of all runs before; those of this one are added.
    """
    if "compiling the training step" in text:
        resumed = re.search(r"resumed at step (\d+)", text)
        got, want = int(resumed[1]) if resumed else 0, before[-1] if before else 0
        assert got == want, f"went on from {got}; the newest checkpoint was {want}"

    newest = max(whole(workdir / "checkpoints"), default=0)
    assert newest >= tally.last_checkpoint, f"{newest} after {tally.last_checkpoint}: lost"
    tally.last_checkpoint = newest
    now = losses(workdir)
    for step, loss in now.items():
        if step in seen:
            assert seen[step] == loss, f"step {step}: {loss} in place of {seen[step]}"
    if FIRST_STEP in text:
        first, done = max(before, default=0) + 1, max(now, default=0)
        tally.steps_repeated_alike += sum(step in seen for step in now if step >= first)
        tally.steps_lost.append(max(0, done - newest))
        # At worst the save that was going on, the steps until the next one, and one in flight.
        assert done - newest <= 2 * EVERY + 1, f"step {done} was done, checkpoint {newest}"
    seen.update(now)


def run(videos: Path, workdir: Path, kills: int, seed: int) -> Tally:
    """`kills` times `kill_once`, then one restart that is ended in order."""
    rng, tally, seen = random.Random(seed), Tally(), {}
    for _ in range(kills):
        kill_once(videos, workdir, rng, tally, seen)
        print(json.dumps({"kill": tally.kills, "checkpoint": tally.last_checkpoint}), flush=True)
    before = whole(workdir / "checkpoints")
    process, log = start(videos, workdir)
    wait_for(process, log, lambda: FIRST_STEP in log.read_text())
    process.terminate()
    assert process.wait(120) == exits.PREEMPTED, log.read_text()[-3000:]
    compare(workdir, before, log.read_text(), tally, seen)
    assert not unfinished(workdir / "checkpoints")
    steps = losses(workdir)
    assert sorted(steps) == list(range(1, tally.last_checkpoint + 1)), "steps are missing"
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=Path, help="train.jsonl, test.jsonl, tokenizer; else made")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        videos = arguments.videos or Path(scratch) / "videos"
        if arguments.videos is None:
            from storm_jax.data import synthetic

            videos.mkdir()
            train = synthetic.write_split(str(videos), "train", 64, seed=0)
            synthetic.write_split(str(videos), "test", 24, seed=1)
            synthetic.write_tokenizer(str(videos), train)
        began = time.time()
        workdir = arguments.workdir or Path(scratch) / "run"
        tally = run(videos, workdir, arguments.kills, arguments.seed)
    lost = tally.steps_lost
    result = dataclasses.asdict(tally) | {
        "seconds": round(time.time() - began, 1),
        "steps_lost": {"most": max(lost), "mean": round(sum(lost) / len(lost), 2)},
        "checkpoint_every": EVERY,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
