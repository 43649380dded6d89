"""What can be learned from the question, one frame, group means, or all frames of controlled clips.

    python -m storm_jax.data.controlled.fetch --out=CLIPS
    python benchmarks/controlled_probes.py --backgrounds=CLIPS --out=FILE.json

One small network a family and kind of input, trained from nothing on decoded mp4 files and asked
about others. The pictures (none, a frame drawn at random, the mean of each group in order, every
frame in order) are described in the same way for all kinds: coarse pixels, and features that make
the work easy, which are how much of the colour of each named object and each option there is, and
where, and what the most colourful thing looks like when it is moved to the middle. A network of two
hidden layers then finds an answer that is in the pixels from some thousand clips; where it does no
better than chance, the information is missing.
"""

import argparse
import functools
import json
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import machine
import numpy as np

from storm_jax.data.controlled.backgrounds import Clips, Texture
from storm_jax.data.controlled.clip import make_clip
from storm_jax.data.controlled.families import FAMILIES
from storm_jax.data.controlled.layout import Layout
from storm_jax.data.controlled.oracle import answer as oracle
from storm_jax.data.drawing import COLOURS, DIGITS, SHAPES, write_video
from storm_jax.data.video import decode

INPUTS = ("question", "one frame", "group means", "all frames")
LAYOUT = Layout()
_WORDS = [*COLOURS, *SHAPES, *DIGITS, "left", "right", "up", "down"]
_SLOTS, _OPTIONS = 5, 4  # the object asked about and the options; options at most
_SMALL = 0.05
_CENTRE = 14  # side of the cut-out around a thing, in pixels of 2 x 2


# -------------------------------------------------------------------------------------------- clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backgrounds", default="")
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--train", type=int, default=1680, help="clips of a family")
    parser.add_argument("--test", type=int, default=960, help="clips of a family")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    began, families = time.time(), {}
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), _start, (args.backgrounds,)
    ) as pool:
        for name in args.families.split(","):
            train = _clips(pool, name, "train", args.train)
            test = _clips(pool, name, "test_seen", args.test)
            families[name] = _report(name, train, test, args.epochs)
            print(name, json.dumps(families[name]), flush=True)
            result = {
                **machine.describe(),
                "clips": {"train": args.train, "test": args.test, "frames": LAYOUT.frames},
                "size": LAYOUT.size,
                "group": LAYOUT.group,
                "background": "natural clips" if args.backgrounds else "procedural",
                "epochs": args.epochs,
                "seconds": round(time.time() - began),
                "families": families,
            }
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
                file.write("\n")


def _start(backgrounds: str) -> None:
    global _background
    _background = Clips(backgrounds, LAYOUT.size) if backgrounds else Texture()


def _clips(pool, name: str, split: str, count: int) -> dict[str, np.ndarray]:
    """Arrays of a family's clips, the first axis is of clips."""
    made = pool.map(functools.partial(_clip, name, split), range(count), chunksize=50)
    columns = zip(*made, strict=True)
    keys = ("pictures", "slots", "words", "numbers", "options", "answers", "oracle")
    return {key: np.stack(column) for key, column in zip(keys, columns, strict=True)}


def _clip(name: str, split: str, item: int):
    clip = make_clip(FAMILIES[name], item, 0, split, LAYOUT, _background)
    question = clip.question
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        write_video(path, clip.frames)
        frames, _ = decode(path, n=LAYOUT.frames)
    # Training clips need no oracle.
    found = oracle(name, question.text, question.options, frames) if split != "train" else -1
    half = LAYOUT.size // 2
    pictures = frames.reshape(-1, half, 2, half, 2, 3).mean((2, 4)) / 64 - 2
    # The colour of the object that is asked about, and that of each option; -1: none.
    named = [question.text.replace("?", "").split(": ")[0], *question.options]
    colours = [[c for c in re.findall(r"\w+", text) if c in COLOURS][:1] for text in named]
    slots = np.full(_SLOTS, -1)
    for k, colour in enumerate(colours):
        slots[k] = list(COLOURS).index(colour[0]) if colour else -1
    words = np.zeros((_SLOTS, len(_WORDS)), np.float32)
    for k, text in enumerate(named):
        for word in re.findall(r"\w+", text):
            if word in _WORDS:
                words[k, _WORDS.index(word)] = 1
    numbers = np.eye(LAYOUT.frames, dtype=np.float32)[question.number]
    options = np.arange(_OPTIONS) < len(question.options)
    return pictures.astype(np.float32), slots, words, numbers, options, clip.answer, found


