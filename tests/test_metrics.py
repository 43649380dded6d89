"""The metric files across an interruption, and numbers that are lost."""

import json
import time

import pytest

from storm_jax.metrics import MetricWriter, Progress


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
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert all(abs(row["time"] - time.time()) < 60 for row in rows)
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


def test_a_resumed_run_sees_what_the_killed_one_wrote_last(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    assert writer.kept is None and writer.last is None
    writer.write(0, {"goodput": 0.0})
    writer.write(2, {"goodput": 0.5})
    writer.write(3, {"loss": 1.0})
    writer.close()
    writer = MetricWriter(tmp_path, 2)
    assert writer.kept is not None and (writer.kept["step"], writer.kept["goodput"]) == (2, 0.5)
    assert writer.last is not None and writer.last["step"] == 3
    writer.close()


def test_a_number_that_is_not_finite_is_null(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": float("nan")})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and json.loads(text)["loss"] is None
