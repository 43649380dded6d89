"""The scheduler when things go wrong: errors of the engine, cancelled work, the end."""

import queue
import threading

import jax
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.programs import CompileError
from storm_jax.inference.sampling import Sampling
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.scheduler import Delta, EngineFailed, Generation, Scheduler
from tests.serving.harness import CONTEXT, SETTINGS, running

FRAMES = np.zeros((1, 12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, slots=2, context=CONTEXT)


@pytest.fixture
def scheduler(engine, tokenizer, monkeypatch):
    """A scheduler; patches of the engine are taken back behind it."""
    found = Scheduler(engine, tokenizer, Metrics())
    yield found
    found.close()
    for slot in list(engine._slots):  # of a failure that a test has made up
        engine.release(slot)
    monkeypatch.undo()


def asked(scheduler, tokens=10, new=20):
    """Submits an answer; returns it and the queue of what is delivered."""
    return submitted(scheduler, np.arange(tokens, dtype=np.int32), new)


def submitted(scheduler, prompt, new):
    got: queue.Queue[Delta | Exception] = queue.Queue()
    generation = Generation(prompt, (), (), Sampling(max_new_tokens=new), (), got.put)
    scheduler.submit(generation)
    return generation, got


def answered(scheduler, prompt, new):
    """An answer, and everything that was delivered."""
    generation, got = submitted(scheduler, prompt, new)
    return generation, ended(got)


def ended(got) -> list:
    """Everything that is delivered."""
    items = [got.get(timeout=30)]
    while isinstance(items[-1], Delta) and not items[-1].finish:
        items.append(got.get(timeout=30))
    return items


def test_answers_in_the_order_of_arrival(scheduler, engine):
    order = []
    waiting = [asked(scheduler, new=30) for _ in range(6)]

    def watch(number, got):
        items = ended(got)
        order.append(number)
        assert sum(item.tokens for item in items) == 30

    threads = [threading.Thread(target=watch, args=(i, got)) for i, (_, got) in enumerate(waiting)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    pairs = [sorted(order[i : i + 2]) for i in (0, 2, 4)]  # two slots
    assert pairs == [[0, 1], [2, 3], [4, 5]]
    assert scheduler.free_slots == 2


def test_one_prompt_too_long(scheduler, engine):
    _, wrong = asked(scheduler, CONTEXT + 1)
    _, right = asked(scheduler)
    (error,) = ended(wrong)
    assert isinstance(error, ContextError) and error.available == CONTEXT
    assert ended(right)[-1].finish == "length" and scheduler.free_slots == 2


def test_media_that_cannot_be_encoded(scheduler, engine, monkeypatch):
    """The error belongs to one request; others go on."""
    encode = engine.encode

    def failing(frames):
        if len(frames) == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return encode(frames)

    monkeypatch.setattr(engine, "encode", failing)
    wrong = scheduler.encode(np.repeat(FRAMES, 3, axis=0))
    right = scheduler.encode(FRAMES)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        wrong.result(30)
    assert right.result(30).frames == 1 and scheduler.failure is None


def test_media_that_nobody_waits_for(scheduler, engine, monkeypatch):
    begun, go_on, encoded = threading.Event(), threading.Event(), []
    encode = engine.encode

    def waiting(frames):
        encoded.append(len(frames))
        begun.set()
        assert go_on.wait(30)
        return encode(frames)

    monkeypatch.setattr(engine, "encode", waiting)
    first = scheduler.encode(FRAMES)
    assert begun.wait(30)
    second = scheduler.encode(np.repeat(FRAMES, 2, axis=0))
    assert second.cancel()
    third = scheduler.encode(FRAMES)
    go_on.set()
    assert first.result(30) is not None and third.result(30) is not None
    assert encoded == [1, 1]


def test_cancelled(scheduler, engine):
    running_ones = [asked(scheduler, new=CONTEXT - 20) for _ in range(2)]
    for _, got in running_ones:
        got.get(timeout=30)
    waiting, never = asked(scheduler)
    scheduler.cancel(waiting)
    for generation, _ in running_ones:
        scheduler.cancel(generation)
    _, got = asked(scheduler)
    assert ended(got)[-1].finish == "length"
    assert never.empty() and scheduler.free_slots == 2


class Gate:
    """Holds back the compiling of programs of one name until it is opened."""

    def __init__(self, engine, name: str, monkeypatch):
        self.begun, self._open = threading.Event(), threading.Event()
        compile_ = engine.programs._compile

        def held(job):
            if job.name == name:
                self.begun.set()
                assert self._open.wait(60)
            compile_(job)

        monkeypatch.setattr(engine.programs, "_compile", held)

    def open(self) -> None:
        self._open.set()


def value(scheduler, name: str) -> float:
    lines = scheduler._metrics.page().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.split()[0] == name))


