"""Says that a program is being compiled while somebody waits for it, and counts the seconds."""

import sys
import threading
from typing import Any

import jax

# JAX records these when it has lowered a program, and when XLA has compiled it or found it on disk.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileNotice:
    """Writes a line to standard error when a compilation takes long, and one when it is done.

    Attributes:
      seconds: spent on compiling so far, short compilations included.
    """

    def __init__(self, after: float = 1.0):
        """Listens from now on; `after` seconds are not long yet."""
        self.seconds = 0.0
        self._after = after
        self._timer: threading.Timer | None = None
        self._announced = threading.Event()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._heard)
        if self._timer is not None:
            self._timer.cancel()

    def _heard(self, event: str, duration_secs: float, **about: Any) -> None:
        if event not in (_LOWERED, _COMPILED):
            return
        self.seconds += duration_secs
        name = str(about.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if event == _LOWERED:
            self._timer = threading.Timer(self._after, self._announce, (name,))
            self._timer.daemon = True
            self._timer.start()
        elif self._announced.is_set():
            self._announced.clear()
            self._say(f"compiled {name} in {duration_secs:.1f} s")

    def _announce(self, name: str) -> None:
        self._announced.set()
        self._say(f"compiling {name} for these sizes; the next start finds it on disk")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
