"""Accuracy with 95 % intervals clustered by video.

Questions about one video are not independent, so the standard error is that of a ratio of sums over
videos (cluster-robust, as in survey sampling), with C videos, n items and residuals e:

    se^2 = C / (C - 1) * sum over videos of (sum over the video's items of e / n)^2

For a mean over groups each item's residual is taken to its group's accuracy and weighs 1 / (groups
* items of its group). The interval is Wilson's for the number of independent items that would have
this standard error, value * (1 - value) / se^2, at most n (Korn and Graubard's effective sample
size). So it stays within 0 and 1, and has a width where everything is right or wrong: there every
video counts as one item. With fewer than some 20 videos it is a rough one.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storm_jax.evaluation.items import Answered, Item

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """An accuracy, as a share of 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    items: int
    videos: int  # clusters of the interval


@dataclass(frozen=True)
class Score:
    """What a benchmark reports.

    Attributes:
      metric: what `main` is: "accuracy", or "mean of the accuracies of 7 tasks".
      main: None where no answer is published.
      groups: category -> value -> accuracy.
      also: further metrics by name.
      items: scored ones.
      unparsed: outputs of scored items without an answer in them; they count as wrong.
      hidden: items without a published answer; they count nowhere.
    """

    metric: str
    main: Estimate | None
    groups: Mapping[str, Mapping[str, Estimate]]
    items: int
    unparsed: int
    hidden: int
    also: Mapping[str, Estimate] = field(default_factory=dict)


def accuracy(records: Sequence[Answered], mean_over: str = "") -> Score:
    """The accuracy of what was answered.

    Args:
      records: one for each item; those of items without a published answer are only counted.
      mean_over: category over whose values the main metric is the unweighted mean of accuracies
        (macro); "": every item weighs the same (micro).
    """
    scored = [r for r in records if r.item.answer is not None]
    correct = [credit(r) for r in scored]
    videos = [r.item.video for r in scored]
    names = sorted({name for r in scored for name in r.item.categories})
    groups = {}
    for name in names:
        members = defaultdict(list)
        for index, record in enumerate(scored):
            for value in values_of(record.item, name):
                members[value].append(index)
        groups[name] = {
            value: estimate([correct[i] for i in which], [videos[i] for i in which])
            for value, which in sorted(members.items())
        }
    metric, main, also = "accuracy", None, {}
    if scored:
        main = estimate(correct, videos)
        if mean_over:
            kinds = [values_of(r.item, mean_over)[0] for r in scored]
            also["accuracy over all items"] = main
            main = estimate(correct, videos, kinds)
            metric = f"mean of the accuracies of {len(set(kinds))} values of {mean_over}"
        open_ended = [r for r in scored if not r.item.options]
        if open_ended:
            metric = (
                "exact match after normalisation"
                if len(open_ended) == len(scored)
                else "accuracy; of open-ended questions exact match after normalisation"
            )
            also["token F1 of open-ended questions"] = estimate(
                [token_f1(r.output, str(r.item.answer)) for r in open_ended],
                [r.item.video for r in open_ended],
            )
    return Score(
        metric=metric,
        main=main,
        groups=groups,
        items=len(scored),
        unparsed=sum(r.predicted is None for r in scored),
        hidden=len(records) - len(scored),
        also=also,
    )


def values_of(item: Item, category: str) -> tuple[str, ...]:
    """The values of a category that an item counts in."""
    value = item.categories.get(category, ())
    return (value,) if isinstance(value, str) else value


def estimate(
    values: Sequence[float], videos: Sequence[str], strata: Sequence[str] | None = None
) -> Estimate:
    """The mean of `values`, each between 0 and 1, and its interval (see the module).

    Args:
      values: one for each item.
      videos: the item's cluster.
      strata: the item's group: the mean is the unweighted one of the groups' means; None: of items.

    Raises:
      ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    x = np.asarray(values, np.float64)
    groups = np.unique(strata if strata is not None else np.zeros(len(x)), return_inverse=True)[1]
    size = np.bincount(groups)
    means = np.bincount(groups, x) / size
    value = float(means.mean())
    cluster = np.unique(np.asarray(videos), return_inverse=True)[1]
    influence = (x - means[groups]) / (size[groups] * len(size))
    sums = np.bincount(cluster, influence)
    clusters = len(sums)
    variance = value * (1 - value)
    effective = 1.0
    if clusters > 1:
        se2 = clusters / (clusters - 1) * float(np.sum(sums**2))
        # No variance is seen where all is right or all wrong, nor where groups are all or nothing.
        effective = min(variance / se2, len(x)) if se2 > 1e-12 else clusters
    low, high = _wilson(value, max(effective, 1.0))
    return Estimate(value, low, high, len(x), clusters)


def _wilson(value: float, n: float) -> tuple[float, float]:
    z2 = _Z**2
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    # Rounding must not put the interval beside its value at 0 and 1.
    return max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))


# ------------------------------------------------------------------------- open-ended questions


def credit(record: Answered) -> float:
    """1 where the answer is right, else 0; exact match for open-ended questions."""
    if record.item.options:
        return float(record.right)
    if record.predicted is None:
        return 0.0
    return float(normalised(str(record.predicted)) == normalised(str(record.item.answer)))


def normalised(text: str) -> str:
    """Small letters, no punctuation, no English articles, single spaces, as SQuAD compares."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(output: str, answer: str) -> float:
    """Harmonic mean of the shares of words that output and answer have in common, as SQuAD's."""
    got, want = normalised(output).split(), normalised(answer).split()
    if not got or not want:
        return float(got == want)
    common = sum((Counter(got) & Counter(want)).values())
    return 2 * common / (len(got) + len(want))
