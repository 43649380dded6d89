"""The metric files across an interruption, and numbers that are lost."""

import json

import pytest

from storm_jax.metrics import MetricWriter, Progress, require_finite


def test_a_resumed_run_rewrites_later_lines(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, 30.0))]
    assert list((tmp_path / "tensorboard").iterdir())


def test_rates_are_those_since_the_last_call():
    progress = Progress(0, 10, peak=1e3)
    for _ in range(4):
        progress.add(tokens=5, frames=2, flops=7.0, waited=0.0)
    rates = progress.rates()
    seconds = 4 * rates["step_seconds"]
    assert rates["tokens_per_second"] * seconds == pytest.approx(20)
    assert rates["frames_per_second"] * seconds == pytest.approx(8)
    assert rates["mfu"] * seconds == pytest.approx(28 / 1e3)
    progress.add(tokens=1, frames=0, flops=0.0, waited=0.0)
    later = progress.rates()
    assert later["tokens_per_second"] * later["step_seconds"] == pytest.approx(1)
    progress.close()
    without_peak = Progress(0, 1, peak=None)
    without_peak.add(1, 1, 1.0, 0.0)
    assert "mfu" not in without_peak.rates()
    without_peak.close()


def test_lost_numbers_name_step_and_metric():
    require_finite(3, {"loss": 1.0})
    with pytest.raises(FloatingPointError, match="step 7: grad_norm, loss not finite"):
        require_finite(7, {"grad_norm": float("inf"), "loss": float("nan"), "accuracy": 1.0})
