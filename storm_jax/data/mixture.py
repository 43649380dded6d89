"""Mixtures in YAML as LLaVA-NeXT writes them: data sets, and how much of each.

    datasets:
      - json_path: cap_processed.json        # any format that a source may have
        sampling_strategy: "first:1000"      # all; first, end or random, then a number or "10%"
        data_root: videos                    # optional: the folder of the media

Shares of a hundred are rounded up. A random choice depends on the seed and the number of records
alone. Paths are relative to the folder of the YAML file, if they exist there, or to the working
directory.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from storm_jax.data.planning import subset
from storm_jax.data.records import RecordError

# video_read_type (VideoChat-Flash) is read over: what a file is shows in the file.
_KEYS = ("json_path", "sampling_strategy", "data_root", "video_read_type")
_STRATEGY = re.compile(r"(first|end|random):(\d+)(%?)")


@dataclass(frozen=True)
class Entry:
    """One data set of a mixture."""

    path: str
    media_root: str
    strategy: str

    def choose(self, total: int, seed: int) -> np.ndarray:
        """Which of `total` records are used: int64 [n], ascending."""
        match = _STRATEGY.fullmatch(self.strategy)
        if match is None:  # all
            return np.arange(total)
        how, number, percent = match.groups()
        count = -(-int(number) * total // 100) if percent else int(number)
        count = min(count, total)
        if how == "random":
            return subset(total, count, seed)
        return np.arange(count) if how == "first" else np.arange(total - count, total)


def read_mixture(path: str) -> list[Entry]:
    """The entries of a mixture file.

    Raises:
      RecordError: the file is missing or no YAML, or an entry has an unknown key or strategy.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            raw = yaml.safe_load(file)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; is the path right?") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecordError(f"{path} is not YAML: {error}") from error
    listed = raw.get("datasets") if isinstance(raw, dict) else None
    if not isinstance(listed, list) or not listed:
        raise RecordError(f'{path} needs a list "datasets" of entries with json_path')
    return [_entry(item, f"{path}: entry {i}", path) for i, item in enumerate(listed)]


def _entry(item: Any, where: str, path: str) -> Entry:
    if not isinstance(item, dict):
        raise RecordError(f"{where} is {item!r}, not an object with json_path")
    unknown = [str(key) for key in item if key not in _KEYS]
    if unknown:
        raise RecordError(f"{where} has {', '.join(unknown)}; known keys are {', '.join(_KEYS)}")
    for key in ("json_path", "data_root"):
        if not isinstance(item.get(key, "" if key == "data_root" else None), str):
            raise RecordError(f"{where}: {key}={item.get(key)!r} must be a path")
    strategy = str(item.get("sampling_strategy", "all"))
    if strategy != "all" and not _STRATEGY.fullmatch(strategy):
        raise RecordError(
            f"{where}: sampling_strategy={strategy!r} is not understood; write all, or first:,"
            " end: or random: and a number of records or a share such as 10%"
        )
    root = item.get("data_root", "")
    return Entry(_found(item["json_path"], path), root and _found(root, path), strategy)


def _found(name: str, mixture: str) -> str:
    beside = os.path.join(os.path.dirname(os.path.abspath(mixture)), name)
    # Of a pattern, the part in front of it.
    plain = re.split(r"[*?\[{]", beside)[0]
    there = os.path.exists(beside) or (plain != beside and os.path.isdir(os.path.dirname(plain)))
    return beside if there else name
