"""LVBench (arXiv 2406.08035): 1549 questions about 103 videos of an hour and more.

Annotations: `video_info.meta.jsonl`, a line for each video with its `qa`, or the parquet of
lmms-lab/LVBench, a row for each question. A question may test several abilities: it counts in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Family, Item, Prompt
from storm_jax.evaluation.task import Expected, Task, View

_NAMES = ("LVBench",)
_PATTERNS = (
    "video_info.meta.jsonl",
    "data/video_info.meta.jsonl",
    "data/train*.parquet",
    "data/test*.parquet",
    "*.parquet",
)
_FOLDERS = ("videos", "all_videos", "video", "video_chunks", "data", "scripts/videos", "")
_ABILITIES = {
    "entity recognition": "ER",
    "event understanding": "EU",
    "key information retrieval": "KIR",
    "temporal grounding": "TG",
    "reasoning": "Rea",
    "summarization": "Sum",
}


@dataclass(frozen=True)
class LVBench(Task):
    """The official prompt is the question, which holds its options; VILA has none."""

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms")

    @property
    def expected(self) -> Expected:
        return Expected(1549, (4, 4), 103)

    def load(self, data: Path) -> list[Item]:
        items = []
        videos = files.places(files.roots(data, _NAMES), _FOLDERS)
        for path in files.annotations(data, _NAMES, _PATTERNS, "LVBench"):
            for number, row in enumerate(_flat(path, files.read(path))):
                items.append(_item(path, number, row, videos))
        return options.unique(str(data), items)

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        if family == "lmms":
            return prompts.lmms(f"{item.printed}\nAnswer the question with the option letter")
        return Prompt(f"{prompts.VIDEO}\n{item.printed}")


def _flat(path: Path, content: Any) -> list[dict[str, Any]]:
    fields = ("uid", "question", "answer", "question_type")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "qa" in content[0]:
            flat = []
            for video in files.rows(path, content, ("key", "qa"), "LVBench"):
                about = {name: value for name, value in video.items() if name != "qa"}
                flat += [{**about, **question} for question in video["qa"]]
            content = flat
    return files.rows(path, content, fields, "LVBench", ("key", "video_path"))


def _item(path: Path, number: int, row: dict[str, Any], videos: Sequence[Path]) -> Item:
    where = f"{path}: item {row['uid']}"
    printed = files.text(path, number, row, "question")
    if row.get("options"):  # as lmms-eval prints them
        letters = enumerate(row["options"])
        printed += "".join(f"\n({chr(ord('A') + i)}) {option}" for i, option in letters)
    question, texts = options.split_question(where, printed)
    options.checked(where, texts, duplicates=True)
    right = options.answer_index(where, row["answer"], texts, "letter")
    kinds = row["question_type"]
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or ())
    abilities = tuple(_ABILITIES.get(kind, kind) for kind in kinds)
    return Item(
        id=str(row["uid"]),
        video=files.video(
            videos,
            [str(row[name]) for name in ("video_path", "key") if row.get(name)],
        ),
        question=question,
        options=texts,
        answer=options.decided(where, texts, right),
        categories={
            **({"type": str(row["type"])} if row.get("type") else {}),
            "ability": abilities,
        },
        printed=printed,
    )


TASKS = (LVBench("lvbench"),)
