"""The paper's claims as contrasts of grid points, and the rule that decides about each.

The rule was written down before any run of the grid, after first tuning runs. A contrast is a
weighted sum of average accuracies on clips drawn as the training clips ("test_seen"), in points. It
has two 95 % intervals, over seeds and over test clips (`statistics`); "low" and "high" are the
outermost ends of the two.

A claim that the contrast is above zero:
    low > 0                                   reproduced
    high < 0                                  not reproduced (the opposite holds)
    else, half widths at most `RESOLUTION`    not reproduced (a difference would have been seen)
    else                                      not testable this way (too much chance)
A claim that something costs nothing: the contrast is above -`MARGIN`:
    low > -MARGIN                             reproduced
    high < -MARGIN                            not reproduced
    else                                      not testable this way
Before that: where no model of the contrast is better than chance by `RESOLUTION` points, or all
are within `CEILING` points of 100 %, nothing can be said: not testable this way.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from storm_jax.evidence_grid.paper import (
    TABLE3,
    TABLE4,
    TABLE5,
    TABLE7,
    TABLE11,
    average,
)
from storm_jax.evidence_grid.recipe import SPLITS, Mixer, Point
from storm_jax.evidence_grid.results import Result
from storm_jax.evidence_grid.statistics import Contrast, contrast

RESOLUTION = 2.0  # points: smaller differences than the paper's own are not looked for
MARGIN = 2.0  # points that "costs nothing" may cost
CEILING = 1.0  # points below 100 %

Rule = Literal["above", "no_cost"]
Verdict = Literal["reproduced", "not reproduced", "not testable this way", "not run"]


@dataclass(frozen=True)
class Term:
    """A grid point in a contrast."""

    factor: float
    point: Point
    sampling: int = 1


@dataclass(frozen=True)
class Claim:
    """One statement of the paper.

    Attributes:
      table: of the paper, "4".
      text: what is claimed.
      paper: the same contrast from the paper's numbers, points; None: the paper has none.
      terms: the contrast.
      rule: "above" zero, or "no_cost".
    """

    table: str
    text: str
    paper: float | None
    terms: tuple[Term, ...]
    rule: Rule = "above"


@dataclass(frozen=True)
class Decision:
    """A claim with what was measured; the contrast is None where runs are missing."""

    claim: Claim
    contrast: Contrast | None
    verdict: Verdict
    reason: str


def decide(claim: Claim, results: dict[str, Result], split: str = SPLITS[0]) -> Decision:
    """Applies the rule."""
    missing = sorted({t.point.name for t in claim.terms if t.point.name not in results})
    if missing:
        return Decision(claim, None, "not run", "missing: " + ", ".join(missing))
    answers = [(t.factor, results[t.point.name].answers(split, t.sampling)) for t in claim.terms]
    found = contrast(answers)
    averages = [float(a.averages().mean()) for _, a in answers]
    chance = float(np.mean(list(answers[0][1].chance_of_task().values())))
    return Decision(claim, found, *verdict(claim.rule, found, averages, chance))


def verdict(
    rule: Rule, found: Contrast, averages: list[float], chance: float
) -> tuple[Verdict, str]:
    """The rule of the module's docstring.

    Args:
      averages: average accuracies of the models of the contrast, percent.
      chance: percent.
    """
    if max(averages) < chance + RESOLUTION:
        return "not testable this way", "no model is better than chance"
    if min(averages) > 100 - CEILING:
        return "not testable this way", "all models answer everything"
    if rule == "no_cost":
        if found.low > -MARGIN:
            return "reproduced", f"costs less than {MARGIN:g} points"
        if found.high < -MARGIN:
            return "not reproduced", f"costs more than {MARGIN:g} points"
        return "not testable this way", f"the interval contains {-MARGIN:g}"
    if found.low > 0:
        return "reproduced", "both intervals are above 0"
    if found.high < 0:
        return "not reproduced", "both intervals are below 0: the opposite holds"
    if max(found.seeds.half, found.clips.half) <= RESOLUTION:
        return "not reproduced", "the intervals contain 0, or one does, and are narrow"
    return "not testable this way", "the intervals contain 0, or one does, and are wide"


def _claims() -> list[Claim]:
    found = []

    def add(table, text, paper, *terms, rule: Rule = "above"):
        found.append(Claim(table, text, paper, tuple(Term(*term) for term in terms), rule))

    def mixer(name: Mixer, frames: int) -> Point:
        return Point(name, 1 if frames == 8 else 4, 1, frames)

    def gap(frames: int, other: Mixer = "none", factor: float = 1.0):
        return (factor, mixer("mamba", frames)), (-factor, mixer(other, frames))

    gaps = {frames: with_ - without for frames, (without, with_) in TABLE4.items()}
    add("4", "128 frames: Mamba before temporal pooling is better than none", gaps[128], *gap(128))
    add("4", "32 frames: Mamba before temporal pooling is better than none", gaps[32], *gap(32))
    add(
        "4",
        "the advantage of Mamba is larger at 128 frames than at 8",
        gaps[128] - gaps[8],
        *gap(128),
        *gap(8, factor=-1.0),
    )
    add(
        "4",
        "the advantage of Mamba is larger at 128 frames than at 32",
        gaps[128] - gaps[32],
        *gap(128),
        *gap(32, factor=-1.0),
    )
    add(
        "4",
        "with Mamba, 128 frames are better than 32 at four times the tokens",
        TABLE4[128][1] - TABLE4[32][1],
        (1.0, mixer("mamba", 128)),
        (-1.0, mixer("mamba", 32)),
    )
    for control, what in (
        ("mlp", "a per-token MLP of as many parameters"),
        ("convolution", "a temporal shift (TSM) of as many parameters"),
        ("attention", "temporal attention of as many parameters"),
    ):
        add("4", f"128 frames: Mamba is better than {what}", None, *gap(128, control))

    def cell(mamba, sampling=False, temporal=False, spatial=False):
        return average(TABLE5[(mamba, sampling, temporal, spatial)])

    def pooled(temporal: int, spatial: int, name: Mixer = "mamba", frames: int = 32) -> Point:
        return Point(name, temporal, spatial, frames)

    plain = pooled(1, 1)
    add(
        "5",
        "without reduction, Mamba is better than none",
        cell(True) - cell(False),
        (1.0, plain),
        (-1.0, pooled(1, 1, "none")),
    )
    for text, temporal, spatial in (
        ("temporal pooling (a quarter of the tokens) costs nothing", 4, 1),
        ("spatial pooling (a quarter of the tokens) costs nothing", 1, 2),
    ):
        add(
            "5",
            f"with Mamba, {text}",
            cell(True, False, temporal > 1, spatial > 1) - cell(True),
            (1.0, pooled(temporal, spatial)),
            (-1.0, plain),
            rule="no_cost",
        )
    for text, temporal, spatial in (
        ("without pooling", 1, 1),
        ("after temporal pooling", 4, 1),
        ("after spatial pooling", 1, 2),
        ("after both poolings", 4, 2),
    ):
        point = pooled(temporal, spatial)
        add(
            "5",
            f"with Mamba, dropping every second pooled frame at test time {text} costs nothing",
            cell(True, True, temporal > 1, spatial > 1)
            - cell(True, False, temporal > 1, spatial > 1),
            (1.0, point, 2),
            (-1.0, point, 1),
            rule="no_cost",
        )
    sampled = [average(TABLE11[(m, True)]) - average(TABLE11[(m, False)]) for m in (True, False)]
    add(
        "5",
        "dropping every second pooled frame at test time costs less with Mamba than without"
        " (128 frames, the paper's table 11)",
        sampled[0] - sampled[1],
        (1.0, mixer("mamba", 128), 2),
        (-1.0, mixer("mamba", 128), 1),
        (-1.0, mixer("none", 128), 2),
        (1.0, mixer("none", 128), 1),
    )

    def table3(frames):
        temporal, spatial = (average(TABLE3[(kind, frames)]) for kind in ("temporal", "spatial"))
        return temporal - spatial

    def pooling(frames, factor=1.0):
        return (
            (factor, pooled(4, 1, frames=frames)),
            (-factor, pooled(1, 2, frames=frames)),
        )

    add("3", "128 frames: temporal pooling is better than spatial", table3(128), *pooling(128))
    add(
        "3",
        "the advantage of temporal pooling is larger at 128 frames than at 32",
        table3(128) - table3(32),
        *pooling(128),
        *pooling(32, -1.0),
    )

    def streaming(frames):
        return Point("mamba", 4, 1, frames, "forward")

    for frames in (32, 128):
        add(
            "7",
            f"{frames} frames: Mamba in one direction is better than none",
            TABLE7[("forward", frames)] - TABLE7[("none", frames)],
            (1.0, streaming(frames)),
            (-1.0, mixer("none", frames)),
        )
    add(
        "7",
        "128 frames: both directions are better than one",
        TABLE7[("bidirectional", 128)] - TABLE7[("forward", 128)],
        (1.0, mixer("mamba", 128)),
        (-1.0, streaming(128)),
    )
    add(
        "7",
        "32 frames: one direction is better than both",
        TABLE7[("forward", 32)] - TABLE7[("bidirectional", 32)],
        (1.0, streaming(32)),
        (-1.0, mixer("mamba", 32)),
    )
    return found


CLAIMS = _claims()
