"""Records in webdataset tars, read at random through an index of where the members lie.

Members whose names are equal up to the first dot after the last slash are one sample: KEY.json is
the record, the others are its media. A record that names media has those members of its tar, found
by the name as written or by its last part; one that names none has the media members of its sample,
in the order of their names. So several records of a tar can share a medium, which lies there once.

The index of FILE.tar is FILE.tar.index.npz beside it, or in the user's cache folder where that
cannot be written. It is made by reading the headers alone, and again when the tar has changed.
Media are read where they lie, so that a long video in a tar is not loaded as a whole.
"""

import dataclasses
import io
import json
import os
import tarfile
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from storm_jax.data.caches import cache_paths, write_cache
from storm_jax.data.formats.shards import ShardedSet
from storm_jax.data.records import Media, Record, RecordError, parse_record

_VIDEOS = ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ts", "webm")
_IMAGES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_THREADS = 8  # tars indexed at once: it waits for the disk
_TABLES = 32  # tars whose names a process keeps as a dict
_VERSION = 1  # of the index


@dataclass(frozen=True)
class _Index:
    """The members of a tar, in its order.

    Attributes:
      names: UTF-8, joined by zeros, uint8.
      spans: int64 [members, 2], where the contents begin in the tar, and their size.
      order: int32, the members of the samples, one sample after another.
      starts: int64 [samples + 1], where the members of each sample begin in `order`, and the end.
    """

    names: np.ndarray
    spans: np.ndarray
    order: np.ndarray
    starts: np.ndarray


class Tars(ShardedSet):
    """The samples of one or more tars, in the order of the files."""

    def __init__(self, path: str, media_root: str, files: tuple[str, ...]):
        """Opens or makes the indexes of `files`.

        Raises:
          RecordError: one is missing, damaged or compressed, or holds no record at all.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            self._indexes = list(pool.map(_index, files))
        super().__init__(path, media_root, files, [len(its.starts) - 1 for its in self._indexes])
        self._tables: dict[int, _Table] = {}  # of the tars read from
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Record:
        shard, local = self._place(index)
        its, file = self._indexes[shard], self.files[shard]
        table = self._table(shard)
        numbers = its.order[its.starts[local] : its.starts[local + 1]].tolist()
        names = sorted(table.names[number] for number in numbers)
        where = f"{file}: record {local} ({_key(names[0])})"
        records = [name for name in names if name.endswith(".json")]
        if len(records) != 1:
            raise RecordError(f"{where} has {len(records)} .json members; a sample needs one")
        try:
            with self._member(shard, records[0]) as member:
                raw = json.loads(member.read())
        except OSError as error:
            raise RecordError(f"{where} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"{where} is not JSON: {error}; repair or delete it") from error
        if isinstance(raw, dict) and raw.get("id") in (None, ""):
            raw["id"] = _key(names[0])
        media = [Media(kind, name) for name in names if (kind := _kind(name)) is not None]
        record = parse_record(raw, local, file, "", self.name, media)

        # Where a record's names are those of no member, its sample's media are meant all the same.
        last = {os.path.basename(name): name for name in names}
        found = [
            m.path if m.path in table.numbers else last.get(os.path.basename(m.path))
            for m in record.media
        ]
        if not any(found) and len(media) == len(found):
            found = [medium.path for medium in media]
        placed = []
        for medium, name in zip(record.media, found, strict=True):
            inside = f"{os.path.abspath(file)}#{name}"
            path = inside if name else os.path.join(self.media_root, medium.path)
            placed.append(dataclasses.replace(medium, path=path))
        return dataclasses.replace(record, media=tuple(placed))

    def opened(self, medium: Media) -> Media:
        inside = self._inside(medium.path)
        if inside is None:
            return medium
        try:
            return dataclasses.replace(medium, data=io.BufferedReader(self._member(*inside)))
        except OSError as error:
            raise RecordError(f"{medium.path} cannot be read: {error.strerror}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__ = {**state, "_lock": threading.Lock()}

    def _member(self, shard: int, name: str) -> "_Member":
        start, size = self._indexes[shard].spans[self._table(shard).numbers[name]].tolist()
        return _Member(self.files[shard], start, size)

    def _table(self, shard: int) -> "_Table":
        with self._lock:
            table = self._tables.get(shard)
            if table is None:
                if len(self._tables) >= _TABLES:
                    del self._tables[next(iter(self._tables))]
                text = self._indexes[shard].names.tobytes().decode(errors="surrogateescape")
                names = text.split("\0")
                table = _Table(names, {name: number for number, name in enumerate(names)})
                self._tables[shard] = table
        return table


@dataclass(frozen=True)
class _Table:
    """The names of a tar's members, and the number of each."""

    names: list[str]
    numbers: dict[str, int]


