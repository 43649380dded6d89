"""A workdir in a bucket, trained in and answered from, served by an emulator on this machine.

Needs `pip install gcsfs gcp-storage-emulator`, which the test extra leaves out.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storm_jax.training import exits
from tests.commands.conftest import ROOT
from tests.compilation import QUICK

pytestmark = pytest.mark.slow
server = pytest.importorskip("gcp_storage_emulator.server")
gcsfs = pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def bucket():
    """Environment in which gs://bucket is the emulator's, and a file system to look into it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    threading.Thread(target=emulator.run, daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    files = gcsfs.GCSFileSystem(endpoint_url=address, token="anon", use_listings_cache=False)
    variables = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        # Else gcsfs asks Google's metadata server who we are, and waits for it where there is none.
        "FSSPEC_GCS_TOKEN": "anon",
    }
    yield files, variables
    emulator.stop()


def ran(name: str, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    done = subprocess.run(
        [sys.executable, "-m", f"storm_jax.{name}", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(QUICK),
            "PYTHONPATH": ":".join([str(ROOT), str(ROOT / "kernels"), *sys.path]),
            **variables,
        },
        stderr=subprocess.PIPE,
        text=True,
        timeout=400,
    )
    return done.returncode, done.stderr


def train(videos: Path, workdir: str, variables: dict[str, str], steps: int) -> tuple[int, str]:
    settings = {
        "data.train[0].path": videos / "train.jsonl",
        "data.tokenizer": videos / "tokenizer",
        "train.steps": steps,
        "train.eval_samples": 0,
        "train.checkpoint.every": 3,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return ran("train", ["--config=configs/debug.py", f"--workdir={workdir}", *flags], variables)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(bucket, videos):
    files, variables = bucket
    status, err = train(videos, "gs://bucket/run", variables, steps=6)
    assert status == 0, err[-3000:]
    # As a kill leaves it: everything but the file that is written last.
    files.rm("bucket/run/checkpoints/6/commit_success.txt")
    files.invalidate_cache()
    status, err = train(videos, "gs://bucket/run", variables, steps=6)
    assert status == 0, err[-3000:]
    assert "resumed at step 3 from gs://bucket/run/checkpoints" in err
    files.invalidate_cache()
    assert files.exists("bucket/run/checkpoints/6/commit_success.txt")
    for name in ("config.json", "metrics.jsonl", "tokenizer/tokenizer.json", "tensorboard"):
        assert files.exists(f"bucket/run/{name}"), name


def test_a_checkpoint_in_a_bucket_answers_as_its_copy(bucket, videos, tmp_path):
    """Its own tokenizer too: the config names another place, which is gone by then."""
    files, variables = bucket
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    status, err = train(data, "gs://bucket/asked", variables, steps=3)
    assert status == 0, err[-3000:]
    shutil.rmtree(data / "tokenizer")
    files.invalidate_cache()
    files.get("bucket/asked", str(tmp_path / "copy"), recursive=True)
    answers = []
    for checkpoint in ("gs://bucket/asked", str(tmp_path / "copy")):
        out = tmp_path / f"out{len(answers)}"
        flags = [f"--checkpoint={checkpoint}", f"--data={data / 'test.jsonl'}", f"--out={out}"]
        status, err = ran("evaluate", [*flags, "--tasks=own", "--limit=4"], variables)
        assert status == 0, err[-3000:]
        recipe = json.loads((out / "own" / "recipe.json").read_text())
        assert recipe["checkpoint"].pop("path") == checkpoint
        answers.append((recipe["checkpoint"], (out / "own" / "samples.jsonl").read_bytes()))
    assert answers[0] == answers[1] and answers[0][1].count(b"\n") == 4


def test_a_bucket_that_is_not_there(bucket, videos):
    status, err = train(videos, "gs://nowhere/run", bucket[1], steps=6)
    assert status == exits.MISTAKE
    assert "--workdir=gs://nowhere/run cannot be written" in err and "Traceback" not in err
