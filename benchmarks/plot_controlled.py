"""Draws docs/controlled.png: one decoded clip of each family.

    python benchmarks/plot_controlled.py DIR docs/controlled.png

DIR is a folder of `python -m storm_jax.data.controlled`, of 8 frames a clip.
"""

import json
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # comes with matplotlib

from storm_jax.data.video import decode


def main(folder: str, out: str) -> None:
    clips = {}
    with open(os.path.join(folder, "test_seen.jsonl"), encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["id"] >= "test_seen_000012":  # the second question of a family or later
                clips.setdefault(record["task"], record)
    figure, axes = plt.subplots((len(clips) + 1) // 2, 2, figsize=(9.6, 0.82 * len(clips) / 2))
    for axis in axes.flat:
        axis.axis("off")
    for axis, record in zip(axes.flat, clips.values(), strict=False):
        frames, _ = decode(os.path.join(folder, record["media"][0]["path"]), n=8)
        edge = np.full((frames.shape[1], 2, 3), 255, np.uint8)
        axis.imshow(np.concatenate([x for frame in frames for x in (frame, edge)], axis=1))
        question = record["conversations"][0]["value"].removeprefix("<video>\n")
        answer = record["conversations"][1]["value"]
        axis.set_title(
            f"{record['task']}: {question} {answer}", fontsize=5.6, loc="left", pad=2, wrap=False
        )
    figure.subplots_adjust(0.005, 0.0, 0.995, 0.97, wspace=0.02, hspace=0.2)
    figure.savefig(out, dpi=100)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main(*sys.argv[1:])