class _Member(io.RawIOBase):
    """A member of a tar as a file of its own."""

    def __init__(self, file: str, start: int, size: int):
        self._file = open(file, "rb", buffering=0)
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        read = os.preadv(self._file.fileno(), [memoryview(buffer)[:count]], self._start + self._at)
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


# ------------------------------------------------------------------------------------------ index


def _key(name: str) -> str:
    """The sample that a member belongs to."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".")[0]


def _kind(name: str) -> Literal["video", "image"] | None:
    ending = name.rpartition(".")[2].lower()
    return "video" if ending in _VIDEOS else "image" if ending in _IMAGES else None


def _index(file: str) -> _Index:
    """The index of a tar: that of an earlier call, if the tar has not changed since."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror}; is the path right?") from error
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    for place in cache_paths(file, ".index.npz"):
        try:
            with np.load(place) as saved:
                if np.array_equal(saved["stamp"], stamp):
                    return _Index(saved["names"], saved["spans"], saved["order"], saved["starts"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
    index = _scan(file)
    parts = {name: getattr(index, name) for name in ("names", "spans", "order", "starts")}
    buffer = io.BytesIO()
    np.savez(buffer, stamp=stamp, **parts)
    try:
        write_cache(file, ".index.npz", buffer.getvalue())
    except OSError as error:
        warnings.warn(f"{file}: its index cannot be kept: {error.strerror}", stacklevel=2)
    return index


def _scan(file: str) -> _Index:
    try:
        with tarfile.open(file, "r:") as tar:
            every = list(tar)
        with open(file, "rb") as raw:
            # tarfile takes a header that is cut off for the end.
            last = max((m.offset_data + (m.size if m.isreg() else 0) for m in every), default=0)
            raw.seek(-(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            closed = raw.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        compressed = file.endswith(("gz", "bz2", "xz", "zst"))
        remedy = "decompress it: a compressed tar cannot be read at random" if compressed else ""
        raise RecordError(
            f"{file}: not a complete tar: {error}; {remedy or 'copy the file again'}"
        ) from error
    if not closed:
        raise RecordError(
            f"{file}: not a complete tar: no empty block closes it, so it was cut off behind"
            f" member {len(every)}; copy the file again"
        )
    members = [member for member in every if member.isreg()]
    samples: dict[str, list[int]] = {}
    for number, member in enumerate(members):
        hidden = os.path.basename(member.name).startswith(".")  # macOS adds such
        if not hidden and (member.name.endswith(".json") or _kind(member.name) is not None):
            samples.setdefault(_key(member.name), []).append(number)
    if not any(members[i].name.endswith(".json") for its in samples.values() for i in its):
        raise RecordError(
            f"{file}: none of its {len(members)} members is a record: a sample needs KEY.json"
            " beside KEY.mp4 or KEY.jpg"
        )
    names = "\0".join(member.name for member in members)
    return _Index(
        np.frombuffer(names.encode(errors="surrogateescape"), np.uint8),
        np.array([(m.offset_data, m.size) for m in members], np.int64),
        np.array([number for its in samples.values() for number in its], np.int32),
        np.cumsum([0, *map(len, samples.values())], dtype=np.int64),
    )
