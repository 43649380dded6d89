"""A user's own questions: JSONL, multiple choice or open-ended.

One object a line, in a file, or in the only .jsonl of a folder, or in its own.jsonl or test.jsonl:

    {"id": "1", "video": "clips/a.mp4", "question": "What falls?", "options": ["a cup", "a pen"],
     "answer": "a cup", "start": 2.0, "end": 9.5, "subtitles": "a.srt",
     "categories": {"scene": "kitchen", "skill": ["count", "order"]}}

`options` are left out for an open-ended question. `answer` is an index (0 for the first), or a
text, one of the options where there are some; without one an item is asked and not scored. All but
`video` and `question` may be left out. Paths are relative to the file. A category has a value or a
list of them: the item then counts in the accuracy of each, and in none of an empty list or null.

The data sets that this project trains on (`media` and `conversations`, docs/data.md) are read too:
the first question and its answer, with `options` where the record has them, and the fields `task`
and `group` as categories. Their questions are asked as they stand.

Multiple choice is scored by accuracy, open-ended questions by exact match after normalisation
(small letters, no punctuation, no articles), and by the F1 of their words.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.data.records import PLACEHOLDER, RecordError, parse_record
from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Family, Item, Prompt, TaskError
from storm_jax.evaluation.task import Expected, Task, View

_WHAT = "your own questions"


@dataclass(frozen=True)
class Own(Task):
    """The prompts of all families are one: the question, and lettered options where it has some."""

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms", "vila")
    with_subtitles: ClassVar[bool] = True

    @property
    def expected(self) -> Expected | None:
        return None

    def load(self, data: Path) -> list[Item]:
        found = files.annotations(data, (), ("own.jsonl", "test.jsonl", "*.jsonl"), _WHAT)
        if len(found) > 1:
            raise TaskError(
                f"{data} holds {', '.join(p.name for p in found)}: give the file itself, or call it"
                " own.jsonl"
            )
        (path,) = found
        items = []
        for number, row in enumerate(files.rows(path, files.read(path), (), _WHAT)):
            known = row.keys() & {"conversations", "messages"}
            items.append((_of_record if known else _of_question)(path, number, row))
        return options.unique(str(path), items)

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        body = item.printed or item.question
        if item.options and not item.printed:
            body += f"\n{options.lines(item, 'A. x')}\n{prompts.LETTER_DIRECTLY}"
        if view.cues and (shown := prompts.at_frames(view.cues, view.times)):
            body = "\n".join(["This video's subtitles are listed below:", *shown, body])
        return Prompt(f"{prompts.VIDEO}\n{body}", max_new_tokens=16 if item.options else 128)


def _of_question(path: Path, number: int, row: dict[str, Any]) -> Item:
    files.rows(path, [row], ("video", "question"), _WHAT)
    name = str(row.get("id", number))
    where = f"{path}: item {name}"
    texts, answer = _answer(where, row)
    categories = row.get("categories") or {}
    if not isinstance(categories, dict):
        raise TaskError(f"{where} has categories={categories!r}; expected an object of names")
    categories = {name: _category(where, name, value) for name, value in categories.items()}
    subtitles = row.get("subtitles")
    if subtitles and not (path.parent / subtitles).is_file():
        raise TaskError(f"{where} has subtitles={subtitles!r}: there is no such file")
    return Item(
        id=name,
        video=str(path.parent / files.text(path, number, row, "video")),
        question=PLACEHOLDER.sub("", files.text(path, number, row, "question")).strip(),
        options=texts,
        answer=answer,
        start=_seconds(where, row, "start"),
        end=_seconds(where, row, "end"),
        subtitles=str(path.parent / subtitles) if subtitles else None,
        categories={name: values for name, values in categories.items() if values},
    )


def _of_record(path: Path, number: int, row: dict[str, Any]) -> Item:
    try:
        record = parse_record(row, number, str(path), str(path.parent))
    except RecordError as error:
        raise TaskError(str(error)) from error
    where = f"{path}: item {record.id}"
    if len(record.media) != 1 or record.media[0].kind != "video":
        raise TaskError(f"{where} has {len(record.media)} media; a question is about one video")
    question, answer = (
        next(turn.text for turn in record.turns if turn.role == role)
        for role in ("user", "assistant")
    )
    text = PLACEHOLDER.sub("", question).strip()
    if row.get("options"):
        texts, right = _answer(where, {"answer": answer, **row})
    else:
        texts, right = (), answer
    (medium,) = record.media
    return Item(
        id=record.id,
        video=medium.path,
        question=text,
        options=texts,
        answer=right,
        start=medium.start,
        end=medium.end,
        categories={
            name: values
            for name in ("task", "group")
            if (values := _category(where, name, row.get(name)))
        },
        printed=text,
    )


def _answer(where: str, row: dict[str, Any]) -> tuple[tuple[str, ...], int | str | None]:
    answer = row.get("answer")
    if row.get("options") is None:
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise TaskError(f"{where} has the answer {answer!r}; without options it must be a text")
        return (), answer
    texts = options.checked(where, row["options"])
    if answer is None:
        return texts, None
    kind = "text" if isinstance(answer, str) else "index"
    return texts, options.answer_index(where, answer, texts, kind)


def _category(where: str, name: str, value: Any) -> str | tuple[str, ...]:
    """The value or values of a category that an item belongs to; () for none."""
    several = isinstance(value, list)
    values = value if several else [] if value is None else [value]
    for one in values:
        if not isinstance(one, (str, int, float)):
            raise TaskError(
                f"{where} has the category {name}={value!r}; write a text or a number, or a list of"
                " them where the item belongs to several"
            )
    # Each once: an item must not count twice in an accuracy.
    texts = tuple(dict.fromkeys(str(one) for one in values))
    return texts if several or not texts else texts[0]


def _seconds(where: str, row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise TaskError(f"{where} has {name}={value!r}; it must be seconds")


TASKS = (Own("own"),)
