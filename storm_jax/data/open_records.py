"""From what the configuration names to open data sets: the one place that knows all formats."""

import dataclasses
import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from storm_jax.config import SourceConfig
from storm_jax.data.formats.array_record import ArrayRecordFiles
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.formats.parquet import ParquetFiles
from storm_jax.data.formats.tar import Tars
from storm_jax.data.formats.tfds import TfdsFolder
from storm_jax.data.mixture import read_mixture
from storm_jax.data.records import RecordError, RecordSet

_ENDINGS = {
    ".json": "json",
    ".jsonl": "json",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".yaml": "mixture",
    ".yml": "mixture",
}
_SHARDED: dict[str, Callable[[str, str, tuple[str, ...]], RecordSet]] = {
    "array_record": ArrayRecordFiles,
    "webdataset": Tars,
    "parquet": ParquetFiles,
}


@dataclass(frozen=True)
class Part:
    """A data set, and which of its records are used: int64 [n], ascending."""

    records: RecordSet
    chosen: np.ndarray


def open_records(config: SourceConfig, seed: int = 0) -> list[Part]:
    """Opens what a source names: one data set, or those that a mixture lists.

    Args:
      config: the source; `format` or the ending of `path` says how it is read.
      seed: what a mixture's random choices are drawn with.

    Raises:
      RecordError: nothing is there, the format is not known, or a file cannot be opened.
    """
    kind = config.format or _format(config.path)
    if kind == "mixture":
        parts = []
        for entry in read_mixture(config.path):
            of_entry = dataclasses.replace(
                config,
                path=entry.path,
                media_root=entry.media_root or config.media_root,
                format="",
            )
            if _format(entry.path) == "mixture":
                raise RecordError(f"{config.path}: {entry.path} is a mixture itself; list its sets")
            opened = open_records(of_entry)
            # Files of one entry are one list to its strategy.
            ends = np.cumsum([len(part.records) for part in opened])
            chosen = entry.choose(int(ends[-1]), seed)
            for part, end in zip(opened, ends.tolist(), strict=True):
                start = end - len(part.records)
                its = chosen[(chosen >= start) & (chosen < end)] - start
                if len(its) or not len(part.records):
                    parts.append(Part(part.records, its))
        return parts
    if kind == "tfds":
        sets: list[RecordSet] = [TfdsFolder(config.path, config.media_root, config.split)]
    elif kind == "json":
        sets = [JsonFile(file, config.media_root) for file in expand(config.path)]
    else:
        sets = [_SHARDED[kind](config.path, config.media_root, expand(config.path))]
    return [Part(records, np.arange(len(records))) for records in sets]


def expand(pattern: str) -> tuple[str, ...]:
    """The files that a path stands for, sorted within each choice of braces.

    Braces are alternatives or ranges ("{a,b}", "{000..127}"); "*", "?", "[" are those of a shell.

    Raises:
      RecordError: a wildcard that no file matches.
    """
    paths = _braces(pattern)
    files: list[str] = []
    for path in paths:
        if os.path.exists(path) or not glob.has_magic(path):
            files.append(path)  # if it is missing, whoever opens it says so
            continue
        found = sorted(glob.glob(path))
        if not found:
            raise RecordError(f"{path} matches no file; is the path right?")
        files += found
    return tuple(files)


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None or os.path.exists(pattern):
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        choices = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    return [
        path
        for choice in choices
        for path in _braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _format(path: str) -> str:
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "dataset_info.json")):
            return "tfds"
        raise RecordError(
            f"{path} is a folder without dataset_info.json: name the files in it"
            f' ("{os.path.join(path, "*.tar")}"), or the folder of one version of a TFDS data set'
        )
    # TFDS and Hugging Face write numbers behind the ending or in front of it.
    name = re.sub(r"-[\d*?]+-of-[\d*?]+$", "", path)
    ending = os.path.splitext(name)[1].rstrip("}").lower()
    if ending not in _ENDINGS:
        raise RecordError(
            f"{path}: its ending says no format; known are {', '.join(_ENDINGS)}."
            " Set `format`, or rename it"
        )
    return _ENDINGS[ending]
