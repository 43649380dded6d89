"""SIGTERM in a process of its own: once, twice, and when saving takes too long."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from storm_jax.training import exits

ROOT = Path(__file__).parents[2]
START = """
import signal, sys, time
import jax
from storm_jax.config import MeshConfig
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.preemption import Preemption
preemption = Preemption(make_mesh(MeshConfig(), jax.devices()[:1]), grace=GRACE)
assert not preemption.agreed()
print("ready", flush=True)
"""


def started(code: str, grace: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", START.replace("GRACE", str(grace)) + code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


WORK = """
while not preemption.agreed():
    time.sleep(0.01)
print("saving", flush=True)
"""
# Taken up again by the interpreter after every signal: no Python code of this thread runs any more.
STUCK = """
import threading
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def test_one_sigterm_is_agreed_on_and_then_given_back():
    process = started(
        WORK + "preemption.close(); print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)", 0
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "saving\nTrue\n"
    assert "SIGTERM: saving the state" in err


def test_a_second_sigterm_ends_at_once():
    process = started(WORK + "time.sleep(100)", 0)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "a second SIGTERM: ending without saving" in err


def test_saving_that_takes_too_long_ends_with_stacks():
    """The main thread hangs where no Python signal handler runs, as in a collective."""
    process = started(STUCK, 0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exits.STUCK
    assert "not saved 0.5 s after SIGTERM (train.preemption_grace)" in err
    assert "Current thread" in err or "Thread 0x" in err