def test_others_go_on_while_a_prompt_waits_for_its_program(scheduler, engine, monkeypatch):
    known, got = asked(scheduler, tokens=10, new=4)
    ended(got)  # its program is there, and that of decoding
    gate = Gate(engine, "prefill", monkeypatch)
    runs, going = asked(scheduler, tokens=10, new=1500)
    going.get(timeout=30)
    _, new = asked(scheduler, tokens=700)
    assert gate.begun.wait(30)
    while not going.empty():
        going.get()
    more = [going.get(timeout=30) for _ in range(5)]
    assert all(delta.tokens for delta in more)
    # One whose program is there passes it, into the slot that is free.
    assert ended(asked(scheduler, tokens=10, new=30)[1])[-1].finish == "length"
    assert value(scheduler, "storm_requests_compiling") == 1 and new.empty()
    assert value(scheduler, "storm_compile_waits_total") == 0
    gate.open()
    items = ended(new)
    assert items[-1].finish == "length" and sum(item.tokens for item in items) == 20
    assert value(scheduler, "storm_compile_waits_total") == 1
    assert value(scheduler, "storm_compile_wait_seconds_total") > 0
    scheduler.cancel(runs)
    # Nothing else runs: the answer's program wakes the scheduler up.
    assert ended(asked(scheduler, tokens=1200)[1])[-1].finish == "length"
    assert scheduler.free_slots == 2


def test_a_further_turn_waits_for_its_program(scheduler, engine, monkeypatch):
    prompt = np.arange(10, dtype=np.int32)
    first, got = submitted(scheduler, prompt, 9)
    ended(got)
    gate = Gate(engine, "prefill of what follows", monkeypatch)
    turn = np.arange(300, dtype=np.int32)
    held = np.concatenate([prompt, np.asarray(first.answer, np.int32)])
    second, new = submitted(scheduler, np.concatenate([held, turn]), 9)
    assert gate.begun.wait(30)
    assert ended(asked(scheduler, tokens=10, new=30)[1])[-1].finish == "length"
    assert new.empty()
    gate.open()
    assert ended(new)[-1].finish == "length" and second.reused == len(held)


def test_media_wait_for_their_program(scheduler, engine, monkeypatch):
    assert scheduler.encode(FRAMES).result(30).frames == 1
    gate = Gate(engine, "temporal encoder and reduction", monkeypatch)
    five = scheduler.encode(np.repeat(FRAMES, 5, axis=0))
    assert gate.begun.wait(30)
    assert scheduler.encode(FRAMES).result(30).frames == 1
    assert ended(asked(scheduler)[1])[-1].finish == "length"
    given_up = scheduler.encode(np.repeat(FRAMES, 5, axis=0))
    assert given_up.cancel() and not five.done()
    gate.open()
    assert five.result(30).frames == 5


def test_a_program_that_cannot_be_compiled(scheduler, engine, monkeypatch):
    """The request is told; others, and the next one of its length, go on."""
    compile_ = engine._fill._made

    def failing(length):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(engine._fill, "_made", failing)
    _, wrong = asked(scheduler, tokens=900)
    (error,) = ended(wrong)
    assert isinstance(error, CompileError) and "RESOURCE_EXHAUSTED" in str(error)
    assert ended(asked(scheduler)[1])[-1].finish == "length"
    monkeypatch.setattr(engine._fill, "_made", compile_)
    assert ended(asked(scheduler, tokens=900)[1])[-1].finish == "length"
    assert scheduler.failure is None and scheduler.free_slots == 2


def test_an_engine_that_fails(scheduler, engine, monkeypatch):
    """Everybody is told, and nobody waits for ever."""
    working = threading.Event()
    _, runs = asked(scheduler, new=CONTEXT - 20)
    _, runs_too = asked(scheduler, new=CONTEXT - 20)
    runs.get(timeout=30)
    _, waits = asked(scheduler)

    def failing(**_):
        working.set()
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    monkeypatch.setattr(engine, "step", failing)
    for got in (runs, runs_too, waits):
        assert isinstance(ended(got)[-1], EngineFailed)
    assert working.is_set() and "device is gone" in str(scheduler.failure)
    with pytest.raises(EngineFailed):
        asked(scheduler)
    with pytest.raises(EngineFailed):
        scheduler.encode(FRAMES)


def test_the_end(engine, tokenizer):
    scheduler = Scheduler(engine, tokenizer, Metrics())
    _, got = asked(scheduler, new=CONTEXT - 20)
    got.get(timeout=30)
    scheduler.close()
    assert isinstance(ended(got)[-1], EngineFailed) and scheduler.failure is None
    with pytest.raises(EngineFailed, match="going down"):
        asked(scheduler)
    for slot in list(engine._slots):
        engine.release(slot)


def test_a_server_whose_engine_failed(loaded, tokenizer, monkeypatch):
    """Requests and /health say so, with 503."""
    with running(loaded, tokenizer, SETTINGS) as found:
        assert found.ask("x").status_code == 200

        def failing(**_):
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

        monkeypatch.setattr(found.server.scheduler._engine, "step", failing)
        for _ in range(2):
            answer = found.ask("x")
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "unavailable"
        health = found.client.get("/health")
        assert health.status_code == 503 and "device is gone" in health.json()["error"]
