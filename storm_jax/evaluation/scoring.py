"""Accuracy with 95 % intervals clustered by video."""

from collections.abc import Mapping
from dataclasses import dataclass


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
      metric: what `main` is: "accuracy", or "mean accuracy of 7 tasks".
      main: None where no answer is published.
      groups: category -> value -> accuracy.
      unparsed: outputs without an answer in them; they count as wrong.
      hidden: items without a published answer; they count nowhere.
    """

    metric: str
    main: Estimate | None
    groups: Mapping[str, Mapping[str, Estimate]]
    unparsed: int
    hidden: int
