"""Plans of storm_jax.data.planning: complete, within capacity, and the same everywhere."""

import pickle
import threading

import numpy as np
import pytest

from storm_jax.data import planning
from storm_jax.data.packing import Limits
from storm_jax.data.planning import EndlessPlan, Lengths, OrderedPlan

LIMITS = Limits(tokens=100, frames=16)


def lengths(count, seed=0, most=100):
    rng = np.random.default_rng(seed)
    return Lengths(
        rng.integers(1, most + 1, count).astype(np.int32),
        rng.integers(0, 17, count).astype(np.int32),
    )


def rows(plan, count, first=0):
    return [plan.row(i).tolist() for i in range(first, first + count)]


def take(plan, samples):
    """Rows from the first on until `samples` samples are in them."""
    taken, count = [], 0
    while count < samples:
        taken.append(plan.row(len(taken)).tolist())
        count += len(taken[-1])
    return taken


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("count", "window"), [(1, 64), (7, 64), (300, 64), (300, 1000)])
def test_each_pass_has_every_sample_once_in_another_order(count, window, pack):
    plan = EndlessPlan([lengths(count)], [1.0], LIMITS, pack=pack, seed=3, window=window)
    taken = sum(take(plan, 3 * count), [])
    passes = [taken[i * count : (i + 1) * count] for i in range(3)]
    for one in passes:
        assert sorted(one) == list(range(count))
    if count > 7:
        assert passes[0] != passes[1] != passes[2]
        assert passes[0] != sorted(passes[0])


def test_capacity_is_never_exceeded_and_little_is_wasted():
    source = lengths(3000, most=60)
    plan = EndlessPlan([source], [1.0], LIMITS, pack=True, seed=0)
    taken = take(plan, 3000)
    tokens = np.array([source.tokens[row].sum() for row in taken])
    frames = np.array([source.frames[row].sum() for row in taken])
    assert tokens.max() <= 100
    assert frames.max() <= 16
    least = max(source.tokens.sum() / 100, source.frames.sum() / 16)
    assert len(taken) < 1.05 * least  # no plan has fewer rows than `least`


def test_without_packing_a_row_is_one_sample():
    plan = EndlessPlan([lengths(50)], [1.0], LIMITS, pack=False, seed=0)
    assert all(len(row) == 1 for row in rows(plan, 200))


@pytest.mark.parametrize("pack", [True, False])
def test_mixture_gives_each_source_its_share(pack):
    sources = [lengths(40, 1), lengths(500, 2), lengths(30, 3)]
    plan = EndlessPlan(sources, [3.0, 1.0, 0.0], LIMITS, pack=pack, seed=0)
    taken = take(plan, 2160)  # four windows of 540 samples
    samples = np.concatenate([np.array(row) for row in taken])
    assert len(samples) == 2160
    first, second = samples[samples < 40], samples[samples >= 40]
    assert abs(len(first) - 0.75 * 2160) <= 1
    assert second.max() < 540  # the source of weight 0 stays out
    # Without replacement within each source's pass: 40 full passes and a half, at most one pass.
    counts = np.bincount(first, minlength=40)
    assert counts.min() >= 40 and counts.max() <= 41
    assert np.bincount(second - 40).max() == np.bincount(second - 40).min() + 1 == 2
    if not pack:  # in every stretch of the stream, not only in the long run
        shares = np.convolve(samples < 40, np.ones(8) / 8, "valid")
        assert shares.min() >= 5 / 8 and shares.max() <= 7 / 8


def test_rows_do_not_depend_on_what_was_asked_before():
    def plan():
        sources = [lengths(90, 1), lengths(70, 2)]
        return EndlessPlan(sources, [1.0, 2.0], LIMITS, pack=True, seed=5, window=32)

    expected = rows(plan(), 200)
    assert rows(plan(), 60, first=140) == expected[140:]  # a resumed run
    backwards = plan()
    assert [backwards.row(i).tolist() for i in reversed(range(200))] == expected[::-1]
    used = plan()
    used.row(120)
    assert rows(pickle.loads(pickle.dumps(used)), 200) == expected  # a worker's copy
    assert rows(EndlessPlan([lengths(160)], [1.0], LIMITS, pack=True, seed=5), 200) != expected


