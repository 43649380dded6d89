"""A benchmark: how its files are read, and what it asks, extracts, counts and submits."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from storm_jax.data.subtitles import Cue
from storm_jax.evaluation import extraction, scoring
from storm_jax.evaluation.items import Answered, Family, Item, Prompt, TaskError


@dataclass(frozen=True)
class Expected:
    """Counts of the full published set."""

    items: int
    options: tuple[int, int]  # least and most of an item; (0, 0): open-ended
    videos: int | None = None  # None: not known
    categories: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What is known of a video when its question is put into words; see `Task.prompt`."""

    cues: Sequence[Cue] | None
    times: Sequence[float]
    duration: float | None
    groups: Sequence[int]


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark, or one of its splits. `evaluation.tasks` holds the instances.

    Attributes:
      name: in commands and results.
      families: prompts that it has; the first is the default.
      expected: what is in the full set; None: any set is full.
      with_subtitles: whether it has subtitles.
      mean_over: category whose values' accuracies the main metric is the mean of; "": all items
        weigh the same.
    """

    name: str

    families: ClassVar[tuple[Family, ...]]
    with_subtitles: ClassVar[bool] = False
    mean_over: ClassVar[str] = ""

    @property
    @abstractmethod
    def expected(self) -> Expected | None: ...

    @abstractmethod
    def load(self, data: Path) -> list[Item]:
        """Reads the annotations below `data`, whichever of the published layouts they have.

        Args:
          data: the benchmark's folder, a folder that holds it, or an annotation file.

        Returns:
          Items in the order of the files. Paths of videos are where they are, or, where a video is
          missing, should be.

        Raises:
          TaskError: no annotations, those of another benchmark or version (the message says what
            was expected and found), or items that cannot be asked.
        """

    @abstractmethod
    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        """As `prompt`, for a family that the task has."""

    def prompt(
        self,
        item: Item,
        family: Family,
        cues: Sequence[Cue] | None = None,
        times: Sequence[float] = (),
        duration: float | None = None,
        groups: Sequence[int] = (),
    ) -> Prompt:
        """What the model is asked.

        Args:
          cues: all subtitles of the file `item.subtitles`, with its times; () where there is none
            for this video; None: the question is asked without subtitles.
          times: seconds in the video of the frames that were taken from it.
          duration: of the video, seconds.
          groups: the group of each of these frames, as `ReductionConfig.frame_groups` says (-1:
            left out by temporal sampling); (): every frame is a group of its own.

        Raises:
          TaskError: the task has no such prompt, or no subtitles; the message names those it has.
        """
        if family not in self.families:
            raise TaskError(
                f"{self.name} has no {family} prompt; it has {', '.join(self.families)}"
            )
        if cues is not None and not self.with_subtitles:
            raise TaskError(f"{self.name} has no subtitles; ask without them")
        return self.ask(item, family, View(cues, times, duration, groups))

    def extract(self, text: str, item: Item, family: Family) -> int | str | None:
        """The answer in a model's output, by the one rule of the family; None: there is none."""
        return extraction.extract(text, item, family)

    def score(self, records: Sequence[Answered]) -> scoring.Score:
        """The benchmark's metric over what was answered."""
        return scoring.accuracy(records, self.mean_over)

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        """Files for the benchmark's server, their text by name; {} where it has none."""
        return {}

    def difference(self, items: Sequence[Item]) -> str:
        """How the items differ from the full published set, "expected ..., found ..."; "": not."""
        want = self.expected
        if want is None:
            return ""
        faults = []
        if len(items) != want.items:
            faults.append(f"expected {want.items} items, found {len(items)}")
        videos = len({item.video for item in items})
        if want.videos is not None and videos != want.videos:
            faults.append(f"expected {want.videos} videos, found {videos}")
        counts = sorted({len(item.options) for item in items}) or [0]
        if (counts[0], counts[-1]) != want.options:
            faults.append(f"expected {_range(want.options)} options, found {_range(counts)}")
        for name, values in want.categories.items():
            found = Counter(v for item in items for v in scoring.values_of(item, name))
            wrong = [
                f"{value} {values.get(value, 0)} and {found.get(value, 0)}"
                for value in sorted(values.keys() | found.keys())
                if values.get(value, 0) != found.get(value, 0)
            ]
            if wrong:
                faults.append(f"of {name} expected and found: {', '.join(wrong)}")
        return "; ".join(faults)


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def without_subtitles(items: Sequence[Item]) -> list[str]:
    """Videos that have no file of subtitles, in order, each once."""
    return list(dict.fromkeys(item.video for item in items if item.subtitles is None))
