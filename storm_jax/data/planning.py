"""Which samples share a row, and in which order rows come.

Plans are made from the lengths of the samples alone, before anything is decoded. A plan answers
`row(i)` for any i, and the answer depends on the lengths, the weights and the seed only: not on the
process, on the worker, on earlier calls or on the version of NumPy (own hash instead of a random
generator). So the position in the data is one number, and any process can start anywhere.

The training plan is an endless stream of samples, cut into windows. Source k gives item j of its
stream at time (j + 1/2) / share_k, and window b takes the items of the times [b T, (b+1) T): at the
end of every window each source has given its share to within one sample. Item j of a source with n
samples is sample permutation(pass j // n)[j % n]: each sample once in each pass, in a new order.
Within a window, samples are packed by best fit, the largest first, and the rows are shuffled.
"""

import bisect
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from storm_jax.data.packing import Limits

# Samples packed together. Fewer waste more room (the last rows of a window are not full), more
# make best fit slower: it looks at every open row.
WINDOW = 2048


class Plan(Protocol):
    """Rows by number."""

    def row(self, number: int) -> np.ndarray:
        """Samples of the row, int64 [k]: numbers in the concatenation of all sources."""


@dataclass(frozen=True)
class Lengths:
    """Sizes of the samples of one source.

    Attributes:
      tokens: int32 [n], text and visual tokens.
      frames: int32 [n].
    """

    tokens: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def joined(lengths: Sequence[Lengths]) -> Lengths:
    """The lengths of several sources that are one to the plan."""
    return Lengths(
        np.concatenate([its.tokens for its in lengths]),
        np.concatenate([its.frames for its in lengths]),
    )


