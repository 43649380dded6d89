"""A small data set of real mp4 files, and a way to run the commands as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storm_jax.data import synthetic
from tests.compilation import QUICK

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder with train.jsonl, test.jsonl (64 and 24 records) and a tokenizer."""
    folder = tmp_path_factory.mktemp("videos")
    train = synthetic.write_split(str(folder), "train", 64, seed=0)
    synthetic.write_split(str(folder), "test", 24, seed=1)
    synthetic.write_tokenizer(str(folder), train)
    return folder


def command_environment() -> dict[str, str]:
    """Of a command on one simulated device, which is compiled quickly."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(QUICK),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }


def called(name: str, calls: list[tuple[list[str], str]]) -> list[list]:
    """Several calls of a command in one process.

    Args:
      calls: arguments and standard input of each.

    Returns:
      [exit status, standard output, standard error] of each.
    """
    asked = [{"arguments": arguments, "input": text} for arguments, text in calls]
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands.command_calls", name],
        cwd=ROOT,
        input=json.dumps(asked),
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Command:
    """Runs `python -m storm_jax.NAME` in the repository's root on one simulated device."""

    def __init__(self, name: str, *arguments: str, stdin=None):
        """`stdin` is that of `subprocess.Popen`."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"storm_jax.{name}", *arguments],
            cwd=ROOT,
            env=command_environment(),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float = 300) -> tuple[int, str, str]:
        """Waits; returns exit status, standard output and standard error."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def training(videos: Path, workdir: Path, *overrides: str) -> Command:
    """`storm_jax.train` with configs/debug.py on the small data set."""
    return Command(
        "train",
        "--config=configs/debug.py",
        f"--workdir={workdir}",
        f"--config.data.train[0].path={videos / 'train.jsonl'}",
        f"--config.data.eval[0].path={videos / 'test.jsonl'}",
        f"--config.data.tokenizer={videos / 'tokenizer'}",
        *overrides,
    )
