"""The results that `storm_jax.evaluate` wrote, as `compare` takes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storm_jax.evaluation import report
from storm_jax.evaluation.compare import Answer, CompareError, Result, TaskResult
from storm_jax.evaluation.results import read_result
from storm_jax.evaluation.tasks import all_tasks


def read(folders: Sequence[Path]) -> list[Result]:
    """Reads output folders; each is named by its last part, or as it is given where two are alike.

    Raises:
      CompareError: a folder without finished results, twice the same folder, or files of another
        format.
    """
    resolved = [folder.resolve() for folder in folders]
    again = next((f for f, r in zip(folders, resolved, strict=True) if resolved.count(r) > 1), None)
    if again is not None:
        raise CompareError(f"{again} is given twice: give different folders")
    names = [path.name for path in resolved]
    return [
        Result(name if names.count(name) == 1 else str(folder), _tasks(folder))
        for name, folder in zip(names, folders, strict=True)
    ]


def _tasks(folder: Path) -> dict[str, TaskResult]:
    if not folder.is_dir():
        raise CompareError(f"{folder} is no folder: give what --out was")
    if (folder / "result.json").is_file():
        raise CompareError(f"{folder} is the folder of one task: give {folder.parent}")
    tasks, unfinished = {}, []
    for path in sorted(folder.iterdir()):
        if (path / "result.json").is_file():
            tasks[path.name] = _task(path)
        elif (path / "recipe.json").is_file():
            unfinished.append(path.name)
    if not tasks:
        begun = f"; {', '.join(unfinished)} is not finished" if unfinished else ""
        raise CompareError(
            f"{folder} holds no TASK/result.json{begun}: give a folder that --out of a finished"
            " evaluation was"
        )
    return tasks


def _task(folder: Path) -> TaskResult:
    try:
        found = read_result(folder)
        lines = (folder / "samples.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        if found is None or found["format"] != report.FORMAT:
            raise CompareError(
                f"{folder}/result.json has format {found and found['format']}, not"
                f" {report.FORMAT}: evaluate again with this version"
            )
        answers = {r["id"]: _answer(r) for r in records if r["credit"] is not None}
        task = all_tasks().get(found["task"])
        return TaskResult(
            mean_over=task.mean_over if task else "",
            recipe=found["recipe"],
            model=found["recipe"]["checkpoint"]["fingerprint"],
            answers=answers,
            frames=found["cost"]["frames"],
            visual_tokens=found["cost"]["visual_tokens"],
            latency=_latency(found["run"]),
            remarks=tuple(line.strip() for line in report.warnings(found)),
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CompareError(
            f"{folder} is no result of storm_jax.evaluate ({type(error).__name__}: {error}):"
            " evaluate again with another --out"
        ) from error


def _latency(run: Mapping[str, Any]) -> float | None:
    """Seconds for each question, compiling left out, of a run that was not only compiling."""
    seconds = run["seconds"] - run["compile_seconds"]
    return seconds / run["items"] if run["items"] and seconds > 0 else None


def _answer(record: Mapping[str, Any]) -> Answer:
    # Where a file lies, and how often an item was asked, is not part of the question.
    asked = [record[name] for name in ("question", "options", "answer", "start", "end")]
    categories = {
        name: (value,) if isinstance(value, str) else tuple(value)
        for name, value in record["categories"].items()
    }
    return Answer(
        record["video"], json.dumps(asked, ensure_ascii=False), float(record["credit"]), categories
    )
