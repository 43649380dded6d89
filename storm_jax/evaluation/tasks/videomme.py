"""Video-MME (arXiv 2405.21075): 900 videos of 11 s to an hour, three questions each.

Annotations: the parquet of lmms-lab/Video-MME (`videomme/test-*.parquet`), or JSON in the form of
the official output template, a list of videos with their `questions`. Videos are
`data/<videoID>.mp4`, subtitles `subtitle/<videoID>.srt`; 156 videos have none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Family, Item, Prompt
from storm_jax.evaluation.task import Expected, Task, View

_NAMES = ("Video-MME", "videomme", "Video_MME")
_PATTERNS = (
    "videomme/test*.parquet",
    "test*.parquet",
    "data/test*.parquet",
    "*ideo*MME*.json",
    "*ideo*mme*.json",
    "output_test_template.json",
)
_FIELDS = ("question_id", "task_type", "question", "options", "answer")
_VIDEO_FIELDS = ("video_id", "duration", "domain", "sub_category")
_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video{}. Respond"
    " with only the letter (A, B, C, or D) of the correct option."
)
_LMMS_FRAMES = 32  # at which lmms-eval reads the subtitles, whatever the model sees


@dataclass(frozen=True)
class VideoMME(Task):
    """Prompts: `official` and `vila` are the same text; VILA replaces lmms-eval's by it."""

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms", "vila")
    with_subtitles: ClassVar[bool] = True

    @property
    def expected(self) -> Expected:
        lengths = {"short": 900, "medium": 900, "long": 900}
        return Expected(2700, (4, 4), 900, {"duration": lengths})

    def load(self, data: Path) -> list[Item]:
        roots = files.roots(data, _NAMES)
        videos = files.places(roots, ("data", "videos", "video", ""))
        subtitles = files.places(roots, ("subtitle", "subtitles"))
        items = []
        for path in files.annotations(data, _NAMES, _PATTERNS, "Video-MME"):
            for number, row in enumerate(_flat(path, files.read(path))):
                items.append(_item(path, number, row, videos, subtitles))
        return options.unique(str(data), items)

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        question = f"{item.question}\n{options.lines(item, 'A. x')}"
        if family == "lmms":
            body = _INSTRUCTION.format(" and the subtitles") + f"\n{question}\n"
            if view.cues is None:
                return prompts.lmms(f"{body}\n{prompts.LETTER_DIRECTLY}")
            duration = view.duration
            if duration is None:
                duration = max(view.times, default=0.0)
            shown = prompts.at_frames(view.cues, np.linspace(0, duration, _LMMS_FRAMES).tolist())
            texts = "\n".join(shown) if view.cues else "No subtitles available"
            head = "This video's subtitles are listed below: \n"
            return prompts.lmms(f"{head}{texts}\n{body}The best answer is:")
        head = ""
        if view.cues and (shown := prompts.at_frames(view.cues, view.times)):
            head = "This video's subtitles are listed below:\n" + "\n".join(shown) + "\n"
        body = f"{head}{_INSTRUCTION.format('')}\n{question}\nThe best answer is:"
        return Prompt(f"{prompts.VIDEO}\n{body}")


def _flat(path: Path, content: Any) -> list[dict[str, Any]]:
    """Rows of questions, also where the file is a list of videos with their questions."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "questions" in content[0]:
            flat = []
            for video in files.rows(path, content, (*_VIDEO_FIELDS, "questions"), "Video-MME"):
                about = {name: value for name, value in video.items() if name != "questions"}
                flat += [{**about, **question} for question in video["questions"]]
            content = flat
    return files.rows(path, content, (*_VIDEO_FIELDS, *_FIELDS), "Video-MME", ("videoID", "url"))


def _item(
    path: Path,
    number: int,
    row: dict[str, Any],
    videos: Sequence[Path],
    subtitles: Sequence[Path],
) -> Item:
    where = f"{path}: item {row['question_id']}"
    lettered = options.checked(where, row["options"], duplicates=True)
    texts = options.unlettered(where, lettered)
    right = options.answer_index(where, row["answer"], texts, "letter")
    name = row.get("videoID") or re.sub(r".*(?:v=|/)", "", files.text(path, number, row, "url"))
    return Item(
        id=str(row["question_id"]),
        video=files.video(videos, [name]),
        question=files.text(path, number, row, "question"),
        options=texts,
        answer=options.decided(where, texts, right),
        subtitles=files.existing(subtitles, f"{name}.srt"),
        categories={
            "duration": str(row["duration"]),
            "domain": str(row["domain"]),
            "sub_category": str(row["sub_category"]),
            "task_type": str(row["task_type"]),
        },
    )


TASKS = (VideoMME("videomme"),)