class EndlessPlan:
    """A shuffled, weighted mixture of sources without end, for training; see the module."""

    def __init__(
        self,
        sources: Sequence[Lengths],
        weights: Sequence[float],
        limits: Limits,
        *,
        pack: bool,
        seed: int,
        window: int = WINDOW,
    ):
        """Prepares the plan; windows are computed when rows of them are asked for.

        Args:
          sources: lengths of the usable samples; every sample must fit a row of its own.
          weights: relative share of the samples, one per source; 0 leaves the source out.
          pack: whether samples may share a row; otherwise each has its own, in stream order.

        Raises:
          ValueError: a negative weight, no weight at all, or a weight on a source without samples.
        """
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight < 0:
                raise ValueError(f"the weight {weight} of source {number} is negative")
            if weight > 0 and not len(source):
                raise ValueError(f"source {number} has weight {weight}, but no usable sample")
        total = float(sum(weights))
        if total == 0:
            raise ValueError("no source has a weight above 0")
        self._shares = [weight / total for weight in weights]
        self._sizes = [len(source) for source in sources]
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._tokens = np.concatenate([source.tokens for source in sources]).astype(np.int32)
        self._frames = np.concatenate([source.frames for source in sources]).astype(np.int32)
        self._limits = limits
        self._pack = pack
        self._seed = seed
        # Windows of one length T <= window that end where a single source's pass ends.
        samples = sum(n for n, share in zip(self._sizes, self._shares, strict=True) if share > 0)
        self._period = (samples, -(-samples // window))  # T = samples / windows, kept as a ratio
        self._first_rows = [0]  # number of the first row of each window known so far, and the next
        self._recent: dict[int, list[np.ndarray]] = {}  # the windows in use
        self._permutations: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def row(self, number: int) -> np.ndarray:
        """Samples of row `number` >= 0, int64 [k >= 1]."""
        with self._lock:
            while self._first_rows[-1] <= number:
                window = len(self._first_rows) - 1
                self._first_rows.append(self._first_rows[-1] + len(self._window(window)))
            window = bisect.bisect_right(self._first_rows, number) - 1
            return self._window(window)[number - self._first_rows[window]]

    def __getstate__(self) -> dict:
        # What is known of the windows' sizes goes along, so that workers need not find it again.
        return {**self.__dict__, "_lock": None, "_recent": {}, "_permutations": {}}

    def __setstate__(self, state: dict):
        self.__dict__ = {**state, "_lock": threading.Lock()}

    def _window(self, window: int) -> list[np.ndarray]:
        rows = self._recent.get(window)
        if rows is None:
            samples = self._samples(window)
            if self._pack:
                fitted = best_fit(self._tokens[samples], self._frames[samples], self._limits)
                rows = [samples[members] for members in fitted]
                order = np.argsort(_hash(len(rows), self._seed, 1, window), kind="stable")
                rows = [rows[i] for i in order]
            else:
                rows = list(samples[:, None])
            _keep(self._recent, window, rows, 4)
        return rows

    def _samples(self, window: int) -> np.ndarray:
        """Samples of a window in stream order."""
        times, samples = [], []
        for source, share in enumerate(self._shares):
            if share == 0:
                continue
            first, last = self._items(window, share), self._items(window + 1, share)
            items = np.arange(first, last)
            times.append((items + 0.5) / share)
            passes, places = np.divmod(items, self._sizes[source])
            for number in range(passes[0], passes[-1] + 1) if len(items) else ():
                chosen = self._permutation(source, number)[places[passes == number]]
                samples.append(self._starts[source] + chosen)
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(samples)[order]

    def _items(self, window: int, share: float) -> int:
        """Items that a source of this share has given before the window begins."""
        samples, windows = self._period
        return int(np.ceil(window * samples * share / windows - 0.5))

    def _permutation(self, source: int, number: int) -> np.ndarray:
        key = (source, number)
        permutation = self._permutations.get(key)
        if permutation is None:
            keys = _hash(self._sizes[source], self._seed, 0, source, number)
            permutation = np.argsort(keys, kind="stable")
            _keep(self._permutations, key, permutation, 2 * len(self._sizes))
        return permutation


class OrderedPlan:
    """Chosen samples once, in order, for evaluation; rows past the end are empty."""

    def __init__(self, chosen: np.ndarray, lengths: Lengths, limits: Limits, *, pack: bool):
        """Puts samples into rows; a new row begins where the next sample does not fit.

        Args:
          chosen: numbers of the samples, int64 [n].
          lengths: of all samples.
          pack: whether samples may share a row.
        """
        self._chosen = chosen
        self._bounds = [0]  # row r holds chosen[bounds[r] : bounds[r + 1]]
        tokens = frames = 0
        for place, sample in enumerate(chosen.tolist()):
            tokens += int(lengths.tokens[sample])
            frames += int(lengths.frames[sample])
            full = tokens > limits.tokens or frames > limits.frames
            if place > 0 and (full or not pack):
                self._bounds.append(place)
                tokens, frames = int(lengths.tokens[sample]), int(lengths.frames[sample])
        if len(chosen):
            self._bounds.append(len(chosen))

    @property
    def rows(self) -> int:
        """Rows that are not empty."""
        return len(self._bounds) - 1

    def row(self, number: int) -> np.ndarray:
        """Samples of row `number` >= 0, int64 [k]; empty past the end."""
        if number >= self.rows:
            return self._chosen[:0]
        return self._chosen[self._bounds[number] : self._bounds[number + 1]]


def subset(total: int, count: int, seed: int) -> np.ndarray:
    """`count` of `total` samples (all, if there are fewer) in order, drawn without replacement.

    Drawn, not taken from the front or at equal distances: files are often sorted, or repeat a
    pattern of tasks.
    """
    if count >= total:
        return np.arange(total)
    return np.sort(np.argsort(_hash(total, seed, 2), kind="stable")[:count])


def best_fit(tokens: np.ndarray, frames: np.ndarray, limits: Limits) -> list[np.ndarray]:
    """Packs samples into rows: largest first, each where it leaves the least room.

    Args:
      tokens, frames: int [n] >= 0, each at most its limit.

    Returns:
      For each row the indices of its samples, int64, each index in exactly one row.
    """
    tokens_share, frames_share = tokens / limits.tokens, frames / limits.frames
    order = np.argsort(-np.maximum(tokens_share, frames_share), kind="stable")
    share = (tokens_share + frames_share).tolist()
    sizes, lengths = tokens.tolist(), frames.tolist()
    free_tokens = np.zeros(len(order), np.int32)  # of the rows that are open
    free_frames = np.zeros(len(order), np.int32)
    room = np.zeros(len(order))  # both, as shares of the limits: best fit takes the least
    numbers = np.zeros(len(order), np.int64)  # which row that is
    rows: list[list[int]] = []
    opened = 0
    # A row is closed once the smallest of the samples to come does not fit.
    least_tokens = np.minimum.accumulate(tokens[order][::-1])[::-1].tolist()
    least_frames = np.minimum.accumulate(frames[order][::-1])[::-1].tolist()
    for place, sample in enumerate(order.tolist()):
        size, length = sizes[sample], lengths[sample]
        fits = (free_tokens[:opened] >= size) & (free_frames[:opened] >= length)
        candidates = fits.nonzero()[0]
        if len(candidates):
            chosen = candidates[room[candidates].argmin()]
            rows[numbers[chosen]].append(sample)
        else:
            chosen, opened = opened, opened + 1
            free_tokens[chosen], free_frames[chosen] = limits.tokens, limits.frames
            room[chosen] = 2
            numbers[chosen] = len(rows)
            rows.append([sample])
        free_tokens[chosen] -= size
        free_frames[chosen] -= length
        room[chosen] -= share[sample]
        following = min(place + 1, len(order) - 1)
        if (
            free_tokens[chosen] < least_tokens[following]
            or free_frames[chosen] < least_frames[following]
        ):
            opened -= 1  # the last open row takes the place of the closed one
            for array in (free_tokens, free_frames, room, numbers):
                array[chosen] = array[opened]
    return [np.array(row) for row in rows]


def _hash(count: int, *key: int) -> np.ndarray:
    """uint64 [count], equidistributed and the same everywhere: splitmix64 (Steele et al., 2014)."""
    state = functools.reduce(lambda h, part: _mix(h + _GOLDEN + np.uint64(part)), key, _START)
    return _mix(state + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


_START = np.zeros(1, np.uint64)  # an array: NumPy warns about overflow of scalars only
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keep(cache: dict, key: object, value: object, size: int):
    """Adds to a cache that holds the `size` newest entries."""
    cache[key] = value
    while len(cache) > size:
        del cache[next(iter(cache))]
