"""Bad input over HTTP: a 4xx with the reason, and the server as it was before."""

import base64
import dataclasses
import json
import os
import random
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from hypothesis import HealthCheck, given, settings

from storm_jax.data.text import load_tokenizer
from tests.data.media_files import blank_png, write, write_audio
from tests.serving.harness import (
    CONTEXT,
    MODEL,
    SETTINGS,
    data_url,
    image,
    running,
    video,
    words,
)
from tests.serving.test_schema import REQUESTS

JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _serves_on(served):
    """Whatever a test sends, nothing of it stays behind and the next request is answered."""
    yield
    served.idle()
    assert served.ask("hello").status_code == 200


def refused(answer, status=400) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_malformed(served):
    for content in (b"{", b"", b"\xff", b"[]", b"null", b'{"model": 1}', b"[" * 10_000):
        refused(served.client.post("/v1/chat/completions", content=content, headers=JSON))
    for kind in (None, "text/plain", "multipart/form-data; boundary=x"):
        headers = {} if kind is None else {"Content-Type": kind}
        answer = served.client.post("/v1/chat/completions", content=b"{}", headers=headers)
        assert refused(answer, 415)["code"] == "unsupported_media_type"
    error = refused(served.ask("hello", temperature="hot"))
    assert error["param"] == "temperature" and "'hot'" in error["message"]
    assert refused(served.ask("hello", n=3))["code"] == "unsupported_value"
    assert refused(served.ask("hello", what=3))["code"] == "unknown_parameter"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(request_=REQUESTS)
def test_fuzz(served, request_):
    """Nothing that a client can write is an error of the server."""
    body = json.dumps(request_ | {"model": MODEL, "max_tokens": 2})
    answer = served.client.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code in (200, 400, 403, 404), answer.text
    if answer.status_code != 200:
        refused(answer, answer.status_code)


def test_model_and_routes(served):
    error = refused(served.ask("hello", model="gpt-4"), 404)
    assert error["code"] == "model_not_found" and "'tiny'" in error["message"]
    refused(served.client.get("/v1/completions"), 404)
    refused(served.client.get("/v1/chat/completions"), 405)
    refused(served.client.post("/v1/models"), 405)
    refused(served.client.get("/../../etc/passwd"), 404)


def test_conversations_without_a_form(served):
    def post(*roles):
        messages = [{"role": role, "content": "x"} for role in roles]
        return served.post({"model": MODEL, "messages": messages})

    assert "alternate" in refused(post("user", "user"))["message"]
    assert "ends with a user turn" in refused(post("user", "assistant"))["message"]
    assert "only stand first" in refused(post("user", "system"))["message"]