# ------------------------------------------------------------------------------------------- probes


def _report(name: str, train, test, epochs: int) -> dict:
    from scipy.stats import binom

    family, count = FAMILIES[name], len(test["answers"])
    chance = float((1 / test["options"].sum(1)).mean())
    report = {
        "chance": chance,
        "claims": [
            c for c in ("needs_time", "needs_mixing", "needs_coverage") if getattr(family, c)
        ],
        "oracle": float((test["oracle"] == test["answers"]).mean()),
        "bound_99": float(binom.ppf(0.99, count, chance)) / count,
    }
    if family.needs_coverage:  # what one frame may give: it is one of those that show the answer
        seen = LAYOUT.group / 2 / LAYOUT.frames
        best = seen + (1 - seen) * chance
        report["bound_99_one_frame"] = float(binom.ppf(0.99, count, best)) / count
    for kind in INPUTS:
        report[kind] = _probe(kind, train, test, epochs)
    return report


def _probe(kind: str, train, test, epochs: int) -> float:
    """Held-out accuracy."""
    import jax
    import optax

    rng = np.random.default_rng(0)
    described = [_described(kind, clips) for clips in (train, test)]
    batch, chosen = 50, _inputs(kind, train, described[0], rng)
    params = _init(jax.random.key(0), chosen["seen"].shape[1])
    steps = epochs * (len(train["answers"]) // batch)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)

    def loss(params, data):
        logits = _logits(params, data)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data["answers"]).mean()

    @jax.jit
    def step(params, state, data):
        gradient = jax.grad(loss)(params, data)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for _ in range(epochs):
        data = _inputs(kind, train, described[0], rng)
        order = rng.permutation(len(data["answers"]))
        for k in range(0, len(order) - batch + 1, batch):
            chosen = {key: value[order[k : k + batch]] for key, value in data.items()}
            params, state = step(params, state, chosen)
    predict = jax.jit(_logits)
    # What a frame at random gives is the mean over the frames.
    seen = [described[1]]
    if kind == "one frame":
        seen = [described[1][:, t : t + 1] for t in range(LAYOUT.frames)]
    right = []
    for pictures in seen:
        data = _inputs(kind, test, pictures, rng)
        right.append(np.asarray(predict(params, data)).argmax(-1) == data["answers"])
    return float(np.mean(right))


def _described(kind: str, clips) -> np.ndarray:
    """What is seen in each picture, [clips, T, features]."""
    pictures = clips["pictures"]
    count = len(pictures)
    if kind == "question":
        pictures = pictures[:, :0]
    elif kind == "group means":
        pictures = pictures.reshape(count, -1, LAYOUT.group, *pictures.shape[2:]).mean(2)
    shown = pictures.shape[1]
    coarse = pictures.reshape(count, shown, 6, 4, 6, 4, 3).mean((3, 5)).reshape(count, shown, 108)
    colours = _colour_features(pictures, clips["slots"])
    # The many pixels are small beside the few features, so that these are tried first.
    return np.concatenate([colours, 0.1 * coarse, _SMALL * _centred(pictures)], -1)


def _inputs(kind: str, clips, described: np.ndarray, rng: np.random.Generator):
    data = {k: clips[k] for k in ("words", "numbers", "options", "answers")}
    if kind == "one frame":  # another one each time
        count, shown = described.shape[:2]
        described = described[np.arange(count), rng.integers(shown, size=count)][:, None]
    # The centred thing once more, summed over the pictures: nothing has to be learned frame by
    # frame that is the same in all.
    whole = described[:, :, -_CENTRE * _CENTRE :].sum(1) / _SMALL
    flat = described.reshape(len(described), described.shape[1] * described.shape[2])
    colours = described[:, :, : 3 * _SLOTS]
    # How much the colours change from one picture to the next, and those of the picture in which
    # the frame lies that the question numbers.
    changes = np.abs(np.diff(colours, axis=1)).sum(1)
    shown = max(described.shape[1], 1)
    numbered = clips["numbers"].reshape(len(described), shown, -1).sum(2)[:, : described.shape[1]]
    asked = np.einsum("bt,btf->bf", numbered, colours)
    seen = np.concatenate([flat, whole, changes, asked], -1)
    return {**data, "seen": seen}


