"""Which items of an endless stream have a slot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm_jax.inference.history import History


@given(slots=st.integers(1, 40), items=st.integers(0, 300))
def test_recent_keeps_the_newest(slots, items):
    history = History(slots, "recent")
    for item in range(items):
        history.add(item)
    assert list(history.kept) == list(range(max(0, items - slots), items))


@given(slots=st.integers(1, 40), items=st.integers(0, 300))
def test_spread_keeps_multiples_of_a_power_of_two(slots, items):
    history = History(slots, "spread")
    for item in range(items):
        history.add(item)
    stride = 1  # the smallest one whose multiples fit
    while -(-items // stride) > slots:
        stride *= 2
    assert list(history.kept) == list(range(0, items, stride))


@given(
    slots=st.integers(1, 12),
    items=st.integers(1, 100),
    policy=st.sampled_from(["recent", "spread"]),
)
def test_an_item_stays_in_its_slot(slots, items, policy):
    history = History(slots, policy)
    places = {}
    for item in range(items):
        history.add(item)
        kept = history.kept
        assert sorted(kept) == list(kept)
        assert len(set(kept.values())) == len(kept) and set(kept.values()) <= set(range(slots))
        for one, slot in kept.items():
            assert places.setdefault(one, slot) == slot == history.slot(one)
    gone = set(range(items)) - set(history.kept)
    assert all(history.slot(item) is None for item in gone)


def test_bad_values():
    with pytest.raises(ValueError, match="slots=0"):
        History(0, "recent")
    with pytest.raises(ValueError, match="policy='newest'.*'recent', 'spread'"):
        History(3, "newest")
