"""Compiling before the first request, so that nobody waits for it."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from storm_jax.config import ConfigError, RunConfig
from storm_jax.data import text
from storm_jax.data.conversation import Turn
from storm_jax.inference.engine import Engine, further_lengths
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.serving import conversation
from storm_jax.serving.scheduler import Delta, Generation, Scheduler

_SHORT_TURN = 64  # tokens of the longest further turn that is compiled for, but with "all"


def frame_numbers(wanted: str, most: int) -> tuple[int, ...] | None:
    """What `--warm-up` names.

    Args:
      wanted: "longest": an image and the longest video; "all": None; "none": (); or numbers of
        frames with commas between.
      most: frames of the longest video.

    Raises:
      ConfigError: none of these.
    """
    if wanted == "all":
        return None
    if wanted in ("none", "longest"):
        return () if wanted == "none" else tuple(dict.fromkeys((1, most)))
    try:
        numbers = tuple(dict.fromkeys(int(number) for number in wanted.split(",")))
    except ValueError:
        numbers = (0,)
    if not all(1 <= number <= most for number in numbers):
        raise ConfigError(
            f"--warm-up={wanted}: say longest, all, none, or numbers of frames from 1 to {most},"
            " as in --warm-up=1,32"
        )
    return numbers


def warm_up(
    scheduler: Scheduler,
    engine: Engine,
    tokenizer,
    config: RunConfig,
    frames: Sequence[int] | None,
    most: int,
    tell: Callable[[str], None],
) -> None:
    """Compiles what media of so many frames need, and short prompts and turns about them.

    Args:
      engine: of the scheduler, whose thread goes on meanwhile.
      frames: of media; None: all numbers, and prompts and turns of all lengths.
      most: frames of the longest video.
      tell: gets lines that say how far it is.

    Raises:
      ContextError: a video of so many frames does not fit into the context.
      CompileError: a program cannot be compiled.
    """
    everything = frames is None
    media = engine.encode_frames.kinds(most) if frames is None else frames
    template, began = config.data.chat_template, time.perf_counter()

    def prompt(visual: Sequence[Visual]) -> np.ndarray:
        turns, counts = [Turn("user", conversation.MEDIUM * len(visual))], [v.count for v in visual]
        return text.encode_prompt(tokenizer, template, turns, counts, conversation.PLACEHOLDER)

    side, lengths = config.model.vit.image_size, set()
    for i, count in enumerate(media):
        tell(f"compiling for {count} frames ({i + 1} of {len(media)})")
        visual = scheduler.encode(np.zeros((count, side, side, 3), np.uint8)).result()
        tokens = prompt([visual])
        if not everything or len(tokens) < engine.context:
            _answered(scheduler, tokens, visual)
        # The question makes it longer.
        lengths |= set(engine.prompt_lengths(len(tokens), 2 * len(tokens))[:2])
    turns = [n for n in further_lengths() if everything or n <= _SHORT_TURN]
    if everything:
        lengths = set(engine.prompt_lengths(len(prompt([])), engine.context))
    for i, length in enumerate(sorted(lengths)):
        tell(f"compiling for prompts of {length} tokens ({i + 1} of {len(lengths)})")
        engine.can_admit(min(length, engine.context - 1))
        engine.programs.wait()
    for i, length in enumerate(turns if media else ()):
        tell(f"compiling for further turns of {length} tokens ({i + 1} of {len(turns)})")
        engine.can_go_on(length)
        engine.programs.wait()
    engine.programs.check()
    if media:
        tell(f"{len(engine.programs)} programs after {time.perf_counter() - began:.1f} s")


def _answered(scheduler: Scheduler, tokens: np.ndarray, visual: Visual) -> None:
    """Runs a prompt through the engine."""
    ended = threading.Event()
    errors: list[Exception] = []

    def deliver(item: Delta | Exception) -> None:
        if isinstance(item, Exception):
            errors.append(item)
        if isinstance(item, Exception) or item.finish:
            ended.set()

    sampling = Sampling(max_new_tokens=2)
    scheduler.submit(Generation(tokens, (visual,), (id(visual),), sampling, (), deliver))
    ended.wait()
    if errors:
        raise errors[0]
