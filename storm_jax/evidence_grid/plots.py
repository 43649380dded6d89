"""Plots of a grid's results, one for each of the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storm_jax.evidence_grid import paper
from storm_jax.evidence_grid.latency import Latency
from storm_jax.evidence_grid.recipe import EvidenceError, Mixer, Point
from storm_jax.evidence_grid.results import Result
from storm_jax.evidence_grid.statistics import over_seeds
from storm_jax.evidence_grid.tables import NAMES, averages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL = "average accuracy, %"
_SHARES = (3.13, 6.25, 12.5, 25, 50, 100)  # of table 5


def draw(results: dict[str, Result], latency: Latency | None, folder: Path) -> list[Path]:
    """Writes table3.png, table4.png, ...; returns their paths.

    Raises:
      EvidenceError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise EvidenceError(
            "plots need matplotlib (pip install matplotlib); --noplots leaves them out"
        ) from error
    kinds = {"table4": _table4, "table5": _table5, "table3": _table3, "table7": _table7}
    paths = []
    for name, draw_one in kinds.items():
        figure, (here, theirs) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        draw_one(results, here, theirs)
        here.set_title("here, 95 % over seeds", fontsize=10)
        theirs.set_title("the paper", fontsize=10)
        here.set_ylabel(_LABEL)
        for axes in (here, theirs):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    if latency is not None:
        figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
        _table13(latency, axes)
        paths.append(folder / "table13.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _line(axes: Axes, results: dict[str, Result], points: list[Point], label: str) -> None:
    """Accuracy against frames."""
    found = [(p.frames, averages(results, p)) for p in points]
    there = [(frames, over_seeds(x)) for frames, x in found if x is not None]
    if there:
        axes.errorbar(
            [str(frames) for frames, _ in there],
            [x.mean for _, x in there],
            [x.half for _, x in there],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel("frames, training and test")


def _table4(results: dict[str, Result], here: Axes, theirs: Axes) -> None:
    mixers: tuple[Mixer, ...] = ("none", "mamba", "mlp", "attention", "convolution")
    for mixer in mixers:
        points = [Point(mixer, 1 if f == 8 else 4, 1, f) for f in (8, 32, 128)]
        _line(here, results, points, NAMES[mixer])
    for column, name in enumerate(("none", "Mamba")):
        frames = list(paper.TABLE4)
        theirs.plot(
            [str(f) for f in frames],
            [paper.TABLE4[f][column] for f in frames],
            marker="o",
            label=name,
        )
    theirs.set_xlabel("frames in training")


def _table3(results: dict[str, Result], here: Axes, theirs: Axes) -> None:
    for kind, temporal, spatial in (("temporal", 4, 1), ("spatial", 1, 2)):
        points = [Point("mamba", temporal, spatial, f) for f in (32, 128)]
        _line(here, results, points, f"{kind} pooling")
        values = [paper.average(paper.TABLE3[(kind, f)]) for f in (32, 128)]
        theirs.plot(["32", "128"], values, marker="o", label=f"{kind} pooling")
    theirs.set_xlabel("frames in training")


def _table7(results: dict[str, Result], here: Axes, theirs: Axes) -> None:
    kinds: tuple[tuple[str, str, Mixer], ...] = (
        ("none", "none", "none"),
        ("forward", "mamba_forward", "mamba"),
        ("bidirectional", "mamba", "mamba"),
    )
    for key, name, mixer in kinds:
        direction = "forward" if key == "forward" else "bidirectional"
        points = [Point(mixer, 4, 1, f, direction) for f in (32, 128)]
        _line(here, results, points, NAMES[name])
        values = [paper.TABLE7[(key, f)] for f in (32, 128)]
        theirs.plot(["32", "128"], values, marker="o", label=NAMES[name])
    theirs.set_xlabel("frames in training")


def _table5(results: dict[str, Result], here: Axes, theirs: Axes) -> None:
    """Accuracy against visual tokens relative to those without reduction."""
    mixers: tuple[Mixer, ...] = ("none", "mamba")
    for mixer in mixers:
        for sampling, marker in ((1, "o"), (2, "x")):
            points = []
            for temporal in (1, 4):
                for spatial in (1, 2):
                    result = results.get(Point(mixer, temporal, spatial, 32).name)
                    if result is not None:
                        share = 100 / (temporal * spatial**2 * sampling)
                        accuracy = result.answers("test_seen", sampling).averages()
                        points.append((share * (0.97 if spatial > 1 else 1.03), accuracy))
            if points:
                intervals = [over_seeds(x) for _, x in points]
                here.errorbar(
                    [share for share, _ in points],
                    [x.mean for x in intervals],
                    [x.half for x in intervals],
                    fmt=marker,
                    capsize=3,
                    label=NAMES[mixer] + (", every second" if sampling > 1 else ""),
                )
    for mamba, name in ((False, "none"), (True, "Mamba")):
        for sampling, marker in ((False, "o"), (True, "x")):
            points = [
                (100 / ((4 if t else 1) * (4 if s else 1) * (2 if every else 1)), values)
                for (with_, every, t, s), values in paper.TABLE5.items()
                if with_ == mamba and every == sampling
            ]
            if points:
                theirs.plot(
                    [share for share, _ in points],
                    [paper.average(values) for _, values in points],
                    marker,
                    label=name + (", every second" if sampling else ""),
                )
    for axes in (here, theirs):
        axes.set_xscale("log")
        axes.set_xlabel("visual tokens, % of those without reduction")
        axes.set_xlim(2.5, 130)
        axes.set_xticks(_SHARES, [f"{share:g}" for share in _SHARES])
        axes.minorticks_off()


def _table13(latency: Latency, axes: Axes) -> None:
    devices = sorted(set(latency.device.values()))
    for compression, colour in ((1, "C0"), (4, "C1"), (8, "C2")):
        for number, device in enumerate(devices):
            ours = sorted(
                (f, ms[0])
                for (f, c), ms in latency.ms.items()
                if c == compression and latency.device[f, c] == device
            )
            label = f"{compression} times fewer" + f", {device}" * (len(devices) > 1)
            if ours:
                axes.plot(*zip(*ours, strict=True), f"{colour}{'os^D'[number % 4]}-", label=label)
        theirs = sorted((f, ms[0]) for (f, c), ms in paper.TABLE13.items() if c == compression)
        axes.plot(*zip(*theirs, strict=True), f"{colour}x:", label=f"{compression}, the paper")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("frames")
    axes.set_ylabel("time to the first token, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
