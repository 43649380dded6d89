"""Records in ArrayRecord files: with paths of media, or with the media inside.

A record of the file is either a JSON object (UTF-8), exactly a line of a JSONL file, or the same
object in MessagePack, where {"bytes": the media file, "path": its name} may stand wherever the
schema has a path, and a medium of "media" may have "bytes" beside "type". `data.convert` writes
both, with one record in each ArrayRecord group: a group is read whole.
"""

import json
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource

from storm_jax.data.formats.shards import EmbeddedSet
from storm_jax.data.records import RecordError


class ArrayRecordFiles(EmbeddedSet):
    """The records of one or more ArrayRecord files, in the order of the files."""

    def __init__(self, path: str, media_root: str, files: tuple[str, ...]):
        """Reads the footers of `files`.

        Raises:
          RecordError: one is missing, cut off, or no ArrayRecord file.
        """
        self._readers = [_reader(file) for file in files]
        super().__init__(path, media_root, files, [len(reader) for reader in self._readers])

    def _read(self, shard: int, local: int, contents: bool) -> dict[str, Any]:
        try:
            packed = self._readers[shard][local]
        except (RuntimeError, ValueError) as error:
            raise RecordError(f"cannot be read: {error}; copy the file again") from error
        return parse(packed)


def parse(packed: bytes) -> dict[str, Any]:
    """The fields of a record as it stands in an ArrayRecord file.

    Raises:
      RecordError: it is neither of the two forms.
    """
    try:
        raw = json.loads(packed) if packed[:1] == b"{" else msgpack.unpackb(packed)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError(
            f"is neither JSON nor MessagePack ({error}); write it with storm_jax.data.convert"
        ) from error
    if not isinstance(raw, dict):
        raise RecordError(f"is a {type(raw).__name__}, not an object with fields")
    return raw


def _reader(file: str) -> ArrayRecordDataSource:
    try:
        return ArrayRecordDataSource(file)
    except (RuntimeError, OSError) as error:
        raise RecordError(f"{file}: not a complete ArrayRecord file: {error}") from error
