"""A checkpoint of random parameters whose answers depend on the video, and questions for it."""

import json
from pathlib import Path

import jax

from storm_jax import checkpoint
from storm_jax.data import synthetic
from storm_jax.models.storm import StormModel
from tests.inference.test_engine import perturbed
from tests.serving.conftest import tiny_run

VIDEOS, QUESTIONS = 4, 3  # questions of each video; the last one is about a part of it
SRT = "1\n00:00:00,000 --> 00:00:00,300\nearly\n\n2\n00:09:00,000 --> 00:09:01,000\nlate\n"


def write_checkpoint(folder: Path) -> Path:
    params = StormModel(tiny_run().model).init(jax.random.key(5))
    # As it is at first, the decoder would repeat one token, whatever was asked.
    params["decoder"] = perturbed(params["decoder"])
    checkpoint.save_params(folder, params, tiny_run())
    return folder


def write_questions(folder: Path) -> list[dict]:
    """Writes own.jsonl, real videos, and subtitles of the first one; returns the lines."""
    synthetic.write_split(str(folder), "v", VIDEOS, seed=0)
    (folder / "v.jsonl").unlink()
    (folder / "a.srt").write_text(SRT)
    rows = []
    for v in range(VIDEOS):
        for q in range(QUESTIONS):
            row = {
                "id": f"{v}-{q}",
                "video": f"videos/v_{v:06d}.mp4",
                "question": f"What is shown in {q}?",
                "options": ["a square", "nothing", "a disc"],
                "answer": (v + q) % 3,
                "categories": {"kind": "even" if v % 2 == 0 else "odd"},
            }
            if q == QUESTIONS - 1:
                row |= {"start": 0.2, "end": 0.8}
            if v == 0:
                row["subtitles"] = "a.srt"
            rows.append(row)
    # Questions about one video need not stand together.
    rows = [r for q in range(QUESTIONS) for r in rows[q::QUESTIONS]]
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows
