"""Answers a question about a video, from a training checkpoint.

python -m storm_jax.generate --checkpoint=DIR --video=FILE.mp4 --prompt="..." [--frames=64]
    [--temporal_sampling=2]
"""

import dataclasses
import os
import sys
import time

import jax
from absl import app, flags

from storm_jax import checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import text, video
from storm_jax.data.records import Media, Turn
from storm_jax.inference.engine import Engine
from storm_jax.inference.load import load, with_frames
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.text import AnswerText
from storm_jax.inference.tokenizer import load_tokenizer

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training workdir, or one checkpoint.", required=True
)
_VIDEO = flags.DEFINE_string("video", None, "A video file or a folder of frames.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "The question.", required=True)
_FRAMES = flags.DEFINE_integer("frames", 0, "Frames taken from the video; 0: as in training.", 0)
_SAMPLING = flags.DEFINE_integer(
    "temporal_sampling", 0, "Keep every so many pooled frames; 0: as in training.", 0
)
_START = flags.DEFINE_float("start", None, "Where the clip starts, s.", 0.0)
_END = flags.DEFINE_float("end", None, "Where the clip ends, s.", 0.0)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 always takes the best token.", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of random choices.")


def run() -> None:
    began = time.perf_counter()
    loaded = load(_CHECKPOINT.value)
    config = loaded.config
    if _FRAMES.value:
        config = with_frames(config, _FRAMES.value)
    if _SAMPLING.value:
        reduction = dataclasses.replace(config.model.reduction, temporal_sampling=_SAMPLING.value)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, reduction=reduction)
        )
    loaded = dataclasses.replace(loaded, config=config)
    tokenizer = load_tokenizer(_CHECKPOINT.value, config)
    times = {"load": time.perf_counter() - began}

    began = time.perf_counter()
    media = Media("video", _VIDEO.value, _START.value, _END.value)
    frames, _ = video.sample(
        media, config.data.frames, config.model.vit.image_size, config.data.decode_timeout
    )
    times["decode video"] = time.perf_counter() - began

    print(f"{len(frames)} frames; compiling for this length", file=sys.stderr, flush=True)
    began = time.perf_counter()
    context = config.data.sequence_length + _NEW_TOKENS.value
    engine = Engine(loaded, slots=1, context=context)
    visual = engine.encode(frames)
    jax.block_until_ready(visual.tokens)
    times["encode"] = time.perf_counter() - began
    turns = (Turn("user", f"<video>\n{_PROMPT.value}"),)
    template = config.data.chat_template
    tokens = text.encode_prompt(tokenizer, template, turns, [visual.count])
    sampling = Sampling(
        max_new_tokens=_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        stop_tokens=text.stop_tokens(tokenizer, template),
    )
    began = time.perf_counter()
    engine.admit(tokens, [visual], sampling)
    answer, count = AnswerText(tokenizer), 0
    while progress := engine.step():
        count += len(progress[0].tokens)
        print(answer.push(progress[0].tokens), end="", flush=True)
    print(answer.close(), flush=True)
    times["answer"] = time.perf_counter() - began
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    print(
        f"{len(frames)} frames, {len(frames) * config.model.frame_tokens} tokens mixed,"
        f" {visual.count} visual tokens in the decoder, {len(tokens)} tokens in the prompt,"
        f" {count} in the answer; {parts} (compilation included)",
        file=sys.stderr,
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {' '.join(argv[1:])}")
    try:
        run()
    except (checkpoint.CheckpointError, ConfigError, video.MediaError, text.TokenizerError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    app.run(main)
