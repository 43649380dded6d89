"""Clients that are slow, or leave: their places and slots are free again, and others are served."""

import dataclasses
import json
import socket
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from storm_jax.serving.connections import PatientProtocol
from tests.serving.harness import MODEL, SETTINGS, data_url, running, video, words

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Impatient(PatientProtocol):
    head_seconds = 0.6
    stall_seconds = 0.6


@pytest.fixture(scope="module")
def served(loaded, tokenizer):
    """With short limits, and with two slots whose engine takes 30 ms for every eight tokens."""
    settings = dataclasses.replace(SETTINGS, receive_seconds=0.6, request_seconds=5.0)
    with running(loaded, tokenizer, settings, Impatient, slots=2) as found:
        found.server.warm_up((1, SETTINGS.max_frames))
        engine = found.server.scheduler._engine
        step = engine.step

        def slowly(most=None, **how):
            time.sleep(0.03)
            return step(most=min(most or 8, 8), **how)

        engine.step = slowly
        yield found


@pytest.fixture(autouse=True)
def _nothing_stays(served):
    yield
    served.idle()
    assert served.ask("hello").status_code == 200


def long(stream: bool, **fields) -> bytes:
    """A request whose answer takes about six seconds."""
    message = {"role": "user", "content": "x"}
    body = {"model": MODEL, "messages": [message], "stream": stream, "max_tokens": 1600}
    data = json.dumps(body | fields).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def connected(served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=10)


def until_closed(connection) -> bytes:
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def running_now(served, count):
    deadline = time.monotonic() + 5
    while served.metric("storm_requests_running") != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_the_middle_of_an_answer(served, stream):
    before = served.metric("storm_answer_tokens_total")
    connection = connected(served)
    connection.sendall(long(stream))
    running_now(served, 1)
    connection.close()
    served.idle(2.0)
    assert served.metric("storm_answer_tokens_total") - before < 1000
    assert served.metric('storm_requests_total{status="499"}') >= 1


def test_leaving_while_waiting_for_a_slot(served):
    running_ones = [connected(served) for _ in range(2)]
    for connection in running_ones:
        connection.sendall(long(True))
    running_now(served, 2)
    waiting = connected(served)
    waiting.sendall(long(True))
    while served.metric("storm_requests_waiting") != 1:
        time.sleep(0.01)
    waiting.close()
    while served.metric("storm_requests_waiting") != 0:
        time.sleep(0.01)
    assert served.metric("storm_requests_running") == 2
    for connection in running_ones:
        connection.close()


def test_waiting_for_a_slot(served):
    """Three long answers and two slots: the third one begins when a slot is free."""
    connections = [connected(served) for _ in range(3)]
    for connection in connections:
        connection.sendall(long(True, max_tokens=100))
    for connection in connections:
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
        assert b" 200 " in received
        connection.close()


def test_leaving_while_media_are_read(served, media, monkeypatch):
    """The encoding that nobody waits for any longer is not begun."""
    engine = served.server.scheduler._engine
    encoded = []
    encode = engine.encode

    def slowly(frames):
        encoded.append(len(frames))
        time.sleep(0.5)
        return encode(frames)

    monkeypatch.setattr(engine, "encode", slowly)
    connections = []
    for start in (0.0, 0.1, 0.2):
        part = video(data_url(media / "clip.mp4"), start=start, end=0.9)
        message = {"role": "user", "content": [part, words("x")]}
        connections.append(connected(served))
        connections[-1].sendall(long(False, messages=[message]))
    while not encoded:
        time.sleep(0.01)
    for connection in connections:
        connection.close()
    served.idle()
    time.sleep(0.6)
    assert len(encoded) < 3


def test_a_body_that_does_not_come(served):
    with connected(served) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        began = time.monotonic()
        answer = connection.recv(65536)
        assert b" 408 " in answer and b"longer than 0.6 s" in answer
        assert time.monotonic() - began < 3


def test_a_body_that_drips(served):
    with connected(served) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        connection.settimeout(0.1)
        answer = b""
        for _ in range(50):
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                connection.sendall(b" ")
        assert b" 408 " in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nX: "])
def test_a_head_that_does_not_come(served, sent):
    with connected(served) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert until_closed(connection) == b""
        assert 0.3 < time.monotonic() - began < 3


def test_a_second_head_that_does_not_come(served):
    with connected(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in connection.recv(65536)
        connection.sendall(b"G")
        began = time.monotonic()
        assert until_closed(connection) == b""
        assert time.monotonic() - began < 3


def test_a_long_answer_is_not_a_head_that_does_not_come(served):
    with connected(served) as connection:
        connection.sendall(long(True, max_tokens=400))
        began = time.monotonic()
        received = b""
        while b"[DONE]" not in received:
            piece = connection.recv(65536)
            assert piece, received[-200:]
            received += piece
        assert time.monotonic() - began > 2 * Impatient.head_seconds


def test_a_client_that_does_not_read(served):
    """Its buffers full, the connection is cut; nobody else waits for it."""
    with connected(served) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wanted = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        began = time.monotonic()
        sent = 0
        connection.settimeout(0.2)
        while time.monotonic() - began < 20:
            try:
                sent += connection.send(wanted * 50)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            raise AssertionError("the connection was never cut")
        assert served.client.get("/health").status_code == 200


def test_a_client_that_reads_late(served):
    """The slot does not wait for it: the answer is made at the engine's pace."""
    with connected(served) as connection:
        connection.sendall(long(True, max_tokens=200))
        served.idle(4.0)
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
        assert received.count(b"data: ") > 10


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long(served, stream):
    with connected(served) as connection:
        connection.sendall(long(stream, max_tokens=2000))
        received = b""
        while b"longer than 5 s" not in received:
            piece = connection.recv(65536)
            assert piece, received[-300:]
            received += piece
        assert (b" 200 " in received) == stream and (b" 503 " in received) != stream
