"""The command as users start it: flags, first answer, signals, exit status."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
import openai

from storm_jax import checkpoint
from storm_jax.models.storm import StormModel
from tests.commands.conftest import ROOT, Command
from tests.serving.conftest import tiny_run
from tests.serving.harness import data_url, video, words


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the tiny model with random parameters."""
    run = dataclasses.replace(tiny_run(), name="tiny_run")
    folder = tmp_path_factory.mktemp("serve") / "run"
    checkpoint.save_params(folder, StormModel(run.model).init(jax.random.key(0)), run)
    return folder


class Started(Command):
    """`storm_jax.serve` until it says where it listens."""

    def __init__(self, *arguments):
        super().__init__("serve", "--compile_cache=", *arguments)
        self.lines: list[str] = []
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listening.wait(120), "".join(self.lines)
        self.url = re.search(r"serving at (\S+)", self.lines[-1])[1]

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "serving at" in line:
                self._listening.set()

    def end(self, number=signal.SIGTERM, timeout=60) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)


@pytest.mark.slow
def test_serves_and_ends(saved, tmp_path):
    from tests.data.media_files import write

    clip = write(tmp_path / "clip.mp4", 20)
    server = Started(
        f"--checkpoint={saved}", "--port=0", "--slots=2", "--context=4096", "--api-key=key",
        f"--allowed-media-path={tmp_path}", "--frames=6", "--grace=60",
    )  # fmt: skip
    try:
        assert any("compiling" in line for line in server.lines)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == ["tiny_run"]

            def ask(part, **fields):
                message = {"role": "user", "content": [part, words("What?")]}
                return client.chat.completions.create(
                    model="tiny_run", messages=[message], **fields
                )

            first = ask(video(data_url(clip)), max_tokens=5)
            assert first.usage.storm["frames"] == 6
            again = ask(video(f"file://{clip}"), max_tokens=5)
            assert again.usage.storm["media_cached"] == 1
            # A long answer is on its way when the signal comes: it ends well, nothing new begins.
            stream = ask(
                video(data_url(clip)), max_tokens=3500, stream=True, temperature=1, seed=0,
                extra_body={"top_k": 3},
            )  # fmt: skip
            chunks = [next(stream)]
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert server.process.wait(60) == 0
        assert not any("Traceback" in line for line in server.lines), server.lines
    finally:
        server.process.kill()


@pytest.mark.slow
def test_the_grace_ends(saved):
    """A client that does not finish does not keep the server: after --grace it is gone."""
    environment = {"STORM_JAX_API_KEY": "from the environment"}
    os.environ.update(environment)
    try:
        server = Started(
            f"--checkpoint={saved}", "--port=0", "--grace=1", "--warm-up=none", "--name=other"
        )
    finally:
        del os.environ["STORM_JAX_API_KEY"]
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            head += b"Authorization: Bearer from the environment\r\n"
            head += b"Content-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.3)
            began = time.monotonic()
            assert server.end(signal.SIGINT) == 0
            assert time.monotonic() - began < 30
            assert b" 503 " in connection.recv(65536)
            assert not any("Traceback" in line for line in server.lines), server.lines
    finally:
        server.process.kill()


def test_mistakes(saved, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = [
            ((f"--checkpoint={tmp_path}",), "no checkpoint at"),
            ((f"--checkpoint={saved}", f"--port={port}"), f"--port={port}: Address already in use"),
        ]
        commands = [
            (Command("serve", "--compile_cache=", *arguments), said) for arguments, said in wrong
        ]
        for command, said in commands:
            status, _, err = command.finish()
            assert status == 1 and said in err and "Traceback" not in err


def test_without_its_packages(saved, tmp_path):
    """Where the extra is not installed, the command says what to install."""
    (tmp_path / "uvicorn.py").write_text("raise ImportError('No module named uvicorn')")
    done = subprocess.run(
        [sys.executable, "-m", "storm_jax.serve", f"--checkpoint={saved}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "storm_jax[serve]" in done.stderr, done.stderr
