"""Answers a question about a video, from a training checkpoint.

python -m storm_jax.generate --checkpoint=DIR --video=FILE.mp4 --prompt="..." [--frames=64]
    [--temporal_sampling=2]
"""

import os
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags

from storm_jax import checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import text, video
from storm_jax.data.records import Media, Turn
from storm_jax.inference import prefill
from storm_jax.inference.decode import Decode

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


def text_pieces(tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Turns token ids into text as it becomes final: half a character waits for its other half."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        whole = tokenizer.decode(seen, skip_special_tokens=True)
        if not whole.endswith("\ufffd"):
            yield whole[len(shown) :]
            shown = whole


def load_tokenizer(path: str, name: str):
    """The tokenizer that was saved beside the checkpoints, else the one that the config names."""
    saved = checkpoint.find(path)[0].parent / "tokenizer"
    return text.load_tokenizer(str(saved) if saved.is_dir() else name)


def run() -> None:
    began = time.perf_counter()
    loaded = prefill.load(
        _CHECKPOINT.value, max_frames=_FRAMES.value, temporal_sampling=_SAMPLING.value
    )
    config = loaded.config
    tokenizer = load_tokenizer(_CHECKPOINT.value, config.data.tokenizer)
    times = {"load": time.perf_counter() - began}

    began = time.perf_counter()
    media = Media("video", _VIDEO.value, _START.value, _END.value)
    frames, _ = video.sample(
        media, config.data.frames, config.model.vit.image_size, config.data.decode_timeout
    )
    times["decode video"] = time.perf_counter() - began

    visual_tokens = config.model.visual_tokens(len(frames))
    turns = (Turn("user", f"<video>\n{_PROMPT.value}"),)
    tokens = text.encode_prompt(tokenizer, config.data.chat_template, turns, [visual_tokens])
    prompt = prefill.Prompt(
        tokens=tokens,
        frames=frames,
        frame_segments=np.zeros(len(frames), np.int32),
        frame_groups=config.model.reduction.frame_groups(len(frames)),
    )
    stages = prefill.Prefill(loaded)
    print(f"{len(frames)} frames; compiling for this length", file=sys.stderr, flush=True)
    began = time.perf_counter()
    visual = jax.block_until_ready(stages.encode(prompt))
    times["encode"] = time.perf_counter() - began
    began = time.perf_counter()
    scores, cache = jax.block_until_ready(stages.fill(prompt, visual, _NEW_TOKENS.value))
    times["prefill"] = time.perf_counter() - began

    began = time.perf_counter()
    ids = Decode(loaded)(
        scores,
        cache,
        len(tokens),
        new_tokens=_NEW_TOKENS.value,
        stop=text.stop_tokens(tokenizer, config.data.chat_template),
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
    )
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in ids:
            count += 1
            yield token

    for piece in text_pieces(tokenizer, counted()):
        print(piece, end="", flush=True)
    print(flush=True)
    times["answer"] = time.perf_counter() - began
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    print(
        f"{len(frames)} frames, {len(frames) * config.model.frame_tokens} tokens mixed,"
        f" {visual_tokens} visual tokens in the decoder, {len(tokens)} tokens in the prompt,"
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
