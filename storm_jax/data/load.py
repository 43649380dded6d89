"""What loading costs: frames, and the time of the threads that read and decode them."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """The cost of some rows, from reading their records to the finished arrays.

    Attributes:
      frames: decoded and used.
      seconds: of the threads that loaded them, waiting for disks and for other threads included.
      cpu_seconds: processor time of the same threads. A file is decoded on one thread, so that
        frames / cpu_seconds is what one core can do, however many run beside it.
    """

    frames: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.frames + other.frames,
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
        )


class Stopwatch:
    """Measures this thread from its creation on."""

    def __init__(self):
        self._start = time.perf_counter(), time.thread_time()

    def load(self, frames: int) -> Load:
        """The time until now, as spent on `frames` frames."""
        seconds, cpu = self._start
        return Load(frames, time.perf_counter() - seconds, time.thread_time() - cpu)


class LoadMeter:
    """Sums the load of batches between two reports."""

    def __init__(self):
        self._sum = Load()
        self._since = time.perf_counter()

    def add(self, load: Load) -> None:
        """Counts a batch: `BatchInfo.load`."""
        self._sum += load

    def rates(self) -> dict[str, float]:
        """Metrics of this process since the last call.

        decode_frames_per_core_second: frames that one core loads in a second.
        decode_cores: cores that loading kept busy on average.
        decode_wait_share: of the loading threads' time, what they waited for disks, network and
          free cores.
        """
        load, elapsed = self._sum, time.perf_counter() - self._since
        self._sum, self._since = Load(), time.perf_counter()
        if not load.cpu_seconds:
            return {}
        return {
            "decode_frames_per_core_second": load.frames / load.cpu_seconds,
            "decode_cores": load.cpu_seconds / elapsed,
            "decode_wait_share": max(0.0, 1 - load.cpu_seconds / load.seconds),
        }
