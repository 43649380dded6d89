"""Records: conversations about videos and images, and random access to them.

Two families are read: this project's own schema and LLaVA's, as published in many small variants
(docs/data.md lists them). Both end up as `Record`, whose turns hold exactly one placeholder,
`<video>` or `<image>`, for every medium, in the order of `Record.media`.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storm_jax.data.conversation import Media, Role, Turn

PLACEHOLDER = re.compile(r"<(?:vila/)?(video|image)>")

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


class RecordError(ValueError):
    """A record that cannot be used; the message names file and record, the fault and the remedy."""


@dataclass(frozen=True)
class Record:
    """One conversation: an optional system turn, then user and assistant in alternation."""

    id: str  # as in the file, or the record's index where the file has none
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    source: str  # the data set: `data_source`, or the file's name without its ending
    task: str = ""  # family of the question, for the accuracy of each task


class RecordSet(ABC):
    """Random access to the records of a data set, whatever files it is kept in.

    Opening reads an index at most; a record is read and parsed when it is asked for, and holds no
    contents of media: `opened` gets those. Objects are cheap to pickle (a worker opens the files
    again) and may be read by several threads.

    Attributes:
      path: as configured; errors about the whole set name it.
      media_root: folder that media paths are relative to.
      name: of the data set, where its records do not give one.
      files: what it is made of: a change of their sizes or times is a change of the set.
      caches: path that the files kept beside the set begin with: CACHES.tokens, for example.
    """

    def __init__(self, path: str, media_root: str, files: tuple[str, ...]):
        self.path = path
        self.media_root = media_root or os.path.dirname(os.path.abspath(path))
        self.caches = re.sub(r"[*?\[\]{}]", "_", path)  # of a pattern: as a file's name
        self.name = os.path.splitext(os.path.basename(self.caches))[0]
        self.files = files

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The record at `index`.

        Raises:
          RecordError: this record cannot be read, or its conversation or media cannot be used.
          IndexError: there is no such record.
        """

    def opened(self, medium: Media) -> Media:
        """A medium of these records with `data`, if its contents lie inside the set's files.

        Only kind and path of `medium` count for where it is found.

        Raises:
          RecordError: the file that holds it cannot be read.
        """
        return medium

    def container(self, medium: Media) -> str:
        """The file that holds a medium: another size or time of it means other contents."""
        return medium.path


def parse_record(
    raw: Any,
    index: int,
    path: str,
    media_root: str,
    data_set: str = "",
    beside: Sequence[Media] = (),
) -> Record:
    """Checks one parsed record and brings it into the form of `Record`.

    Args:
      raw: the JSON object.
      data_set: what the record's data set is called where it does not say so; the file's name
        without its ending by default.
      beside: media that are the record's where it names none itself.
      index, path: where it stands, for error messages and for records without an id.
      media_root: folder that relative media paths are joined with.

    Raises:
      RecordError: see the message; `docs/data.md` lists what is accepted.
    """
    if not isinstance(raw, dict):
        raise RecordError(
            f"{path}: record {index} is a {type(raw).__name__}, not an object with fields"
        )
    name = str(raw["id"]) if raw.get("id") not in (None, "") else str(index)
    try:
        media, turns = _media(raw), _turns(raw)
        extra, turns = _resolve_parts(turns)
        if extra and media:
            raise RecordError("media stand both in the record and in its messages; keep one")
        media = _order(extra or media or list(beside), turns)
        turns = _normalise(media, turns)
    except RecordError as error:
        raise RecordError(f"{path}: record {index} (id {name}): {error}") from None
    stem = data_set or os.path.splitext(os.path.basename(path))[0]
    return Record(
        id=name,
        media=tuple(Media(m.kind, os.path.join(media_root, m.path), m.start, m.end) for m in media),
        turns=turns,
        source=str(raw.get("data_source") or raw.get("datasource") or stem),
        task=str(raw.get("task") or ""),
    )


# ------------------------------------------------------------------------------------------ media


def _media(raw: dict[str, Any]) -> list[Media]:
    """The media that stand in the record itself, paths as written."""
    if "media" in raw:
        if not isinstance(raw["media"], list):
            raise RecordError(f"media={raw['media']!r} must be a list of objects")
        return [_medium(m) for m in raw["media"]]
    found: list[Media] = []
    for kind, keys in (
        ("image", ("image", "images")),
        ("video", ("video", "videos", "video_path")),
    ):
        for key in keys:
            paths = raw.get(key) or []
            paths = [paths] if isinstance(paths, str) else paths
            if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
                raise RecordError(f"{key}={raw[key]!r} must be a path or a list of paths")
            found += [Media(kind, p) for p in paths]
    if len(found) == 1 and ("start" in raw or "end" in raw):
        found = [_medium({**raw, "type": found[0].kind, "path": found[0].path})]
    return found


