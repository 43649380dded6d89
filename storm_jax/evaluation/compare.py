"""Results of several checkpoints or recipes beside each other, on the items that all of them have.

The first result is what the others are compared with. Intervals of accuracies are those of
`scoring`, differences and their significance those of `paired`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storm_jax.evaluation import paired, scoring

OVERALL = ""  # category of the row over all items


class CompareError(ValueError):
    """Results that cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a result says of one item.

    Attributes:
      asked: question, options and right answer, in a form that is equal for equal ones.
      credit: 1 where it is right, else 0.
      categories: name -> values that the item counts in.
    """

    video: str
    asked: str
    credit: float
    categories: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class TaskResult:
    """One task of one result.

    Attributes:
      mean_over: category over whose values the main metric is a mean; "": over items.
      recipe: how it was made, nested.
      model: equal for results of the same parameters.
      answers: of the scored items, by id.
      frames, visual_tokens: mean over items, of what the decoder saw.
      latency: seconds of the run for each question, many at a time; None: it is not known.
      remarks: what a reader must know: a partial run, degenerate outputs, corrupt videos.
    """

    mean_over: str
    recipe: Mapping[str, Any]
    model: str
    answers: Mapping[str, Answer]
    frames: float | None = None
    visual_tokens: float | None = None
    latency: float | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """An output folder of `storm_jax.evaluate`."""

    name: str  # differs from those of the other results
    tasks: Mapping[str, TaskResult]


@dataclass(frozen=True)
class Row:
    """One task, or one value of one of its categories.

    Attributes:
      estimates: accuracy of each result; None: it has not run this task.
      differences: of each result to the first one; None for the first itself and where one of the
        two has not run the task.
    """

    task: str
    category: str  # OVERALL, or its name
    value: str
    estimates: tuple[scoring.Estimate | None, ...]
    differences: tuple[paired.Difference | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Several results on the same items.

    Attributes:
      recipes: field -> its value in each result, for fields that differ; None: it is not there, ""
        where tasks of one result differ in it.
      notes: what was left out, and remarks of the results.
    """

    results: tuple[Result, ...]
    recipes: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def compare(results: Sequence[Result]) -> Comparison:
    """Aligns results task by task.

    A task that some have not run stays, with what the others have. Of each task only the items that
    all who ran it have are counted, and the notes say how many were left out.

    Raises:
      CompareError: fewer than two results, no common task, no common item of a task, or an item
        with the same id that asks something else.
    """
    if len(results) < 2:
        raise CompareError(f"{len(results)} result to compare: give at least two folders")
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    shared = [t for t in tasks if sum(t in result.tasks for result in results) > 1]
    if not shared:
        has = "; ".join(f"{r.name}: {', '.join(sorted(r.tasks)) or 'none'}" for r in results)
        raise CompareError(f"no task is in two of the results ({has}): run the same --tasks")
    notes: list[str] = []
    rows: list[Row] = []
    for task in tasks:
        found = [result.tasks.get(task) for result in results]
        missing = [r.name for r, t in zip(results, found, strict=True) if t is None]
        if missing:
            notes.append(f"{task}: not run in {', '.join(missing)}")
        common = _common(task, results, notes)
        rows += _rows(task, found, common)
        for result, of_task in zip(results, found, strict=True):
            if of_task is not None:
                notes += [f"{task}, {result.name}: {remark}" for remark in of_task.remarks]
    return Comparison(tuple(results), _recipe_differences(results), tuple(notes), tuple(rows))


def _common(task: str, results: Sequence[Result], notes: list[str]) -> list[str]:
    """Ids of the items of all results with this task, in the first one's order."""
    having = [(r.name, r.tasks[task].answers) for r in results if task in r.tasks]
    first_name, first = having[0]
    common = [id_ for id_ in first if all(id_ in answers for _, answers in having)]
    if not common:
        counts = ", ".join(f"{name} {len(answers)}" for name, answers in having)
        raise CompareError(
            f"{task}: the results have no scored item in common ({counts}): they are of different"
            " item sets, for example of two versions of the annotations"
        )
    for name, answers in having:
        other = next((i for i in common if answers[i].asked != first[i].asked), None)
        if other is not None:
            raise CompareError(
                f"{task}: item {other} is another question in {name} than in {first_name}:"
                f" {answers[other].asked} and {first[other].asked}; compare results of the same"
                " annotation file"
            )
        if len(answers) > len(common):
            notes.append(
                f"{task}: only the {len(common)} items that all results have are counted;"
                f" {len(answers) - len(common)} of {len(answers)} in {name} are left out"
            )
    return common


def _rows(task: str, found: Sequence[TaskResult | None], common: list[str]) -> list[Row]:
    reference = next(t for t in found if t is not None)
    members: dict[tuple[str, str], list[str]] = {(OVERALL, ""): common}
    for id_ in common:
        for category, values in reference.answers[id_].categories.items():
            for value in values:
                members.setdefault((category, value), []).append(id_)
    rows = []
    for category, value in sorted(members):
        ids = members[category, value]
        mean_over = reference.mean_over if category == OVERALL else ""
        rows.append(_row(task, category, value, found, ids, mean_over))
    return rows


def _row(task, category, value, found, ids: list[str], mean_over: str) -> Row:
    reference = next(t for t in found if t is not None)
    videos = [reference.answers[i].video for i in ids]
    groups = None
    if mean_over:
        groups = [reference.answers[i].categories[mean_over][0] for i in ids]
    credits = [None if t is None else [t.answers[i].credit for i in ids] for t in found]
    first = credits[0]
    estimates = tuple(
        None if credit is None else scoring.estimate(credit, videos, groups) for credit in credits
    )
    differences = tuple(
        None
        if index == 0 or credit is None or first is None
        else paired.difference(first, credit, videos, groups)
        for index, credit in enumerate(credits)
    )
    return Row(task, category, value, estimates, differences)


# ----------------------------------------------------------------------------------------- recipes


def _recipe_differences(results: Sequence[Result]) -> dict[str, tuple[str, ...]]:
    """Fields of the recipes that are not the same in all results, by task where tasks differ."""
    flat = [
        {task: dict(_flattened(t.recipe)) for task, t in result.tasks.items()} for result in results
    ]
    names = sorted({name for tasks in flat for fields in tasks.values() for name in fields})
    different: dict[str, tuple[str, ...]] = {}
    for name in names:
        by_task = {}
        for task in dict.fromkeys(t for tasks in flat for t in tasks):
            values = [tasks[task].get(name, "none") if task in tasks else None for tasks in flat]
            if len({v for v in values if v is not None}) > 1:
                by_task[task] = tuple("-" if v is None else v for v in values)
        if len(set(by_task.values())) == 1:
            different[name] = next(iter(by_task.values()))
        else:
            different |= {f"{name} ({task})": values for task, values in by_task.items()}
    return different


def _flattened(fields: Mapping[str, Any], path: str = ""):
    for name, value in fields.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _flattened(value, where)
        else:
            yield where, value if isinstance(value, str) else json.dumps(value)
