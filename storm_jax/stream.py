"""Watches an endless video and answers questions about it at any time.

    python -m storm_jax.stream --checkpoint=DIR --source=FILE|URL|/dev/video0|- [--fps=1]
        [--policy=recent|spread] [--budget=TOKENS] [--ask="SECONDS:QUESTION" ...] [--ask_every=S]

Questions are typed on standard input, one a line, or come from --ask. The checkpoint's temporal
encoder runs forward only. docs/streaming.md has the rest.

Exit status: 0 the source came to its end and every question was answered; 1 the source or the
checkpoint cannot be used, or the source was lost; 2 the flags make no sense; 3 a question was too
long for the context; 130 interrupted.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from absl import app, flags

from storm_jax import checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import live, text
from storm_jax.data.container import MediaError
from storm_jax.data.records import Turn
from storm_jax.inference import load
from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.history import POLICIES
from storm_jax.inference.prefill import Visual
from storm_jax.inference.questions import Questions
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.streaming import Stream
from storm_jax.inference.text import AnswerText

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training workdir, or one checkpoint.", required=True
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "A video file; rtsp://, tcp://, http:// or another URL of FFmpeg; a camera (/dev/video0); or -"
    " for raw frames on standard input (RGB, 8 bits each).",
    required=True,
)
_FPS = flags.DEFINE_float("fps", 1.0, "Frames taken a second; 0: all.", 0.0)
_REALTIME = flags.DEFINE_bool(
    "realtime", False, "Play a file or a pipe at its own pace, dropping frames that are too late."
)
_SIZE = flags.DEFINE_string("size", None, "WIDTHxHEIGHT of raw frames.")
_RATE = flags.DEFINE_float("rate", 0.0, "Raw frames that come a second; 0: as --fps.", 0.0)
_OPTION = flags.DEFINE_multi_string(
    "source_option", [], "KEY=VALUE for FFmpeg, as rtsp_transport=udp or video_size=1280x720."
)
_RECONNECT = flags.DEFINE_integer(
    "reconnect", 5, "Attempts in a row to open a lost URL or camera again.", 0
)
_TIMEOUT = flags.DEFINE_float("timeout", 10.0, "Seconds without data after which it is lost.", 0.1)
_POLICY = flags.DEFINE_enum(
    "policy", "recent", POLICIES, "What is kept of a longer history: its end, or evenly spread."
)
_BUDGET = flags.DEFINE_integer(
    "budget", 0, "Visual tokens that the decoder is shown at most; 0: as in training.", 0
)
_BATCH = flags.DEFINE_integer("batch", 8, "Frames that go through the model together.", 1)
_ASK = flags.DEFINE_multi_string(
    "ask", [], 'SECONDS:QUESTION, asked when the stream is there; "inf:..." at its end.'
)
_ASK_EVERY = flags.DEFINE_float("ask_every", 0.0, "Ask each --ask again after so long, s.", 0.0)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", 1)
_QUESTION_TOKENS = flags.DEFINE_integer(
    "question_tokens", 512, "Room for a question and the template around it, tokens.", 16
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 always takes the best token.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Of the most probable tokens that add to this.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of random choices.", 0)
_JSON = flags.DEFINE_bool("json", False, "One JSON object a line instead of text.")

OK, FAILED, USAGE, TOO_LONG, INTERRUPTED = 0, 1, 2, 3, 130


def note(message: str) -> None:
    """A line for whoever watches."""
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Source:
    """Where frames come from; `drop`: it does not wait for us."""

    frames: Iterator[live.TimedFrame]
    drop: bool


def usage(message: str) -> app.UsageError:
    """For mistakes in flags."""
    return app.UsageError(message, exitcode=USAGE)


def open_source(size: int) -> Source:
    """What --source names; nothing is opened before the first frame is asked for.

    Args:
      size: side of the model's frames, pixels.
    """
    name, fps = _SOURCE.value, _FPS.value
    options = {key: value for key, _, value in (pair.partition("=") for pair in _OPTION.value)}
    if name == "-":
        match = re.fullmatch(r"(\d+)x(\d+)", _SIZE.value or "")
        if match is None or "0" in match.groups():
            raise usage(f"--size={_SIZE.value}: raw frames need --size=WIDTHxHEIGHT")
        rate = _RATE.value or fps
        if not rate:
            raise usage("--fps=0 takes all raw frames: say with --rate how many make a second")
        width, height = map(int, match.groups())
        frames = live.raw_frames(sys.stdin.buffer, width, height, rate, size, fps)
        return Source(frames, drop=_REALTIME.value)
    if _SIZE.value or _RATE.value:
        raise usage("--size and --rate describe raw frames: they need --source=-")
    if "://" in name or name.startswith("/dev/"):
        frames = live.live_frames(
            name,
            size,
            fps,
            options=options,
            reconnects=_RECONNECT.value,
            timeout=_TIMEOUT.value,
            notice=note,
        )
        return Source(frames, drop=True)
    if options:
        raise usage("--source_option is for URLs and cameras")
    frames = live.file_frames(name, size, fps)
    return Source(live.paced(frames), True) if _REALTIME.value else Source(frames, False)


def timed_questions() -> list[tuple[float, str]]:
    """The questions of --ask, and their times."""
    asks = []
    for ask in _ASK.value:
        at, colon, question = ask.partition(":")
        try:
            seconds = float(at)
        except ValueError:
            seconds = math.nan
        if not colon or not question.strip() or not seconds >= 0:
            raise usage(f'--ask="{ask}" is not SECONDS:QUESTION')
        asks.append((seconds, question.strip()))
    if _ASK_EVERY.value and not asks:
        raise usage("--ask_every repeats the questions of --ask, and there is none")
    return asks


# -------------------------------------------------------------------------------------- the answers


@dataclass
class Answer:
    """A question that is being answered."""

    slot: int
    question: str
    seconds: float  # of stream time, when it was asked
    visual: Visual
    text: AnswerText
    began: float
    first: float = 0.0  # seconds until the first piece of text
    written: list[str] = field(default_factory=list)
    tokens: int = 0


class Asker:
    """Answers one question at a time about what a stream has shown."""

    def __init__(self, loaded: load.LoadedModel, stream: Stream, tokenizer):
        config = loaded.config
        self._stream, self._tokenizer = stream, tokenizer
        self._template = config.data.chat_template
        room = stream.capacity * config.model.group_tokens
        context = room + _QUESTION_TOKENS.value + _NEW_TOKENS.value
        self._engine = Engine(loaded, slots=1, context=context)
        self._sampling = Sampling(
            max_new_tokens=_NEW_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
            stop_tokens=text.stop_tokens(tokenizer, self._template),
        )
        self.now: Answer | None = None
        self.answered = 0
        self.too_long = 0

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
        """Begins an answer from all frames so far, or says why there is none."""
        began = time.perf_counter()
        if text.PLACEHOLDER.search(question):
            self._refuse(question, seconds, "a question cannot hold <video> or <image>", {})
            return
        visual = self._stream.visual()
        media = [visual] if visual.count else []
        tokens = self._prompt(question, media)
        try:
            slot = self._engine.admit(tokens, media, self._sampling)
        except ContextError as error:
            self.too_long += 1
            sizes = {"needed": error.needed, "available": error.available}
            self._refuse(question, seconds, f"{error}; raise --question_tokens", sizes)
            return
        if not _JSON.value:
            print(f"[{seconds:.1f} s] {question}", flush=True)
        written = AnswerText(self._tokenizer)
        self.now = Answer(slot, question, seconds, visual, written, began)

    def _prompt(self, question: str, media: list[Visual]) -> np.ndarray:
        turns = (Turn("user", f"<video>\n{question}" if media else question),)
        counts = [medium.count for medium in media]
        return text.encode_prompt(self._tokenizer, self._template, turns, counts)

    def _refuse(self, question: str, seconds: float, reason: str, sizes: dict) -> None:
        if _JSON.value:
            event = {"event": "error", "time": seconds, "question": question, "error": reason}
            print(json.dumps(event | sizes), flush=True)
        else:
            note(f"error: {reason}: {question}")

    def step(self) -> None:
        """A few tokens of the answer."""
        for progress in self._engine.step():
            answer = self.now
            assert answer is not None and progress.slot == answer.slot
            piece = answer.text.push(progress.tokens)
            if progress.finish:
                piece += answer.text.close()
            answer.tokens += len(progress.tokens)
            if not answer.written:
                answer.first = time.perf_counter() - answer.began
            answer.written.append(piece)
            if not _JSON.value:
                print(piece, end="\n" if progress.finish else "", flush=True)
            if progress.finish:
                self._engine.release(answer.slot)
                self.now = None
                self.answered += 1
                if _JSON.value:
                    self._report(answer, progress.finish)

    def _report(self, answer: Answer, finish: str) -> None:
        event = {
            "event": "answer",
            "time": answer.seconds,
            "question": answer.question,
            "answer": "".join(answer.written),
            "finish": finish,
            "frames": answer.visual.frames,
            "visual_tokens": answer.visual.count,
            "tokens": answer.tokens,
            "first_token_seconds": answer.first,
            "seconds": time.perf_counter() - answer.began,
        }
        print(json.dumps(event), flush=True)


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Watch:
    """What happens between the source, the stream and the questions."""

    feed: live.Feed
    stream: Stream
    asker: Asker
    questions: Questions
    drop: bool
    seconds: float = 0.0  # of the last frame
    skipped: int = 0  # repeated questions that came while they were still waiting
    lost: MediaError | None = None
    _waiting: deque[str] = field(default_factory=deque)
    _frame: live.TimedFrame | None = None  # taken, not yet in the stream

    def run(self) -> None:
        """Returns when no question can come any more."""
        while True:
            busy = self.asker.now is not None
            # A file waits for the answer; a camera does not, and its frames are not in it.
            if not busy or self.drop:
                self._take(0.0 if busy or self._waiting else 0.05)
            line = self.questions.line()
            if line is not None:
                self._waiting.append(line)
            if self._waiting and self.asker.now is None:
                self.asker.ask(self._waiting.popleft(), self.seconds)
            self.asker.step()
            # Nothing is left to do where no frame will come, or nobody could ask about it.
            over = self._ended or not self.questions.more
            if over and self.asker.now is None and not self._waiting:
                question = self.questions.at_end()
                if question is not None:
                    self._waiting.append(question)
                elif self.lost is not None or not self.questions.typing:
                    return

    @property
    def _ended(self) -> bool:
        """Whether all frames are in the stream."""
        return self.lost is not None or (self.feed.ended and self._frame is None)

    def _take(self, timeout: float) -> None:
        """Gives the next frame to the stream, unless a question comes before it."""
        if self._frame is None and self.lost is None:
            try:
                self._frame = self.feed.take(timeout)
            except MediaError as error:
                self.lost = error
                note(f"error: {error}")
        if self._frame is None:
            if self._ended:
                time.sleep(timeout)  # nothing but typed questions can come
            return
        question = self.questions.due(self._frame.time)
        if question is not None:
            if question in self._waiting:
                self.skipped += 1
            else:
                self._waiting.append(question)
        if question is None or self.drop:
            self.seconds = self._frame.time
            self.stream.push(self._frame.image[None])
            self._frame = None


def run() -> int:
    began = time.perf_counter()
    asks = timed_questions()
    if _SOURCE.value == "-" and not asks:
        raise usage("--source=- leaves no place to type a question: use --ask")
    loaded = load.load(_CHECKPOINT.value)
    source = open_source(loaded.config.model.vit.image_size)
    tokenizer = load.load_tokenizer(_CHECKPOINT.value, loaded.config.data.tokenizer)
    stream = Stream(loaded, budget=_BUDGET.value, policy=_POLICY.value, batch=_BATCH.value)
    asker = Asker(loaded, stream, tokenizer)
    questions = Questions(
        asks, every=_ASK_EVERY.value, typed=None if _SOURCE.value == "-" else sys.stdin
    )
    note(f"compiling for batches of {stream.batch} frames ...")
    stream.warm_up()
    if source.drop:  # else the source waits, and shorter answers to fewer frames come first
        asker.warm_up()
    note(f"ready after {time.perf_counter() - began:.1f} s; watching {_SOURCE.value}")
    feed = live.Feed(source.frames, depth=2 * stream.batch, drop=source.drop)
    watch = Watch(feed, stream, asker, questions, source.drop)
    began = time.perf_counter()
    interrupted = False
    try:
        watch.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        feed.close()
    stream.visual()  # the last frames may wait for a full batch
    summarise(watch, time.perf_counter() - began)
    if interrupted:
        return INTERRUPTED
    if watch.lost is not None:
        return FAILED
    return TOO_LONG if asker.too_long else OK


def summarise(watch: Watch, seconds: float) -> None:
    """The line at the end."""
    stream = watch.stream
    event = {
        "frames": stream.frames,
        "dropped": watch.feed.dropped,
        "groups_kept": len(stream.groups),
        "answers": watch.asker.answered,
        "questions_skipped": watch.skipped,
        "stream_seconds": watch.seconds,
        "seconds": seconds,
    }
    if _JSON.value:
        print(json.dumps({"event": "summary", **event}), flush=True)
    note(
        f"{stream.frames} frames to {watch.seconds:.1f} s in {seconds:.1f} s, {watch.feed.dropped}"
        f" dropped; {len(stream.groups)} of {stream.capacity} groups kept;"
        f" {watch.asker.answered} answers, {watch.skipped} repeated questions skipped"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise usage(f"arguments not understood: {' '.join(argv[1:])}")
    try:
        status = run()
    except (checkpoint.CheckpointError, ConfigError, MediaError, text.TokenizerError) as e:
        note(f"error: {e}")
        status = FAILED
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.stdout.flush()
    # A camera's or a terminal's thread may sit in a read that nothing interrupts.
    os._exit(status)


def parsed(argv: list[str]) -> list[str]:
    """Flags as absl reads them, mistakes in them ending with status `USAGE`."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        app.usage(shorthelp=True, detailed_error=error, exitcode=USAGE)
        raise


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    app.run(main, flags_parser=parsed)
