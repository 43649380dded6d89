"""Where the time of a run goes, over all its restarts; and what it is waiting for right now."""

import time
from typing import Any

from storm_jax.training.watchdog import Watchdog

PHASES = ("start", "compile", "data", "step", "checkpoint", "evaluate")
"""What a process does: everything before the first step, compiling (with the first step), waiting
for a batch, training, holding for a checkpoint, evaluating."""
LOSSES = ("lost", "down")
"""Work after the checkpoint that a restart went back to; and the time when nothing ran, from the
last line of the metrics that the stopped process wrote."""


class Goodput:
    """Seconds by phase, as this process's main thread sees them.

    The device works on while the host waits for the next batch, so "data" bounds what the loader
    costs from above.
    """

    def __init__(self, began: float, watchdog: Watchdog):
        """`began`: Unix time when this process started."""
        self._seconds = dict.fromkeys((*PHASES, *LOSSES), 0.0)
        self._restarts = 0
        self._phase, self._since = "start", began
        self._began = began
        self._watchdog = watchdog

    def resume(self, kept: dict[str, Any] | None, last: dict[str, Any] | None) -> None:
        """Goes on from what an earlier process of the same run wrote.

        Args:
          kept: the newest `row` at or before the step that this process goes on from, or None.
          last: the last line with a "time" that the earlier process wrote, or None.
        """
        if kept is None or last is None:
            return  # a first start, or on a process that writes no metrics
        for name in self._seconds:
            self._seconds[name] = kept[f"seconds/{name}"]
        self._restarts = int(kept["restarts"]) + 1
        self._seconds["lost"] += max(0.0, last["time"] - kept["time"])
        self._seconds["down"] += max(0.0, self._began - last["time"])

    def enter(self, name: str, what: str, ends: bool = True) -> None:
        """From now on time counts for `name`.

        Args:
          what, ends: see `Watchdog.working_on`.
        """
        now = time.time()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = name, now
        self._watchdog.working_on(what, ends)

    def row(self) -> dict[str, float]:
        """For the metrics: totals up to now, and the share that trained."""
        now = time.time()
        self._seconds[self._phase] += now - self._since
        self._since = now
        total = sum(self._seconds.values())
        return {
            **{f"seconds/{name}": seconds for name, seconds in self._seconds.items()},
            "restarts": self._restarts,
            "goodput": self._seconds["step"] / total if total else 0.0,
        }

    def line(self) -> str:
        """The same for people."""
        row = self.row()
        parts = (f"{name} {row[f'seconds/{name}']:.1f}" for name in self._seconds)
        return f"goodput {row['goodput']:.1%} of {', '.join(parts)} s; {row['restarts']} restart(s)"
