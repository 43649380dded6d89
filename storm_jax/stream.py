"""Watches an endless video and answers questions about it at any time.

    python -m storm_jax.stream --checkpoint=DIR --source=FILE|URL|/dev/video0|- [--fps=1]
        [--policy=recent|spread] [--budget=TOKENS] [--ask="SECONDS:QUESTION" ...] [--ask_every=S]

Questions are typed on standard input, one a line, or come from --ask. The checkpoint's temporal
encoder runs forward only. docs/streaming.md has the rest.

Exit status: 0 every question was answered and none can come any more; 1 the source or the
checkpoint cannot be used, or the source was lost; 2 the flags make no sense; 3 a question was too
long for the context; 130 interrupted or terminated; 141 nobody reads the answers any more.
"""

import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from absl import app, flags, logging

from storm_jax import answer_flags, cache_flag, checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import live, text
from storm_jax.data.container import MediaError
from storm_jax.inference.history import POLICIES
from storm_jax.inference.load import load
from storm_jax.inference.questions import Questions
from storm_jax.inference.streaming import Stream
from storm_jax.inference.tokenizer import load_tokenizer
from storm_jax.inference.watching import (
    Answered,
    Asked,
    Asker,
    Event,
    Piece,
    Refused,
    TooLong,
    Watch,
)

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
    "realtime", False, "Play a file at its own pace, and drop frames that come too fast."
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
_QUESTION_TOKENS = flags.DEFINE_integer(
    "question_tokens", 512, "Room for a question and the template around it, tokens.", 16
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object a line instead of text.")

OK, FAILED, USAGE, TOO_LONG, INTERRUPTED, CLOSED = 0, 1, 2, 3, 130, 141


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
    options = {}
    for pair in _OPTION.value:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise usage(f"--source_option={pair} is not KEY=VALUE")
        options[key] = value
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


# ------------------------------------------------------------------------------------ what is shown


class Printer:
    """Writes what happens on standard output.

    Attributes:
      answered, too_long: questions so far.
    """

    def __init__(self, as_json: bool):
        self._as_json = as_json
        self.answered = 0
        self.too_long = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Asked(seconds, question):
                self._text(f"[{seconds:.1f} s] {question}\n")
            case Piece(piece):
                self._text(piece)
            case Answered():
                self.answered += 1
                self._text("\n")
                self.line("answer", dataclasses.asdict(event))
            case Refused():
                self.too_long += isinstance(event, TooLong)
                remedy = " (--question_tokens makes room)" if isinstance(event, TooLong) else ""
                note(f"error: {event.error}{remedy}: {event.question}")
                self.line("error", dataclasses.asdict(event))

    def _text(self, piece: str) -> None:
        if not self._as_json:
            print(piece, end="", flush=True)

    def line(self, event: str, fields: dict) -> None:
        """One JSON object, where they are asked for."""
        if self._as_json:
            print(json.dumps({"event": event, **fields}, ensure_ascii=False), flush=True)


def summarise(printer: Printer, watch: Watch, feed: live.Feed, stream: Stream, took: float) -> None:
    """The line at the end."""
    stream.visual()  # the last frames may wait for a full batch
    fields = {
        "frames": stream.frames,
        "dropped": feed.dropped,
        "groups_kept": len(stream.groups),
        "answers": printer.answered,
        "questions_skipped": watch.skipped,
        "stream_seconds": watch.seconds,
        "seconds": took,
    }
    printer.line("summary", fields)
    note(
        f"{stream.frames} frames to {watch.seconds:.1f} s in {took:.1f} s, {feed.dropped} dropped;"
        f" {len(stream.groups)} of {stream.capacity} groups kept; {printer.answered} answers,"
        f" {watch.skipped} repeated questions skipped"
    )


def run() -> int:
    began = time.perf_counter()
    asks = timed_questions()
    piped = _SOURCE.value == "-"
    if piped and not asks:
        raise usage("--source=- leaves no place to type a question: use --ask")
    try:
        sampling = answer_flags.sampling()
    except ValueError as error:
        raise usage(f"--{error}") from error
    source = open_source(checkpoint.read_config(_CHECKPOINT.value).model.vit.image_size)
    cache_flag.keep_programs()
    loaded = load(_CHECKPOINT.value)
    tokenizer = load_tokenizer(_CHECKPOINT.value, loaded.config)
    stream = Stream(loaded, budget=_BUDGET.value, policy=_POLICY.value, batch=_BATCH.value)
    printer = Printer(_JSON.value)
    asker = Asker(
        loaded,
        stream,
        tokenizer,
        sampling,
        stop_strings=answer_flags.STOP.value,
        question_tokens=_QUESTION_TOKENS.value,
        tell=printer,
    )
    note(f"compiling for batches of {stream.batch} frames ...")
    stream.warm_up()
    if source.drop:  # else it waits, and compiles for what it needs
        asker.warm_up()
    note(f"ready after {time.perf_counter() - began:.1f} s; watching {_SOURCE.value}")
    questions = Questions(asks, every=_ASK_EVERY.value, typed=None if piped else sys.stdin)
    feed = live.Feed(source.frames, depth=2 * stream.batch, drop=source.drop)
    watch = Watch(feed, stream, asker, questions)
    began = time.perf_counter()
    interrupted = False
    try:
        watch.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        feed.close()
    if watch.lost is not None:
        note(f"error: {watch.lost}")
    summarise(printer, watch, feed, stream, time.perf_counter() - began)
    if interrupted:
        return INTERRUPTED
    if watch.lost is not None:
        return FAILED
    return TOO_LONG if printer.too_long else OK


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells everything that it does
    if len(argv) > 1:
        raise usage(f"arguments not understood: {' '.join(argv[1:])}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service is stopped by it
    try:
        status = run()
    except (checkpoint.CheckpointError, ConfigError, MediaError, text.TokenizerError) as e:
        note(f"error: {e}")
        status = FAILED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = CLOSED
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
