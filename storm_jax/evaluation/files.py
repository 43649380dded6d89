"""Where a benchmark's files are, in the folders that people have, and what is in them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from storm_jax.evaluation.items import TaskError

_VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".MP4")


def roots(data: Path, names: Sequence[str]) -> list[Path]:
    """Folders that may be the benchmark's: those below `data` with one of the names, and `data`.

    Names are compared without case, "-", "_" and spaces: "Video-MME" is "videomme".
    """
    if not data.is_dir():
        return [data.parent] if data.is_file() else []
    folders = sorted(d for d in data.iterdir() if d.is_dir())
    below = [d for name in names for d in folders if _key(d.name) == _key(name)]
    return [*dict.fromkeys(below), data]


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c not in "-_ .")


def annotations(data: Path, names: Sequence[str], patterns: Sequence[str], what: str) -> list[Path]:
    """The annotation files: of the first pattern that fits something, all files, sorted.

    Args:
      data: a folder, or an annotation file itself.
      names: of the benchmark's folder.
      patterns: globs below the benchmark's folder, in the order of preference.
      what: the benchmark, for messages.

    Raises:
      TaskError: there are none.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise TaskError(f"{data}: no such folder or file; give the folder that holds {what}")
    for root in roots(data, names):
        for pattern in patterns:
            if found := sorted(p for p in root.glob(pattern) if p.is_file()):
                return found
    raise TaskError(
        f"{data} holds no annotations of {what}: expected {', or '.join(patterns)} in it or in a"
        f" folder {' or '.join(names)} below; found {_contents(data)}"
    )


def _contents(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def read(path: Path) -> Any:
    """What a .json, .jsonl or .parquet file holds; of the last two, a list of rows.

    Raises:
      TaskError: it cannot be read; with the line for JSON.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    number = 0
    try:
        if ending != ".jsonl":
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  (for the message)
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except json.JSONDecodeError as error:
        line = number or error.lineno
        hint = "" if text.strip() else "; the file is empty, so copy it again"
        if text.startswith("version https://git-lfs"):
            hint = "; it is a pointer of Git LFS, so run git lfs pull"
        raise TaskError(f"{path}:{line}: is not JSON: {error.msg}{hint}") from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TaskError(
            f"{path}: parquet files need pyarrow; pip install 'storm_jax[parquet]'"
        ) from error
    try:
        return parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ArrowException) as error:
        raise TaskError(f"{path}: not a complete parquet file: {error}") from error


def rows(
    path: Path, content: Any, required: Iterable[str], what: str, either: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """The content as a list of objects with the fields that the benchmark has.

    Args:
      required: fields that every row has.
      either: further fields, of which a row has at least one.

    Raises:
      TaskError: it is another benchmark's or version's; says what was expected and found.
    """
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        found = f"a {type(content).__name__}"
        if isinstance(content, list):
            found = f"a list with {next(row for row in content if not isinstance(row, dict))!r}"
        raise TaskError(f"{path}: expected a list of objects, as {what} has; found {found}")
    if not content:
        raise TaskError(f"{path}: holds no items; expected those of {what}")
    needed, any_of = list(required), list(either)
    for number, row in enumerate(content):
        missing = [name for name in needed if name not in row]
        lacks_all = bool(any_of) and not any(name in row for name in any_of)
        if missing or lacks_all:
            expected = ", ".join(needed) + (f", and {' or '.join(any_of)}" if any_of else "")
            raise TaskError(
                f"{path}: item {number} is not one of {what}: expected the fields {expected}; found"
                f" {', '.join(map(str, row)) or 'none'}. Is it the file of another benchmark or"
                " version?"
            )
    return content


def places(roots: Sequence[Path], folders: Sequence[str]) -> list[Path]:
    """Folders where media may be, those that exist.

    The first is where one that is missing should be: a folder of its own, if there is one.
    """
    every = [root / folder for root in roots for folder in folders]
    there = [place for place in every if place.is_dir()]
    should = next((place for place in there if place not in roots), None)
    return list(dict.fromkeys([*([should] if should else every[:1]), *there]))


def video(folders: Iterable[Path], names: Sequence[str]) -> str:
    """Path of the first of the videos that is there; else of the first that was looked for.

    Args:
      folders: where it may be, in the order of preference.
      names: what it may be called; one without a known ending is tried with each, and, as it is,
        as a folder of frames.
    """
    first = ""
    for folder in folders:
        for name in names:
            known = os.path.splitext(name)[1] in _VIDEOS
            options = [name] if known else [*(name + e for e in _VIDEOS), name]
            for option in options:
                path = os.path.join(folder, option)
                first = first or path
                if os.path.exists(path):
                    return path
    return first


def existing(folders: Iterable[Path], name: str) -> str | None:
    """Path of a file in the first folder that has it."""
    return next((str(f / name) for f in folders if (f / name).is_file()), None)


def text(path: Path, number: int, row: Mapping[str, Any], name: str) -> str:
    """A field that holds text, or a number taken as text.

    Raises:
      TaskError: it is empty, or something else.
    """
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{path}: item {number} has {name}={value!r}; it must be a text")
    return value
