"""A comparison as Markdown and CSV."""

import csv
import io

from storm_jax.evaluation.compare import OVERALL, Comparison, Row
from storm_jax.evaluation.paired import Difference
from storm_jax.evaluation.scoring import Estimate

_METHOD = """\
Accuracies and differences in per cent, in brackets 95 % intervals clustered by video. A
difference is the named result less {first}, on the same items; its interval is that of Student's t
over videos. McNemar's exact test counts the items that one of the two alone has right, and takes
items for independent. No p is adjusted for the number of comparisons."""


def markdown(comparison: Comparison) -> str:
    """Differing recipes, notes, accuracies by task and category, and paired tests."""
    names = [result.name for result in comparison.results]
    parts = ["# Comparison of " + ", ".join(names)]
    if comparison.recipes:
        rows = [[field, *values] for field, values in comparison.recipes.items()]
        parts += ["## The recipes differ", _table(["field", *names], rows)]
    else:
        parts.append("All recipes are the same.")
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in comparison.notes)]
    others = [f"{name} - {names[0]}" for name in names[1:]]
    head = ["task", "category", "items", "videos", *names, *others]
    parts += ["## Accuracy", _METHOD.format(first=names[0])]
    parts.append(_table(head, [_accuracies(row) for row in comparison.rows]))
    pairs = [
        pair for row in comparison.rows if row.category == OVERALL for pair in _pairs(row, names)
    ]
    head = ["task", "first", "second", "difference", "p, clustered by video"]
    head += ["only first right", "only second right", "p, McNemar exact"]
    parts += ["## Paired tests", _table(head, pairs)]
    return "\n\n".join(parts) + "\n"


def _accuracies(row: Row) -> list[str]:
    one = next(e for e in row.estimates if e is not None)
    label = "all" if row.category == OVERALL else f"{row.category}: {row.value}"
    return [
        row.task,
        label,
        str(one.items),
        str(one.videos),
        *map(_shown, row.estimates),
        *(_shown(d, "+") for d in row.differences[1:]),
    ]


def _shown(x: Estimate | Difference | None, sign: str = "") -> str:
    if x is None:
        return "-"
    return f"{100 * x.value:{sign}.1f} [{100 * x.low:{sign}.1f}, {100 * x.high:{sign}.1f}]"


def _pairs(row: Row, names: list[str]) -> list[list[str]]:
    return [
        [
            row.task,
            names[0],
            name,
            _shown(d, "+"),
            _p(d.p),
            str(d.first_only),
            str(d.second_only),
            _p(d.mcnemar),
        ]
        for name, d in zip(names, row.differences, strict=True)
        if d is not None
    ]


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.01 else f"{p:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


# --------------------------------------------------------------------------------------------- CSV


def accuracy_csv(comparison: Comparison) -> str:
    """One line for each task, category value and result."""
    lines = []
    for row in comparison.rows:
        for result, e in zip(comparison.results, row.estimates, strict=True):
            if e is not None:
                where = [row.task, row.category or "all", row.value, result.name]
                lines.append([*where, e.value, e.low, e.high, e.items, e.videos])
    head = ["task", "category", "value", "result", "accuracy", "low", "high", "items", "videos"]
    return _csv(head, lines)


def paired_csv(comparison: Comparison) -> str:
    """One line for each task, category value and result after the first."""
    lines = []
    first = comparison.results[0].name
    for row in comparison.rows:
        for result, d in zip(comparison.results, row.differences, strict=True):
            if d is not None:
                where = [row.task, row.category or "all", row.value, first, result.name]
                numbers = [d.value, d.low, d.high, d.p, d.first_only, d.second_only, d.mcnemar]
                lines.append([*where, *numbers, d.items, d.videos])
    head = ["task", "category", "value", "first", "second", "difference", "low", "high", "p"]
    head += ["first_only", "second_only", "p_mcnemar", "items", "videos"]
    return _csv(head, lines)


def _csv(head: list[str], lines: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    return text.getvalue()
