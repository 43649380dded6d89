"""Whether two models differ on the same questions.

For each item d is the second model's credit less the first's, -1, 0 or 1.

- McNemar's exact test looks at items alone: of the b items that only the first has right and the c
  that only the second has, either would be the larger by chance. With n = b + c,

      p = min(1, 2 * sum over k <= min(b, c) of C(n, k) / 2^n).

  It takes all items for independent, which questions about one video are not.
- The interval of the difference is clustered by video. The difference is the mean of d, or where
  the benchmark takes a mean over G groups (macro), the mean of the groups' means of d. With an
  item's influence e = (d - its group's mean) / (G * items of its group), G = 1 for the plain mean,
  and V videos,

      se^2 = V / (V - 1) * sum over videos of (sum of e over the video's items)^2,

  and the interval is the difference +- t * se, t the 97.5 % quantile of Student's distribution with
  V - 1 degrees of freedom; p is the two-sided one of difference / se. With one item a video this is
  the paired t test. Where all d of a group are the same se is 0: then the interval reaches as far
  as the share of videos that could differ although none of V did, 1 - 0.025^(1 / V).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_TAIL = 0.025


@dataclass(frozen=True)
class Difference:
    """The second result less the first, on the items that both have.

    Attributes:
      value, low, high: of the accuracy, as a share of 1, with its 95 % interval.
      p: two-sided, of the clustered interval.
      mcnemar: two-sided, exact, on items.
      first_only, second_only: items that one alone has right.
    """

    value: float
    low: float
    high: float
    p: float
    mcnemar: float
    first_only: int
    second_only: int
    items: int
    videos: int


def mcnemar(first_only: int, second_only: int) -> float:
    """The two-sided p of McNemar's exact test, see the module."""
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**n)


def difference(
    first: Sequence[float],
    second: Sequence[float],
    videos: Sequence[str],
    groups: Sequence[str] | None = None,
) -> Difference:
    """Compares the credits, 0 or 1, of the same items in two results.

    Args:
      videos: of each item.
      groups: of each item, where the metric is the mean of their accuracies; None: of all items.

    Raises:
      ValueError: there is no item, or the sequences differ in length.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not len(a) or not len(a) == len(b) == len(videos):
        raise ValueError(f"{len(a)} and {len(b)} credits of {len(videos)} items")
    d = b - a
    group = np.unique(groups if groups is not None else [""] * len(d), return_inverse=True)[1]
    cluster = np.unique(np.asarray(videos), return_inverse=True)[1]
    size = np.bincount(group)
    means = np.bincount(group, d) / size
    value, count = float(means.mean()), int(cluster.max()) + 1
    influence = (d - means[group]) / (len(size) * size[group])
    low, high, p = _interval(value, np.bincount(cluster, influence))
    first_only, second_only = int(np.sum(d < 0)), int(np.sum(d > 0))
    return Difference(
        value=value,
        low=low,
        high=high,
        p=p,
        mcnemar=mcnemar(first_only, second_only),
        first_only=first_only,
        second_only=second_only,
        items=len(d),
        videos=count,
    )


def _interval(value: float, sums: np.ndarray) -> tuple[float, float, float]:
    """Bounds and p of a difference from the sums of influences of the videos."""
    count = len(sums)
    if count == 1:
        return -1.0, 1.0, 1.0  # one video says nothing about others
    se = math.sqrt(count / (count - 1) * float(np.sum(sums**2)))
    if se < 1e-12:
        reach = 1 - _TAIL ** (1 / count)
        p = 1.0 if abs(value) < 1e-12 else 2 * 0.5**count
        return max(-1.0, value - reach), min(1.0, value + reach), min(1.0, p)
    reach = float(stats.t.ppf(1 - _TAIL, count - 1)) * se
    p = 2 * float(stats.t.sf(abs(value) / se, count - 1))
    return max(-1.0, value - reach), min(1.0, value + reach), p
