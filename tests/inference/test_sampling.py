"""Filters against transformers' own, choices against the distribution that they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.inference.sampling import Sampling, Wishes, filtered, sample

VOCAB = 50
CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5, top_k=1),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_k=500),
    Sampling(temperature=0.8, top_p=0.5),
    Sampling(temperature=1.0, top_p=1e-4),
    Sampling(temperature=1.5, top_k=20, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=0.7, top_k=30, top_p=0.95, min_p=0.05),
]


def stacked(samplings) -> Wishes:
    return jax.tree.map(lambda *x: jnp.stack(x), *map(Wishes.of, samplings))


def scores(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB), scale=2.0).astype(np.float32)


def test_filters_are_those_of_transformers():
    """All cases as rows of one call."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    given = scores(0, len(CASES))
    got = np.asarray(jax.jit(filtered)(given, stacked(CASES)))
    for row, case in enumerate(CASES):
        expected = torch.as_tensor(given[row : row + 1])
        warpers = [hf.TemperatureLogitsWarper(case.temperature)]
        if case.top_k:
            warpers.append(hf.TopKLogitsWarper(case.top_k))
        if case.top_p < 1:
            warpers.append(hf.TopPLogitsWarper(case.top_p))
        if case.min_p:
            warpers.append(hf.MinPLogitsWarper(case.min_p))
        for warper in warpers:
            expected = warper(None, expected)
        expected = expected[0].numpy()
        np.testing.assert_array_equal(np.isfinite(got[row]), np.isfinite(expected), str(case))
        kept = np.isfinite(expected)
        np.testing.assert_allclose(got[row][kept], expected[kept], rtol=1e-6)
    assert {int(np.isfinite(row).sum()) for row in got} >= {1, 7, VOCAB}


def test_the_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    given, penalty = scores(1, 4), 1.7
    seen = np.random.default_rng(2).integers(0, VOCAB, (4, 9))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.as_tensor(seen), torch.as_tensor(given)
    )
    mask = np.zeros((4, VOCAB), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    wishes = stacked([Sampling(repetition_penalty=penalty)] * 4)
    got = sample(jnp.asarray(given), wishes, jnp.asarray(mask), jnp.arange(4))
    np.testing.assert_array_equal(got, expected.argmax(dim=1).numpy())
    assert (np.asarray(got) != given.argmax(axis=1)).any()


def test_choices_follow_the_distribution():
    """20,000 draws: a chi-squared test at one in a million, for what the filters leave."""
    draws = 20_000
    case = Sampling(temperature=1.1, top_k=12, top_p=0.9, seed=3)
    given = jnp.asarray(np.broadcast_to(scores(4, 1), (draws, VOCAB)))
    wishes = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape)), Wishes.of(case))
    seen = jnp.zeros((draws, VOCAB), bool)
    got = np.asarray(jax.jit(sample)(given, wishes, seen, jnp.arange(draws)))
    left = np.asarray(filtered(given[:1], jax.tree.map(lambda x: x[:1], wishes))[0], np.float64)
    expected = np.exp(left - left.max())
    expected *= draws / expected.sum()
    counts = np.bincount(got, minlength=VOCAB)
    assert not counts[expected == 0].any()
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    assert 3 <= degrees <= 11
    # Wilson and Hilferty's approximation of the quantile; 4.753 is the normal one.
    bound = degrees * (1 - 2 / (9 * degrees) + 4.753 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < bound


def test_greedy_rows_beside_random_ones():
    given = jnp.asarray(scores(5, 6))
    wishes = stacked([Sampling(), Sampling(temperature=5.0, seed=1)] * 3)
    got = np.asarray(sample(given, wishes, jnp.zeros((6, VOCAB), bool), jnp.arange(6)))
    best = np.asarray(given).argmax(axis=1)
    np.testing.assert_array_equal(got[::2], best[::2])
    assert (got[1::2] != best[1::2]).any()
