"""EgoSchema (arXiv 2308.09126): 5031 questions, each about its own video of three minutes.

Annotations: `questions.json` with `subset_answers.json` beside it, or the parquet files of
lmms-eval/egoschema, folders `GENERATION` and `Subset`. Answers are published for 500 items, the
subset. `egoschema` asks all, scores these 500 if their answers are there, and writes the file for
the validation server (q_uid -> 0..4) and the one for Kaggle; an item whose output has no answer
in it is -1 there, which is wrong.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Answered, Family, Item, Prompt, TaskError
from storm_jax.evaluation.task import Expected, Task, View

_NAMES = ("EgoSchema",)
_FOLDERS = ("videos", "good_clips_git", "video", "")
_VILA = "Watching the video and answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class EgoSchema(Task):
    """EgoSchema publishes no prompt. VILA's has nothing between its instruction and the question.

    Attributes:
      subset: only the items whose answers are published.
    """

    subset: bool

    families: ClassVar[tuple[Family, ...]] = ("vila", "lmms")

    @property
    def expected(self) -> Expected:
        count = 500 if self.subset else 5031
        return Expected(count, (5, 5), count)

    def load(self, data: Path) -> list[Item]:
        config = "Subset" if self.subset else "GENERATION"
        patterns = ("questions.json", f"{config}/*.parquet", f"*/{config}/*.parquet")
        roots = files.roots(data, _NAMES)
        videos, answers = files.places(roots, _FOLDERS), _answers(roots)
        items = []
        for path in files.annotations(data, _NAMES, patterns, "EgoSchema"):
            if path.suffix == ".parquet":
                required: tuple[str, ...] = ("video_idx", "question", "option")
            else:
                required = ("q_uid", "question", *(f"option {i}" for i in range(5)))
            content = files.rows(path, files.read(path), required, "EgoSchema")
            for number, row in enumerate(content):
                item = _item(path, number, row, answers, videos)
                if item.answer is not None or not self.subset:
                    items.append(item)
        if not items:
            raise TaskError(
                f"{data}: no item has a published answer; put subset_answers.json beside"
                " questions.json, or use the task egoschema"
            )
        return options.unique(str(data), items)

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        question = f"{item.question}\n{options.lines(item, 'A. x')}\n"
        if family == "lmms":
            return prompts.lmms(question + prompts.LETTER_DIRECTLY)
        return Prompt(f"{prompts.VIDEO}\n{_VILA}{question}")

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        if self.subset:
            return {}
        chosen = {r.item.id: -1 if r.predicted is None else r.predicted for r in records}
        table = "".join(f"{uid},{option}\n" for uid, option in chosen.items())
        return {
            "egoschema_validation_server.json": json.dumps(chosen, indent=1),
            "egoschema_kaggle.csv": f"q_uid,answer\n{table}",
        }


def _answers(roots: Sequence[Path]) -> dict[str, int]:
    """Published answers, 0 to 4, by q_uid: those of the subset, beside the questions."""
    if found := files.existing(roots, "subset_answers.json"):
        answers = files.read(Path(found))
        if not isinstance(answers, dict):
            raise TaskError(f"{found}: expected an object of q_uid and answer, 0 to 4")
        return answers
    copies = [path for root in roots for path in sorted(root.glob("Subset/*.parquet"))]
    subset = [row for path in copies for row in files.read(path)]
    return {row["video_idx"]: int(row["answer"]) for row in subset}


def _item(
    path: Path, number: int, row: dict[str, Any], answers: dict[str, int], videos: Sequence[Path]
) -> Item:
    if "q_uid" in row:
        uid = files.text(path, number, row, "q_uid")
        where = f"{path}: item {uid}"
        texts = options.checked(where, [row[f"option {i}"] for i in range(5)], duplicates=True)
        right = answers.get(uid)
    else:
        uid = files.text(path, number, row, "video_idx")
        where = f"{path}: item {uid}"
        lettered = options.checked(where, row["option"], 5, 5, duplicates=True)
        texts = options.unlettered(where, lettered)
        right = row.get("answer")
        right = int(right) if isinstance(right, str) and right.isdecimal() else answers.get(uid)
    if right is not None:
        right = options.decided(where, texts, options.answer_index(where, right, texts, "index"))
    return Item(
        id=uid,
        video=files.video(videos, [uid]),
        question=files.text(path, number, row, "question"),
        options=texts,
        answer=right,
    )


TASKS = (EgoSchema("egoschema", subset=False), EgoSchema("egoschema_subset", subset=True))
