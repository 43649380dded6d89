"""The side table: what is known about each medium of a data set, probed once and kept on disk.

FILE.probe.jsonl stands beside the record file FILE, one line for each distinct medium:

    {"path": "a/b.mp4", "kind": "video", "size": 81234, "mtime": 1763800000000000000,
     "probe": {"kind": "video", "duration": 12.5, "fps": 25.0, "frames": 312, "codec": "h264",
               "width": 640, "height": 360, "rotation": 0}}

or, instead of "probe", {"error": "..."}. `path` is relative to the media root; size (bytes) and
mtime (ns) are those of the file when it was probed: a file that has changed is probed again. Of a
medium inside a tar or the like, they are those of the tar.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from storm_jax.data.caches import cache_paths, write_cache
from storm_jax.data.conversation import Kind
from storm_jax.data.records import Media, RecordError, RecordSet
from storm_jax.data.video import MediaError, Probe, decode, probe

_THREADS = 8  # probing waits for the disk where files are remote
_DECODE_SECONDS = 60.0  # limit for one file when its ends are decoded

_Key = tuple[Kind, str]  # kind, path
_ENDING = ".probe.jsonl"


@dataclass(frozen=True)
class _Entry:
    size: int  # bytes; -1: the file is missing
    mtime: int  # ns
    probe: Probe | None
    error: str


class ProbeTable:
    """Probes by medium: `table[media]` is its `Probe`, or raises the `MediaError` it met.

    A medium that the table was not built from is a KeyError. Tables are plain dicts inside and can
    be pickled to workers.
    """

    def __init__(self, entries: dict[_Key, _Entry]):
        self._entries = entries

    def __getitem__(self, media: Media) -> Probe:
        entry = self._entries[media.kind, media.path]
        if entry.probe is None:
            raise MediaError(media.path, entry.error)
        return entry.probe

    def __len__(self) -> int:
        return len(self._entries)

    def probes(self) -> list[Probe]:
        """The probes of all media that could be read."""
        return [e.probe for e in self._entries.values() if e.probe is not None]


def table_path(records: RecordSet) -> str:
    """Where the side table of a data set is kept."""
    beside, home = cache_paths(records.caches, _ENDING)
    return str(home if home.exists() and not beside.exists() else beside)


def load_or_probe(
    records: RecordSet,
    media: Iterable[Media] | None = None,
    *,
    progress: bool = True,
    decode_ends: bool = False,
) -> ProbeTable:
    """The side table of `records`, after probing what is missing from it or has changed.

    The table on disk is replaced at once, never in part; where its folder cannot be written to, a
    warning says so and the result lives in memory only. Records that cannot be read are passed
    over: whoever reads them next meets the same `RecordError`.

    Args:
      records: the data set.
      media: those of the records, where the caller knows them; all records are read for them else.
      progress: show a progress bar when it takes longer than two seconds.
      decode_ends: probe everything anew, and decode the first and the last frame of each video:
        slower, but it finds files that are cut off behind an intact header.
    """
    media = media_of(records, range(len(records)), progress) if media is None else media
    wanted = list(dict.fromkeys((m.kind, m.path) for m in media))
    holders = [records.container(Media(*key)) for key in wanted]
    files = list(dict.fromkeys(holders))
    found = dict(zip(files, _in_threads(_stamp, files, "checking files", progress), strict=True))
    stamps = {key: found[file] for key, file in zip(wanted, holders, strict=True)}
    known = {} if decode_ends else _load(records)
    entries = {
        key: entry
        for key, entry in known.items()
        if stamps.get(key) == (entry.size, entry.mtime) and entry.size >= 0
    }
    missing = [key for key in wanted if key not in entries]
    if missing:

        def look(key: _Key) -> _Entry:
            return _probe(records, key, stamps[key], decode_ends)

        probed = _in_threads(look, missing, "probing media", progress)
        entries.update(zip(missing, probed, strict=True))
        _save(records, {**known, **entries})
    return ProbeTable({key: entries[key] for key in wanted})


def media_of(records: RecordSet, numbers: Sequence[int], progress: bool = True) -> Iterator[Media]:
    """The media of some records, in order; records that cannot be read are passed over."""
    for i in tqdm(numbers, "reading records", delay=2, disable=not progress):
        try:
            yield from records[i].media
        except RecordError:
            continue


def _stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _probe(records: RecordSet, key: _Key, stamp: tuple[int, int], decode_ends: bool) -> _Entry:
    try:
        medium = records.opened(Media(*key))
        found = probe(medium.path, medium.kind, medium.data)
        if decode_ends and found.kind == "video":
            source = medium.path if medium.data is None else medium.data
            decode(source, n=2, timeout=_DECODE_SECONDS, name=medium.path)
    except MediaError as error:
        return _Entry(*stamp, None, error.reason)
    except RecordError as error:
        return _Entry(*stamp, None, str(error))
    return _Entry(*stamp, found, "")


def _in_threads(call: Any, items: list[Any], what: str, progress: bool) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(call, items)
        return list(tqdm(results, what, len(items), delay=2, disable=not progress))


def _load(records: RecordSet) -> dict[_Key, _Entry]:
    """The table on disk; a line that cannot be read counts as absent."""
    entries: dict[_Key, _Entry] = {}
    try:
        with open(table_path(records), encoding="utf-8") as file:
            for line in file:
                try:
                    raw = json.loads(line)
                    key: _Key = raw["kind"], os.path.join(records.media_root, raw["path"])
                    found = Probe(**raw["probe"]) if "probe" in raw else None
                    entries[key] = _Entry(raw["size"], raw["mtime"], found, raw.get("error", ""))
                except (ValueError, KeyError, TypeError):
                    continue
    except OSError:
        pass
    return entries


def _save(records: RecordSet, entries: dict[_Key, _Entry]) -> None:
    root = os.path.join(records.media_root, "")
    lines = []
    for (kind, path), entry in entries.items():
        if entry.size < 0:  # a missing file costs nothing to look for again
            continue
        line: dict[str, Any] = {"path": path.removeprefix(root), "kind": kind}
        line.update(size=entry.size, mtime=entry.mtime)
        if entry.probe is None:
            line["error"] = entry.error
        else:
            line["probe"] = dataclasses.asdict(entry.probe)
        lines.append(json.dumps(line) + "\n")
    try:
        write_cache(records.caches, _ENDING, "".join(lines).encode())
    except OSError as error:
        warnings.warn(
            f"{table_path(records)}: {error.strerror}; the media will be probed again next time",
            stacklevel=3,
        )
