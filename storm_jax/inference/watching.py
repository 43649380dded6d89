"""Frames that come, questions that come, answers that go out: all of them on one thread.

`Asker` answers one question at a time about what a stream has shown; `Watch` gives it questions and
the stream frames. What happens is told to a function, as one of the `Event`s.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from storm_jax.data import text
from storm_jax.data.container import MediaError
from storm_jax.data.conversation import Turn
from storm_jax.data.live import Feed, TimedFrame
from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.load import LoadedModel
from storm_jax.inference.prefill import Visual
from storm_jax.inference.questions import Questions
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.streaming import Stream
from storm_jax.inference.text import AnswerText

_IDLE = 0.05  # seconds after which typed questions are looked for


@dataclass(frozen=True)
class Asked:
    """An answer begins."""

    time: float  # of the stream, s
    question: str


@dataclass(frozen=True)
class Piece:
    """Further text of the answer."""

    text: str


@dataclass(frozen=True)
class Answered:
    """An answer is complete."""

    time: float  # of the stream when it was asked, s
    question: str
    answer: str
    finish: str  # of `engine.Progress`
    frames: int  # that the stream had taken in
    visual_tokens: int  # that the decoder was shown
    tokens: int  # of the answer
    first_token_seconds: float  # from the question to the first tokens
    seconds: float  # to the last


@dataclass(frozen=True)
class Refused:
    """A question that cannot be answered."""

    time: float  # of the stream, s
    question: str
    error: str


@dataclass(frozen=True)
class TooLong(Refused):
    """A question that does not fit into the context."""

    needed: int  # tokens
    available: int


Event = Asked | Piece | Answered | Refused


@dataclass
class _Answer:
    """The answer that is being made."""

    prompt: np.ndarray
    question: str
    seconds: float  # of stream time
    visual: Visual
    text: AnswerText
    began: float
    slot: int | None = None  # None: its program is being compiled
    first: float = 0.0
    written: str = ""
    tokens: int = 0


class Asker:
    """Answers one question at a time.

    Attributes:
      busy: an answer is being made.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stream: Stream,
        tokenizer,
        sampling: Sampling,
        *,
        stop_strings: Sequence[str] = (),
        question_tokens: int,
        tell: Callable[[Event], None],
    ):
        """Args:
        stream: of the same model.
        tokenizer: of the model.
        sampling: of every answer; the tokens that end one are added to it.
        stop_strings: an answer ends before the first of them.
        question_tokens: room for a question and the template around it.
        tell: called with what happens.
        """
        config = loaded.config
        self._stream, self._tokenizer, self._tell = stream, tokenizer, tell
        self._template = config.data.chat_template
        room = stream.capacity * config.model.group_tokens
        context = room + question_tokens + sampling.max_new_tokens
        self._engine = Engine(loaded, slots=1, context=context)
        stop = text.stop_tokens(tokenizer, self._template)
        self._stop_strings = stop_strings
        self._sampling = dataclasses.replace(sampling, stop_tokens=stop)
        self._now: _Answer | None = None

    @property
    def busy(self) -> bool:
        return self._now is not None

    def warm_up(self) -> None:
        """Compiles what answers a short question about a full budget, by answering one."""
        visual = self._stream.visual()
        full = dataclasses.replace(visual, count=len(visual.tokens))
        tokens = self._prompt("What can be seen?", [full])
        slot = self._engine.admit(tokens, [full], Sampling(max_new_tokens=2))
        while self._engine.step():
            pass
        self._engine.release(slot)

    def ask(self, question: str, seconds: float) -> None:
        """Begins an answer from all frames so far, or says why there is none.

        Args:
          question: the text.
          seconds: of stream time, for the events.
        """
        began = time.perf_counter()
        if text.PLACEHOLDER.search(question):
            reason = "a question cannot hold <video> or <image>"
            self._tell(Refused(seconds, question, reason))
            return
        visual = self._stream.visual()
        media = [visual] if visual.count else []
        tokens = self._prompt(question, media)
        answer = AnswerText(self._tokenizer, self._stop_strings)
        now = _Answer(tokens, question, seconds, visual, answer, began)
        try:
            self._admit(now)
        except ContextError as error:
            self._tell(TooLong(seconds, question, str(error), error.needed, error.available))
            return
        self._tell(Asked(seconds, question))
        self._now = now

    def _admit(self, answer: _Answer) -> None:
        """Prefills the question, unless its program must be compiled first."""
        media = [answer.visual] if answer.visual.count else []
        if self._engine.can_admit(len(answer.prompt), media):
            answer.slot = self._engine.admit(answer.prompt, media, self._sampling)

    def _prompt(self, question: str, media: list[Visual]) -> np.ndarray:
        turns = (Turn("user", f"<video>\n{question}" if media else question),)
        counts = [medium.count for medium in media]
        return text.encode_prompt(self._tokenizer, self._template, turns, counts)

    def step(self) -> None:
        """A few tokens of the answer, if one is being made and no program is missing for it."""
        answer = self._now
        if answer is None:
            return
        if answer.slot is None:
            self._engine.programs.wait(_IDLE)
            self._admit(answer)
        if answer.slot is None:
            return
        (progress,) = self._engine.step()
        piece = answer.text.push(progress.tokens)
        finish = "stop" if answer.text.stopped else progress.finish
        if finish:
            piece += answer.text.close()
        answer.tokens += len(progress.tokens)
        answer.written += piece
        answer.first = answer.first or time.perf_counter() - answer.began
        if piece:
            self._tell(Piece(piece))
        if finish:
            self._engine.release(answer.slot)
            self._now = None
            self._tell(
                Answered(
                    answer.seconds,
                    answer.question,
                    answer.written,
                    finish,
                    answer.visual.frames,
                    answer.visual.count,
                    answer.tokens,
                    answer.first,
                    time.perf_counter() - answer.began,
                )
            )


