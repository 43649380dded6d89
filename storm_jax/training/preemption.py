"""SIGTERM: a machine is about to be taken away; all processes save at the same step and end."""

import os
import signal
import sys
import threading
import time

import jax
import numpy as np

from storm_jax.training import exits
from storm_jax.training.watchdog import dump_stacks


class Preempted(Exception):
    """Training was asked to stop, and has saved; the same command goes on from there."""


class Preemption:
    """Listens for SIGTERM from construction to `close`.

    The first SIGTERM asks all processes to stop: each step carries a vote, and what came of the
    vote of a step is known to all of them after the same later step. A second SIGTERM ends this
    process at once, as does the end of the time that saving may take.

    A thread listens, not a Python signal handler: the main thread may hang in a collective, and
    handlers would wait for it.
    """

    def __init__(self, mesh: jax.sharding.Mesh, grace: float):
        """
        Args:
          mesh: all devices of the run.
          grace: seconds from SIGTERM to the end of this process at the latest; 0: no limit.
        """
        self._asked = threading.Event()
        self._grace = grace
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as signal.set_wakeup_fd wants it
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="preemption").start()
        self._split = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._devices = mesh.devices.size
        self._vote: jax.Array | None = None
        self._sum = jax.jit(jax.numpy.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def agreed(self) -> bool:
        """Shall all processes stop after the step that was just started? Called once a step.

        With several processes the answer is the vote of the step before, so that nobody waits for
        the devices: it comes one step late, and is the same for all of them.
        """
        if jax.process_count() == 1:
            return self._asked.is_set()
        mine = np.full(jax.local_device_count(), self._asked.is_set(), np.int32)
        votes = jax.make_array_from_process_local_data(self._split, mine, (self._devices,))
        before, self._vote = self._vote, self._sum(votes)
        return before is not None and bool(before)

    def close(self) -> None:
        """Gives SIGTERM its former meaning back."""
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        while received := os.read(self._read, 64):
            for number in received:
                if number != signal.SIGTERM:
                    continue
                if self._asked.is_set():
                    _say("a second SIGTERM: ending without saving")
                    os._exit(128 + signal.SIGTERM)
                _say("SIGTERM: saving the state, then ending; a second one ends at once")
                self._asked.set()
                if self._grace:
                    threading.Thread(target=self._deadline, daemon=True).start()
        os.close(self._read)

    def _deadline(self) -> None:
        time.sleep(self._grace)
        _say(f"not saved {self._grace:g} s after SIGTERM (train.preemption_grace); ending")
        dump_stacks()
        os._exit(exits.STUCK)


def _say(text: str) -> None:
    print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
