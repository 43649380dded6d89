"""MLVU (arXiv 2406.04264): long videos; multiple choice of the dev set and of the test set.

Annotations, dev: the seven files `json/1_plotQA.json` to `json/7_topic_reasoning.json`, or the
parquet of sy1998/MLVU_dev. Test: `test_question.json`, or the parquet of sy1998/MLVU_Test. Videos
lie in a folder for each task (`video/1_plotQA/`) or all in one. The two open-ended tasks need a
judge and are not asked.

Files hold items with equal and with empty candidates. Two answers of the dev set's needle task are
none of the candidates: they are never right, and count.
"""

import functools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Answered, Family, Item, Prompt, TaskError
from storm_jax.evaluation.scoring import values_of
from storm_jax.evaluation.task import Expected, Task, View

_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations,"
    " select the best option that accurately addresses the question."
)
_DEV = {
    "plotQA": 539,
    "needle": 355,
    "ego": 352,
    "count": 206,
    "order": 259,
    "anomaly_reco": 200,
    "topic_reasoning": 264,
}
_TEST = ("anomaly_reco count ego needleQA order plotQA sportsQA topic_reasoning tutorialQA").split()
_LETTER = re.compile(r"\(?[A-F]\)?\.?")
_NUMBERED = re.compile(r"\d_(?!.*\.json$)")  # folders of tasks, beside which their files may lie
# The name that a task has elsewhere -> here.
_DEV_NAMES = {"findNeedle": "needle", "needleQA": "needle"}
_TEST_NAMES = {"findNeedle": "needleQA", "needle": "needleQA"}


@dataclass(frozen=True)
class MLVU(Task):
    """M-Avg, the mean of the tasks' accuracies: 7 of the dev set, 9 of the test set.

    lmms-eval asks the dev set's questions with "Best option: (" at the end of the user's turn, and
    the test set's questions with nothing after them. VILA does not evaluate on MLVU.
    """

    test: bool

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms")
    mean_over: ClassVar[str] = "task"

    @property
    def expected(self) -> Expected:
        return Expected(502, (6, 6)) if self.test else Expected(2175, (4, 4), None, {"task": _DEV})

    def load(self, data: Path) -> list[Item]:
        if self.test:
            names = ("MLVU_Test", "mlvu_test", "MLVU")
            patterns = ("*test*question*.json", "*/*test*question*.json", *_parquet("test"))
        else:
            names = ("MLVU", "MLVU_dev", "MVLU")
            patterns = ("json/[1-7]_*.json", "[1-7]_*.json", "MLVU/json/[1-7]_*.json")
            patterns += _parquet("dev")
        roots = files.roots(data, names)
        roots += [root / "MLVU" for root in roots]
        videos = functools.cache(lambda kind, folder: _places(roots, kind, folder))
        items = []
        for path in files.annotations(data, names, patterns, self._what):
            content = files.rows(
                path,
                files.read(path),
                ("question_id", "question") if self.test else ("question", "answer"),
                self._what,
                ("question_type", "task_type"),
            )
            folder = path.stem if path.suffix == ".json" else ""
            for number, row in enumerate(content):
                kind = self._kind(path, number, row)
                items.append(self._item(path, number, row, kind, videos(kind, folder)))
        seen: Counter[str] = Counter()
        for index, item in enumerate(items):  # a question may be asked twice of a video
            seen[item.id] += 1
            if not self.test and seen[item.id] > 1:
                items[index] = replace(item, id=f"{item.id}/{seen[item.id]}")
        return options.unique(str(data), items)

    @property
    def _what(self) -> str:
        return "MLVU's test set" if self.test else "MLVU's dev set"

    def _kind(self, path: Path, number: int, row: dict[str, Any]) -> str:
        """The task that a row belongs to, by its name here."""
        kind = str(row.get("question_type") or row.get("task_type"))
        kind = (_TEST_NAMES if self.test else _DEV_NAMES).get(kind, kind)
        known = _TEST if self.test else _DEV
        if kind not in known:
            raise TaskError(
                f"{path}: item {number} is of the task {kind!r}; {self._what} has"
                f" {', '.join(known)}"
            )
        return kind

    def _item(
        self, path: Path, number: int, row: dict[str, Any], kind: str, videos: Sequence[Path]
    ) -> Item:
        where = f"{path}: item {row.get('question_id', number)}"
        name = str(row.get("video") or row.get("video_name") or "")
        if not name:
            raise TaskError(f"{where} names no video; expected the field video or video_name")
        # One question of the dev set is empty, as are its candidates.
        question, printed = str(row["question"]), str(row["question"])
        if row.get("candidates") is None:
            question, texts = options.split_question(where, printed)
        else:
            texts = row["candidates"]
            lines = "".join(f"\n({chr(ord('A') + i)}) {text}" for i, text in enumerate(texts))
            printed = f"{question}{lines}\n"  # as Hugging Face's copy has it
        count = 6 if self.test else 4
        texts = options.checked(where, texts, count, count, duplicates=True)
        if self.test:
            identity = str(row["question_id"])
        else:
            stem = os.path.splitext(os.path.basename(name))[0]
            words = " ".join(question.split())
            identity = f"{kind}/{stem}/{zlib.crc32(words.encode()):08x}"
        return Item(
            id=identity,
            video=files.video(videos, [name]),
            question=question,
            options=texts,
            answer=_answer(where, row.get("answer"), texts, kind),
            categories={"task": kind},
            printed=printed,
        )

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        if family == "lmms":
            end = "" if self.test else "\nOnly give the best option.\nBest option: ("
            return prompts.lmms(item.printed + end)
        return Prompt(
            f"{prompts.VIDEO}\nQuestion: {item.question}\nOptions:\n"
            f"{options.lines(item, '(A) x')}".rstrip()
            + "\nOnly give the best option.",
            system=_SYSTEM,
            answer_prefix="Best Option: (",
            max_new_tokens=100,
        )

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        if not self.test:
            return {}
        answers = [
            {
                "question_id": r.item.id,
                "question_type": values_of(r.item, "task")[0],
                "option": r.item.letters[r.predicted] if isinstance(r.predicted, int) else "",
            }
            for r in records
        ]
        return {"mlvu_test.json": json.dumps(answers, indent=1)}


def _parquet(split: str) -> tuple[str, ...]:
    return (f"{split}*.parquet", "test*.parquet", "data/*.parquet", "*.parquet")


def _places(roots: Sequence[Path], kind: str, folder: str) -> list[Path]:
    """Where a task's videos may be: its numbered folder, or one with all videos."""
    should, names = [], [folder] if folder else []
    for place in (root / name for root in roots for name in ("video", "videos", ".")):
        if place.is_dir():
            numbered = [d.name for d in sorted(place.iterdir()) if _NUMBERED.match(d.name)]
            names += [name for name in numbered if name.partition("_")[2] == kind]
            # Where other tasks have a folder each, a missing one has its own too.
            should += [place / folder] if folder and numbered else []
    names += [kind, "."]
    every = [f"{place}/{name}" for place in ("video", "videos", ".") for name in names]
    return [*should[:1], *files.places(roots, every)]


def _answer(where: str, answer: Any, texts: tuple[str, ...], kind: str) -> int | str | None:
    if answer is None:
        return None
    if str(answer) in texts:
        return options.answer_index(where, answer, texts, "text")
    if kind == "needle" and not _LETTER.fullmatch(str(answer)):
        return str(answer)  # never right
    return options.answer_index(where, answer, texts, "letter")


TASKS = (MLVU("mlvu_dev", test=False), MLVU("mlvu_test", test=True))
