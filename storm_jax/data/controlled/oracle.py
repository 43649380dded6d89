"""Answers from the pixels of the decoded files, by rules: the best that can be reached.

    python -m storm_jax.data.controlled.oracle DIR [--limit=N]

It shares no code with the generator. It reads the question's text, finds saturated pixels, and
knows the nominal colours and the digits' bitmaps.
"""

import argparse
import collections
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from storm_jax.data.drawing import COLOURS, DIGITS
from storm_jax.data.video import decode

_SATURATED = 70  # difference of the largest and smallest channel
_VISIBLE = 20  # pixels that make an object
# Weight of brightness beside colour in telling an object from what is behind it. With 1 an edge
# between dark and bright behind a shape looked like a part of it: 3 of 1320 were answered wrongly.
_BRIGHTNESS = 0.25
_NAMES = list(COLOURS)


def answer(family: str, question: str, options: Sequence[str], frames: np.ndarray) -> int:
    """The number of the option that is right for frames uint8 [F, H, W, 3]."""
    colours_FHW = _colours(frames)
    rule = _RULES[family]
    return rule(question, options, colours_FHW, frames)


def answer_record(record: Mapping, folder: str) -> int:
    """The same for a parsed line of DIR/*.jsonl."""
    path = os.path.join(folder, record["media"][0]["path"])
    frames, _ = decode(path, n=100_000)
    question = record["conversations"][0]["value"].removeprefix("<video>\n")
    return answer(record["task"], question, record["options"], frames)


# ------------------------------------------------------------------------------------------- seeing


def _colours(frames: np.ndarray) -> np.ndarray:
    """Index of the nearest nominal colour, int [F, H, W]; -1 where nothing is saturated."""
    rgb = frames.astype(np.float32)
    hue = rgb - rgb.mean(-1, keepdims=True)
    nominal = np.array(list(COLOURS.values()), np.float32)
    nominal -= nominal.mean(-1, keepdims=True)
    nominal /= np.linalg.norm(nominal, axis=-1, keepdims=True)
    return np.where(np.ptp(rgb, axis=-1) > _SATURATED, (hue @ nominal.T).argmax(-1), -1)


def _areas(colours_FHW: np.ndarray) -> np.ndarray:
    """Pixels of each colour, int [F, colours]."""
    return np.stack([(colours_FHW == c).sum((1, 2)) for c in range(len(_NAMES))], 1)


def _seen(colours_FHW: np.ndarray, colour: str) -> np.ndarray:
    """Whether something of this colour is visible, bool [F]."""
    areas = _areas(colours_FHW)
    c = _NAMES.index(colour)
    # What an object's edges look like is no object.
    return (areas[:, c] > _VISIBLE) & (4 * areas[:, c] > areas.max(1))


def _main_colours(colours_FHW: np.ndarray) -> list[str | None]:
    areas = _areas(colours_FHW)
    return [_NAMES[a.argmax()] if a.max() > _VISIBLE else None for a in areas]


