"""LongVideoBench (arXiv 2407.15754): questions that refer to a moment of a video of up to an hour.

Annotations: `lvb_val.json` and `lvb_test_wo_gt.json`, or the parquet files `validation-*` and
`test-*` beside them. Videos are `videos/<video_path>`, subtitles `subtitles/<subtitle_path>`. With
subtitles, frames and subtitles are interleaved by time. The test set's answers are not published;
its submission is an object of id and letter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Answered, Family, Item, Prompt, TaskError
from storm_jax.evaluation.task import Expected, Task, View

_NAMES = ("LongVideoBench", "longvideobench")
_FIELDS = ("video_id", "question", "id", "video_path", "subtitle_path", "duration_group")
_GROUPS = {"15": 189, "60": 172, "600": 412, "3600": 564}  # of the validation set


@dataclass(frozen=True)
class LongVideoBench(Task):
    """The published `official` text is a list of lines; lmms-eval's has no "Question: " in it.

    VILA runs lmms-eval's task, on the validation set, without subtitles.
    """

    test: bool

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms", "vila")
    with_subtitles: ClassVar[bool] = True

    @property
    def expected(self) -> Expected:
        if self.test:
            return Expected(5341, (2, 5))
        return Expected(1337, (2, 5), 753, {"duration_group": _GROUPS})

    def load(self, data: Path) -> list[Item]:
        patterns = ("lvb_test_wo_gt.json", "test-*.parquet", "*/test-*.parquet")
        if not self.test:
            patterns = ("lvb_val.json", "validation-*.parquet", "*/validation-*.parquet")
        roots = files.roots(data, _NAMES)
        videos = files.places(roots, ("videos", "video", ""))
        subtitles = files.places(roots, ("subtitles", "subtitle"))
        items = []
        for path in files.annotations(data, _NAMES, patterns, self._what()):
            content = files.rows(
                path, files.read(path), _FIELDS, self._what(), ("candidates", "option0")
            )
            for row in content:
                items.append(self._item(path, row, videos, subtitles))
        return options.unique(str(data), items)

    def _what(self) -> str:
        return f"LongVideoBench's {'test' if self.test else 'validation'} set"

    def _item(
        self, path: Path, row: dict[str, Any], videos: Sequence[Path], subtitles: Sequence[Path]
    ) -> Item:
        where = f"{path}: item {row['id']}"
        candidates = row.get("candidates")
        if candidates is None:  # parquet: as many columns as the longest list needs
            columns = [row.get(f"option{i}") for i in range(5)]
            candidates = [c for c in columns if c is not None and c != "N/A"]
        texts = options.checked(where, candidates, 2, 5, duplicates=True)
        right = row.get("correct_choice")
        if right is not None and right != -1:
            right = options.decided(
                where, texts, options.answer_index(where, right, texts, "index")
            )
        else:
            right = None
        if right is None and not self.test:
            raise TaskError(
                f"{where} has no correct_choice; is {path.name} a file of the test set? Its task"
                " is longvideobench_test"
            )
        offset = row.get("starting_timestamp_for_subtitles") or 0.0
        return Item(
            id=str(row["id"]),
            video=files.video(videos, [str(row["video_path"])]),
            question=str(row["question"]),
            options=texts,
            answer=right,
            subtitles=files.existing(subtitles, str(row["subtitle_path"])),
            subtitle_offset=float(offset),
            categories={
                name: str(row[name])
                for name in ("duration_group", "question_category", "topic_category", "level")
                if row.get(name) is not None
            },
        )

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        if family == "vila" and view.cues is not None:
            raise TaskError(
                f"{self.name} has no vila prompt with subtitles: VILA evaluates without; use"
                " official or lmms"
            )
        listed = options.lines(item, "A. x")
        if family == "official":
            body = f"Question: {item.question}\n{listed}\n{prompts.LETTER_DIRECTLY}"
        else:
            body = f"{item.question}\n{listed}\n{prompts.LETTER_DIRECTLY}\n"
        video, counts = prompts.VIDEO, ()
        if view.cues is not None:
            video, counts = prompts.interleaved(
                view.cues, view.times, view.groups, item.subtitle_offset, view.duration
            )
        stop = () if family == "official" else prompts.LMMS_STOP
        return Prompt(f"{video}\n{body}", stop=stop, max_new_tokens=32, groups=counts)

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        if not self.test:
            return {}
        letters = {
            r.item.id: r.item.letters[r.predicted] if isinstance(r.predicted, int) else ""
            for r in records
        }
        return {"longvideobench_test.json": json.dumps(letters, indent=1)}


TASKS = (
    LongVideoBench("longvideobench_val", test=False),
    LongVideoBench("longvideobench_test", test=True),
)
