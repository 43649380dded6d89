"""Reports a run that stands still, and ends it so that its launcher can start it again."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import active_children

from storm_jax.training import exits


class Watchdog:
    """A thread that looks whether `working_on` is still called."""

    def __init__(self, seconds: float):
        """
        Args:
          seconds: without progress until the stacks of all threads are written to standard error;
            after as many again this process ends with `exits.STUCK`. 0: never.
        """
        self._seconds = seconds
        self._what, self._since, self._ends = "starting", time.monotonic(), False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def working_on(self, what: str, ends: bool = True) -> None:
        """Something new has begun.

        Args:
          what: completes "waiting for".
          ends: may be too long only if something is wrong; if not, it is reported, no more.
        """
        with self._lock:
            self._what, self._since, self._ends = what, time.monotonic(), ends

    def close(self) -> None:
        """Stops looking."""
        self._closed.set()

    def _watch(self) -> None:
        reported = None
        while not self._closed.wait(min(self._seconds / 10, 10.0)):
            with self._lock:
                what, since, ends = self._what, self._since, self._ends
            still = time.monotonic() - since
            if still > 2 * self._seconds and ends:
                _say(f"still waiting for {what} after {still:.0f} s: ending. The same command goes")
                _say("on from the newest checkpoint")
                os._exit(exits.STUCK)
            if still > self._seconds and reported != since:
                reported = since
                _say(
                    f"no progress for {still:.0f} s (train.watchdog={self._seconds:g}): waiting for"
                    f" {what}"
                )
                dump_stacks()


def dump_stacks() -> None:
    """The stacks of all threads, and those of data workers, to standard error."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    for child in active_children():
        if child.pid is not None and _answers(child.pid):
            os.kill(child.pid, signal.SIGUSR1)


def _answers(pid: int) -> bool:
    """Has `data.pipeline._start_worker` run there? If not, the signal would end the process."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _say(text: str) -> None:
    # Not jax.process_index(): the process may hang before it has one.
    where = f"process {os.getpid()} on {socket.gethostname()}"
    print(f"watchdog, {where}: {text}", file=sys.stderr, flush=True)
