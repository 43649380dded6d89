"""What formats have in common that keep records, and media inside them, in one or more files."""

import os
import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from storm_jax.data.records import Media, Record, RecordError, RecordSet, parse_record

LATER = object()  # stands for bytes that have not been read


class ShardedSet(RecordSet):
    """Records numbered through all files; a medium inside a file has the path FILE#KEY."""

    def __init__(self, path: str, media_root: str, files: tuple[str, ...], counts: Sequence[int]):
        """`counts` are the numbers of records in each of the files."""
        super().__init__(path, media_root, files)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._numbers = {os.path.abspath(file): number for number, file in enumerate(files)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def container(self, medium: Media) -> str:
        inside = self._inside(medium.path)
        return medium.path if inside is None else self.files[inside[0]]

    def _place(self, index: int) -> tuple[int, int]:
        """File of a record, and its number in there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, no record {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - (self._ends[shard - 1] if shard else 0))

    def _inside(self, path: str) -> tuple[int, str] | None:
        """Of a medium inside a file: the number of the file, and the rest of its path."""
        end = path.find("#")
        while end >= 0:
            shard = self._numbers.get(path[:end])
            if shard is not None:
                return shard, path[end + 1 :]
            end = path.find("#", end + 1)
        return None


class EmbeddedSet(ShardedSet):
    """Records that come as one value each, with the contents of media in it or without.

    Contents stand as {"bytes": ..., "path": ...} where a path would stand, as in Hugging Face's
    parquet files, and have the key RECORD/PLACE: the record's number in its file, and their place
    in the record. `bytes` may be None; then `path` is one like any other.
    """

    def __init__(self, path: str, media_root: str, files: tuple[str, ...], counts: Sequence[int]):
        super().__init__(path, media_root, files, counts)
        self._latest = threading.local()

    @abstractmethod
    def _read(self, shard: int, local: int, contents: bool) -> dict[str, Any]:
        """The fields of a record as Python values.

        Without `contents`, LATER may stand for bytes.

        Raises:
          RecordError: says what is wrong; the caller adds where.
        """

    def __getitem__(self, index: int) -> Record:
        shard, local = self._place(index)
        raw, _ = self._detached(shard, local, contents=False)
        if raw.get("id") in (None, ""):
            raw["id"] = str(index)
        return parse_record(raw, local, self.files[shard], self.media_root, self.name)

    def opened(self, medium: Media) -> Media:
        inside = self._inside(medium.path)
        if inside is None:
            return medium
        shard, key = inside
        _, found = self._detached(shard, int(key.split("/")[0]), contents=True)
        data, path = found[medium.path]
        if data is None:
            if not path:
                raise RecordError(f"{medium.path} has neither bytes nor a path")
            file = os.path.join(self.media_root, path)
            return Media(medium.kind, file, medium.start, medium.end)
        return Media(medium.kind, medium.path, medium.start, medium.end, data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__ = {**state, "_latest": threading.local()}

    def _detached(
        self, shard: int, local: int, contents: bool
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
        # A record is asked for twice in a row, for its text and for each of its media.
        latest = getattr(self._latest, "record", None)
        if latest is not None and latest[:2] == (shard, local) and (latest[2] or not contents):
            return dict(latest[3]), latest[4]
        file = self.files[shard]
        try:
            raw = self._read(shard, local, contents)
        except RecordError as error:
            raise RecordError(f"{file}: record {local} {error}") from error
        found: dict[str, tuple[Any, str]] = {}
        raw = _detach(raw, f"{os.path.abspath(file)}#{local}", found)
        complete = all(data is not LATER for data, _ in found.values())
        self._latest.record = shard, local, complete, raw, found
        return dict(raw), found


def _detach(value: Any, name: str, found: dict[str, tuple[Any, str]]) -> Any:
    """`value` with names in place of {"bytes", "path"}; `found`: name -> bytes and path."""
    if isinstance(value, list):
        return [_detach(item, name, found) for item in value]
    if not isinstance(value, dict):
        return value
    if "bytes" not in value:
        return {key: _detach(item, name, found) for key, item in value.items()}
    path = value.get("path") or ""
    inside = f"{name}/{len(found)}{os.path.splitext(path)[1]}"
    found[inside] = value["bytes"], path
    rest = {key: item for key, item in value.items() if key != "bytes"}
    rest["path"] = inside if value["bytes"] is not None or not path else path
    return rest if "type" in rest else rest["path"]
