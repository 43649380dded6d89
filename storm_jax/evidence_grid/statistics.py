"""Intervals of means and of paired differences.

Two sources of chance are kept apart. Between seeds (parameters at the start, order of clips): the
t interval of K values with K - 1 degrees of freedom, mean +- t(0.975, K - 1) * s / sqrt(K).
Between test clips: the normal interval of a weighted mean over independent clips, for the mean over
seeds, mean +- 1.96 * sqrt(sum over tasks of s_task^2 / n_task) / tasks.
"""

import math
from dataclasses import dataclass

import numpy as np

from storm_jax.evidence_grid.answers import Answers

# 0.975 quantiles of Student's t by degrees of freedom.
T = {
    1: 12.7062,
    2: 4.30265,
    3: 3.18245,
    4: 2.77645,
    5: 2.57058,
    6: 2.44691,
    7: 2.36462,
    8: 2.30600,
    9: 2.26216,
}
Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean in percent or points, and half the width of its 95 % interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, sign: bool = False) -> str:
        """As tables show it."""
        return f"{self.mean:{'+' if sign else ''}.1f} ± {self.half:.1f}"


def over_seeds(values: np.ndarray) -> Interval:
    """The t interval of one value a seed.

    Args:
      values: float [K], 2 to 10 of them.
    """
    count = len(values)
    if count - 1 not in T:
        raise ValueError(f"{count} seeds: intervals are offered for 2 to {max(T) + 1}")
    spread = float(np.std(values, ddof=1))
    return Interval(float(np.mean(values)), T[count - 1] * spread / math.sqrt(count))


def over_clips(values: np.ndarray, tasks: tuple[str, ...]) -> Interval:
    """The normal interval of the mean over tasks of the mean over their clips.

    Args:
      values: float [N], of each clip, in percent or points.
      tasks: of each clip.
    """
    names, means, variance = np.array(tasks), [], 0.0
    for task in sorted(set(tasks)):
        of_task = values[names == task]
        means.append(of_task.mean())
        variance += of_task.var(ddof=1) / len(of_task)
    return Interval(float(np.mean(means)), Z * math.sqrt(variance) / len(means))


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of results, such as a difference, by both sources of chance.

    Attributes:
      seeds: over seeds, paired by seed.
      clips: over test clips, paired by clip.
    """

    seeds: Interval
    clips: Interval

    @property
    def low(self) -> float:
        """The lower end of the interval that reaches further down."""
        return min(self.seeds.low, self.clips.low)

    @property
    def high(self) -> float:
        return max(self.seeds.high, self.clips.high)


def contrast(terms: list[tuple[float, Answers]]) -> Contrast:
    """The sum of factor * average over tasks, in points.

    Args:
      terms: factors, and answers of as many seeds to the same clips.

    Raises:
      ValueError: the answers are not to the same clips, or not of as many seeds.
    """
    first = terms[0][1]
    for _, answers in terms:
        if answers.tasks != first.tasks or answers.right.shape != first.right.shape:
            raise ValueError("paired differences need the same clips and as many seeds")
    by_seed = np.sum([f * a.averages() for f, a in terms], axis=0)
    by_clip = np.sum([f * 100 * a.right.mean(0) for f, a in terms], axis=0)
    return Contrast(over_seeds(by_seed), over_clips(by_clip, first.tasks))