def test_too_long(served):
    tokens = len(load_tokenizer("bytes")("x" * 3000)["input_ids"])
    error = refused(served.ask("x" * 3000, max_tokens=10))
    assert error["code"] == "context_length_exceeded"
    assert f"{CONTEXT} are available" in error["message"]
    needed = int(error["message"].split(": ")[1].split()[0])
    assert tokens + 10 < needed < tokens + 50
    error = refused(served.ask("hello", max_tokens=CONTEXT))
    assert error["code"] == "context_length_exceeded" and "lower max_tokens" in error["message"]
    error = refused(served.ask("x" * 200_000))
    assert "200000 characters" in error["message"]
    room = CONTEXT - (needed - tokens - 10)
    assert served.ask("x" * (room - 1), max_tokens=1).status_code == 200
    refused(served.ask("x" * room, max_tokens=1))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Files that cannot be used, and a word of the reason."""
    folder = tmp_path_factory.mktemp("broken")
    whole = write(folder / "whole.mp4", 60, options={"g": "30"}, size=(64, 48)).read_bytes()
    damaged = bytearray(whole)
    at = whole.index(b"mdat") + 4
    damaged[at + 1000 : at + 3000] = random.Random(0).randbytes(2000)
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    return {
        "empty": (b"", "is empty"),
        "text": (b"not a video", "cannot be opened"),
        "cut off": (whole[: len(whole) // 2], "cut off"),
        "damaged": (bytes(damaged), "is damaged behind"),
        "audio": (write_audio(folder / "a.mp4").read_bytes(), "no video stream"),
        "playlist": (playlist, ""),
        "script": (b"ffconcat version 1.0\nfile /etc/passwd\n", ""),
        "zip": (b"PK\x03\x04" + bytes(100), ""),
    }


def test_media_that_cannot_be_decoded(served, broken):
    before = served.metric("storm_media_errors_total")
    for name, (data, reason) in broken.items():
        for stream in (False, True):
            error = refused(served.ask(words("x"), video(data_url(data)), stream=stream))
            assert error["code"] == "invalid_media", name
            assert error["param"] == "messages[0].content[1]"
            assert error["message"].startswith("messages[0].content[1]: "), name
            assert reason in error["message"], (name, error)
            refused(served.ask(image(data_url(data[:600], "image/png"))))
    assert served.metric("storm_media_errors_total") == before + 4 * len(broken)


def test_clips_outside(served, media):
    url = data_url(media / "clip.mp4")
    assert "outside the video" in refused(served.ask(video(url, start=50)))["message"]
    assert "not after start" in refused(served.ask(video(url, start=0.5, end=0.2)))["message"]
    frames = f"file://{media / 'frames'}"
    assert "has no clock" in refused(served.ask(video(frames, start=1)))["message"]
    assert refused(served.ask(video(url), frames=9))["param"] == "frames"
    assert "at most 4" in refused(served.ask(*[video(url)] * 5))["message"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:video/mp4,abc", "data:TYPE;base64,DATA"),
        ("data:video/mp4;base64", "data:TYPE;base64,DATA"),
        ("data:video/mp4;base64,@@@@", "base64"),
        ("data:video/mp4;base64,AAA", "base64"),
        ("data:video/mp4;base64,Ā", "base64"),
        ("ftp://host/a.mp4", "starts with data:"),
        ("/etc/passwd", "starts with data:"),
        ("", "starts with data:"),
        ("rtsp://127.0.0.1/x", "starts with data:"),
        ("concat:/etc/passwd|/etc/passwd", "starts with data:"),
    ],
)
def test_urls(served, url, said):
    assert said in refused(served.ask(video(url)))["message"]


def test_sizes(served):
    limit = SETTINGS.max_media_bytes
    error = refused(served.ask(video(data_url(bytes(limit + 1)))), 413)
    assert error["code"] == "media_too_large" and str(limit) in error["message"]
    assert refused(served.ask(video(data_url(bytes(limit)))))["code"] == "invalid_media"
    half = data_url(bytes(limit * 5 // 8), "image/png")  # of a list of frames all count together
    refused(served.ask({"type": "video", "video": [half, half]}), 413)
    body = b'{"model": "' + b"x" * SETTINGS.max_body_bytes + b'"}'
    answer = served.client.post("/v1/chat/completions", content=body, headers=JSON)
    assert refused(answer, 413)["code"] == "request_too_large"


def test_decompression_bombs(served):
    """Pictures whose header promises more than a machine has."""
    small = bytearray(blank_png(8, 8))
    small[16:24] = (50_000).to_bytes(4, "big") * 2  # width and height; FFmpeg checks no checksum
    real = blank_png(6_000, 6_000)  # within FFmpeg's own limits: 108 MB in 105 kB
    before = peak()
    for data in (bytes(small), real):
        for part in (image(data_url(data, "image/png")), video(data_url(data, "image/png"))):
            error = refused(served.ask(part))
            assert error["code"] == "invalid_media" and "pixels" in error["message"]
    assert peak() - before < 60


def peak() -> int:
    """MiB of memory that this process, in which the server runs, has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def send(port: int, head: bytes, pieces, wait: threading.Event | None = None) -> bytes:
    """Sends a request by hand; returns what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head)

        def write_all():
            try:
                for piece in pieces:
                    connection.sendall(piece)
            except OSError:
                pass  # refused in the middle

        writer = threading.Thread(target=write_all, daemon=True)
        writer.start()
        answer = b""
        while b"}}" not in answer:
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
        connection.shutdown(socket.SHUT_RDWR)
        writer.join(30)
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_an_upload_of_two_gigabytes(served):
    """Announced, it is refused before it is read; in chunks, as soon as the limit is passed."""
    size = 2 << 30
    before = peak()
    answer = send(served.port, HEAD + b"Content-Length: %d\r\n\r\n" % size, [])
    assert b" 413 " in answer and b"request_too_large" in answer
    piece = bytes(1 << 20)
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
    sent = 0

    def chunks():
        nonlocal sent
        while sent < size:
            yield chunk
            sent += len(piece)

    answer = send(served.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks())
    assert b" 413 " in answer and b"request_too_large" in answer
    assert sent < size  # nobody waited for all of it
    assert peak() - before < 4 * (SETTINGS.max_body_bytes >> 20)


def test_local_files(served, media, tmp_path):
    (tmp_path / "secret.mp4").write_bytes((media / "clip.mp4").read_bytes())
    (media / "link.mp4").unlink(missing_ok=True)
    (media / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    linked = media / "linked"
    linked.mkdir(exist_ok=True)
    (linked / "a.png").unlink(missing_ok=True)
    (linked / "a.png").symlink_to(tmp_path / "secret.mp4")
    for path in (
        tmp_path / "secret.mp4",
        f"{media}/../{tmp_path.name}/secret.mp4",
        f"{media}/%2e%2e/%2e%2e/etc/passwd",
        media / "link.mp4",
        linked,  # a folder of frames in which one leads out
        "/etc/passwd",
    ):
        error = refused(served.ask(video(f"file://{path}")), 403)
        assert error["code"] == "file_not_allowed", path
    refused(served.ask({"type": "video", "video": ["file:///etc/passwd"]}), 403)
    refused(served.ask(image("file:///etc/passwd")), 403)
    assert refused(served.ask(video(f"file://{media}/none.mp4")), 404)["code"] == "file_not_found"
    (media / "nothing").mkdir(exist_ok=True)
    assert "without images" in refused(served.ask(video(f"file://{media}/nothing")))["message"]
    assert served.ask(video(f"file://{media}/clip.mp4")).status_code == 200


def test_remote_media_are_off(served):
    for url in ("http://example.com/a.mp4", "HTTPS://example.com/a.mp4"):
        error = refused(served.ask(video(url)), 403)
        assert error["code"] == "remote_media_not_allowed"


def test_remote_media_of_private_addresses(loaded, tokenizer, media):
    """With the flag on, and something that listens and must not be asked."""
    limits = dataclasses.replace(SETTINGS, allow_remote_media=True)
    with running(loaded, tokenizer, limits) as open_, socket.create_server(("", 0)) as inner:
        inner.settimeout(0.2)
        port = inner.getsockname()[1]
        for host in (
            "127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]",
            "0.0.0.0", socket.gethostname(),
        ):  # fmt: skip
            answer = open_.ask(video(f"http://{host}:{port}/a.mp4"))
            assert answer.status_code in (400, 403), (host, answer.text)
            if host != "0x7f.1":
                assert answer.json()["error"]["code"] == "address_not_allowed", host
        error = refused(open_.ask(video("http://169.254.169.254/latest/meta-data/")), 403)
        assert error["code"] == "address_not_allowed"
        with pytest.raises(TimeoutError):
            inner.accept()


def test_too_many_requests(loaded, tokenizer):
    """One place, taken by who has not yet sent all of a request; then it is free again."""
    limits = dataclasses.replace(SETTINGS, max_requests=1)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    with (
        running(loaded, tokenizer, limits, slots=1) as small,
        socket.create_connection(("127.0.0.1", small.port), timeout=30) as first,
    ):
        first.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:10])
        while small.metric("storm_requests_open") != 1:
            time.sleep(0.01)
        answer = small.ask("x")
        assert refused(answer, 429)["code"] == "too_many_requests"
        assert answer.headers["retry-after"] == "1"
        first.sendall(body[10:])
        assert b" 200 " in first.recv(65536)
        small.idle()  # the place is free just after the last byte
        assert small.ask("x").status_code == 200
        assert small.metric('storm_requests_total{status="429"}') == 1


def test_base64_of_a_frame_that_is_none(served, media):
    good = base64.b64encode((media / "picture.png").read_bytes()).decode()
    url = f"data:video/jpeg;base64,{good},{good[:40]},{good}"
    error = refused(served.ask(video(url)))
    assert error["code"] == "invalid_media"


def test_a_decoder_that_dies(served, media):
    """Killed over a file, as a crash of FFmpeg would: the server and its next request live on."""
    decoders = served.server.reader.decoders
    clip = video(data_url(media / "other.mp4"), start=0.1)  # not encoded before
    stopped = decoders.process_ids
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.ask, clip)
        deadline = time.monotonic() + 20
        while len(decoders._idle) == decoders.processes:  # none has the file yet
            assert time.monotonic() < deadline
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        error = refused(asked.result())
    assert error["code"] == "invalid_media" and "died (signal 9)" in error["message"]
    # Those that died without a file are started anew, and nobody is told.
    for i in range(decoders.processes):
        other = video(data_url(media / "other.mp4"), start=0.1 + 0.01 * i)
        assert served.ask(other).status_code == 200
