"""Tables of a grid's results, one for each of the paper's, beside the paper's own numbers."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from storm_jax.evidence_grid import paper
from storm_jax.evidence_grid.claims import CLAIMS, Decision, decide
from storm_jax.evidence_grid.recipe import SAMPLING, SPLITS, Mixer, Point, answers_name
from storm_jax.evidence_grid.results import Result
from storm_jax.evidence_grid.statistics import over_seeds


@dataclass(frozen=True)
class Table:
    """A table of texts, with a file name and a title."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{table}\n"

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return text.getvalue()


NAMES: dict[str, str] = {
    "none": "none",
    "mamba": "Mamba",
    "mamba_forward": "Mamba, forward only",
    "mlp": "MLP",
    "attention": "temporal attention",
    "convolution": "temporal shift",
}
_MEASURED = (
    "tokens",
    "held out clips",
    "held out appearances",
    "parameters of the encoder",
    "training step, ms",
    "answer, ms",
)


def devices(results: dict[str, Result]) -> list[str]:
    """Kinds of devices that the results were measured on."""
    return sorted({result.run["device"] for result in results.values()})


def _measured(results: dict[str, Result]) -> tuple[str, ...]:
    """Header of what `_cells` gives: each row names its device where there are several kinds."""
    return _MEASURED + ("device",) * (len(devices(results)) > 1)


def _timed(title: str, results: dict[str, Result]) -> str:
    """A title that says what the milliseconds are of."""
    kinds = devices(results)
    if len(kinds) == 1:
        return f"{title}; milliseconds on {kinds[0]}"
    return f"{title}; compare milliseconds only between rows of the same device"


def _cells(results: dict[str, Result], point: Point, sampling: int = 1) -> tuple[str, ...]:
    """The columns `_measured` of a point."""
    result = results.get(point.name)
    if result is None:
        return ("not run",) + ("",) * (len(_measured(results)) - 1)
    answers = [result.answers(split, sampling) for split in SPLITS]
    step = f"{result.run['train_step_ms']['ms']:.2f}" if sampling == 1 else ""
    answer = f"{result.run['answer_ms'][answers_name(SPLITS[0], sampling)]['ms']:.3f}"
    return (
        str(answers[0].visual_tokens),
        *(over_seeds(a.averages()).text() for a in answers),
        f"{result.run['temporal_parameters']:,}",
        step,
        answer,
        *((result.run["device"],) if len(devices(results)) > 1 else ()),
    )


def table4(results: dict[str, Result]) -> Table:
    rows: list[tuple[str, ...]] = []
    mixers: tuple[Mixer, ...] = ("none", "mamba", "mlp", "attention", "convolution")
    for frames in (8, 32, 128):
        for mixer in mixers:
            column = {"none": 0, "mamba": 1}.get(mixer)
            theirs = "" if column is None else f"{paper.TABLE4[frames][column]:.1f}"
            point = Point(mixer, 1 if frames == 8 else 4, 1, frames)
            rows.append((str(frames), NAMES[mixer], *_cells(results, point), theirs))
    return Table(
        "table4",
        _timed(
            "Tables 4 and 10: what the temporal encoder is worth as frames grow (8 frames unpooled,"
            " 32 and 128 with temporal pooling by 4)",
            results,
        ),
        ("frames", "temporal encoder", *_measured(results), "paper, average of four benchmarks"),
        rows,
    )


def table5(results: dict[str, Result]) -> Table:
    rows: list[tuple[str, ...]] = []
    mixers: tuple[Mixer, ...] = ("none", "mamba")
    for mixer in mixers:
        for temporal in (1, 4):
            for spatial in (1, 2):
                for sampling in (1, SAMPLING):
                    key = (mixer == "mamba", sampling > 1, temporal > 1, spatial > 1)
                    theirs = paper.TABLE5.get(key)
                    rows.append(
                        (
                            NAMES[mixer],
                            *("yes" if used else "" for used in key[1:]),
                            *_cells(results, Point(mixer, temporal, spatial, 32), sampling),
                            f"{paper.average(theirs):.1f}" if theirs else "",
                        )
                    )
    return Table(
        "table5",
        _timed(
            "Table 5: token reduction, all trained with 32 frames (sampling only at test time)",
            results,
        ),
        (
            "temporal encoder",
            "temporal sampling",
            "temporal pooling",
            "spatial pooling",
            *_measured(results),
            "paper, average of four benchmarks",
        ),
        rows,
    )


