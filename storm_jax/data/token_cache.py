"""The tokens of a whole data set, kept on disk beside it.

Packing needs the length of every sample before training starts, and tokenizing is the slow part of
finding it; so the tokens are kept, and data workers need no tokenizer. The cache of FILE is the
folder FILE.tokens/KEY (or one in the user's cache folder where FILE's folder cannot be written).
KEY is made of everything that the tokens depend on: another tokenizer, template or version of the
set's files gets another folder. The folders can be deleted at any time.

    tokens.i32, loss.u8       all conversations, one after another; VISUAL once for each medium
    offsets.i64               where each conversation begins, and the end
    media.i32 [m, 2]          number of the path in strings.json, kind (0 video, 1 image)
    clips.f64 [m, 2]          start and end in seconds; NaN: none
    media_offsets.i64         where the media of each conversation begin, and the end
    strings.json              {"paths": [path, ...], "errors": {record number: message}}
"""

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from storm_jax.config import VISUAL
from storm_jax.data.caches import cache_paths
from storm_jax.data.records import Media, Record, RecordError, RecordSet
from storm_jax.data.text import Encoded, Template, TemplateError, encode_unexpanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 2
_CHUNK = 512  # records tokenized in one call
_KINDS = ("video", "image")


class TokenCache:
    """Tokens and media of the records of one set. Cheap to pickle: the arrays stay on disk."""

    def __init__(self, folder: Path):
        """Opens a folder that `open_or_build` has written."""
        self._folder = folder
        self._tokens = _array(folder / "tokens.i32", np.int32)
        self._loss = _array(folder / "loss.u8", np.uint8)
        self._offsets = _array(folder / "offsets.i64", np.int64)
        self._media = _array(folder / "media.i32", np.int32).reshape(-1, 2)
        self._clips = _array(folder / "clips.f64", np.float64).reshape(-1, 2)
        self._media_offsets = _array(folder / "media_offsets.i64", np.int64)

    def __reduce__(self):
        return TokenCache, (self._folder,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @functools.cached_property
    def _strings(self) -> dict[str, Any]:
        # Read when needed: workers never do, and paths can be many megabytes.
        return json.loads((self._folder / "strings.json").read_text(encoding="utf-8"))

    @functools.cached_property
    def errors(self) -> dict[int, str]:
        """Messages of the records that cannot be used, by record number."""
        return {int(number): message for number, message in self._strings["errors"].items()}

    def text(self, record: int) -> Encoded:
        """The conversation with a single VISUAL for each medium."""
        span = slice(self._offsets[record], self._offsets[record + 1])
        return Encoded(self._tokens[span], self._loss[span].astype(bool))

    def text_tokens(self) -> np.ndarray:
        """Tokens of each record without the visual ones, int32 [len(self)]."""
        return (np.diff(self._offsets) - np.diff(self._media_offsets)).astype(np.int32)

    def media_counts(self) -> np.ndarray:
        """Number of media of each record, int64 [len(self)]."""
        return np.diff(self._media_offsets)

    def distinct_media(self) -> tuple[list[Media], np.ndarray]:
        """The different media of the set, and which of them each medium is.

        Returns:
          a list of media, and int64 [m]: the place in the list of each medium of all records, in
          order (`media_counts` says how many belong to each record).
        """
        both = np.concatenate([self._media.astype(np.float64), self._clips], axis=1)
        # Compared as bytes: NaN, for no start or end, differs from itself as a number.
        keys = np.ascontiguousarray(both).view(np.dtype((np.void, 32)))[:, 0]
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        paths = self._strings["paths"]
        media = [
            Media(
                kind=_KINDS[int(kind)],
                path=paths[int(path)],
                start=None if math.isnan(start) else start,
                end=None if math.isnan(end) else end,
            )
            for path, kind, start, end in both[first].tolist()
        ]
        return media, which


def open_or_build(
    records: RecordSet, tokenizer: "PreTrainedTokenizerFast", template: Template
) -> TokenCache:
    """Opens the cache of a data set; tokenizes all of it first if there is none.

    Records that cannot be read or rendered are in `TokenCache.errors`.

    Raises:
      OSError: neither beside the file nor in the user's cache folder can anything be written.
    """
    key = _key(records, tokenizer, template)
    beside, home = cache_paths(records.caches, ".tokens")
    for parent in (beside, home):
        if (parent / key).is_dir():
            return TokenCache(parent / key)
    try:
        beside.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft", dir=beside))
    except OSError:  # a read-only data set
        beside = home
        beside.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft", dir=beside))
    try:
        _build(draft, records, tokenizer, template)
        try:
            draft.rename(beside / key)
        except OSError:  # another process was first, with the same content
            if not (beside / key).is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return TokenCache(beside / key)


def _key(records: RecordSet, tokenizer: "PreTrainedTokenizerFast", template: Template) -> str:
    states = [(file, os.stat(file)) for file in records.files]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # left over from the latest call
        vocabulary.pop(passing, None)
    files = [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    parts = json.dumps([_VERSION, records.media_root, files, template, vocabulary])
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


def _build(
    folder: Path,
    records: RecordSet,
    tokenizer: "PreTrainedTokenizerFast",
    template: Template,
):
    offsets, media_offsets = [0], [0]
    paths: dict[str, int] = {}
    errors: dict[int, str] = {}
    with (
        (folder / "tokens.i32").open("wb") as tokens_file,
        (folder / "loss.u8").open("wb") as loss_file,
        (folder / "media.i32").open("wb") as media_file,
        (folder / "clips.f64").open("wb") as clips_file,
        # Shown only when it takes long enough to wonder.
        tqdm(total=len(records), desc=f"tokenizing {records.path}", delay=2, unit="rec") as bar,
    ):
        for first in range(0, len(records), _CHUNK):
            numbers = range(first, min(first + _CHUNK, len(records)))
            for record, encoded, error in _encode_chunk(records, numbers, tokenizer, template):
                if error is not None:
                    errors[len(offsets) - 1] = error
                if record is None or encoded is None:
                    offsets.append(offsets[-1])
                    media_offsets.append(media_offsets[-1])
                    continue
                tokens_file.write(encoded.tokens.tobytes())
                loss_file.write(encoded.loss.astype(np.uint8).tobytes())
                offsets.append(offsets[-1] + len(encoded.tokens))
                for medium in record.media:
                    number = paths.setdefault(medium.path, len(paths))
                    kind = _KINDS.index(medium.kind)
                    media_file.write(np.array([number, kind], np.int32).tobytes())
                    clip = [math.nan if s is None else s for s in (medium.start, medium.end)]
                    clips_file.write(np.array(clip, np.float64).tobytes())
                media_offsets.append(media_offsets[-1] + len(record.media))
            bar.update(len(numbers))
    np.array(offsets, np.int64).tofile(folder / "offsets.i64")
    np.array(media_offsets, np.int64).tofile(folder / "media_offsets.i64")
    strings = {"paths": list(paths), "errors": errors}
    (folder / "strings.json").write_text(json.dumps(strings), encoding="utf-8")


def _encode_chunk(
    records: RecordSet,
    numbers: range,
    tokenizer: "PreTrainedTokenizerFast",
    template: Template,
) -> Iterator[tuple[Record | None, Encoded | None, str | None]]:
    """Yields record, tokens and error message for each record number."""
    chunk: list[Record | RecordError] = []
    for number in numbers:
        try:
            chunk.append(records[number])
        except RecordError as error:
            chunk.append(error)
    turns = [record.turns for record in chunk if isinstance(record, Record)]
    try:
        together = iter(encode_unexpanded(tokenizer, template, turns))
    except TemplateError:  # one has no form in this template: find out which, one by one
        together = None
    for record in chunk:
        if isinstance(record, RecordError):
            yield None, None, str(record)
            continue
        try:
            if together is not None:
                encoded = next(together)
            else:
                (encoded,) = encode_unexpanded(tokenizer, template, [record.turns])
        except TemplateError as error:
            yield None, None, str(error)
            continue
        assert (encoded.tokens == VISUAL).sum() == len(record.media), record
        yield record, encoded, None


def _array(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # a plain array: slicing is faster
