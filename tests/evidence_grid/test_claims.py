import numpy as np
import pytest

from storm_jax.evidence_grid.answers import Answers
from storm_jax.evidence_grid.claims import CLAIMS, Claim, Term, decide, verdict
from storm_jax.evidence_grid.grids import CORE
from storm_jax.evidence_grid.recipe import Point
from storm_jax.evidence_grid.results import Result
from storm_jax.evidence_grid.statistics import Contrast, Interval

NONE, MAMBA = Point("none", 4, 1, 32), Point("mamba", 4, 1, 32)
CLAIM = Claim("4", "Mamba is better", 0.7, (Term(1.0, MAMBA), Term(-1.0, NONE)))


def result(accuracy, seed, clips=400):
    """Three seeds that answer so many of the clips, each others."""
    rng = np.random.default_rng(seed)
    right = np.zeros((3, clips), bool)
    for one in right:
        one[rng.permutation(clips)[: round(accuracy * clips)]] = True
    found = Answers(right, ("x/4",) * clips, np.full(clips, 0.5), 8)
    return Result({"answers": {"test_seen": found.to_json()}})


@pytest.mark.parametrize(
    ("mamba", "none", "expected"),
    [
        (0.9, 0.6, "reproduced"),
        (0.6, 0.9, "not reproduced"),
        (0.75, 0.75, "not testable this way"),  # 400 clips are too few to exclude 2 points
        (0.5, 0.5, "not testable this way"),  # chance
        (1.0, 0.995, "not testable this way"),  # ceiling
    ],
)
def test_decisions_follow_the_data(mamba, none, expected):
    results = {MAMBA.name: result(mamba, 1), NONE.name: result(none, 2)}
    decision = decide(CLAIM, results)
    assert decision.verdict == expected, decision
    assert decision.contrast.seeds.mean == pytest.approx(100 * (mamba - none))


def test_missing_runs_are_named():
    decision = decide(CLAIM, {MAMBA.name: result(0.9, 1)})
    assert decision.verdict == "not run"
    assert NONE.name in decision.reason


@pytest.mark.parametrize(
    ("rule", "seeds", "clips", "expected"),
    [
        ("above", (3, 1), (3, 1), "reproduced"),
        ("above", (3, 1), (3, 4), "not testable this way"),  # both intervals count
        ("above", (0.5, 1), (0.5, 1), "not reproduced"),  # narrow around nothing
        ("above", (-3, 1), (-3, 1), "not reproduced"),
        ("no_cost", (-0.5, 1), (-0.5, 1), "reproduced"),
        ("no_cost", (-1.5, 1), (-1.5, 1), "not testable this way"),
        ("no_cost", (-5, 1), (-5, 1), "not reproduced"),
    ],
)
def test_the_rule(rule, seeds, clips, expected):
    found = Contrast(Interval(*seeds), Interval(*clips))
    assert verdict(rule, found, [70.0, 72.0], 40.0)[0] == expected


def test_every_claim_is_covered_by_the_core_grid():
    points = {recipe.point for recipe in CORE.recipes("")}
    for claim in CLAIMS:
        assert {term.point for term in claim.terms} <= points, claim.text
        # Sums of factors are 0: contrasts, whose chance level cancels.
        assert sum(term.factor for term in claim.terms) == 0


def test_paper_numbers_of_claims():
    """The gaps of tables 4 and 10, as the text of the paper's ablation gives them."""
    by_text = {claim.text: claim.paper for claim in CLAIMS}
    at = "{} frames: Mamba before temporal pooling is better than none"
    assert by_text[at.format(128)] == pytest.approx(2.4)
    assert by_text[at.format(32)] == pytest.approx(0.7)
    growth = by_text["the advantage of Mamba is larger at 128 frames than at 8"]
    assert growth == pytest.approx(2.8)
