"""A run that stands still, in a process of its own: stacks, status, and what it was waiting for."""

import os
import subprocess
import sys
from pathlib import Path

from storm_jax.training import exits

ROOT = Path(__file__).parents[2]


def run(code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def test_a_run_that_stands_still_is_reported_and_ended():
    status, err = run("""
import threading, time
from storm_jax.training.watchdog import Watchdog
watchdog = Watchdog(0.5)
def loader():
    threading.Event().wait()
threading.Thread(target=loader, daemon=True).start()
watchdog.working_on("the batch of step 12")
time.sleep(100)
""")
    assert status == exits.STUCK
    assert "(train.watchdog=0.5): waiting for the batch of step 12" in err
    assert "in loader" in err and "time.sleep" not in err  # faulthandler shows frames, not source
    assert err.count("Current thread") + err.count("Thread 0x") >= 3
    assert "ending. The same command goes" in err


def test_progress_keeps_it_quiet_and_the_compiler_may_take_long():
    status, err = run("""
import time
from storm_jax.training.watchdog import Watchdog
watchdog = Watchdog(1.0)
for step in range(12):
    watchdog.working_on(f"step {step}")
    time.sleep(0.25)
watchdog.working_on("the compiler", ends=False)
time.sleep(2.5)
watchdog.close()
""")
    assert status == 0
    assert err.count("no progress") == 1 and "waiting for the compiler" in err
