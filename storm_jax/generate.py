"""Answers questions about videos and images, from a training checkpoint.

python -m storm_jax.generate --checkpoint=DIR --video=FILE.mp4 --prompt="What happens?"

--video (a file or a folder of frames) and --image may be repeated. In the prompt `<video>` and
`<image>` say where they stand; without them all stand before it, videos first. --start, --end and
--subtitles belong to the videos in order; one --start or --end alone is for all of them. Without
--prompt every line of standard input is a question of one conversation: the media are encoded
once. The answer goes to standard output, everything else to standard error. docs/generate.md
describes the options.

Exit status: 0 answered; 1 a medium, a subtitle file or the checkpoint cannot be used; 2 flags or
prompts that cannot be; 3 too long for the context; 130 interrupted; 141 nobody reads the answer.
"""

import contextlib
import dataclasses
import functools
import json
import operator
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import jax
import numpy as np
from absl import app, flags, logging

from storm_jax import answer_flags, cache_flag, checkpoint, option_flags
from storm_jax.command_exit import USAGE, failed, parse
from storm_jax.config import ConfigError, RunConfig
from storm_jax.data import subtitles, text
from storm_jax.data.conversation import Media, Turn
from storm_jax.data.video import MediaError
from storm_jax.inference.compile_notice import CompileNotice
from storm_jax.inference.conversation import Conversation, Medium, PlacementError, opening
from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.load import load
from storm_jax.inference.media import Decoders, Frames
from storm_jax.inference.options import Options, TokensKept
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.tokenizer import load_tokenizer
from storm_jax.inference.weights import QUANTIZATIONS, Quantization

if TYPE_CHECKING:  # takes a second to import: mistakes in flags are told before
    from transformers import PreTrainedTokenizerFast

CHAT_TOKENS = 2048  # that questions and answers of a conversation may take by default
ANSWERED, BAD_INPUT, TOO_LONG, INTERRUPTED, CLOSED = 0, 1, 3, 130, 141

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training workdir, or one checkpoint.", required=True
)
_VIDEO = flags.DEFINE_multi_string("video", [], "A video file or a folder of frames.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image file.")
_START = flags.DEFINE_multi_float("start", [], "Where the clip starts, s.", 0.0)
_END = flags.DEFINE_multi_float("end", [], "Where the clip ends, s.", 0.0)
_SUBTITLES = flags.DEFINE_multi_string(
    "subtitles", [], 'A .srt, .vtt or .json file, one for each video; "" for none.'
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "The question; without it, each line of standard input is one."
)
_JSON = flags.DEFINE_bool("json", False, "Print each answer as a JSON object on one line.")
_CONTEXT = flags.DEFINE_integer(
    "context", 0, "Tokens of the whole conversation; 0: as the media and a row of training need.", 0
)
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", "", QUANTIZATIONS, "Of the weights; docs/inference.md says of which."
)
_DECODERS = flags.DEFINE_integer("decoders", 0, "Decoding processes; 0: one for each core.", 0)


class UsageError(ValueError):
    """Flags or prompts that cannot be used."""


def requested_media() -> list[Medium]:
    """The videos of the flags, then the images."""
    videos = _VIDEO.value
    if not videos and not _IMAGE.value:
        raise UsageError("give --video or --image")

    def of_each(flag: flags.FlagHolder, one_for_all: bool) -> list:
        values = flag.value
        if one_for_all and len(values) == 1:
            return values * len(videos)
        if len(values) not in (0, len(videos)):
            raise UsageError(f"--{flag.name} is given {len(values)} times, --video {len(videos)}")
        return values or [None] * len(videos)

    spans = zip(of_each(_START, True), of_each(_END, True), strict=True)
    found = []
    for path, span, file in zip(videos, spans, of_each(_SUBTITLES, False), strict=True):
        cues = subtitles.within(subtitles.read(file), *span) if file else []
        found.append(Medium(Media("video", path, *span), tuple(cue.text for cue in cues)))
    return found + [Medium(Media("image", path)) for path in _IMAGE.value]


class Summary:
    """What one answer took. Seconds of compiling are counted apart from the part they fell into."""

    def __init__(self, notice: CompileNotice):
        self.media: list[tuple[Media, TokensKept]] = []
        self._notice = notice
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the seconds of a block."""
        began, compiled = time.perf_counter(), self._notice.seconds
        try:
            yield
        finally:
            compiled = self._notice.seconds - compiled
            self._add(part, time.perf_counter() - began - compiled)
            self._add("compile", compiled)

    def waited(self, frames: Frames) -> Iterator[np.ndarray]:
        """The chunks; counts the time that they are waited for, which is none of encoding's."""
        while True:
            began = time.perf_counter()
            chunk = next(frames, None)
            seconds = time.perf_counter() - began
            self._add("frames", seconds)
            self._add("encode", -seconds)
            if chunk is None:
                return
            yield chunk

    def finish(self, conversation: Conversation, question: str, answer: str) -> dict:
        """What `--json` prints; begins anew for the next answer."""
        seconds, self._seconds = self._seconds, {}
        return {
            "prompt": question,
            "answer": answer,
            "finish": conversation.finish,
            "media": [{"path": m.path} | dataclasses.asdict(kept) for m, kept in self.media],
            "prompt_tokens": conversation.prompt_tokens,
            "answer_tokens": conversation.answer_tokens,
            "seconds": {part: round(value, 4) for part, value in seconds.items()},
            "tokens_per_second": round(conversation.answer_tokens / seconds["answer"], 2),
        }

    def line(self, record: dict) -> str:
        """What `finish` returned, for people."""
        media = functools.reduce(operator.add, [kept for _, kept in self.media])
        times = ", ".join(f"{part} {value:.2f} s" for part, value in record["seconds"].items())
        return (
            f"{media}; {record['prompt_tokens']} tokens in the prompt, {record['answer_tokens']}"
            f" in the answer; {times}; {record['tokens_per_second']:.1f} tokens/s"
        )

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds


