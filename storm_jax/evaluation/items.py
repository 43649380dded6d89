"""What a benchmark consists of: questions about videos, prompts, and what was answered.

Nothing here or in the tasks imports JAX: data workers read it too.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Family = Literal["official", "lmms", "vila"]  # whose prompt, and with it whose extraction rule
FAMILIES: tuple[Family, ...] = get_args(Family)


class TaskError(ValueError):
    """Benchmark data that cannot be used; the message names file and item, fault and remedy."""


@dataclass(frozen=True)
class Item:
    """One question about one video.

    Attributes:
      id: unique within the task, and the same in every copy of the benchmark.
      video: path of the file, or of the folder of frames.
      question: without its options.
      options: texts without letters; () for an open-ended question.
      answer: index into `options`; the text for an open-ended question, and for one whose published
        answer is none of its options, which is never right; None: not published.
      start, end: seconds, the segment asked about; None: no limit on that side.
      subtitles: path of the file, where the video has one.
      subtitle_offset: seconds of the subtitles' clock at which the video starts.
      categories: accuracy is reported for each value of each: {"duration": "short", ...}; an item
        with several values counts in each.
      labels: what the question calls its options, where that is not A, B, C, ...
      printed: question and options as the annotations print them, where they hold them as one text.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    start: float | None = None
    end: float | None = None
    subtitles: str | None = None
    subtitle_offset: float = 0.0
    categories: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    printed: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        """What names each option: `labels`, or A, B, C, ..."""
        return self.labels or tuple(string.ascii_uppercase[: len(self.options)])


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    `text` has the placeholder <video> once, or, where subtitles stand between frames, several
    times: `groups` then tells how many of the video's groups of frames (what the decoder sees of
    a pooled frame) stand at each of them, in order.
    """

    text: str
    system: str = ""  # "": no system turn
    answer_prefix: str = ""  # the model's turn begins with it; not part of the output
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 16
    groups: tuple[int, ...] = ()  # (): one placeholder for all


@dataclass(frozen=True)
class Answered:
    """One question and what came out.

    An output that could not be had (a corrupt video, say) is "", with predicted=None.
    """

    item: Item
    output: str  # the model's text, without the prompt's answer prefix
    # Extracted from it: index into the item's options, or the text for an open-ended question.
    predicted: int | str | None  # None: no answer was found in it, which counts as wrong

    @property
    def right(self) -> bool:
        """Whether the right option was chosen; of open-ended questions `scoring` decides."""
        return isinstance(self.item.answer, int) and self.predicted == self.item.answer
