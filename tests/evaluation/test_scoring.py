"""Intervals against independent computations, and means by hand."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from storm_jax.evaluation import scoring
from storm_jax.evaluation.items import Answered, Item

Z = stats.norm.ppf(0.975)


def score_interval(p, n):
    """Wilson's, as the roots of the score test rather than by its formula."""

    def distance(q):
        return (p - q) ** 2 - Z**2 * q * (1 - q) / n

    low = 0.0 if p == 0 else optimize.brentq(distance, 1e-15, p)
    high = 1.0 if p == 1 else optimize.brentq(distance, p, 1 - 1e-15)
    return low, high


def regression_error(values, videos, strata):
    """Standard error of the mean of the strata's means: least squares on indicators of the strata,
    covariance clustered by video (Liang and Zeger), and the contrast that averages them."""
    x = (np.asarray(strata)[:, None] == np.unique(strata)).astype(float)
    y = np.asarray(values, float)
    bread = np.linalg.inv(x.T @ x)
    residual = y - x @ (bread @ x.T @ y)
    meat = np.zeros_like(bread)
    names = np.unique(videos)
    for name in names:
        here = np.asarray(videos) == name
        vector = x[here].T @ residual[here]
        meat += np.outer(vector, vector)
    contrast = np.full(x.shape[1], 1 / x.shape[1])
    covariance = len(names) / (len(names) - 1) * bread @ meat @ bread
    return math.sqrt(contrast @ covariance @ contrast)


@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_standard_error_equals_clustered_regression(seed, groups):
    rng = np.random.default_rng(seed)
    videos = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    strata = rng.integers(0, groups, len(videos))
    values = (rng.uniform(size=40)[videos] + rng.uniform(size=len(videos)) > 1).astype(float)
    got = scoring.estimate(values.tolist(), videos.tolist(), strata.tolist())
    value = np.mean([values[strata == g].mean() for g in np.unique(strata)])
    assert got.value == pytest.approx(value, abs=1e-12)
    error = regression_error(values, videos, strata)
    n = min(value * (1 - value) / error**2, len(values))
    assert (got.low, got.high) == pytest.approx(score_interval(value, n), abs=1e-9)
    assert (got.items, got.videos) == (len(values), 40)


def test_interval_agrees_with_a_cluster_bootstrap():
    """Of many videos: resampling videos with replacement, percentiles of the mean."""
    rng = np.random.default_rng(3)
    right = rng.beta(1.2, 0.8, 300)
    values = (rng.uniform(size=(300, 4)) < right[:, None]).astype(float)
    videos = np.repeat(np.arange(300), 4)
    got = scoring.estimate(values.ravel().tolist(), videos.tolist())
    means = [values[rng.integers(0, 300, 300)].mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.004)
    # As if the questions were independent the interval would be two thirds as wide.
    naive = score_interval(got.value, 1200)
    assert (got.high - got.low) / (naive[1] - naive[0]) > 1.35


def test_coverage():
    """Nineteen of twenty intervals hold the true accuracy, and fewer without clusters."""
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(60), 3).tolist()
    held = naive = 0
    for _ in range(1000):
        right = rng.beta(0.7, 0.7 / 3, (60, 1))  # mean 3/4
        values = (rng.uniform(size=(60, 3)) < right).ravel().astype(float).tolist()
        got = scoring.estimate(values, videos)
        held += got.low <= 0.75 <= got.high
        alone = scoring.estimate(values, list(range(180)))
        naive += alone.low <= 0.75 <= alone.high
    assert 930 <= held <= 970
    assert naive < 880


@pytest.mark.parametrize("right", [0, 1])
def test_all_right_or_all_wrong(right):
    """Every video is one trial: not a width of nothing, and not of more trials than videos."""
    got = scoring.estimate([right] * 12, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
    exact = stats.binomtest(4 * right, 4).proportion_ci(method="wilson")
    assert got.value == right
    assert (got.low, got.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_one_video_is_one_trial():
    got = scoring.estimate([1, 0, 1, 1], ["a"] * 4)
    assert (got.low, got.high) == pytest.approx(score_interval(0.75, 1), abs=1e-9)
    assert got.videos == 1


def test_copies_of_an_item_add_nothing():
    values, videos = [1, 0, 0, 1, 1, 0, 1, 1], list("abcdefgh")
    once = scoring.estimate(values, videos)
    twice = scoring.estimate([*values, *values], [*videos, *videos])
    assert (twice.value, twice.low, twice.high) == pytest.approx(
        (once.value, once.low, once.high), abs=1e-12
    )
    independent = scoring.estimate([*values, *values], [*videos, *"ABCDEFGH"])
    assert independent.high - independent.low < 0.8 * (twice.high - twice.low)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        scoring.estimate([], [])


# ------------------------------------------------------------------------------------------ means


def records(*rows):
    """Rows of video, category, right option, chosen option."""
    made = []
    for number, (video, kind, right, chosen) in enumerate(rows):
        item = Item(str(number), video, "q", tuple("abcd"), right, categories={"task": kind})
        made.append(Answered(item, "", chosen))
    return made


ROWS = [
    ("u", "x", 0, 0),
    ("u", "x", 1, 1),
    ("v", "x", 2, 3),
    ("v", "x", 2, None),
    ("w", "y", 3, 3),
    ("w", "y", None, 0),
]


def test_micro():
    score = scoring.accuracy(records(*ROWS))
    assert score.metric == "accuracy" and not score.also
    assert score.main is not None and score.main.value == pytest.approx(3 / 5)
    assert (score.items, score.unparsed, score.hidden) == (5, 1, 1)
    assert {v: e.value for v, e in score.groups["task"].items()} == {"x": 0.5, "y": 1.0}


def test_macro():
    score = scoring.accuracy(records(*ROWS), mean_over="task")
    assert score.metric == "mean of the accuracies of 2 values of task"
    assert score.main is not None and score.main.value == pytest.approx((1 / 2 + 1) / 2)
    assert score.also["accuracy over all items"].value == pytest.approx(3 / 5)


def test_nothing_published():
    score = scoring.accuracy(records(("u", "x", None, 1)))
    assert score.main is None and score.groups == {} and score.hidden == 1
    assert scoring.accuracy([]).main is None


@pytest.mark.parametrize(
    ("output", "answer", "exact", "f1"),
    [
        ("The red ball.", "red ball", 1, 1.0),
        ("  a RED, ball!", "The Red Ball", 1, 1.0),
        ("red balls", "red ball", 0, 0.5),
        ("red red ball", "red ball", 0, 0.8),  # 2 of 3 and 2 of 2 words
        ("green", "red ball", 0, 0.0),
        ("the", "red ball", 0, 0.0),
        ("an answer", "answer", 1, 1.0),
        ("theatre", "the atre", 0, 0.0),
        ("5", "5.", 1, 1.0),
    ],
)
def test_open_ended(output, answer, exact, f1):
    item = Item("1", "v", "q", (), answer)
    assert scoring.credit(Answered(item, output, output)) == exact
    assert scoring.token_f1(output, answer) == pytest.approx(f1)
    assert scoring.credit(Answered(item, output, None)) == 0