def table3(results: dict[str, Result]) -> Table:
    rows: list[tuple[str, ...]] = []
    for frames in (32, 128):
        for kind, temporal, spatial in (("spatial", 1, 2), ("temporal", 4, 1)):
            cells = _cells(results, Point("mamba", temporal, spatial, frames))
            theirs = paper.average(paper.TABLE3[(kind, frames)])
            rows.append((str(frames), kind, *cells, f"{theirs:.1f}"))
    return Table(
        "table3",
        _timed("Table 3: temporal against spatial pooling, with Mamba, at equal tokens", results),
        ("frames", "pooling", *_measured(results), "paper, average of LongVideoBench and VideoMME"),
        rows,
    )


def table7(results: dict[str, Result]) -> Table:
    rows: list[tuple[str, ...]] = []
    points: tuple[tuple[str, str, Mixer], ...] = (
        ("none", "none", "none"),
        ("forward", "mamba_forward", "mamba"),
        ("bidirectional", "mamba", "mamba"),
    )
    for frames in (32, 128):
        for key, name, mixer in points:
            direction = "forward" if key == "forward" else "bidirectional"
            cells = _cells(results, Point(mixer, 4, 1, frames, direction))
            rows.append((str(frames), NAMES[name], *cells, f"{paper.TABLE7[(key, frames)]:.1f}"))
    return Table(
        "table7",
        _timed(
            "Table 7: one direction, as streams need it, against both, with temporal pooling",
            results,
        ),
        ("frames", "temporal encoder", *_measured(results), "paper, VideoMME"),
        rows,
    )


def tasks(results: dict[str, Result]) -> Table:
    """Accuracy on every task: where a difference comes from."""
    first = next(iter(results.values())).answers(SPLITS[0])
    names = list(first.chance_of_task())
    chance = ("chance", *(f"{c:.0f}" for c in first.chance_of_task().values()))
    rows: list[tuple[str, ...]] = [chance]
    for name, result in sorted(results.items()):
        by_task = result.answers(SPLITS[0]).of_task()
        rows.append((name, *(over_seeds(by_task[task]).text() for task in names)))
    return Table(
        "tasks",
        "Accuracy on each family, behind the stroke the length of its events in frames of the"
        " clip (percent, 95 % t interval over seeds); t: temporal pooling, s: spatial, f: frames",
        ("model", *names),
        rows,
    )


def claims(results: dict[str, Result]) -> Table:
    """What the rule of `claims` says of each claim."""
    return claim_table([decide(claim, results) for claim in CLAIMS])


def claim_table(decisions: Iterable[Decision]) -> Table:
    rows: list[tuple[str, ...]] = []
    for decision in decisions:
        claim, found = decision.claim, decision.contrast
        rows.append(
            (
                claim.table,
                claim.text,
                "" if claim.paper is None else f"{claim.paper:+.1f}",
                "" if found is None else found.seeds.text(sign=True),
                "" if found is None else found.clips.text(sign=True),
                f"**{decision.verdict}**",
                decision.reason,
            )
        )
    return Table(
        "claims",
        "Claims, in points of average accuracy",
        (
            "table",
            "claim",
            "paper",
            "here, 95 % over seeds",
            "95 % over test clips",
            "verdict",
            "because",
        ),
        rows,
    )


def averages(results: dict[str, Result], point: Point) -> np.ndarray | None:
    """Average accuracy of each seed of a point, or None where it was not run."""
    result = results.get(point.name)
    return None if result is None else result.answers(SPLITS[0]).averages()


OF_GRID: tuple[Callable[[dict[str, Result]], Table], ...] = (
    claims,
    table4,
    table5,
    table3,
    table7,
    tasks,
)
