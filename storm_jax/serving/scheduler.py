"""Continuous batching: one thread owns the engine and keeps its slots busy.

In each round the thread encodes at most one medium, admits at most one request into a free slot and
then lets all running answers go on: by one token while further slots can be filled, else by a few.
Nobody who is already answered waits for more than one medium and one prompt of others. Requests are
admitted in the order of their arrival, except that one for which a program is missing waits beside
until it is compiled, and lets others pass.

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
from storm_jax.inference.programs import CompileError
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
    compiling: float | None = field(default=None, init=False)  # since then, perf_counter


@dataclass(eq=False)
class _Medium:
    """One medium to encode."""

    frames: np.ndarray
    future: "Future[Visual]"
    compiling: float | None = None  # as in `Generation`


class Scheduler:
    """Runs an engine for many callers; every method may be called from any thread."""

    def __init__(self, engine: Engine, tokenizer, metrics: Metrics):
        """`tokenizer` is used on the scheduler's thread alone."""
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        self._inbox: queue.SimpleQueue[Generation | _Medium | None] = queue.SimpleQueue()
        self._waiting: deque[Generation] = deque()
        self._media: deque[_Medium] = deque()
        self._running: dict[int, Generation] = {}
        self._parked = Parked()
        self._lock = threading.Lock()  # of the two below
        self._closed = False
        self.failure: BaseException | None = None
        self.slots = engine.free_slots
        metrics.slots.set(self.slots)
        engine.programs.told = self._compiled
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def free_slots(self) -> int:
        """Slots without a running answer."""
        return self._engine.free_slots + len(self._parked)

    def encode(self, frames: np.ndarray) -> "Future[Visual]":
        """Encodes one medium, uint8 [F, H, W, 3]; may be cancelled while it waits."""
        future: Future[Visual] = Future()
        self._send(_Medium(frames, future))
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
        self._engine.programs.give_up()

    def _compiled(self, name: str, seconds: float) -> None:
        """A program is ready, or has failed: whoever waits for it is looked at again."""
        self._metrics.compiles.inc()
        self._metrics.compile_seconds.inc(seconds)
        self._inbox.put(None)

    def _send(self, item: Generation | _Medium) -> None:
        with self._lock:
            if self._closed:
                raise EngineFailed("the server is going down")
            self._inbox.put(item)

    # ------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        acted = False
        try:
            while not self._closed:
                self._receive(wait=not acted)
                self._drop_cancelled()
                acted = self._encode_one()
                if self._admit_one():
                    acted = True
                    self._step()  # its first token
                acted = self._step() or acted
        except BaseException as error:
            _log.exception("the engine failed; every request is refused from now on")
            self.failure = error
        with self._lock:
            self._closed = True
        self._receive_waiting()
        ended = EngineFailed("the engine failed" if self.failure else "the server is going down")
        for generation in (*self._running.values(), *self._waiting):
            generation.deliver(ended)
        for medium in self._media:
            if medium.future.set_running_or_notify_cancel():
                medium.future.set_exception(ended)
        self._metrics.running.set(0)
        self._metrics.waiting.set(0)

    def _receive(self, wait: bool) -> None:
        """Takes what has arrived; `wait` for it where there was nothing else to do."""
        if wait:
            self._sort(self._inbox.get())
        self._receive_waiting()

    def _receive_waiting(self) -> None:
        while True:
            try:
                self._sort(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _sort(self, item: Generation | _Medium | None) -> None:
        match item:
            case Generation():
                self._waiting.append(item)
            case _Medium():
                self._media.append(item)

    def _drop_cancelled(self) -> None:
        for slot, generation in list(self._running.items()):
            if generation.cancelled:
                self._release(slot)
        self._waiting = deque(g for g in self._waiting if not g.cancelled)
        self._media = deque(m for m in self._media if not m.future.cancelled())
        self._metrics.waiting.set(len(self._waiting))
        compiling = [x for x in (*self._waiting, *self._media) if x.compiling is not None]
        self._metrics.compiling.set(len(compiling))

    def _has_program(self, item: Generation | _Medium, there: bool) -> bool:
        """Takes note of how long something waits for a program."""
        if not there:
            item.compiling = item.compiling or time.perf_counter()
        elif item.compiling is not None:
            self._metrics.compile_waits.inc()
            self._metrics.compile_wait_seconds.inc(time.perf_counter() - item.compiling)
            item.compiling = None
        return there

    def _next_medium(self) -> _Medium | None:
        """The first one that can be encoded now."""
        for medium in self._media:
            if self._has_program(medium, self._engine.can_encode(len(medium.frames))):
                return medium
        return None

    def _encode_one(self) -> bool:
        """Whether there was one."""
        medium = self._next_medium()
        if medium is None:
            return False
        self._media.remove(medium)
        frames, future = medium.frames, medium.future
        if not future.set_running_or_notify_cancel():
            return True
        began = time.perf_counter()
        try:
            visual = self._engine.encode(frames)
            visual.tokens.block_until_ready()  # an error of the device is this medium's
        except Exception as error:
            _log.exception("encoding %s frames failed", len(frames))
            future.set_exception(error)
            return True
        self._metrics.encode_seconds.inc(time.perf_counter() - began)
        self._metrics.frames.inc(len(frames))
        future.set_result(visual)
        return True

    def _next(self) -> tuple[Generation, Found | None] | None:
        """The first answer that can begin now, and the row that it goes on in."""
        for generation in self._waiting:
            tokens, media = generation.tokens, generation.media
            found = self._parked.find(tokens, generation.keys)
            if found is None:
                there = self._engine.can_admit(len(tokens), media)
            else:
                new = len(tokens) - found.tokens
                there = self._engine.can_extend(found.slot, new, media[found.media :])
            if self._has_program(generation, there):
                return generation, found
        return None

    def _admit_one(self) -> bool:
        """Whether there was one, which may have been refused."""
        chosen = self._next() if self.free_slots else None
        if chosen is None:
            return False
        generation, found = chosen
        self._waiting.remove(generation)
        tokens, media, sampling = generation.tokens, generation.media, generation.sampling
        try:
            if found is not None:
                self._parked.take(found.slot)
                self._go_on(found, generation)
                slot = found.slot
            else:
                if not self._engine.free_slots:
                    self._engine.release(self._parked.oldest())
                slot = self._engine.admit(tokens, media, sampling)
        except (ContextError, CompileError) as error:
            generation.deliver(error)
            return True
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
        return True

    def _go_on(self, found: Found, generation: Generation) -> None:
        new, media = generation.tokens[found.tokens :], generation.media[found.media :]
        try:
            self._engine.extend(found.slot, new, media, generation.sampling)
        except BaseException:
            self._engine.release(found.slot)
            raise
        generation.reused = found.tokens

    def _step(self) -> bool:
        """Lets the answers go on; whether there is one."""
        if not self._running:
            return False
        waits = self._next() is not None
        fills = self.free_slots and (waits or self._next_medium() is not None)
        for progress in self._engine.step(hurry=waits, most=1 if fills else None):
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
        return True

    def _release(self, slot: int, park: bool = False) -> None:
        generation = self._running.pop(slot)
        if park:
            held = np.concatenate([generation.tokens, np.asarray(generation.answer, np.int32)])
            self._parked.park(slot, held, generation.keys)
        else:
            self._engine.release(slot)
        self._metrics.running.set(len(self._running))