def _centres(colours_FHW: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames in which the colour is visible, and its centre (x, y) there, float [n, 2]."""
    frames = np.flatnonzero(_seen(colours_FHW, colour))
    points = [np.argwhere(colours_FHW[t] == _NAMES.index(colour)) for t in frames]
    return frames, np.array([p.mean(0)[::-1] for p in points])


def _cut_out(colours_FHW: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """How much of each 2 x 2 pixels the largest object covers, float [h, w], with some margin.

    The files keep colour for 2 x 2 pixels, and an object may differ from what is behind it in
    nothing else.
    """
    areas = _areas(colours_FHW)
    t, c = np.unravel_index(areas.argmax(), areas.shape)
    inside = colours_FHW[t] == c
    box = []
    for axis in (1, 0):
        where = np.flatnonzero(inside.any(axis))
        box.append(slice(max(where[0] // 2 * 2 - 4, 0), where[-1] // 2 * 2 + 6))
    rgb = frames[t][tuple(box)].astype(np.float32)
    rgb -= (1 - _BRIGHTNESS) * rgb.mean(-1, keepdims=True)
    inside = inside[tuple(box)]
    behind = np.median(rgb[colours_FHW[t][tuple(box)] < 0], axis=0)
    towards = np.median(rgb[inside], axis=0) - behind
    return _halved(np.clip((rgb - behind) @ towards / (towards @ towards), 0, 1))


def _halved(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(len(picture) // 2, 2, -1, 2).mean((1, 3))


def _best_fit(cover: np.ndarray, models: Sequence[Sequence[np.ndarray]]) -> int:
    """Which of some things it is: each is given as masks of all its sizes, tried everywhere."""
    errors = []
    for masks in models:
        errors.append(np.inf)
        for mask, dy, dx in itertools.product(masks, (0, 1), (0, 1)):
            (h, w), placed = mask.shape, np.zeros(np.array(mask.shape) // 2 * 2 + 2)
            placed[dy : dy + h, dx : dx + w] = mask
            placed = _halved(placed)
            if (np.array(placed.shape) > cover.shape).any():
                continue
            windows = np.lib.stride_tricks.sliding_window_view(cover, placed.shape)
            # The mask's own error, and all that is covered outside of it.
            inside, whole = ((windows - placed) ** 2).sum((2, 3)), (windows**2).sum((2, 3))
            errors[-1] = min(errors[-1], (inside + (cover**2).sum() - whole).min())
    return int(np.argmin(errors))


# -------------------------------------------------------------------------------------------- rules


def _direction(question, options, colours_FHW, frames):
    _, centres = _centres(colours_FHW, _first_colour(question))
    dx, dy = centres[-1] - centres[0]
    seen = {"right": dx, "left": -dx, "down": dy, "up": -dy}
    return int(np.argmax([seen[option] for option in options]))


def _first(question, options, colours_FHW, frames):
    when = [np.flatnonzero(_seen(colours_FHW, option.split()[0])) for option in options]
    return int(np.argmin([times[0] for times in when]))


def _count(question, options, colours_FHW, frames):
    seen = _seen(colours_FHW, _first_colour(question)).astype(int)
    return options.index(str((np.diff(seen, prepend=0) == 1).sum()))


def _state(question, options, colours_FHW, frames):
    before = _first_colour(question)
    shown = [c for c in _main_colours(colours_FHW) if c]
    changes = [b for a, b in zip(shown, shown[1:], strict=False) if a == before != b]
    return options.index(changes[0])


def _speed(question, options, colours_FHW, frames):
    jumps = []
    for option in options:
        _, centres = _centres(colours_FHW, option.split()[0])
        jumps.append((np.abs(np.diff(centres[:, 0])) > 0.2 * frames.shape[2]).sum())
    return int(np.argmax(jumps))


def _frame(question, options, colours_FHW, frames):
    number = int(_found(r"in frame (\d+) of", question)[1]) - 1
    return options.index(_main_colours(colours_FHW)[number])


def _part(question, options, colours_FHW, frames):
    _, which, word = _found(r"in the (\w+) (half|quarter)", question)
    parts = {"half": 2, "quarter": 4}[word]
    number = {"first": 0, "second": 1, "third": 2, "last": parts - 1}[which]
    edges = np.linspace(0, len(frames), parts + 1)
    shown = _main_colours(colours_FHW)[round(edges[number]) : round(edges[number + 1])]
    return options.index(collections.Counter(c for c in shown if c).most_common(1)[0][0])


def _shape(question, options, colours_FHW, frames):
    sides = range(frames.shape[1] // 5, frames.shape[1] * 2 // 5)
    models = [[_coverage(option, side) for side in sides] for option in options]
    return _best_fit(_cut_out(colours_FHW, frames), models)


def _coverage(shape: str, side: int) -> np.ndarray:
    """Share of each pixel that a shape covers, float [side, side]: a mean over 5 x 5 points."""
    v, u = np.mgrid[: 5 * side, : 5 * side] * 2 / (5 * side - 1) - 1
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    edge = {  # distance of the edge from the middle, in each direction
        "square": 1 / np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle))),
        "disc": np.ones_like(u),
        "ring": np.ones_like(u),
        "diamond": 1 / (np.abs(np.cos(angle)) + np.abs(np.sin(angle))),
    }
    if shape in edge:
        covered = radius <= edge[shape]
        if shape == "ring":
            covered &= radius > np.sqrt(0.3)
    elif shape == "cross":
        covered = np.minimum(np.abs(u), np.abs(v)) < 0.4
    else:
        covered = np.abs(u) <= (v + 1) / 2  # a triangle, its tip up
    return covered.reshape(side, 5, side, 5).mean((1, 3))


def _colour(question, options, colours_FHW, frames):
    return options.index(_main_colours(colours_FHW)[0])


def _digit(question, options, colours_FHW, frames):
    models = []
    for option in options:
        bits = np.array([[row >> (4 - c) & 1 for c in range(5)] for row in DIGITS[option]])
        scales = range(1, frames.shape[1] // 14 + 1)
        # Without the columns that "1" leaves empty: they may lie outside of what was cut out.
        models.append([np.kron(bits[:, bits.any(0)], np.ones((k, k))) for k in scales])
    return _best_fit(_cut_out(colours_FHW, frames), models)


def _found(pattern: str, question: str) -> tuple[str, ...]:
    """The match and its groups."""
    match = re.search(pattern, question)
    if match is None:
        raise ValueError(f"question {question!r} does not match {pattern!r}")
    return match[0], *match.groups()


def _first_colour(question: str) -> str:
    return next(word for word in re.findall(r"\w+", question) if word in COLOURS)


_RULES: dict[str, Callable[[str, Sequence[str], np.ndarray, np.ndarray], int]] = {
    "direction": _direction,
    "order": _first,
    "blink": _first,
    "count": _count,
    "state": _state,
    "speed": _speed,
    "frame": _frame,
    "part": _part,
    "shape": _shape,
    "colour": _colour,
    "needle": _digit,
    "digit": _digit,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the accuracy of each family and split."""
    parser = argparse.ArgumentParser(description="Answer a controlled data set from its pixels.")
    parser.add_argument("folder", help="OUT of python -m storm_jax.data.controlled")
    parser.add_argument(
        "--limit", type=int, default=600, help="records of each split, from its start"
    )
    args = parser.parse_args(argv)
    for split in ("train", "test", "test_seen"):
        right, total = collections.Counter(), collections.Counter()
        with open(os.path.join(args.folder, f"{split}.jsonl"), encoding="utf-8") as file:
            records = [json.loads(line) for line, _ in zip(file, range(args.limit), strict=False)]
        for record in tqdm(records, split, delay=2, disable=None):
            total[record["task"]] += 1
            right[record["task"]] += answer_record(record, args.folder) == record["answer"]
        for family, count in total.items():
            print(f"{split:10} {family:10} {right[family]} of {count}")


if __name__ == "__main__":
    main()