def questions() -> Iterator[str]:
    """The prompt of the flags, or the lines of standard input that are not blank."""
    if _PROMPT.value is not None:
        if not _PROMPT.value.strip():
            raise UsageError("--prompt is empty")
        yield _PROMPT.value
        return
    some = False
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            some = True
            yield line.strip()
    if not some:
        raise UsageError("no question: give --prompt, or lines on standard input")


def room_for(config: RunConfig, media: list[Medium]) -> int:
    """Tokens that the context holds where the flags do not say."""
    further = len(media) - 1  # a row of training is one medium and its text
    visual = config.model.visual_tokens(config.data.frames.max_frames)
    text = CHAT_TOKENS if _PROMPT.value is None else 0
    # A token is longer than a character.
    subtitles = sum(len(line) + 1 for medium in media for line in medium.lines)
    return (
        config.data.sequence_length
        + further * visual
        + text
        + subtitles
        + answer_flags.NEW_TOKENS.value
    )


def requested_sampling(stop_tokens: tuple[int, ...] = ()) -> Sampling:
    """What decoding may do."""
    try:
        return answer_flags.sampling(stop_tokens)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def configured() -> tuple[RunConfig, Options]:
    """The checkpoint's configuration with the options of the flags in it, and these."""
    trained = checkpoint.read_config(_CHECKPOINT.value)
    try:
        options = option_flags.options()
        return options.apply(trained), options
    except ConfigError as error:
        raise UsageError(f"--{error}") from error


def run() -> None:
    """Does what the flags ask for."""
    requested_sampling()
    config, options = configured()
    media = requested_media()
    if _PROMPT.value is not None:
        opening(_PROMPT.value, media)  # refuses before anything is decoded
    cache_flag.keep_programs()
    with contextlib.closing(CompileNotice()) as notice:
        summary = Summary(notice)
        engine, tokenizer, encoded = encoded_media(config, options, media, summary)
        sampling = requested_sampling(text.stop_tokens(tokenizer, config.data.chat_template))
        conversation = Conversation(engine, tokenizer, sampling, answer_flags.STOP.value)
        further = False
        for question in questions():
            with summary.timed("prefill"):
                if further:
                    conversation.ask(question)
                else:
                    prompt, ordered = opening(question, media)
                    conversation.ask(prompt, [encoded[medium] for medium in ordered])
            further = True
            answer(conversation, question, summary)


def encoded_media(
    config: RunConfig, options: Options, media: list[Medium], summary: Summary
) -> tuple[Engine, "PreTrainedTokenizerFast", dict[Medium, Visual]]:
    """An engine, a tokenizer, and every medium encoded; one that is given twice is encoded once."""
    size, limit = config.model.vit.image_size, config.data.decode_timeout
    with Decoders(_DECODERS.value) as decoders:
        # They are decoded while the parameters are read.
        frames = {m: decoders.sample(m.media, config.data.frames, size, limit) for m in media}
        with summary.timed("load"):
            tokenizer = load_tokenizer(_CHECKPOINT.value, config)
            kind = cast(Quantization, _QUANTIZATION.value)
            loaded = load(_CHECKPOINT.value, quantization=kind)
            engine = Engine(loaded, slots=1, context=_CONTEXT.value or room_for(config, media))
        compile_beside(engine, tokenizer, config, options, media, frames)
        visual = {}
        for medium, chunks in frames.items():
            with summary.timed("encode"):
                visual[medium] = engine.encode(summary.waited(chunks), options)
                jax.block_until_ready(visual[medium].tokens)
        for medium in media:
            sampled, encoded = frames[medium].count, visual[medium].frames
            kept = options.tokens_kept(config.model, sampled, encoded)
            summary.media.append((medium.media, kept))
    return engine, tokenizer, visual


def compile_beside(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerFast",
    config: RunConfig,
    options: Options,
    media: list[Medium],
    frames: dict[Medium, Frames],
) -> None:
    """Begins to compile for the prompt while its media are encoded, if its length is known."""
    if _PROMPT.value is None or options.duplicate_threshold:
        return
    prompt, ordered = opening(_PROMPT.value, media)
    counts = [frames[medium].count for medium in ordered]
    visual = [options.tokens_kept(config.model, count, count).pruned for count in counts]
    turns = (Turn("user", prompt),)
    tokens = text.encode_prompt(tokenizer, config.data.chat_template, turns, visual)
    engine.can_admit(len(tokens))


def answer(conversation: Conversation, question: str, summary: Summary) -> None:
    """Shows the answer as it comes, and what it took."""
    pieces = []
    with summary.timed("answer"):
        for piece in conversation.answer():
            pieces.append(piece)
            if not _JSON.value:
                print(piece, end="", flush=True)
    record = summary.finish(conversation, question, "".join(pieces))
    if _JSON.value:
        print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
        print(summary.line(record), file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells everything that it does
    try:
        if len(argv) > 1:
            raise UsageError(f"arguments not understood: {' '.join(argv[1:])}")
        run()
        return ANSWERED
    except (UsageError, PlacementError) as error:
        return failed(error, USAGE)
    except ContextError as error:
        return failed(error, TOO_LONG)
    except (
        checkpoint.CheckpointError,
        ConfigError,
        MediaError,
        subtitles.SubtitleError,
        text.TokenizerError,
    ) as error:
        return failed(error, BAD_INPUT)
    except KeyboardInterrupt:
        return failed("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return CLOSED


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    app.run(main, flags_parser=parse)
