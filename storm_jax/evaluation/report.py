"""What an evaluation found: records of answers, the result of a task, and its table."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from storm_jax.evaluation import health, scoring
from storm_jax.evaluation.answering import Outcome
from storm_jax.evaluation.items import Answered, Family, Item
from storm_jax.evaluation.task import Task

FORMAT = 1  # of result.json and samples.jsonl


def record(task: Task, item: Item, family: Family, outcome: Outcome, data: Path) -> dict[str, Any]:
    """A line of samples.jsonl; videos are named as they lie below `data`."""
    video = Path(item.video)
    predicted = None
    if outcome.finish != "error":
        predicted = task.extract(outcome.output, item, family)
    answered = Answered(item, outcome.output, predicted)
    return {
        "id": item.id,
        "video": str(video.relative_to(data) if video.is_relative_to(data) else video),
        "start": item.start,
        "end": item.end,
        "question": item.question,
        "options": list(item.options),
        "answer": item.answer,
        "output": outcome.output,
        "predicted": predicted,
        "credit": None if item.answer is None else scoring.credit(answered),
        "categories": dict(item.categories),
        "prompt": [
            {"role": turn.role, "text": turn.text}
            for turn in (outcome.request.turns if outcome.request else ())
        ],
        "answer_prefix": outcome.request.answer_prefix if outcome.request else "",
        "frames": outcome.frames,
        "visual_tokens": outcome.visual_tokens,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "finish": outcome.finish,
        "degenerate": health.faults(outcome.output, outcome.finite, outcome.finish),
        "error": outcome.error,
    }


def result(
    task: Task,
    items: Sequence[Item],
    records: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of result.json, and the files of a submission by name.

    Args:
      items: those that were asked.
      records: theirs, in the same order.
      about: recipe, and what is known of the run.
    """
    answered = [
        Answered(item, r["output"], r["predicted"]) for item, r in zip(items, records, strict=True)
    ]
    score = task.score(answered)
    failed: dict[str, str] = {r["video"]: r["error"] for r in records if r["error"]}
    degenerate = Counter(fault for r in records for fault in r["degenerate"])
    well = [r for r in records if not r["error"]]

    def mean(name: str) -> float | None:
        return round(sum(r[name] for r in well) / len(well), 3) if well else None

    found = {
        "format": FORMAT,
        "task": task.name,
        "score": dataclasses.asdict(score),
        "items": len(records),
        "videos": len({r["video"] for r in records}),
        "difference_to_full_set": task.difference(items),
        "health": {
            "unparsed": sum(
                r["predicted"] is None and r["answer"] is not None and not r["error"]
                for r in records
            ),
            "degenerate": {
                name: degenerate[name] for name in ("empty", "repetition", "non-finite")
            },
            "cut_off": sum(r["finish"] == "length" for r in records),
            "failed_videos": failed,
            "items_of_failed_videos": len(records) - len(well),
        },
        "cost": {
            name: mean(name)
            for name in ("frames", "visual_tokens", "prompt_tokens", "output_tokens")
        },
        **about,
    }
    return found, task.submission(answered)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """The scores of all tasks, for people."""
    lines = []
    for found in results:
        score = found["score"]
        lines.append(f"{found['task']}  ({found['recipe']['prompts']} prompts)")
        if score["main"] is None:
            lines.append("  no published answers: see the submission file")
        else:
            lines.append(_row(score["metric"], score["main"]))
        lines += [_row(name, value) for name, value in score["also"].items()]
        for name, values in score["groups"].items():
            lines += [_row(f"  {name} {value}", e) for value, e in values.items()]
        lines += [f"  {line}" for line in warnings(found)]
    return "\n".join(lines)


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader of a score has to know."""
    about, lines = found["health"], []
    if found["difference_to_full_set"]:
        lines.append(f"not the full set: {found['difference_to_full_set']}")
    if gone := found["missing_videos"]:
        lines.append(
            f"PARTIAL: {len(gone)} videos are missing, {found['items_left_out']} items left out"
        )
    if about["unparsed"]:
        lines.append(f"no answer found in {about['unparsed']} of {found['items']} outputs (wrong)")
    for name, count in about["degenerate"].items():
        if count:
            lines.append(f"WARNING: degenerate output ({name}) in {count} of {found['items']}")
    if about["failed_videos"]:
        lines.append(
            f"{len(about['failed_videos'])} videos could not be read;"
            f" {about['items_of_failed_videos']} items count as wrong:"
        )
        lines += [f"  {reason}" for reason in about["failed_videos"].values()]
    return lines


def _row(name: str, estimate: Mapping[str, Any]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    of = f"{estimate['items']} items, {estimate['videos']} videos"
    return f"  {name:<44} {value:5.1f} %  [{low:.1f}, {high:.1f}]  {of}"
