"""A small real task: mp4 files of moving and appearing shapes, and questions that need time.

    python -m storm_jax.data.synthetic --out=DIR [--train=N --test=N --frames=8 --size=32 --seed=0]

writes DIR/train.jsonl, DIR/test.jsonl, DIR/videos/*.mp4 (H.264) and DIR/tokenizer. Four families of
questions, each labelled in the record's field "task":

    direction  Did the red square move left or right?                 chance 1/2
               It is visible in one group of `group` consecutive frames only and moves all the time.
    order      Which came first, the red square or the blue disc?     chance 1/2
               Each is visible in one group of its own.
    count      How many times did the red square flash, 1, 2 or 3?    chance 1/3
    frame      Which colour is the square in frame 5 of 8: ...?       chance 1/4
               In every group it shows each of the four colours equally often, in random order.

A model that averages the frames of a group before it compares them in time cannot answer
`direction` or `frame` better than by chance, and this holds exactly, not on average:

* The frames of a group are the same set for both answers (for all answers), only their order
  differs. Every frame is coded alone (an H.264 stream of key frames at one quantiser), so decoded
  frames are the same too: a picture predicted from its neighbour would show traces of it.
* The question is between opposite directions: the mean of a group shows the axis of motion.
* The object is nowhere to be seen in the other groups: standing still where the motion ends would
  give the answer away.
* Answer, group, path, colour, shape, size, background and noise are drawn independently of one
  another, and every answer is equally frequent.

`order` can be answered from averaged groups (they are tokens in order), and `count` in part: they
show that a model without a temporal encoder learned at all. Training and test videos are drawn
from the same distribution by different random streams; no video is in both.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storm_jax.data.drawing import paint, shape_mask, texture, tint, write_video
from storm_jax.data.text import train_tokenizer

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "disc", "triangle", "cross")
CHANCE = {"direction": 1 / 2, "order": 1 / 2, "count": 1 / 3, "frame": 1 / 4}
COUNTS = (1, 2, 3)
VOCABULARY = 384  # ids of the tokenizer: 256 bytes, 8 special tokens, the words

_OPPOSITES = (("left", "right"), ("up", "down"))


@dataclass(frozen=True)
class Clip:
    """A video and the question about it."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    task: str
    question: str
    answer: str


def make_clip(
    task: str, item: int, rng: np.random.Generator, frames: int = 8, size: int = 32, group: int = 4
) -> Clip:
    """Draws one clip.

    Args:
      task: a key of CHANCE.
      item: number of the clip in its family: it alone decides the answer, so that answers are
        equally frequent; everything else comes from `rng`.
      rng: source of everything else.
      frames, size: frames in the clip and their side in pixels, at least 24.
      group: frames that the model averages; `frames` is a multiple of it.
    """
    make = {"direction": _direction, "order": _order, "count": _count, "frame": _frame}[task]
    canvas = np.repeat(_background(rng, size)[None], frames, axis=0)
    question, answer = make(item, rng, canvas, group)
    canvas += rng.normal(0.0, rng.uniform(0.0, 4.0), canvas.shape)  # every frame its own noise
    return Clip(np.clip(canvas, 0, 255).astype(np.uint8), task, question, answer)


