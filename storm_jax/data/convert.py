"""Writes a data set anew, in files that a pod reads well: ArrayRecord or webdataset tars.

    python -m storm_jax.data.convert PATH OUT.array_record [--media_root=DIR] [--paths]
    python -m storm_jax.data.convert PATH OUT.tar [--media_root=DIR]

reads PATH, which is what `path` is in a configuration, and writes OUT-00000.array_record (or .tar)
and so on: read them as "OUT-*.array_record". Media go into the files; --paths keeps them where they
are. A tar holds a medium once however many of its records name it; ArrayRecord holds a copy for
each record, and loads it as a whole: for long videos, use --paths or tars.

Records that cannot be used are listed and left out, and the exit status is then 1.
"""

import argparse
import glob
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from storm_jax.config import ConfigError, SourceConfig, from_mapping
from storm_jax.data.conversation import Media
from storm_jax.data.open_records import Part, open_records
from storm_jax.data.records import Record, RecordError, RecordSet

_FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def fields(record: Record, media: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A record as the JSON object that `parse_record` reads, with these objects as its media."""
    raw: dict[str, Any] = {"id": record.id, "media": list(media)}
    raw["conversations"] = [{"from": _FROM[t.role], "value": t.text} for t in record.turns]
    raw["data_source"] = record.source
    if record.task:
        raw["task"] = record.task
    return raw


def medium_fields(medium: Media, path: str) -> dict[str, Any]:
    """A medium as an object of the list "media", under another path."""
    raw: dict[str, Any] = {"type": medium.kind, "path": path}
    for name in ("start", "end"):
        if getattr(medium, name) is not None:
            raw[name] = getattr(medium, name)
    return raw


def contents(records: RecordSet, medium: Media) -> bytes:
    """The bytes of a medium's file.

    Raises:
      RecordError: it is a folder of frames, or cannot be read.
    """
    opened = records.opened(medium)
    try:
        if isinstance(opened.data, bytes):
            return opened.data
        if opened.data is not None:
            with opened.data as file:
                return file.read()
        if os.path.isdir(opened.path):
            raise RecordError(f"{opened.path} is a folder of frames: only --paths can keep it")
        with open(opened.path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RecordError(f"{medium.path} cannot be read: {error.strerror}") from error


class _Shard(Protocol):
    """A file that is being written."""

    size: int  # bytes so far

    def add(self, records: RecordSet, record: Record) -> None: ...

    def close(self) -> None: ...


class _ArrayRecordShard:
    def __init__(self, path: str, with_media: bool):
        # One record a group: a reader decompresses whole groups, and videos are compressed already.
        options = "group_size:1,uncompressed" if with_media else "group_size:1"
        self._writer = ArrayRecordWriter(path, options)
        self._with_media = with_media
        self.size = 0

    def add(self, records: RecordSet, record: Record) -> None:
        media = []
        for medium in record.media:
            if self._with_media:
                raw = medium_fields(medium, os.path.basename(medium.path))
                media.append(raw | {"bytes": contents(records, medium)})
            else:
                media.append(medium_fields(medium, _outside(records, medium)))
        raw = fields(record, media)
        packed = msgpack.packb(raw) if self._with_media else json.dumps(raw).encode()
        assert packed is not None
        self._writer.write(packed)
        self.size += len(packed)

    def close(self) -> None:
        self._writer.close()


class _TarShard:
    def __init__(self, path: str, with_media: bool):
        self._tar = tarfile.open(path, "w")
        self._with_media = with_media
        self._members: dict[str, str] = {}  # path of a medium -> its member
        self._count = 0
        self.size = 0

    def add(self, records: RecordSet, record: Record) -> None:
        key = f"{self._count:08d}"
        media, new = [], {}
        for place, medium in enumerate(record.media):
            name = self._members.get(medium.path) or new.get(medium.path, ("", b""))[0]
            if not self._with_media:
                name = _outside(records, medium)
            elif not name:
                ending = os.path.splitext(medium.path)[1] or f".{medium.kind}"
                name = f"{key}{f'.{place}' if len(record.media) > 1 else ''}{ending}"
                new[medium.path] = name, contents(records, medium)
            media.append(medium_fields(medium, name))
        for path, (name, data) in new.items():
            self._write(name, data)
            self._members[path] = name
        self._write(f"{key}.json", json.dumps(fields(record, media)).encode())
        self._count += 1

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self.size += len(data)

    def close(self) -> None:
        self._tar.close()


_SHARDS: dict[str, type[_ArrayRecordShard] | type[_TarShard]] = {
    ".array_record": _ArrayRecordShard,
    ".tar": _TarShard,
}


def _outside(records: RecordSet, medium: Media) -> str:
    if records.opened(medium).data is not None:
        raise RecordError(f"{medium.path} lies inside a file: --paths cannot keep it there")
    root = os.path.join(records.media_root, "")
    return medium.path.removeprefix(root) if root else medium.path


def write_shards(
    parts: Sequence[Part],
    out: str,
    *,
    with_media: bool,
    shard_bytes: int,
) -> tuple[list[str], list[str]]:
    """Writes records to OUT-00000.ENDING and so on; each file appears when it is complete.

    Args:
      parts: data sets, and which of their records.
      out: OUT.array_record or OUT.tar.
      with_media: whether the media go into the files; else their paths do.
      shard_bytes: size above which the next file begins.

    Returns:
      the files, and the messages of the records that were left out.

    Raises:
      ConfigError: another ending, or there are such files already.
    """
    stem, ending = os.path.splitext(out)
    if ending not in _SHARDS:
        raise ConfigError(f"{out} must end in {' or '.join(_SHARDS)}")
    if there := sorted(glob.glob(f"{glob.escape(stem)}-*{ending}")):
        raise ConfigError(f"{there[0]} is there already: remove such files, or name others")
    os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
    files: list[str] = []
    bad: list[str] = []
    shard: _Shard | None = None
    for records, number in _numbered(parts):
        try:
            record = records[number]
            if shard is None:
                files.append(f"{stem}-{len(files):05d}{ending}")
                shard = _SHARDS[ending](files[-1] + ".part", with_media)
            shard.add(records, record)
        except RecordError as error:
            bad.append(str(error))
            continue
        if shard.size >= shard_bytes:
            shard.close()
            os.replace(files[-1] + ".part", files[-1])
            shard = None
    if shard is not None:
        shard.close()
        os.replace(files[-1] + ".part", files[-1])
    return files, bad


def _numbered(parts: Sequence[Part]) -> Iterator[tuple[RecordSet, int]]:
    for part in parts:
        for number in tqdm(part.chosen.tolist(), part.records.name, delay=2, unit="rec"):
            yield part.records, number


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a data set as ArrayRecord or tars.")
    parser.add_argument("path", help="what data.train[...].path is in a configuration")
    parser.add_argument("out", help="OUT.array_record or OUT.tar")
    parser.add_argument("--media_root", default="", help="folder of the media; that of PATH")
    parser.add_argument("--format", default="", help="where the path's ending does not say it")
    parser.add_argument("--split", default="train", help="of a TFDS data set")
    parser.add_argument("--paths", action="store_true", help="leave the media where they are")
    parser.add_argument("--shard_megabytes", type=int, default=1024)
    args = parser.parse_args(argv)
    asked = {name: getattr(args, name) for name in ("path", "media_root", "format", "split")}
    try:
        parts = open_records(from_mapping(SourceConfig, asked))
        files, bad = write_shards(
            parts,
            args.out,
            with_media=not args.paths,
            shard_bytes=args.shard_megabytes << 20,
        )
    except (RecordError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(files)} files: {files[0]} to {files[-1]}" if files else "no record to write")
    for reason in bad:
        print(f"left out: {reason}", file=sys.stderr)
    return 1 if bad or not files else 0


if __name__ == "__main__":
    sys.exit(main())
