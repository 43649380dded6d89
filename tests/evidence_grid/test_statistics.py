import numpy as np
import pytest

from storm_jax.evidence_grid.answers import Answers
from storm_jax.evidence_grid.statistics import T, contrast, over_clips, over_seeds


def answers(right, tasks=("a", "a", "b", "b")):
    right = np.array(right, bool)
    return Answers(right, tuple(tasks), np.full(len(tasks), 0.5), 8)


def test_quantiles_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in T.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


def test_interval_over_seeds_by_hand():
    # Five values, mean 70, sum of squares 10: s = sqrt(10 / 4), t(0.975, 4) = 2.77645.
    found = over_seeds(np.array([68.0, 69.0, 70.0, 71.0, 72.0]))
    assert found.mean == pytest.approx(70)
    assert found.half == pytest.approx(2.77645 * (10 / 4) ** 0.5 / 5**0.5)
    assert found.low < 70 < found.high
    with pytest.raises(ValueError, match="1 seeds"):
        over_seeds(np.array([70.0]))


def test_interval_over_clips_weighs_tasks_equally():
    # Task a: 0 and 2, task b: 10 four times; the mean over tasks is (1 + 10) / 2.
    found = over_clips(np.array([0.0, 2.0, 10, 10, 10, 10]), tuple("aabbbb"))
    assert found.mean == pytest.approx(5.5)
    assert found.half == pytest.approx(1.959964 * np.sqrt(2 / 2) / 2)


def test_contrast_is_paired():
    """Seeds and clips that are hard for both cancel out."""
    one = answers([[1, 0, 1, 0], [0, 0, 0, 0]])
    two = answers([[1, 1, 1, 0], [0, 1, 0, 0]])
    found = contrast([(1.0, two), (-1.0, one)])
    assert found.seeds.mean == pytest.approx(25)
    assert found.seeds.half == pytest.approx(0)
    assert found.clips.mean == pytest.approx(25)
    assert found.clips.half > 0
    assert found.low < 0 < found.high


def test_contrast_refuses_other_clips():
    with pytest.raises(ValueError, match="same clips"):
        contrast([(1.0, answers([[1, 0, 1, 0]])), (-1.0, answers([[1, 0, 1, 0]], "aaab"))])


def test_answers_survive_their_file():
    rng = np.random.default_rng(0)
    tasks = tuple(str(t) for t in rng.choice(["a/4", "b/16", "c/4"], 37))
    chance = np.array([{"a/4": 0.5, "b/16": 0.25, "c/4": 0.5}[t] for t in tasks])
    before = Answers(rng.random((3, 37)) < 0.6, tasks, chance, 12)
    after = Answers.from_json(before.to_json())
    assert (after.right == before.right).all()
    assert after.tasks == before.tasks
    assert after.visual_tokens == 12
    np.testing.assert_allclose(after.chance, before.chance)
    by_hand = [100 * before.right[:, np.array(tasks) == t].mean(1) for t in ("a/4", "b/16", "c/4")]
    np.testing.assert_allclose(after.averages(), np.mean(by_hand, axis=0))