def _direction(
    item: int, rng: np.random.Generator, canvas: np.ndarray, group: int
) -> tuple[str, str]:
    words, backward = _OPPOSITES[item // 2 % 2], item % 2 == 0
    name, colour, shape, side = _object(rng, canvas.shape[1])
    room = canvas.shape[1] - side
    travel = rng.uniform(0.5, 0.65) * canvas.shape[1]
    along = rng.uniform(0, room - travel) + np.linspace(0, travel, group)
    along = np.rint(along).astype(int)
    across = int(rng.integers(room + 1))
    first = group * int(rng.integers(len(canvas) // group))
    for i, position in enumerate(along[::-1] if backward else along):
        x, y = (position, across) if words[0] == "left" else (across, position)
        paint(canvas[first + i], shape_mask(shape, side), colour, x, y)
    return f"Did the {name} move {words[0]} or {words[1]}?", words[0 if backward else 1]


def _order(item: int, rng: np.random.Generator, canvas: np.ndarray, group: int) -> tuple[str, str]:
    colours = rng.permutation(list(COLOURS))[:2]
    objects = [_object(rng, canvas.shape[1], colour) for colour in colours]
    when = np.sort(rng.permutation(len(canvas) // group)[:2])
    for (_, colour, shape, side), g in zip(objects, when, strict=True):
        x, y = rng.integers(canvas.shape[1] - side + 1, size=2)
        for frame in canvas[g * group : (g + 1) * group]:
            paint(frame, shape_mask(shape, side), colour, x, y)
    names = [name for name, *_ in objects]
    asked = names if item % 2 == 0 else names[::-1]
    return f"Which came first, the {asked[0]} or the {asked[1]}?", names[0]


def _count(item: int, rng: np.random.Generator, canvas: np.ndarray, group: int) -> tuple[str, str]:
    count, frames = COUNTS[item % len(COUNTS)], len(canvas)
    name, colour, shape, side = _object(rng, canvas.shape[1])
    # The number of frames with the object tells nothing: its range is the same for every count.
    lit = int(rng.integers(max(COUNTS), frames - max(COUNTS) + 2))
    flashes = 1 + _partition(rng, lit - count, count)
    gaps = _partition(rng, frames - lit - (count - 1), count + 1)
    gaps[1:-1] += 1  # a dark frame at least between two flashes
    x, y = rng.integers(canvas.shape[1] - side + 1, size=2)
    at = 0
    for gap, flash in zip(gaps, flashes, strict=False):
        for frame in canvas[at + gap : at + gap + flash]:
            paint(frame, shape_mask(shape, side), colour, x, y)
        at += gap + flash
    options = ", ".join(map(str, COUNTS[:-1])) + f" or {COUNTS[-1]}"
    return f"How many times did the {name} flash, {options}?", str(count)


def _frame(item: int, rng: np.random.Generator, canvas: np.ndarray, group: int) -> tuple[str, str]:
    names = list(COLOURS)
    answer = names[item % len(names)]
    asked = int(rng.integers(len(canvas)))
    _, _, shape, side = _object(rng, canvas.shape[1])
    x, y = rng.integers(canvas.shape[1] - side + 1, size=2)
    shown = np.resize(names, len(canvas))
    for start in range(0, len(canvas), group):
        rng.shuffle(shown[start : start + group])
    # Renaming all colours in a cycle puts the answer where it belongs and keeps every group even.
    turn = names.index(answer) - names.index(shown[asked])
    for frame, colour in zip(canvas, shown, strict=True):
        colour = names[(names.index(colour) + turn) % len(names)]
        paint(frame, shape_mask(shape, side), tint(rng, colour), x, y)
    options = ", ".join(names[:-1]) + f" or {names[-1]}"
    return f"Which colour is the {shape} in frame {asked + 1} of {len(canvas)}: {options}?", answer


# ----------------------------------------------------------------------------------------- drawing


def _object(
    rng: np.random.Generator, size: int, colour: str | None = None
) -> tuple[str, np.ndarray, str, int]:
    """A shape's name, its exact colour [3], its kind and its side in pixels."""
    colour = colour or str(rng.choice(list(COLOURS)))
    shape = str(rng.choice(SHAPES))
    side = int(rng.integers(round(0.22 * size), round(0.34 * size) + 1))
    return f"{colour} {shape}", tint(rng, colour), shape, side


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A muted picture, float [size, size, 3]: noise whose spectrum falls as in natural images."""
    shades = texture(rng, size)
    grey = rng.uniform(90, 150) + rng.uniform(0, 10) * shades
    return grey[:, :, None] + rng.uniform(-8, 8, 3)


def _partition(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """`total` split at random into `parts` numbers of at least 0."""
    cuts = np.sort(rng.integers(0, total + 1, parts - 1))
    return np.diff(np.concatenate([[0], cuts, [total]]))


# ----------------------------------------------------------------------------------------- writing


def write_split(
    out: str,
    name: str,
    count: int,
    seed: int,
    tasks: Sequence[str] = tuple(CHANCE),
    frames: int = 8,
    size: int = 32,
    group: int = 4,
) -> str:
    """Writes `count` videos and OUT/NAME.jsonl, one question a video; returns that file's path.

    Args:
      out: folder; it is created. Videos go into OUT/videos, and their paths are relative to OUT.
      name: of the split. The random stream depends on (seed, name, number of the clip) only.
      tasks: families, each with an equal share of the records.
      frames, size, group: see `make_clip`.
    """
    unknown = sorted(set(tasks) - set(CHANCE))
    if unknown or not tasks:
        raise ValueError(f"tasks={list(tasks)}: known families are {', '.join(CHANCE)}")
    if frames % group or frames < 2 * max(COUNTS) or (frames // group < 2 and "order" in tasks):
        raise ValueError(
            f"frames={frames}, group={group}: frames must be a multiple of group, at least"
            f" {2 * max(COUNTS)}, and two groups or more for questions about order"
        )
    if group < 2 or (group % len(COLOURS) and "frame" in tasks):
        raise ValueError(
            f"group={group}: motion needs two frames, and questions about a frame need a multiple"
            f" of {len(COLOURS)}, so that every group shows every colour equally often"
        )
    if size < 24 or size % 2:
        raise ValueError(f"size={size} must be even and at least 24 pixels")
    os.makedirs(os.path.join(out, "videos"), exist_ok=True)
    split = int.from_bytes(name.encode(), "little")
    path = os.path.join(out, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            rng = np.random.default_rng([seed, split, i])
            clip = make_clip(tasks[i % len(tasks)], i // len(tasks), rng, frames, size, group)
            video = f"videos/{name}_{i:06d}.mp4"
            write_video(os.path.join(out, video), clip.frames)
            record = {
                "id": f"{name}_{i:06d}",
                "task": clip.task,
                "media": [{"type": "video", "path": video}],
                "conversations": [
                    {"from": "human", "value": f"<video>\n{clip.question}"},
                    {"from": "gpt", "value": clip.answer},
                ],
            }
            file.write(json.dumps(record) + "\n")
    return path


def write_tokenizer(out: str, records: str) -> str:
    """Writes OUT/tokenizer, a byte-level BPE of the questions and answers in `records`.

    A question is then some 15 tokens; byte by byte it would be 60.
    """
    with open(records, encoding="utf-8") as file:
        turns = [turn["value"] for line in file for turn in json.loads(line)["conversations"]]
    headers = ["user\n", "model\n", "assistant\n"]  # of the chat templates
    path = os.path.join(out, "tokenizer")
    train_tokenizer(turns + headers * len(turns), VOCABULARY).save_pretrained(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write mp4 files of moving shapes and questions.")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=8000, help="training records")
    parser.add_argument("--test", type=int, default=1000, help="held-out records")
    parser.add_argument("--tasks", default=",".join(CHANCE), help="families, separated by commas")
    parser.add_argument("--frames", type=int, default=8, help="frames in a video")
    parser.add_argument("--size", type=int, default=32, help="side of a frame, pixels")
    parser.add_argument("--group", type=int, default=4, help="frames that the model will average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, count in (("train", args.train), ("test", args.test)):
        path = write_split(
            args.out,
            name,
            count,
            args.seed,
            args.tasks.split(","),
            args.frames,
            args.size,
            args.group,
        )
        print(f"{path}: {count} records")
    print(write_tokenizer(args.out, os.path.join(args.out, "train.jsonl")))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    main()
