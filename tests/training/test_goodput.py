"""Time by phase, over restarts."""

import time

import pytest

from storm_jax.training.goodput import LOSSES, PHASES, Goodput
from storm_jax.training.watchdog import Watchdog


def test_every_second_is_in_one_phase():
    began = time.time() - 5
    clock = Goodput(began, Watchdog(0))
    time.sleep(0.02)
    clock.enter("data", "a batch")
    time.sleep(0.05)
    clock.enter("step", "a step")
    time.sleep(0.1)
    row = clock.row()
    assert sum(row[f"seconds/{n}"] for n in (*PHASES, *LOSSES)) == pytest.approx(
        time.time() - began, abs=0.01
    )
    assert row["seconds/start"] == pytest.approx(5.02, abs=0.03)
    assert row["seconds/data"] == pytest.approx(0.05, abs=0.03)
    assert row["goodput"] == pytest.approx(0.1 / 5.17, abs=0.01) and row["restarts"] == 0


def test_work_done_again_and_idle_time_are_losses():
    """Saved at 100; the last sign of life at 130; started again at 150."""
    kept = {f"seconds/{name}": 0.0 for name in (*PHASES, *LOSSES)}
    kept |= {"time": 100.0, "restarts": 1, "seconds/step": 60.0, "seconds/lost": 3.0}
    clock = Goodput(150.0, Watchdog(0))
    clock.resume(kept, {"time": 130.0})
    row = clock.row()
    assert row["restarts"] == 2 and row["seconds/step"] == 60.0
    assert row["seconds/lost"] == 33.0 and row["seconds/down"] == 20.0
    assert "lost 33.0, down 20.0 s; 2 restart(s)" in clock.line()


def test_a_first_start_has_lost_nothing():
    clock = Goodput(time.time(), Watchdog(0))
    clock.resume(None, None)
    assert clock.row()["restarts"] == 0
