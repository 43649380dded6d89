"""Says that a program is being compiled while somebody waits for it, and counts the seconds."""

import sys
import threading
from typing import Any

import jax

from storm_jax.inference.programs import THREAD, WAITED

# JAX records these when it has lowered a program, and when XLA has compiled it or found it on disk.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileNotice:
    """Writes a line to standard error when a compilation takes long, and one when it is done.

    Attributes:
      seconds: for which callers have waited for the compiler so far, short compilations included;
        what is compiled beside counts only as far as somebody waits for it.
    """

    def __init__(self, after: float = 1.0):
        """Listens from now on; `after` seconds are not long yet."""
        self.seconds = 0.0
        self._after = after
        self._timers: dict[str, threading.Timer] = {}  # by the name of the thread that compiles
        self._announced: set[str] = set()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._heard)
        for timer in list(self._timers.values()):
            timer.cancel()

    def _heard(self, event: str, duration_secs: float, **about: Any) -> None:
        if event not in (_LOWERED, _COMPILED, WAITED):
            return
        thread = threading.current_thread().name
        if thread != THREAD:
            self.seconds += duration_secs
        if event == WAITED:
            return
        name = str(about.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        if thread in self._timers:
            self._timers.pop(thread).cancel()
        if event == _LOWERED:
            timer = threading.Timer(self._after, self._announce, (thread, name))
            timer.daemon = True
            self._timers[thread] = timer
            timer.start()
        elif thread in self._announced:
            self._announced.remove(thread)
            self._say(f"compiled {name} in {duration_secs:.1f} s")

    def _announce(self, thread: str, name: str) -> None:
        self._announced.add(thread)
        self._say(f"compiling {name} for these sizes; the next start finds it on disk")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
