"""Parts that the prompts of several benchmarks share. The tasks hold what is a benchmark's own."""

import math
from collections.abc import Sequence
from itertools import groupby

from storm_jax.data.subtitles import Cue
from storm_jax.evaluation.items import Prompt

VIDEO = "<video>"
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."

# What lmms-eval generates by default ends where a line is left empty.
LMMS_STOP = ("\n\n",)


def lmms(text: str, max_new_tokens: int = 16) -> Prompt:
    """A prompt of lmms-eval: the video, then the text."""
    return Prompt(f"{VIDEO}\n{text}", stop=LMMS_STOP, max_new_tokens=max_new_tokens)


def at_frames(cues: Sequence[Cue], times: Sequence[float]) -> list[str]:
    """Texts of the subtitles that are shown at one of the times, each subtitle once."""
    return [cue.text for cue in cues if any(cue.start <= time < cue.end for time in times)]


def interleaved(
    cues: Sequence[Cue],
    times: Sequence[float],
    groups: Sequence[int],
    offset: float,
    duration: float | None,
) -> tuple[str, tuple[int, ...]]:
    """Frames and subtitles in the order of time, as LongVideoBench puts them.

    A subtitle stands behind the last group of frames that begins no later than its middle. It is
    left out unless some frame is strictly within it, or within half a second of its middle where
    it is shorter than a second; frames count that temporal sampling leaves out, since the temporal
    encoder has seen them.

    Args:
      cues: with the times of their file.
      times: seconds of the frames that were taken from the video.
      groups: of each frame; -1: left out by temporal sampling; (): each frame is one.
      offset: time of the subtitles' file at which the video starts.
      duration: seconds, where a subtitle without an end ends (LongVideoBench's code takes `offset`
        off it, so that such a one may end before it starts); None: never.

    Returns:
      Lines, <video> where groups of frames stand together, and how many groups stand at each.
    """
    ids = groups or range(len(times))
    begins = [
        next(members)[1]
        for group, members in groupby(zip(ids, times, strict=True), key=lambda pair: pair[0])
        if group >= 0
    ]
    parts: list[str] = []
    placed = 0
    for cue in cues:
        start, end = cue.start - offset, cue.end - offset
        if math.isinf(end) and duration is not None:
            end = duration
        middle = (start + end) / 2
        while placed < len(begins) and begins[placed] <= middle:
            parts.append(VIDEO)
            placed += 1
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times):
            parts.append(cue.text)
    parts += [VIDEO] * (len(begins) - placed)
    lines, counts = [], []
    for part, run in groupby(parts):
        same = list(run)
        if part == VIDEO:
            lines.append(VIDEO)
            counts.append(len(same))
        else:
            lines += same
    return "\n".join(lines), tuple(counts)
