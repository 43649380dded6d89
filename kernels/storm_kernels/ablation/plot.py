"""The rows of a run as a picture: times by shape, a panel for every direction and dtype."""

import pathlib
from collections.abc import Sequence

from storm_kernels.ablation.report import Row

_MARKERS = "osD^vP*X<>"


def draw(rows: Sequence[Row], path: pathlib.Path, title: str) -> bool:
    """Writes a PNG; False if no row has a time, so that there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.ms is not None]
    if not rows:
        return False
    shapes = list(dict.fromkeys(row.shape for row in rows))
    panels = list(dict.fromkeys((row.direction, row.setting.dtype) for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    width = max(5.0, 1.5 + 0.55 * len(shapes))
    figure = Figure(figsize=(width * min(2, len(panels)), 4.2 * ((len(panels) + 1) // 2)))
    for i, (direction, dtype) in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, min(2, len(panels)), i + 1)
        here = [row for row in rows if (row.direction, row.setting.dtype) == (direction, dtype)]
        floors = {row.shape: row.floor.ms for row in here if row.floor is not None}
        if floors:
            axes.plot(
                [shapes.index(shape) for shape in floors],
                list(floors.values()),
                "_",
                color="black",
                markersize=18,
                label="floor",
            )
        for j, name in enumerate(names):
            shift = min(0.1, 0.6 / len(names)) * (j - (len(names) - 1) / 2)
            _points(axes, [row for row in here if row.implementation == name], shapes, j, shift)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.set_ylabel("ms")
        axes.set_xlim(-0.5, len(shapes) - 0.5)
        axes.set_xticks(range(len(shapes)), [str(shape) for shape in shapes])
        axes.tick_params(axis="x", labelrotation=60 if len(shapes) > 2 else 0, labelsize=7)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right" if len(shapes) > 2 else "center")
        axes.set_title(f"{direction}, {dtype}", fontsize=9)
        axes.grid(axis="y", which="both", linewidth=0.3, alpha=0.5)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def _points(axes, rows: Sequence[Row], shapes: list, i: int, shift: float) -> None:
    """An implementation's medians with their quartiles; hollow where the result is wrong."""
    if not rows:
        return
    # An implementation has its colour in every panel. Side by side: points would coincide.
    x = [shapes.index(row.shape) + shift for row in rows]
    y = [row.ms for row in rows]
    low = [(row.ms or 0) - (row.timing.quartile_1 if row.timing else row.ms or 0) for row in rows]
    high = [(row.timing.quartile_3 if row.timing else row.ms or 0) - (row.ms or 0) for row in rows]
    colour = f"C{i % 10}"
    axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1)
    for wrong in (False, True):
        chosen = [k for k, row in enumerate(rows) if (row.status == "wrong") == wrong]
        if chosen:
            axes.plot(
                [x[k] for k in chosen],
                [y[k] for k in chosen],
                _MARKERS[i % len(_MARKERS)],
                color=colour,
                markerfacecolor="none" if wrong else colour,
                label=rows[0].implementation + (" (wrong results)" if wrong else ""),
            )
