"""From a family and a number to the frames of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storm_jax.data.controlled.backgrounds import Background
from storm_jax.data.controlled.families import Family, Question, Script
from storm_jax.data.controlled.layout import Layout
from storm_jax.data.drawing import paint

_NOISE = 4.0  # largest standard deviation of a clip's noise, of 255


@dataclass(frozen=True)
class Clip:
    """A question, the number of the option that is right, and the video, uint8 [F, H, W, 3]."""

    question: Question
    answer: int
    frames: np.ndarray


def pose(family: Family, item: int, seed: int, split: str, layout: Layout) -> tuple[Question, int]:
    """Question and answer number `item` of a family.

    Consecutive items are about one question, once with each option as the answer.
    """
    options = len(family.ask(np.random.default_rng(0), layout).options)
    stream = [seed, _number(split), _number(family.name), item // options]
    return family.ask(np.random.default_rng(stream), layout), item % options


def make_clip(
    family: Family, item: int, seed: int, split: str, layout: Layout, background: Background
) -> Clip:
    """Draws clip number `item` of a family: it depends on these arguments only."""
    question, answer = pose(family, item, seed, split, layout)
    stream = (seed, _number(split), _number(family.name), item)
    frames = perform(family, question, answer, stream, layout, background)
    return Clip(question, answer, frames)


def perform(
    family: Family,
    question: Question,
    answer: int,
    stream: Sequence[int],
    layout: Layout,
    background: Background,
) -> np.ndarray:
    """The frames for an answer, uint8 [F, H, W, 3].

    Contents, background and noise have random streams of their own: with equal arguments but for
    `answer`, only the order of contents and noise differs.
    """
    scene, behind, noise = (np.random.default_rng([*stream, k]) for k in range(3))
    script = family.act(question, answer, scene, layout)
    pictures = background.draw(behind, layout.groups, layout.size, layout.held_out)
    return _render(script, pictures, noise, layout)


def _render(
    script: Script, pictures: np.ndarray, rng: np.random.Generator, layout: Layout
) -> np.ndarray:
    canvas = np.repeat(pictures.astype(np.float32), layout.group, axis=0)
    for frame, shown in zip(canvas, script.order, strict=True):
        for sprite in script.contents[shown]:
            paint(frame, sprite.mask, sprite.colour, sprite.x, sprite.y)
    grain = rng.standard_normal(canvas.shape, np.float32)  # every frame its own
    grain *= np.float32(rng.uniform(0.0, _NOISE))
    canvas += grain[script.order]
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _number(name: str) -> int:
    return int.from_bytes(name.encode(), "little")
