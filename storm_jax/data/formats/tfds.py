"""Records in a TFDS data set on disk: its ArrayRecord files, read without TensorFlow.

The features are those of a record's fields (docs/data.md); `data.tfds_builder` prepares such data
sets. A list of objects comes from TFDS as an object of lists, text as bytes, and an absent value as
NaN or empty: here all of them become what the JSON of a record would hold.
"""

import json
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from storm_jax.data.formats.shards import EmbeddedSet
from storm_jax.data.records import RecordError

if TYPE_CHECKING:
    from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource

_CONTENTS = "bytes"  # the feature that holds a media file


class TfdsFolder(EmbeddedSet):
    """One split of the data set in a folder such as tfds/llava_video/1.0.0."""

    def __init__(self, path: str, media_root: str, split: str):
        """Opens `split` of the data set in the folder `path`.

        Raises:
          RecordError: tensorflow-datasets is not installed, the folder holds no data set in
            ArrayRecord files, it has no such split, or no feature with conversations.
        """
        self._source, files = _open(path, split)
        # Records are numbered through all files by TFDS itself: to us they are one file.
        super().__init__(path, media_root, files, [len(self._source)] + [0] * (len(files) - 1))
        self.name = os.path.basename(os.path.dirname(os.path.abspath(path)))

    def _read(self, shard: int, local: int, contents: bool) -> dict[str, Any]:
        try:
            return _plain(self._source[local])
        except (RuntimeError, ValueError) as error:
            raise RecordError(f"cannot be read: {error}; prepare the data set again") from error


def _open(path: str, split: str) -> "tuple[ArrayRecordDataSource, tuple[str, ...]]":
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise RecordError(
            f"{path}: TFDS data sets need tensorflow-datasets; pip install 'storm_jax[tfds]'"
        ) from error
    try:
        builder = tfds.builder_from_directory(path)
        if split not in list(builder.info.splits):
            raise ValueError(
                f"the data set has {', '.join(builder.info.splits)}; for a part of one, list it in"
                " a mixture"
            )
        source: Any = builder.as_data_source(split=split)
    except (ValueError, OSError, RuntimeError, NotImplementedError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}, split {split}: {error}") from error
    names = set(builder.info.features or ())
    if not names & {"conversations", "messages"}:
        raise RecordError(
            f"{path} has no feature conversations or messages; it has {', '.join(sorted(names))}."
            " storm_jax.data.tfds_builder prepares data sets that are read"
        )
    return source, tuple(str(file) for file in builder.info.splits[split].filepaths)


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        plain = {key: _plain(item, key) for key, item in value.items()}
        lists = list(plain.values())
        if name and lists and all(isinstance(item, list) for item in lists):
            return [dict(zip(plain, items, strict=True)) for items in zip(*lists, strict=True)]
        return {key: item for key, item in plain.items() if item is not None or key == _CONTENTS}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(item, name) for item in value]
    if isinstance(value, bytes):
        if name == _CONTENTS:
            return value or None
        return value.decode(errors="replace") or None
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