class Watch:
    """Gives the frames of a feed to a stream and the questions to an asker.

    A feed that can wait stands still while an answer is made, so that every timed question is about
    the frames before its time exactly. One that drops frames goes on meanwhile; the answer is about
    the frames that were there when it began, and a question whose turn comes later about those that
    are there then.

    Attributes:
      seconds: time of the last frame that the stream was given.
      skipped: timed questions that came again before they were answered.
      lost: why the feed failed, or None.
    """

    def __init__(self, feed: Feed, stream: Stream, asker: Asker, questions: Questions):
        self._feed, self._stream = feed, stream
        self._asker, self._questions = asker, questions
        self.seconds = 0.0
        self.skipped = 0
        self.lost: MediaError | None = None
        self._waiting: deque[str] = deque()  # questions
        self._frame: TimedFrame | None = None  # taken from the feed, not yet in the stream

    def run(self) -> None:
        """Returns when all is answered and no question can come any more."""
        while True:
            if not self._asker.busy or self._feed.drops:
                self._take(0.0 if self._asker.busy or self._waiting else _IDLE)
            line = self._questions.line()
            if line is not None:
                self._waiting.append(line)
            if self._waiting and not self._asker.busy:
                self._asker.ask(self._waiting.popleft(), self.seconds)
            self._asker.step()
            # Nothing is left to do where no frame will come, or nobody could ask about it.
            over = self._ended or not self._questions.more
            if over and not self._asker.busy and not self._waiting:
                question = self._questions.at_end()
                if question is not None:
                    self._waiting.append(question)
                elif self.lost is not None or not self._questions.typing:
                    return

    @property
    def _ended(self) -> bool:
        """Whether all frames are in the stream."""
        return self.lost is not None or (self._feed.ended and self._frame is None)

    def _take(self, timeout: float) -> None:
        """Gives the next frame to the stream, unless a question comes before it."""
        if self._frame is None and self.lost is None:
            try:
                self._frame = self._feed.take(timeout)
            except MediaError as error:
                self.lost = error
        if self._frame is None:
            if self._ended:
                time.sleep(timeout)  # nothing but typed questions can come
            return
        question = self._questions.due(self._frame.time)
        if question is not None and question in self._waiting:
            self.skipped += 1
        elif question is not None:
            self._waiting.append(question)
        if question is None or self._feed.drops:
            self.seconds = self._frame.time
            self._stream.push(self._frame.image[None])
            self._frame = None
