"""Subtitle files: SubRip (.srt), WebVTT (.vtt) and the JSON lists that data sets and Whisper write.

Own parser, since the libraries there are (pysubs2, srt, webvtt-py) pass over what they cannot read
or do not say where it stands.
"""

import html
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# 1:02:03.456, 02:03,456 or 02:03; hours may have any number of digits.
_TIME = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d(?:[.,]\d{1,6})?)")
_TAG = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")  # <i>, <v Roger>, <00:01.000>, {\an8}
_NOT_CUES = ("WEBVTT", "NOTE", "STYLE", "REGION")  # how other blocks of .vtt begin


class SubtitleError(ValueError):
    """A subtitle file that cannot be read; the message names file, line, fault and remedy."""


@dataclass(frozen=True)
class Cue:
    """One subtitle."""

    start: float  # seconds
    end: float  # infinite where the file leaves it open
    text: str  # one line, without mark-up


def read(path: str) -> list[Cue]:
    """Reads a file of subtitles, sorted by their start; empty ones are left out.

    JSON is a list of {"start", "end", "text" or "line"} or of {"timestamp": [start, end], "text"},
    or an object that holds such a list as "segments" or "subtitles". Times are seconds or texts as
    "00:01:02.500"; an end that is null is open (LongVideoBench's and Whisper's last ones).

    Raises:
      SubtitleError: with the line, or the number of the entry in JSON.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise SubtitleError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SubtitleError(f"{path}:{line}: is not UTF-8; convert it with iconv") from error
    match os.path.splitext(path)[1].lower():
        case ".json":
            cues = list(_json_cues(path, text))
        case ".srt" | ".vtt" as ending:
            if ending == ".vtt" and not text.startswith("WEBVTT"):
                raise SubtitleError(f"{path}:1: a .vtt file begins with WEBVTT")
            cues = list(_text_cues(path, text))
        case ending:
            raise SubtitleError(
                f"{path}: subtitles of kind {ending!r} are not known; give .srt, .vtt or .json"
            )
    return sorted((cue for cue in cues if cue.text), key=lambda cue: cue.start)


def within(cues: Sequence[Cue], start: float | None, end: float | None) -> list[Cue]:
    """The subtitles that are shown at some time of the clip; None: no limit on that side."""
    return [
        cue
        for cue in cues
        if (end is None or cue.start < end) and (start is None or cue.end > start)
    ]


def _text_cues(path: str, text: str) -> Iterator[Cue]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if not lines[number].strip():
            number += 1
            continue
        first = number
        while number < len(lines) and lines[number].strip():
            number += 1
        block = lines[first:number]
        if block[0].split()[0].startswith(_NOT_CUES) and "-->" not in block[0]:
            continue
        # A line before the times is the number or the name of the subtitle.
        at = next((i for i, line in enumerate(block[:2]) if "-->" in line), None)
        if at is None:
            raise SubtitleError(
                f"{path}:{first + 1}: expected a subtitle's number and its times"
                f" (00:00:01,000 --> 00:00:02,000), got {block[0].strip()!r}"
            )
        where = f"{path}:{first + at + 1}"
        begin, _, rest = block[at].partition("-->")
        finish = (rest.split() or [""])[0]  # settings of the place on the screen follow
        yield _cue(where, begin.strip(), finish, " ".join(block[at + 1 :]))


def _json_cues(path: str, text: str) -> Iterator[Cue]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise SubtitleError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error
    if isinstance(entries, dict):
        entries = entries.get("segments", entries.get("subtitles"))
    if not isinstance(entries, list):
        raise SubtitleError(
            f'{path}:1: expected a list of subtitles, or an object with one as "segments"'
        )
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise SubtitleError(f"{where}: expected an object with start, end and text")
        words = entry.get("text", entry.get("line"))
        times = entry.get("timestamp", [entry.get("start"), entry.get("end")])
        if not isinstance(words, str) or not isinstance(times, list) or len(times) != 2:
            raise SubtitleError(
                f'{where}: expected "start", "end" and "text" (or "line"), got'
                f" {', '.join(map(repr, entry)) or 'nothing'}"
            )
        start, end = times
        if end is None and ("end" in entry or "timestamp" in entry):
            end = math.inf
        yield _cue(where, start, end, words)


def _cue(where: str, start: Any, end: Any, text: str) -> Cue:
    first, last = _seconds(where, start), _seconds(where, end)
    if last < first:
        raise SubtitleError(f"{where}: ends at {last:g} s, before it starts at {first:g} s")
    return Cue(first, last, _plain(text))


def _seconds(where: str, time: Any) -> float:
    if isinstance(time, (int, float)) and not isinstance(time, bool) and time >= 0:
        return float(time)
    match = _TIME.fullmatch(time.strip()) if isinstance(time, str) else None
    if match is None:
        raise SubtitleError(f"{where}: {time!r} is not a time such as 00:01:02,500")
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def _plain(text: str) -> str:
    """Without mark-up; tags that appear when others are removed go as well, so no <video> stays."""
    while (shorter := _TAG.sub("", html.unescape(text))) != text:
        text = shorter
    return " ".join(text.split())
