"""A server with a tiny model of random parameters, in a thread of this process."""

import base64
import contextlib
import dataclasses
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

import httpx2
import jax

from storm_jax.config import MeshConfig
from storm_jax.data import text
from storm_jax.inference.load import made_ready
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.serving.connections import PatientProtocol
from storm_jax.serving.server import Server
from storm_jax.serving.settings import Settings
from tests.data.media_files import write
from tests.inference.test_engine import perturbed
from tests.tiny import run_config, tiny_model

CONTEXT = 2048
MODEL = "tiny"
SETTINGS = Settings(
    model=MODEL, max_frames=8, max_media=4, max_requests=16, max_body_bytes=8 << 20,
    max_media_bytes=4 << 20, max_pixels=1 << 20, decoders=2, request_seconds=60.0,
)  # fmt: skip


def tiny_run():
    """The tiny model, reading bytes."""
    model = tiny_model(
        vit=dict(layers=1), temporal=dict(layers=1), decoder=dict(vocab_size=text.BYTES_VOCAB)
    )
    run = run_config(**{"data.tokenizer": "bytes", "data.frames.max_frames": 8})
    return dataclasses.replace(run, model=model)


@pytest.fixture(scope="session")
def loaded():
    run = tiny_run()
    params = StormModel(run.model).init(jax.random.key(0))
    # As it is at first, the decoder would repeat one token, whatever was asked.
    params["decoder"] = perturbed(params["decoder"])
    return made_ready(run, params, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.fixture(scope="session")
def tokenizer():
    return text.load_tokenizer("bytes")


class Running:
    """A server that listens, and a client for it."""

    def __init__(self, server: Server, port: int):
        self.server, self.url = server, f"http://127.0.0.1:{port}"
        self.port = port
        self.client = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, body: dict, **options) -> httpx2.Response:
        return self.client.post("/v1/chat/completions", json=body, **options)

    def ask(self, *parts, **fields) -> httpx2.Response:
        """A question of one message."""
        content = list(parts) if parts and not isinstance(parts[0], str) else parts[0]
        message = {"role": "user", "content": content}
        return self.post({"model": MODEL, "messages": [message], "max_tokens": 8} | fields)

    def metric(self, name: str) -> float:
        headers = {"Authorization": "Bearer key"}
        lines = self.client.get("/metrics", headers=headers).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split()[0] == name) + sum(
            float(line.split()[-1]) for line in lines if line.startswith(name + "{")
        )

    def idle(self, seconds: float = 5.0) -> None:
        """Waits until no request is left; says so if one does not go in that time."""
        engine = self.server.scheduler._engine
        deadline = time.monotonic() + seconds
        while self.metric("storm_requests_open") or self.metric("storm_requests_running"):
            assert time.monotonic() < deadline, "a request was not given back"
            time.sleep(0.01)
        assert engine.free_slots == self.metric("storm_slots")
        assert self.metric("storm_requests_waiting") == 0


@contextlib.contextmanager
def running(loaded, tokenizer, settings=SETTINGS, protocol=PatientProtocol, slots=4, **options):
    server = Server(settings, loaded, tokenizer, slots=slots, context=CONTEXT, **options)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        ready = threading.Event()
        arguments = (listening, 5, ready.set, protocol)
        thread = threading.Thread(target=server.run, args=arguments, daemon=True)
        thread.start()
        assert ready.wait(60)
        found = Running(server, port)
        try:
            yield found
        finally:
            found.client.close()
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder that clients may name: clip.mp4, other.mp4, picture.png, frames/."""
    folder = tmp_path_factory.mktemp("allowed")
    write(folder / "clip.mp4", 30)
    write(folder / "other.mp4", 12, number=500)
    write(folder / "picture.png", 1, codec="png", format="image2", pix_fmt="rgb24", number=3)
    (folder / "frames").mkdir()
    for i in range(5):
        name = folder / "frames" / f"{i}.png"
        write(name, 1, codec="png", format="image2", pix_fmt="rgb24", number=i)
    return folder


@pytest.fixture(scope="session")
def served(loaded, tokenizer, media):
    settings = dataclasses.replace(SETTINGS, allowed_media_path=(str(media),))
    with running(loaded, tokenizer, settings) as found:
        yield found


def data_url(file: Path | bytes, kind: str = "video/mp4") -> str:
    data = file if isinstance(file, bytes) else file.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(url: str, **clip) -> dict:
    return {"type": "video_url", "video_url": {"url": url, **clip}}


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def words(text: str) -> dict:
    return {"type": "text", "text": text}
