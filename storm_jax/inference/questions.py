"""Questions about a stream: at times that are known beforehand, again and again, or typed."""

import heapq
import math
import queue
import threading
from collections.abc import Iterable
from typing import TextIO

_TYPED = 16  # lines that wait; further ones stay with whoever writes them


class Questions:
    """What is to be asked, and when."""

    def __init__(
        self,
        timed: Iterable[tuple[float, str]] = (),
        *,
        every: float = 0.0,
        typed: TextIO | None = None,
    ):
        """Args:
        timed: seconds of stream time, and a question.
        every: seconds after which each of these is asked again; 0: never.
        typed: one question a line, read by a thread up to the end.
        """
        self._timed = [(at, order, text) for order, (at, text) in enumerate(timed)]
        heapq.heapify(self._timed)
        self._every = every
        self._asked: set[int] = set()
        self._lines: queue.Queue[str] = queue.Queue(_TYPED)
        self._reading = threading.Event()
        if typed is not None:
            self._reading.set()
            threading.Thread(target=self._read, args=(typed,), daemon=True, name="typed").start()

    def _read(self, lines: TextIO) -> None:
        try:
            for line in lines:
                if line.strip():
                    self._lines.put(line.strip())
        finally:
            self._reading.clear()

    def due(self, seconds: float) -> str | None:
        """A question whose time has come when the stream stands at `seconds`."""
        if not self._timed or self._timed[0][0] > seconds:
            return None
        at, order, text = heapq.heappop(self._timed)
        self._asked.add(order)
        if self._every:
            # What a jump of the time has passed over is not made up for.
            passed = math.floor((seconds - at) / self._every) if math.isfinite(seconds) else 0
            heapq.heappush(self._timed, (at + (passed + 1) * self._every, order, text))
        return text

    def at_end(self) -> str | None:
        """A timed question that was never asked, when the stream has ended before its time."""
        while self._timed:
            _, order, text = heapq.heappop(self._timed)
            if order not in self._asked:
                return text
        return None

    def line(self) -> str | None:
        """The next typed question, if there is one."""
        try:
            return self._lines.get_nowait()
        except queue.Empty:
            return None

    @property
    def typing(self) -> bool:
        """Whether typed questions are waiting or may still come."""
        return self._reading.is_set() or not self._lines.empty()

    @property
    def more(self) -> bool:
        """Whether any question is waiting or may still come."""
        return bool(self._timed) or self.typing