def _colour_features(pictures: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """How much of each slot's colour there is and where its centre is, [clips, T, slots * 3]."""
    nominal = np.array(list(COLOURS.values()), np.float32)
    nominal -= nominal.mean(-1, keepdims=True)
    nominal /= np.linalg.norm(nominal, axis=-1, keepdims=True)
    hue = pictures - pictures.mean(-1, keepdims=True)
    near = hue @ nominal.T  # [clips, T, h, w, colours]
    near *= near >= near.max(-1, keepdims=True)
    near = np.maximum(near - 0.15, 0)
    amount = near.sum((2, 3))
    y, x = (np.arange(n, dtype=np.float32) / n - 0.5 for n in near.shape[2:4])
    centre_x = np.einsum("bthwc,w->btc", near, x) / (amount + 1e-3)
    centre_y = np.einsum("bthwc,h->btc", near, y) / (amount + 1e-3)
    features = np.stack([amount / 20, 2 * centre_x, 2 * centre_y], -1)
    chosen = np.take_along_axis(features, np.maximum(slots, 0)[:, None, :, None], 2)
    chosen = chosen * (slots >= 0)[:, None, :, None]
    return chosen.reshape(*chosen.shape[:2], 3 * _SLOTS)


def _centred(pictures: np.ndarray) -> np.ndarray:
    """The most colourful thing of each picture, its centre in the middle, [clips, T, pixels]."""
    strength = np.maximum(np.ptp(pictures, axis=-1) - 0.5, 0)
    *outer, h, w = strength.shape
    result = np.zeros((*outer, _CENTRE, _CENTRE), np.float32)
    padded = np.pad(strength, [(0, 0)] * len(outer) + [(_CENTRE, _CENTRE)] * 2)
    total = strength.sum((-2, -1)) + 1e-3
    y = np.einsum("...hw,h->...", strength, np.arange(h)) / total
    x = np.einsum("...hw,w->...", strength, np.arange(w)) / total
    for index in np.ndindex(*outer):
        if total[index] > 5:
            top, left = (round(float(c[index])) + _CENTRE - _CENTRE // 2 for c in (y, x))
            result[index] = padded[index][top : top + _CENTRE, left : left + _CENTRE]
    return result.reshape(*outer, _CENTRE * _CENTRE)


def _init(key, seen: int):
    import jax

    keys = iter(jax.random.split(key, 8))
    width = 128

    def dense(*shape):
        return jax.random.normal(next(keys), shape) * np.sqrt(2 / shape[0])

    return {
        "in": dense(seen + _SLOTS * len(_WORDS) + LAYOUT.frames, width) * 0.5,
        "in_bias": np.zeros(width, np.float32),
        "middle": dense(width, width),
        "middle_bias": np.zeros(width, np.float32),
        "index": dense(width, _OPTIONS) * 0.1,
        "meaning": dense(width, len(_WORDS)) * 0.1,
    }


def _logits(params, data):
    """Scores of the options, [clips, options]; -1e9 where there is no such option."""
    import jax
    import jax.numpy as jnp

    count = len(data["answers"])
    words = data["words"].reshape(count, -1)
    hidden = jnp.concatenate([data["seen"], words, data["numbers"]], -1)
    hidden = jax.nn.relu(hidden @ params["in"] + params["in_bias"])
    hidden = jax.nn.relu(hidden @ params["middle"] + params["middle_bias"])
    meant = jnp.einsum("bw,bow->bo", hidden @ params["meaning"], data["words"][:, 1:])
    return jnp.where(data["options"], hidden @ params["index"] + meant, -1e9)


if __name__ == "__main__":
    main()
