"""Lost numbers and diverging losses: when the run stops, and what it says."""

import math

import numpy as np
import pytest

from storm_jax.training.health import Health
from tests.tiny import run_config

NAMES = ["decoder/a/weight", "vit/b/scale", "vit/c/weight"]
FINE = np.ones(3, np.float32)


def health(**train) -> Health:
    return Health(run_config(**{f"train.{k}": v for k, v in train.items()}).train, NAMES)


def values(loss=1.0, norm=1.0):
    return {"loss": loss, "grad_norm": norm}


def test_finite_numbers_are_fine():
    assert health().check(1, values(), FINE) is None


def test_parameters_whose_gradient_is_lost_are_named():
    norms = np.array([1.0, math.inf, 2.0], np.float32)
    wrong = health().check(7, values(norm=math.inf), norms)
    assert wrong is not None and wrong.startswith("step 7: grad_norm not finite.")
    assert "not finite: vit/b/scale, in part vit." in wrong and "rates.vit," in wrong


def test_all_gradients_lost_points_at_the_forward_pass():
    wrong = health().check(7, values(math.nan, math.nan), np.full(3, math.nan))
    assert wrong is not None and "step 7: loss, grad_norm not finite" in wrong
    assert "the forward pass is at fault" in wrong


def test_a_lost_loss_with_finite_gradients_is_told_apart():
    wrong = health().check(7, values(loss=math.inf), FINE)
    assert wrong is not None and "it is the loss that is not" in wrong


def test_so_many_updates_in_a_row_may_be_skipped():
    watch = health(skip_nonfinite=2)
    assert watch.check(1, values(math.nan), FINE) is None
    assert watch.check(2, values(math.nan), FINE) is None
    assert watch.check(3, values(), FINE) is None  # the count begins anew
    assert watch.check(4, values(math.nan), FINE) is None
    assert watch.check(5, values(math.nan), FINE) is None
    wrong = watch.check(6, values(math.nan), FINE)
    assert wrong is not None and "(2 updates in a row were skipped before)" in wrong
    assert watch.skipped == 4


def limits(factor, window=8, steps=3):
    return {
        "divergence.factor": factor, "divergence.window": window, "divergence.steps": steps,
    }  # fmt: skip


def test_divergence_needs_several_steps_above_the_median():
    watch = health(**limits(2.0, window=20))
    for step in range(20):
        assert watch.check(step, values(1.0 + step % 2), FINE) is None
    for step, loss in enumerate((9.0, 9.0, 1.0, 9.0, 9.0), start=20):  # one good step between
        assert watch.check(step, values(loss), FINE) is None
    wrong = watch.check(25, values(9.0), FINE)
    assert wrong is not None and "step 25: the loss 9.0000 diverges: for 3 steps" in wrong


def test_nothing_is_judged_before_the_window_is_full_or_when_off():
    watch = health(**limits(2.0))
    assert [watch.check(s, values(10.0**s), FINE) for s in range(8)] == [None] * 8
    off = health(**limits(0.0))
    assert [off.check(s, values(10.0**s), FINE) for s in range(30)] == [None] * 30


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("factor", 0.5, "factor=0.5: above 1, or 0"),
        ("steps", 80, "steps=80 is not between 1 and half of train.divergence.window=100"),
    ],
)
def test_limits_that_make_no_sense(field, value, message):
    with pytest.raises(ValueError, match=message):
        run_config(**{f"train.divergence.{field}": value})
