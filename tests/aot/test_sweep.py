"""Variants compiled in processes of their own: ranked, and none ends the others."""

import pytest

from storm_jax.aot.sweep import outcome_line, try_all
from storm_jax.aot.variants import Variant
from tests.tiny import run_config

pytestmark = pytest.mark.slow


def test_failures_are_results():
    config = run_config(**{"train.batch": 8})
    variants = [
        Variant((("mesh.data", 3),)),  # does not multiply to two
        Variant((("train.batch", 0), ("train.accumulation", 1))),  # an empty batch
        Variant((("train.remat.decoder.policy", "full"),)),
        Variant(()),
    ]
    said = []
    done = try_all(config, variants, "h100:2", 1, workers=2, say=said.append)
    assert len(done) == len(said) == 4
    assert [o.fits for o in done] == [True, True, False, False]
    times = [sum(o.report.counted.speed.step_seconds) for o in done[:2]]
    assert times == sorted(times)
    failures = {str(o.variant): o.failure for o in done[2:]}
    assert "there are 2" in failures["mesh.data=3"]
    assert all(failures.values())
    assert "failed" in outcome_line(done[-1]) and "MFU" in outcome_line(done[0])
