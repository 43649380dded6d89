"""A benchmark: how its files are read, and what it asks, extracts, counts and submits."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from storm_jax.data.subtitles import Cue
from storm_jax.evaluation.items import Answered, Family, Item, Prompt
from storm_jax.evaluation.scoring import Score


class Task(ABC):
    """A benchmark, or one of its splits. `evaluation.tasks` holds the instances.

    Attributes:
      name: in commands and results.
      families: prompts that it has; the first is the default.
      expected: counts of the full published set: "items", and where known "videos", "options"
        (the numbers of options that occur, as "2-5").
    """

    name: str
    families: tuple[Family, ...]
    expected: Mapping[str, str | int]

    @abstractmethod
    def load(self, data: Path) -> list[Item]:
        """Reads the annotations below `data`, whichever of the published layouts they have.

        Paths of videos are where they are, or, where a video is missing, should be.

        Raises:
          TaskError: no annotations, those of another benchmark or version (the message says what
            was expected and found), or items that cannot be asked.
        """

    @abstractmethod
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
          cues: subtitles, all that `item.subtitles` holds, with the file's times; None: without.
          times: seconds in the video of the frames that the model sees.
          duration: of the video, seconds.
          groups: the group of each of these frames, as `ReductionConfig.frame_groups` says (-1:
            left out by temporal sampling); (): every frame is one.

        Raises:
          TaskError: the task has no such prompt; the message names those it has.
        """

    @abstractmethod
    def extract(self, text: str, item: Item, family: Family) -> int | str | None:
        """The answer in a model's output, by the one rule of the family; None: there is none."""

    @abstractmethod
    def score(self, records: Sequence[Answered]) -> Score:
        """The benchmark's metric over what was answered."""

    def submission(self, records: Sequence[Answered]) -> dict[str, str]:
        """Files for the benchmark's server, by name, where answers are not published."""
        return {}

    def difference(self, items: Sequence[Item]) -> str:
        """How the items differ from the published set: "expected ..., found ..."; "": not."""
        raise NotImplementedError
