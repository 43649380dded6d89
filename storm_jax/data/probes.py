"""The side table: what is known about each medium of a data set, probed once and kept on disk.

FILE.probe.jsonl stands beside the record file FILE, one line for each distinct medium:

    {"path": "a/b.mp4", "kind": "video", "size": 81234, "mtime": 1763800000000000000,
     "probe": {"kind": "video", "duration": 12.5, "fps": 25.0, "frames": 312, "codec": "h264",
               "width": 640, "height": 360, "rotation": 0}}

or, instead of "probe", {"error": "..."}. `path` is relative to the media root; size (bytes) and
mtime (ns) are those of the file when it was probed: a file that has changed is probed again.
"""

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from storm_jax.data.records import Media, RecordError, RecordFile
from storm_jax.data.video import MediaError, Probe, decode, probe

_THREADS = 8  # probing waits for the disk where files are remote
_DECODE_SECONDS = 60.0  # limit for one file when its ends are decoded

_Key = tuple[str, str]  # kind, path


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


def table_path(records: RecordFile) -> str:
    """Where the side table of a record file is kept."""
    return records.path + ".probe.jsonl"


def load_or_probe(
    records: RecordFile, *, progress: bool = True, decode_ends: bool = False
) -> ProbeTable:
    """The side table of `records`, after probing what is missing from it or has changed.

    The table on disk is replaced at once, never in part; where its folder cannot be written to, a
    warning says so and the result lives in memory only. Records that cannot be read are passed
    over: whoever reads them next meets the same `RecordError`.

    Args:
      records: the data set.
      progress: show a progress bar when it takes longer than two seconds.
      decode_ends: probe everything anew, and decode the first and the last frame of each video:
        slower, but it finds files that are cut off behind an intact header.
    """
    wanted = _media(records, progress)
    stamps = dict(zip(wanted, _in_threads(_stamp, wanted, "checking files", progress), strict=True))
    known = {} if decode_ends else _load(records)
    entries = {
        key: entry
        for key, entry in known.items()
        if stamps.get(key) == (entry.size, entry.mtime) and entry.size >= 0
    }
    missing = [key for key in wanted if key not in entries]
    if missing:

        def look(key: _Key) -> _Entry:
            return _probe(key, stamps[key], decode_ends)

        probed = _in_threads(look, missing, "probing media", progress)
        entries.update(zip(missing, probed, strict=True))
        _save(records, {**known, **entries})
    return ProbeTable({key: entries[key] for key in wanted})


def _media(records: RecordFile, progress: bool) -> list[_Key]:
    found: dict[_Key, None] = {}
    bar = tqdm(range(len(records)), "reading records", delay=2, disable=not progress)
    for i in bar:
        try:
            found.update(((m.kind, m.path), None) for m in records[i].media)
        except RecordError:
            continue
    return list(found)


def _stamp(key: _Key) -> tuple[int, int]:
    try:
        status = os.stat(key[1])
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _probe(key: _Key, stamp: tuple[int, int], decode_ends: bool) -> _Entry:
    kind, path = key
    try:
        found = probe(path, "image" if kind == "image" else "video")
        if decode_ends and found.kind == "video":
            decode(path, n=2, timeout=_DECODE_SECONDS)
    except MediaError as error:
        return _Entry(*stamp, None, error.reason)
    return _Entry(*stamp, found, "")


def _in_threads(call: Any, items: Iterable[_Key], what: str, progress: bool) -> list[Any]:
    items = list(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(call, items)
        return list(tqdm(results, what, len(items), delay=2, disable=not progress))


def _load(records: RecordFile) -> dict[_Key, _Entry]:
    """The table on disk; a line that cannot be read counts as absent."""
    entries: dict[_Key, _Entry] = {}
    try:
        with open(table_path(records), encoding="utf-8") as file:
            for line in file:
                try:
                    raw = json.loads(line)
                    key = raw["kind"], os.path.join(records.media_root, raw["path"])
                    found = Probe(**raw["probe"]) if "probe" in raw else None
                    entries[key] = _Entry(raw["size"], raw["mtime"], found, raw.get("error", ""))
                except (ValueError, KeyError, TypeError):
                    continue
    except OSError:
        pass
    return entries


def _save(records: RecordFile, entries: dict[_Key, _Entry]) -> None:
    target, root = table_path(records), os.path.join(records.media_root, "")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=os.path.dirname(os.path.abspath(target)), delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            for (kind, path), entry in entries.items():
                if entry.size < 0:  # a missing file costs nothing to look for again
                    continue
                line: dict[str, Any] = {"path": path.removeprefix(root), "kind": kind}
                line.update(size=entry.size, mtime=entry.mtime)
                if entry.probe is None:
                    line["error"] = entry.error
                else:
                    line["probe"] = dataclasses.asdict(entry.probe)
                file.write(json.dumps(line) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)
        warnings.warn(
            f"{target}: {error.strerror}; the media will be probed again next time", stacklevel=3
        )
