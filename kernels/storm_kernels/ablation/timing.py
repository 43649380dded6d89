"""Times of a program: warm-up, repetitions, median and quartiles."""

import dataclasses
import math
import statistics
import time
from typing import Protocol

# A sample of queued calls lasts at least this long, so that waiting for the last one is no share.
_SAMPLE_SECONDS = 0.02
_MOST_QUEUED = 100
_WARM_UP_SECONDS = 0.1
_FEWEST_SAMPLES = 3


class Timed(Protocol):
    def seconds(self, calls: int) -> float:
        """Seconds a call, over `calls` calls queued one after the other and waited for once."""
        ...


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call.

    Attributes:
        median, quartile_1, quartile_3, best: over the samples.
        samples: how many.
        calls: calls in a sample, queued on the device and waited for once; 1: wall time of each.
    """

    median: float
    quartile_1: float
    quartile_3: float
    best: float
    samples: int
    calls: int


def measure(program: Timed, *, repeats: int, seconds: float, queued: bool) -> Timing:
    """Times a program after warming it up.

    Args:
        program: what to time.
        repeats: samples, fewer if they would take longer than `seconds`, but at least 3 (or
            `repeats`, if that is less).
        seconds: the budget for the samples.
        queued: calls return before the device is done, so that a sample is several of them and
            the host's own time per call does not count.
    """
    begin = time.perf_counter()
    one = program.seconds(1)
    while time.perf_counter() - begin < _WARM_UP_SECONDS:
        one = program.seconds(1)
    calls = 1
    if queued:
        calls = min(_MOST_QUEUED, max(1, math.ceil(_SAMPLE_SECONDS / one)))
        program.seconds(calls)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats and (
        len(times) < min(_FEWEST_SAMPLES, repeats) or time.perf_counter() - begin < seconds
    ):
        times.append(1e3 * program.seconds(calls))
    if len(times) == 1:
        low = middle = high = times[0]
    else:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, low, high, min(times), len(times), calls)
