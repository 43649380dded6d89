"""A comparison as pictures: accuracy against what it cost."""

from pathlib import Path
from typing import NamedTuple

from storm_jax.evaluation.compare import OVERALL, Comparison
from storm_jax.evaluation.scoring import Estimate

# File's name -> attribute of `TaskResult`, label of the axis.
_AXES = {
    "frames": ("frames", "frames of a video"),
    "visual_tokens": ("visual_tokens", "visual tokens of a question"),
    "latency": ("latency", "seconds of the run for each question, without compiling"),
}
_MARKERS = "osD^vP*X<>"


def draw(comparison: Comparison, out: Path) -> list[Path]:
    """Writes accuracy_against_{frames,visual_tokens,latency}.png, as far as the results know them.

    A colour for each task, 95 % intervals, a line through the results of one checkpoint; an axis
    that fewer than two results of every task know is left out.

    Returns:
      The files written.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    written = []
    for name, (attribute, label) in _AXES.items():
        lines = _lines(comparison, attribute)
        if not lines:
            continue
        figure = Figure(figsize=(6.4, 4.4))
        axes = figure.add_subplot()
        for i, (task, points) in enumerate(lines.items()):
            for j, model in enumerate(dict.fromkeys(p.model for p in points)):
                own = [p for p in points if p.model == model]
                axes.errorbar(
                    [p.x for p in own],
                    [100 * p.accuracy.value for p in own],
                    yerr=[
                        [100 * (p.accuracy.value - p.accuracy.low) for p in own],
                        [100 * (p.accuracy.high - p.accuracy.value) for p in own],
                    ],
                    fmt=f"{_MARKERS[i % len(_MARKERS)]}-",
                    capsize=3,
                    label="" if j else task,
                    color=f"C{i % 10}",
                )
            for p in points:
                at = p.x, 100 * p.accuracy.value
                axes.annotate(p.name, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.margins(x=0.15)
        xs = [p.x for points in lines.values() for p in points]
        if min(xs) > 0 and max(xs) / min(xs) >= 4:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %")
        axes.grid(linewidth=0.3, alpha=0.5)
        axes.legend(fontsize=8)
        figure.tight_layout()
        written.append(out / f"accuracy_against_{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


class _Point(NamedTuple):
    x: float
    name: str
    model: str
    accuracy: Estimate


def _lines(comparison: Comparison, attribute: str) -> dict[str, list[_Point]]:
    """Task -> its points, by x, for tasks with two of them or more."""
    lines = {}
    for row in comparison.rows:
        if row.category != OVERALL:
            continue
        points = []
        for result, e in zip(comparison.results, row.estimates, strict=True):
            if e is None:
                continue
            of_task = result.tasks[row.task]
            x = getattr(of_task, attribute)
            if x is not None:
                points.append(_Point(x, result.name, of_task.model, e))
        if len(points) > 1:
            lines[row.task] = sorted(points)
    return lines