def _medium(item: Any) -> Media:
    if not isinstance(item, dict) or item.get("type") not in ("video", "image"):
        raise RecordError(f'medium {item!r} needs "type": "video" or "image"')
    path = item.get("path")
    if not isinstance(path, str) or not path:
        raise RecordError(f'medium {item!r} needs a "path"')
    span: list[float | None] = []
    for key in ("start", "end"):
        value = item.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RecordError(f"{key}={value!r} of {path} must be a number of seconds")
        span.append(None if value is None else float(value))
    start, end = span
    if (start or 0.0) < 0 or (end is not None and not end > (start or 0.0)):
        raise RecordError(f"{path}: start={start}, end={end} is no span of time")
    return Media(item["type"], path, start, end)


def _order(media: list[Media], turns: list[Turn]) -> list[Media]:
    """Media in the order of their placeholders, where both images and videos are listed."""
    images = [m for m in media if m.kind == "image"]
    videos = [m for m in media if m.kind == "video"]
    if not images or not videos or media != images + videos:
        return media
    kinds = [k for turn in turns for k in PLACEHOLDER.findall(turn.text)]
    if kinds.count("image") != len(images) or kinds.count("video") != len(videos):
        return media
    return [(images if kind == "image" else videos).pop(0) for kind in kinds]


# ------------------------------------------------------------------------------------------- turns


def _turns(raw: dict[str, Any]) -> list[Turn | tuple[Role, list[Any]]]:
    """The conversation; a turn whose content is a list of parts comes back as (role, parts)."""
    said = raw.get("conversations") or raw.get("messages")
    if not said and isinstance(raw.get("captions"), list):  # ShareGPT4Video's captions
        whole = [c["content"] for c in raw["captions"] if str(c.get("idx")) == "-1"]
        if not whole:
            raise RecordError('captions hold no entry with idx "-1", the whole video\'s caption')
        return [Turn("user", "<video>\nDescribe this video."), Turn("assistant", whole[0])]
    if not isinstance(said, list) or not said:
        raise RecordError('has no conversation: "conversations" or "messages" must be a list')
    turns: list[Turn | tuple[Role, list[Any]]] = []
    for i, item in enumerate(said):
        if not isinstance(item, dict):
            raise RecordError(f"turn {i} is {item!r}, not an object")
        role = _ROLES.get(str(item.get("from", item.get("role"))))
        if role is None:
            raise RecordError(
                f"turn {i} is from {item.get('from', item.get('role'))!r};"
                f" known are {', '.join(_ROLES)}"
            )
        content = item.get("value", item.get("content"))
        if isinstance(content, list):
            turns.append((role, content))
        elif isinstance(content, str):
            turns.append(Turn(role, content))
        else:
            raise RecordError(f"turn {i} has no text: {content!r}")
    return turns


def _resolve_parts(
    turns: list[Turn | tuple[Role, list[Any]]],
) -> tuple[list[Media], list[Turn]]:
    """Joins the parts of chat messages, and collects the media whose paths stand in them."""
    media: list[Media] = []
    joined: list[Turn] = []
    for turn in turns:
        if isinstance(turn, Turn):
            joined.append(turn)
            continue
        role, parts = turn
        text = ""
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            elif kind in ("image", "video"):
                text += f"<{kind}>"
                path = part.get(kind) or part.get("path")
                if path is not None:
                    media.append(_medium({**part, "path": path}))
            else:
                raise RecordError(f"message part {part!r}: type text, image or video is read")
        joined.append(Turn(role, text))
    return media, joined


def _normalise(media: list[Media], turns: list[Turn]) -> tuple[Turn, ...]:
    """Checks roles, answers and placeholders; gives each placeholder its medium's kind."""
    spoken = turns[1:] if turns[0].role == "system" else turns
    if not spoken or spoken[0].role != "user":
        first = spoken[0].role if spoken else "system"
        raise RecordError(f"the first turn is the {first}'s; a question must come first")
    for i, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[i % 2]:
            raise RecordError(f"turn {i} is the {turn.role}'s: user and assistant must alternate")
        if turn.role == "assistant" and not turn.text.strip():
            raise RecordError(f"the answer in turn {i} is empty")
    if spoken[-1].role == "user":
        raise RecordError("the last question has no answer")
    kinds = iter([m.kind for m in media])
    found = 0
    done = []
    for turn in turns:
        marks = PLACEHOLDER.findall(turn.text)
        if marks and turn.role != "user":
            raise RecordError(f"<{marks[0]}> stands in the {turn.role}'s text, not in a question")
        found += len(marks)
        text = PLACEHOLDER.sub(lambda m: f"<{next(kinds, m[1])}>", turn.text)
        done.append(Turn(turn.role, text))
    if found < len(media):
        missing = media[found]
        raise RecordError(
            f"no <{missing.kind}> placeholder for {missing.path}: the record has {len(media)} media"
            f" and {found} placeholders; put one into a question for each"
        )
    if found > len(media):
        raise RecordError(
            f"{found} placeholders but {len(media)} media: add the missing media or remove them"
        )
    return tuple(done)
