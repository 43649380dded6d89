"""A server in a thread of this process, and what its tests send to it."""

import base64
import contextlib
import socket
import threading
import time
from pathlib import Path

import httpx2

from storm_jax.serving.connections import PatientProtocol
from storm_jax.serving.server import Server
from storm_jax.serving.settings import Settings

CONTEXT = 2048
MODEL = "tiny"
SETTINGS = Settings(
    model=MODEL, max_frames=8, max_media=4, max_requests=16, max_body_bytes=8 << 20,
    max_media_bytes=4 << 20, max_pixels=1 << 20, decoders=2, request_seconds=60.0,
)  # fmt: skip


class Running:
    """A server that listens, and a client for it."""

    def __init__(self, server: Server, port: int):
        self.server, self.url = server, f"http://127.0.0.1:{port}"
        self.port = port
        # A connection that is kept may be closed by the server while it is used again.
        once = httpx2.Limits(max_keepalive_connections=0)
        self.client = httpx2.Client(base_url=self.url, timeout=60, trust_env=False, limits=once)

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
        deadline = time.monotonic() + seconds
        while self.metric("storm_requests_open") or self.metric("storm_requests_running"):
            assert time.monotonic() < deadline, "a request was not given back"
            time.sleep(0.01)
        assert self.server.scheduler.free_slots == self.metric("storm_slots")
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


def data_url(file: Path | bytes, kind: str = "video/mp4") -> str:
    data = file if isinstance(file, bytes) else file.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(url: str, **clip) -> dict:
    return {"type": "video_url", "video_url": {"url": url, **clip}}


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def words(text: str) -> dict:
    return {"type": "text", "text": text}
