"""Continuous batching: one thread owns the engine and keeps its slots busy.

In each round the thread encodes at most one medium, admits at most one request into a free slot and
then lets all running answers go on by a few tokens: nobody who is already answered waits for more
than one medium and one prompt of others. Requests are admitted in the order of their arrival.

A finished answer stays in its slot until the slot is needed: a request that goes on where it ended,
as the next turn of a conversation does, has only what is new computed (`serving/parked.py`).
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.text import AnswerText
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.parked import Found, Parked

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """What an answer has grown by.

    Attributes:
      text: that has become final; "" possible.
      tokens: generated for it.
      finish: why the answer ends here; "" while it goes on.
    """

    text: str
    tokens: int
    finish: Literal["", "stop", "length"]


class EngineFailed(RuntimeError):
    """The engine raised an error that leaves its state unknown; the server must be started anew."""


@dataclass(eq=False)
class Generation:
    """One answer that was asked for.

    Attributes:
      tokens: int32 [n], the prompt.
      media: of the prompt, in order; let go once they are in the cache of the slot.
      keys: of the media, equal for equal visual tokens.
      deliver: called on the scheduler's thread with each `Delta`, the last of which has a
        `finish`, or with the error that ends the answer. It must not block.
      reused: tokens of the prompt that were in the cache already; known at the first delivery.
    """

    tokens: np.ndarray
    media: Sequence[Visual]
    keys: Sequence[Hashable]
    sampling: Sampling
    stop: tuple[str, ...]
    deliver: Callable[["Delta | Exception"], None]
    cancelled: bool = False
    reused: int = field(default=0, init=False)
    text: AnswerText | None = field(default=None, init=False)
    answer: list[int] = field(default_factory=list, init=False)


class Scheduler:
    """Runs an engine for many callers; every method may be called from any thread."""

    def __init__(self, engine: Engine, tokenizer, metrics: Metrics):
        """`tokenizer` is used on the scheduler's thread alone."""
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        self._inbox: queue.SimpleQueue[Generation | tuple | None] = queue.SimpleQueue()
        self._waiting: deque[Generation] = deque()
        self._media: deque[tuple[np.ndarray, Future[Visual]]] = deque()
        self._running: dict[int, Generation] = {}
        self._parked = Parked()
        self._lock = threading.Lock()  # of the two below
        self._closed = False
        self.failure: BaseException | None = None
        self.slots = engine.free_slots
        metrics.slots.set(self.slots)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def free_slots(self) -> int:
        """Slots without a running answer."""
        return self._engine.free_slots + len(self._parked)

    def encode(self, frames: np.ndarray) -> "Future[Visual]":
        """Encodes one medium, uint8 [F, H, W, 3]; may be cancelled while it waits."""
        future: Future[Visual] = Future()
        self._send((frames, future))
        return future

    def submit(self, generation: Generation) -> None:
        """Queues an answer."""
        self._send(generation)

    def cancel(self, generation: Generation) -> None:
        """Nobody wants the answer any more: its slot is freed in the next round."""
        generation.cancelled = True
        self._inbox.put(None)

    def close(self) -> None:
        """Ends the thread; what still waits or runs gets an error."""
        with self._lock:
            self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _send(self, item: "Generation | tuple") -> None:
        with self._lock:
            if self._closed:
                raise EngineFailed("the server is going down")
            self._inbox.put(item)

    # ------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._receive()
                self._drop_cancelled()
                self._encode_one()
                self._admit_one()
                self._step()
        except BaseException as error:
            _log.exception("the engine failed; every request is refused from now on")
            self.failure = error
        with self._lock:
            self._closed = True
        self._receive_waiting()
        ended = EngineFailed("the engine failed" if self.failure else "the server is going down")
        for generation in (*self._running.values(), *self._waiting):
            generation.deliver(ended)
        for _, future in self._media:
            if future.set_running_or_notify_cancel():
                future.set_exception(ended)
        self._metrics.running.set(0)
        self._metrics.waiting.set(0)

    def _receive(self) -> None:
        """Takes what has arrived; waits for it where there is nothing else to do."""
        if not (self._running or self._waiting or self._media):
            self._sort(self._inbox.get())
        self._receive_waiting()

    def _receive_waiting(self) -> None:
        while True:
            try:
                self._sort(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _sort(self, item: "Generation | tuple | None") -> None:
        match item:
            case Generation():
                self._waiting.append(item)
            case (frames, future):
                self._media.append((frames, future))

    def _drop_cancelled(self) -> None:
        for slot, generation in list(self._running.items()):
            if generation.cancelled:
                self._release(slot)
        self._waiting = deque(g for g in self._waiting if not g.cancelled)
        self._metrics.waiting.set(len(self._waiting))

    def _encode_one(self) -> None:
        while self._media:
            frames, future = self._media.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            began = time.perf_counter()
            try:
                visual = self._engine.encode(frames)
                visual.tokens.block_until_ready()  # an error of the device is this medium's
            except Exception as error:
                _log.exception("encoding %s frames failed", len(frames))
                future.set_exception(error)
                return
            self._metrics.encode_seconds.inc(time.perf_counter() - began)
            self._metrics.frames.inc(len(frames))
            future.set_result(visual)
            return

    def _admit_one(self) -> None:
        if not (self._waiting and self.free_slots):
            return
        generation = self._waiting.popleft()
        tokens, media, sampling = generation.tokens, generation.media, generation.sampling
        found = self._parked.take(tokens, generation.keys)
        try:
            if found is not None:
                self._go_on(found, generation)
                slot = found.slot
            else:
                if not self._engine.free_slots:
                    self._engine.release(self._parked.oldest())
                slot = self._engine.admit(tokens, media, sampling)
        except ContextError as error:
            generation.deliver(error)
            return
        except BaseException:
            self._waiting.appendleft(generation)  # is told with the others
            raise
        self._metrics.prompt_tokens.inc(len(tokens))
        self._metrics.reused_tokens.inc(generation.reused)
        self._metrics.visual_tokens.inc(sum(visual.count for visual in media))
        generation.media = ()
        generation.text = AnswerText(self._tokenizer, generation.stop)
        self._running[slot] = generation
        self._metrics.running.set(len(self._running))
        self._metrics.waiting.set(len(self._waiting))

    def _go_on(self, found: Found, generation: Generation) -> None:
        new, media = generation.tokens[found.tokens :], generation.media[found.media :]
        try:
            self._engine.extend(found.slot, new, media, generation.sampling)
        except BaseException:
            self._engine.release(found.slot)
            raise
        generation.reused = found.tokens

    def _step(self) -> None:
        if not self._running:
            return
        for progress in self._engine.step(hurry=bool(self._waiting)):
            generation = self._running[progress.slot]
            text, finish = generation.text, progress.finish
            assert text is not None
            new = text.push(progress.tokens)
            if text.stopped:
                finish = "stop"
            elif finish:
                new += text.close()
            self._metrics.answer_tokens.inc(len(progress.tokens))
            generation.answer += progress.tokens
            if finish:
                # At a stop string the text ends before the tokens do, and the row still runs.
                self._release(progress.slot, park=bool(progress.finish))
            if new or progress.tokens or finish:
                generation.deliver(Delta(new, len(progress.tokens), finish))

    def _release(self, slot: int, park: bool = False) -> None:
        generation = self._running.pop(slot)
        if park:
            held = np.concatenate([generation.tokens, np.asarray(generation.answer, np.int32)])
            self._parked.park(slot, held, generation.keys)
        else:
            self._engine.release(slot)
        self._metrics.running.set(len(self._running))
