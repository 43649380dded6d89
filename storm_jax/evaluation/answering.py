"""Answers many questions about media on all devices: each medium is decoded and encoded once.

One thread for each engine takes the questions about one medium after another. While it waits for
frames, the answers that its engine is making go on; while these are made, the workers decode the
media that come next. What an engine answers depends neither on what else runs in it nor on its
number, so that one device and eight give the same answers.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import numpy as np

from storm_jax.config import RunConfig
from storm_jax.data.conversation import Media
from storm_jax.data.video import MediaError
from storm_jax.evaluation.requests import Outcome, Request
from storm_jax.inference.engine import Engine
from storm_jax.inference.media import Decoders, Frames
from storm_jax.inference.options import Options
from storm_jax.inference.prefill import Visual
from storm_jax.inference.text import AnswerText


@dataclass
class _Batch:
    """Questions about the same media, and the frames of these."""

    requests: Sequence[Request]
    frames: list[Frames]


@dataclass
class _Running:
    request: Request
    text: AnswerText
    frames: int
    visual_tokens: int
    prompt_tokens: int
    output: str = ""
    output_tokens: int = 0


@dataclass
class Work:
    """What has been done so far, for progress bars; several threads add to it."""

    frames: int = 0  # encoded
    media: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, frames: int) -> None:
        with self._lock:
            self.frames += frames
            self.media += 1


class Answering:
    """Engines that answer requests."""

    def __init__(
        self,
        engines: Sequence[Engine],
        tokenizer,
        decoders: Decoders,
        config: RunConfig,
        options: Options,
    ):
        """
        Args:
          engines: of the same checkpoint, each on devices of its own.
          config: with the options applied.
        """
        self._engines, self._tokenizer, self._decoders = engines, tokenizer, decoders
        self._config, self._options = config, options
        self.work = Work()

    def run(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """The outcomes, as they come. Requests about the same media must follow one another.

        Raises:
          ContextError: a prompt is too long.
          Exception: what an engine raised; the others end first.
        """
        outcomes: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        with _Ahead(requests, self._start, len(self._engines) + 1) as ahead:
            threads = [
                threading.Thread(target=self._serve, args=(engine, ahead, outcomes), daemon=True)
                for engine in self._engines
            ]
            for thread in threads:
                thread.start()
            try:
                left = len(threads)
                while left:
                    found = outcomes.get()
                    if isinstance(found, BaseException):
                        raise found
                    if found is None:
                        left -= 1
                    else:
                        yield found
            finally:
                ahead.close()
                for thread in threads:
                    thread.join()

    def _start(self, media: Sequence[Media]) -> list[Frames]:
        config = self._config
        limit, size = config.data.decode_timeout, config.model.vit.image_size
        return [self._decoders.sample(m, config.data.frames, size, limit) for m in media]

    def _serve(self, engine: Engine, ahead: "_Ahead", outcomes: queue.SimpleQueue) -> None:
        """Answers on one engine until nothing is left; runs in a thread of its own."""
        server = _Server(engine, self._tokenizer, self._config, self._options, self.work)
        try:
            while (batch := ahead.take()) is not None:
                for outcome in server.answer(batch):
                    outcomes.put(outcome)
            if not ahead.closed:
                for outcome in server.rest():
                    outcomes.put(outcome)
            server.release()
            outcomes.put(None)
        except CancelledError as error:
            outcomes.put(None if ahead.closed else error)
        except BaseException as error:
            outcomes.put(error)


class _Ahead:
    """Batches of requests, of which the next ones are being decoded."""

    def __init__(self, requests: Iterable[Request], start, count: int):
        self._grouped = itertools.groupby(requests, key=lambda r: r.media)
        self._start, self._count = start, count
        self._waiting: deque[_Batch] = deque()
        self._lock = threading.Lock()
        self.closed = False

    def __enter__(self) -> "_Ahead":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def take(self) -> _Batch | None:
        """The next batch; None: there is none."""
        with self._lock:
            while not self.closed and len(self._waiting) < self._count:
                media, group = next(self._grouped, (None, ()))
                if media is None:
                    break
                self._waiting.append(_Batch(list(group), self._start(media)))
            return self._waiting.popleft() if self._waiting and not self.closed else None

    def close(self) -> None:
        """Nothing more is taken."""
        with self._lock:
            self.closed = True
            for batch in self._waiting:
                for frames in batch.frames:
                    frames.close()
            self._waiting.clear()


class _Server:
    """Keeps the slots of one engine busy; one thread calls it."""

    def __init__(self, engine: Engine, tokenizer, config: RunConfig, options: Options, work: Work):
        self._engine, self._tokenizer = engine, tokenizer
        self._config, self._options, self._work = config, options, work
        self._running: dict[int, _Running] = {}
        self._done: deque[Outcome] = deque()  # by a step, not yet given out

    def answer(self, batch: _Batch) -> Iterator[Outcome]:
        """Starts the answers of a batch; gives out those that have ended meanwhile."""
        try:
            visual = [
                self._engine.encode(self._fed(frames), self._options) for frames in batch.frames
            ]
        except MediaError as error:
            yield from self._taken()
            yield from (Outcome(request, error=str(error)) for request in batch.requests)
            return
        finally:
            for frames in batch.frames:
                frames.close()
        self._work.add(sum(v.frames for v in visual))
        for request in batch.requests:
            while not self._engine.free_slots:
                self._step()
            yield from self._taken()
            self._admit(request, visual)

    def rest(self) -> Iterator[Outcome]:
        """Ends what is running."""
        while self._running:
            self._step()
            yield from self._taken()
        yield from self._taken()

    def release(self) -> None:
        """Gives up what is running."""
        for slot in list(self._running):
            self._engine.release(slot)
        self._running.clear()

    def _fed(self, frames: Frames) -> Iterator[np.ndarray]:
        while True:
            while self._running and not frames.ready:
                self._step()
            chunk = next(frames, None)
            if chunk is None:
                return
            yield chunk

    def _admit(self, request: Request, visual: Sequence[Visual]) -> None:
        tokens = request.tokens(self._tokenizer, self._config, [v.count for v in visual])
        slot = self._engine.admit(tokens, visual, request.sampling)
        self._running[slot] = _Running(
            request,
            AnswerText(self._tokenizer, request.stop),
            sum(v.frames for v in visual),
            sum(v.count for v in visual),
            len(tokens),
        )

    def _step(self) -> None:
        for progress in self._engine.step():
            answer = self._running[progress.slot]
            for token in progress.tokens:  # one by one: how many come at a time depends on others
                if not answer.text.stopped:
                    answer.output += answer.text.push([token])
                    answer.output_tokens += 1
            finish = progress.finish
            if answer.text.stopped:
                finish = "stop"
            elif finish:
                answer.output += answer.text.close()
                finish = "stop" if answer.text.stopped else finish
            if finish:
                self._engine.release(progress.slot)
                del self._running[progress.slot]
                self._done.append(
                    Outcome(
                        answer.request,
                        answer.output,
                        finish,
                        progress.finite,
                        frames=answer.frames,
                        visual_tokens=answer.visual_tokens,
                        prompt_tokens=answer.prompt_tokens,
                        output_tokens=answer.output_tokens,
                    )
                )

    def _taken(self) -> Iterator[Outcome]:
        while self._done:
            yield self._done.popleft()
