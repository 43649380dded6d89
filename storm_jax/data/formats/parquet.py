"""Records in parquet files, as Hugging Face publishes them: media as bytes in columns, or paths.

A row is a record, a column one of its fields; `conversations` or `messages` may also be a column of
JSON text. Media are columns `image`, `images`, `video`, `videos` of text (paths), of binary values,
or of structs {bytes, path}.

Rows are read by row groups. The columns of text and those with media are read apart, so that
planning reads no media, but one medium costs its whole row group: for training, files with row
groups above some tens of megabytes are better converted once (`data.convert`).
"""

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from storm_jax.data.formats.shards import LATER, EmbeddedSet
from storm_jax.data.records import RecordError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_CONVERSATIONS = ("conversations", "messages", "captions")  # one of them must be there
_JSON = ("conversations", "messages")  # may be text
_KEPT = 4  # row groups of text that a process keeps


class ParquetFiles(EmbeddedSet):
    """The rows of one or more parquet files, in the order of the files."""

    def __init__(self, path: str, media_root: str, files: tuple[str, ...]):
        """Reads the footers of `files`.

        Raises:
          RecordError: pyarrow is not installed, a file is missing, is no parquet file, or has no
            column with conversations.
        """
        self._handles: dict[str, ParquetFile] = {}
        self._tables: dict[tuple[int, int, bool], pyarrow.Table] = {}
        self._lock = threading.Lock()
        groups, self._text, self._binary = [], [], []
        for file in files:
            metadata = self._handle(file).metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            groups.append(np.cumsum([0, *rows]))
            text, binary = _leaves(metadata.schema)
            columns = {leaf.split(".")[0] for leaf in text}
            if not columns & set(_CONVERSATIONS):
                raise RecordError(
                    f"{file} has no column {' or '.join(_CONVERSATIONS)}; it has"
                    f" {', '.join(sorted(columns))}. Rename the column that holds the turns"
                )
            self._text.append(text)
            self._binary.append(binary)
        self._groups = groups  # of each file: where its row groups begin, and the end
        super().__init__(path, media_root, files, [int(ends[-1]) for ends in groups])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handles": {}, "_tables": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]):
        super().__setstate__({**state, "_lock": threading.Lock()})

    def _read(self, shard: int, local: int, contents: bool) -> dict[str, Any]:
        group = int(np.searchsorted(self._groups[shard], local, side="right")) - 1
        row = local - int(self._groups[shard][group])
        raw = self._row(shard, group, row, contents)
        for path in self._binary[shard]:
            raw = _marked(raw, path)
        for column in _JSON:
            if isinstance(raw.get(column), str):
                try:
                    raw[column] = json.loads(raw[column])
                except ValueError as error:
                    raise RecordError(f"has {column} that are not JSON: {error}") from error
        return raw

    def _row(self, shard: int, group: int, row: int, contents: bool) -> dict[str, Any]:
        from pyarrow import ArrowException

        with self._lock:  # a handle serves one thread at a time
            table = self._tables.get((shard, group, contents))
            if table is None:
                columns = None if contents else self._text[shard]
                try:
                    table = self._handle(self.files[shard]).read_row_group(group, columns=columns)
                except (OSError, ArrowException) as error:
                    raise RecordError(f"cannot be read: {error}; copy the file again") from error
                # Of those with media, which are large, only the latest.
                old = [key for key in self._tables if key[2] == contents]
                for key in old if contents else old[: 1 - _KEPT]:
                    del self._tables[key]
                self._tables[shard, group, contents] = table
        return table.slice(row, 1).to_pylist()[0]

    def _handle(self, file: str) -> "ParquetFile":
        handle = self._handles.get(file)
        if handle is None:
            try:
                from pyarrow import ArrowException
                from pyarrow.parquet import ParquetFile
            except ImportError as error:
                raise RecordError(
                    f"{file}: parquet files need pyarrow; pip install 'storm_jax[parquet]'"
                ) from error
            try:
                handle = ParquetFile(file)
            except (OSError, ArrowException) as error:
                raise RecordError(f"{file}: not a complete parquet file: {error}") from error
            if len(self._handles) >= 64:  # sets can have thousands of files
                self._handles.pop(next(iter(self._handles))).close()
            self._handles[file] = handle
        return handle


def _leaves(schema: Any) -> tuple[list[str], list[list[str]]]:
    """What is read of a record before its media are, and where files' bytes stand.

    Returns:
      paths of leaves: all but bytes beside which a path says for which records there are any; and
      the paths of all bytes, in parts.
    """
    columns = [schema.column(i) for i in range(len(schema))]
    binary = {
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
    }
    every = [column.path for column in columns]
    later = {leaf for leaf in binary if leaf.removesuffix("bytes") + "path" in every}
    return [leaf for leaf in every if leaf not in later], [leaf.split(".") for leaf in binary]


def _marked(value: Any, path: list[str]) -> Any:
    """A value with the bytes below it in the form that `EmbeddedSet` looks for.

    Args:
      path: of the bytes, from here on; a list takes two names of it.
    """
    if isinstance(value, bytes):
        return {"bytes": value}
    if isinstance(value, list):
        return [_marked(item, path[2:]) for item in value]
    if not isinstance(value, dict):
        return value
    if path == ["bytes"]:
        return {"bytes": LATER, **value}
    return {key: _marked(item, path[1:]) if key == path[0] else item for key, item in value.items()}