def test_seed_changes_the_order():
    first, second = (
        rows(EndlessPlan([lengths(90)], [1.0], LIMITS, pack=True, seed=seed), 50) for seed in (0, 1)
    )
    assert first != second


def test_threads_read_the_same_rows():
    def plan():
        return EndlessPlan([lengths(90)], [1.0], LIMITS, pack=True, seed=5, window=16)

    expected, shared, got = rows(plan(), 160), plan(), {}

    def read(first):
        for i in range(first, 160, 4):
            got[i] = shared.row(i).tolist()

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(160)] == expected


def splitmix64(state):
    """One step of the published generator, in Python integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return state, mixed ^ (mixed >> 31)


def test_order_does_not_depend_on_numpy():
    """Worked out without it: a run must go on with the same rows after an update of NumPy."""
    plan = EndlessPlan([lengths(8)], [1.0], LIMITS, pack=False, seed=7)
    expected = []
    for number in range(2):
        state = 0
        for part in (7, 0, 0, number):  # seed, use, source, pass
            _, state = splitmix64((state + part) % 2**64)
        keys = []
        for _ in range(8):
            state, key = splitmix64(state)
            keys.append(key)
        expected += sorted(range(8), key=keys.__getitem__)
    assert sum(rows(plan, 16), []) == expected


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([5, 5], [1.0, -1.0], "weight -1.0 of source 1 is negative"),
        ([5, 0], [1.0, 1.0], "source 1 has weight 1.0, but no usable sample"),
        ([5], [0.0], "no source has a weight above 0"),
    ],
)
def test_weights_that_make_no_mixture(counts, weights, message):
    with pytest.raises(ValueError, match=message):
        EndlessPlan([lengths(n) for n in counts], weights, LIMITS, pack=True, seed=0)


def test_best_fit_by_hand():
    tokens = np.array([60, 30, 50, 40, 20])
    frames = np.array([4, 2, 4, 8, 0])
    # Largest first: 60 | 50, does not fit: own row | (40, 8 frames): beside 60 | 30: beside 50 |
    # 20: only the second row has room.
    fitted = planning.best_fit(tokens, frames, LIMITS)
    assert [row.tolist() for row in fitted] == [[0, 3], [2, 1, 4]]


def test_best_fit_keeps_both_limits_on_random_lengths():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 60))
        tokens, frames = rng.integers(0, 101, count), rng.integers(0, 17, count)
        fitted = planning.best_fit(tokens, frames, LIMITS)
        assert sorted(np.concatenate(fitted).tolist()) == list(range(count))
        assert max(tokens[row].sum() for row in fitted) <= 100
        assert max(frames[row].sum() for row in fitted) <= 16


def test_ordered_plan_has_every_sample_once_in_order():
    source = lengths(100, most=60)
    packed = OrderedPlan(np.arange(100), source, LIMITS, pack=True)
    taken = rows(packed, packed.rows)
    assert sum(taken, []) == list(range(100))
    assert packed.rows < 100
    for row in taken:
        assert source.tokens[row].sum() <= 100 and source.frames[row].sum() <= 16
    assert packed.row(packed.rows).tolist() == []
    some = np.arange(0, 100, 3)
    single = OrderedPlan(some, source, LIMITS, pack=False)
    assert rows(single, single.rows) == [[i] for i in some]
    assert OrderedPlan(np.arange(0), source, LIMITS, pack=True).rows == 0


def test_subset_is_drawn_in_order_without_replacement():
    assert planning.subset(5, 9, seed=0).tolist() == [0, 1, 2, 3, 4]
    chosen = planning.subset(1000, 100, seed=0)
    assert len(set(chosen.tolist())) == 100
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() != planning.subset(1000, 100, seed=1).tolist()
    assert 350 < chosen.mean() < 650  # from everywhere, not from the front
