"""Which outputs count as degenerate."""

import pytest

from storm_jax.evaluation.health import faults, repeats

LONG = "The man walks to the door, opens it, and the dog runs out into the garden. "


@pytest.mark.parametrize(
    "output",
    ["!" * 24, "A" * 300, "no " * 12, "I think: " + "the cat " * 9, LONG * 4, (LONG * 6)[:-30]],
)
def test_repetition(output):
    assert faults(output, True, "length") == ["repetition"]


@pytest.mark.parametrize(
    "output",
    ["A", "(B) a red square", "!!!", "ha ha ha", LONG, LONG * 2, "1, 2, 3, 4, 5, 6, 7, 8, 9",
     "!" * 30 + " but then it ends well", "a " * 11],
)  # fmt: skip
def test_no_repetition(output):
    assert faults(output, True, "stop") == []


def test_others():
    assert faults(" \n", True, "stop") == ["empty"]
    assert faults("A", False, "stop") == ["non-finite"]
    assert faults("!" * 40, False, "length") == ["non-finite", "repetition"]
    assert faults("", True, "error") == []  # nothing was said


def test_long_outputs_take_no_time():
    assert not repeats([i % 7 * (i // 7) for i in range(3000)])
