"""TempCompass (arXiv 2403.00476): 410 short videos, asked about time in four ways.

Annotations: `questions/{multi-choice,yes_no,caption_matching,captioning}.json`, video -> dimension
-> questions, or the parquet files of lmms-eval/TempCompass, a folder for each of the four. Videos
are `videos/<video_id>.mp4`.

Where TempCompass's code finds no option in an output it asks a language model; here that output has
no answer. Captions can be judged by a model only: `tempcompass_captioning` has no score, it writes
predictions/<set>/captioning.json for TempCompass's own eval_captioning.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Answered, Family, Item, Prompt, TaskError
from storm_jax.evaluation.scoring import values_of
from storm_jax.evaluation.task import Expected, Task, View

Kind = Literal["multi-choice", "yes_no", "caption_matching", "captioning"]

_NAMES = ("TempCompass",)
_DIMENSIONS = ("action", "speed", "direction", "order", "attribute_change")
_ENDS: dict[Kind, str] = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}
_EXPECTED: dict[Kind, tuple[int, tuple[int, int]]] = {
    "multi-choice": (1580, (2, 4)),
    "yes_no": (2453, (2, 2)),
    "caption_matching": (1503, (2, 2)),
    "captioning": (2004, (0, 0)),
}
# A line "A. x", some of which lack the space, or "Option 1: x", "Sentence A: x", "Caption A: x".
_OPTION = re.compile(r"\s*(?:([A-Z])\.|(?:Option|Sentence|Caption) (\w):)\s*(.*)")


@dataclass(frozen=True)
class TempCompass(Task):
    """lmms-eval asks as the official code does; VILA does not evaluate on TempCompass."""

    kind: Kind

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms")

    @property
    def expected(self) -> Expected:
        items, counts = _EXPECTED[self.kind]
        return Expected(items, counts, 410)

    def load(self, data: Path) -> list[Item]:
        what = f"TempCompass's {self.kind}"
        patterns = (
            f"questions/{self.kind}.json",
            f"{self.kind}.json",
            f"{self.kind}/*.parquet",
            f"*/{self.kind}/*.parquet",
        )
        roots = files.roots(data, _NAMES)
        places = files.places(roots, ("videos", "video", ""))
        items = []
        for path in files.annotations(data, _NAMES, patterns, what):
            content = files.read(path)
            counts: dict[str, int] = {}
            for row in _nested(path, content, what) if isinstance(content, dict) else content:
                files.rows(path, [row], ("video_id", "dim", "question", "answer"), what)
                stem = f"{row['video_id']}/{row['dim']}"
                counts[stem] = counts.get(stem, -1) + 1
                items.append(self._item(path, row, f"{stem}/{counts[stem]}", places))
        return options.unique(str(data), items)

    def _item(self, path: Path, row: dict[str, Any], name: str, places: Sequence[Path]) -> Item:
        where = f"{path}: item {name}"
        if row["dim"] not in _DIMENSIONS:
            raise TaskError(
                f"{where} is about {row['dim']!r}; TempCompass has {', '.join(_DIMENSIONS)}"
            )
        printed, answer = str(row["question"]), str(row["answer"])
        question, texts, labels, right = printed, ("yes", "no"), (), None
        if self.kind == "yes_no":
            right = options.answer_index(where, answer, texts, "text")
        elif self.kind == "captioning":
            texts = ()
        else:
            question, lines = printed.split("\n")[0], printed.split("\n")[1:]
            matches = [m for m in map(_OPTION.match, lines) if m]
            if not lines or len(matches) < len(lines):
                raise TaskError(
                    f"{where} has the question {printed!r}; a line with an option such as 'A. x'"
                    " was expected for each line after the first. Is it of another kind?"
                )
            texts = options.checked(where, [m[3] for m in matches], 2, 4)
            labels = tuple(m[1] or m[2] for m in matches)
            right = options.answer_index(where, answer, lines, "text")
        return Item(
            id=name,
            video=files.video(places, [str(row["video_id"])]),
            question=question,
            options=texts,
            answer=right,
            categories={"dimension": str(row["dim"])},
            labels=("yes", "no") if self.kind == "yes_no" else labels,
            printed=printed,
        )

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        text = item.printed + _ENDS[self.kind]
        tokens = 128 if self.kind == "captioning" else 16
        if family == "lmms":
            return prompts.lmms(text, tokens)
        return Prompt(f"{prompts.VIDEO}\n{text}", max_new_tokens=tokens)

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        if self.kind != "captioning":
            return {}
        predictions: dict[str, dict[str, list[dict[str, str]]]] = {}
        for record in records:
            video = record.item.id.split("/")[0]
            dimension = values_of(record.item, "dimension")[0]
            about = {"question": record.item.printed, "prediction": record.output}
            predictions.setdefault(video, {}).setdefault(dimension, []).append(about)
        return {"captioning.json": json.dumps(predictions, indent=1)}


def _nested(path: Path, content: dict[str, Any], what: str) -> Iterator[dict[str, Any]]:
    for video, dimensions in content.items():
        if not isinstance(dimensions, dict):
            raise TaskError(
                f"{path}: expected video -> dimension -> questions, as {what} has; found"
                f" {video!r} -> a {type(dimensions).__name__}"
            )
        for dimension, questions in dimensions.items():
            for question in questions:
                yield {"video_id": video, "dim": dimension, **question}


TASKS = tuple(
    TempCompass(f"tempcompass_{kind.replace('-', '_')}", kind)
    for kind in ("multi-choice", "yes_no", "caption_matching", "captioning")
)
