"""Records in a JSONL file, or in a JSON file that holds a list; media beside it."""

import json
import os
from typing import Any

from storm_jax.data.records import Record, RecordError, RecordSet, parse_record
from storm_jax.data.spans import line_spans, list_spans


class JsonFile(RecordSet):
    """The records of one file.

    Opening reads the file once and keeps only where each record starts and ends (16 bytes a
    record).
    """

    def __init__(self, path: str, media_root: str = ""):
        """Indexes `path`.

        Args:
          path: a file whose first character is "[" is read as a JSON list, any other as JSONL.
          media_root: folder that media paths are relative to; "" means the folder of `path`.

        Raises:
          RecordError: the file is missing, or it is a JSON list that cannot be parsed. A bad line
            in a JSONL file is an error of that record alone.
        """
        super().__init__(path, media_root, (path,))
        try:
            with open(path, "rb") as file:
                is_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
                file.seek(0)
                self._spans = list_spans(file) if is_list else line_spans(file)
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}; is the path right?") from error
        except ValueError as error:
            raise RecordError(f"{path}: {error}; repair it, or write it as JSONL") from error
        self._file = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        start, end = (int(x) for x in self._spans[index])
        where = f"{self.path}: record {index}"
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)
            raw = json.loads(os.pread(self._file.fileno(), end - start, start))
        except OSError as error:
            raise RecordError(f"{where} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"{where} is not JSON: {error}; repair or delete it") from error
        return parse_record(raw, index, self.path, self.media_root)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
