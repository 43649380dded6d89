"""A comparison as pictures: accuracy against what it cost."""

from pathlib import Path

from storm_jax.evaluation.compare import OVERALL, Comparison

# File's name -> attribute of `TaskResult`, label of the axis.
_AXES = {
    "frames": ("frames", "frames of a video"),
    "visual_tokens": ("visual_tokens", "visual tokens of a question"),
    "latency": ("latency", "seconds a question"),
}
_MARKERS = "osD^vP*X<>"


def draw(comparison: Comparison, out: Path) -> list[Path]:
    """Writes accuracy_against_{frames,visual_tokens,latency}.png, as far as the results know them.

    A line for each task through the results in order of the axis, with 95 % intervals; an axis that
    fewer than two results of every task know is left out.

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
            x, result, value, low, high = zip(*points, strict=True)
            errors = [[v - a for v, a in zip(value, low, strict=True)]]
            errors.append([b - v for v, b in zip(value, high, strict=True)])
            marker = _MARKERS[i % len(_MARKERS)]
            axes.errorbar(
                x, value, yerr=errors, fmt=f"{marker}-", capsize=3, label=task, color=f"C{i}"
            )
            for at, text, y in zip(x, result, value, strict=True):
                axes.annotate(text, (at, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        xs = [point[0] for points in lines.values() for point in points]
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


def _lines(comparison: Comparison, attribute: str) -> dict[str, list[tuple]]:
    """Task -> points (x, result, accuracy, low, high), for tasks with two of them or more."""
    lines = {}
    for row in comparison.rows:
        if row.category != OVERALL:
            continue
        points = []
        for result, e in zip(comparison.results, row.estimates, strict=True):
            x = getattr(result.tasks[row.task], attribute) if row.task in result.tasks else None
            if x is not None and e is not None:
                points.append((x, result.name, 100 * e.value, 100 * e.low, 100 * e.high))
        if len(points) > 1:
            lines[row.task] = sorted(points)
    return lines
