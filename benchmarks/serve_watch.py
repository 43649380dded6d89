"""What a server under load takes, over time: its metrics, and the memory of its processes."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np

_WATCHED = (
    "process_resident_memory_bytes", "storm_device_memory_bytes", "storm_requests_running",
    "storm_requests_waiting", "storm_requests_open", "storm_visual_cache_bytes", "process_open_fds",
    "storm_answer_tokens_total", "storm_frames_encoded_total", "storm_encode_seconds_total",
    "storm_decode_seconds_total", "storm_visual_cache_hits_total",
    "storm_visual_cache_misses_total", "storm_compiles_total",
    "storm_compile_waits_total", "process_cpu_seconds_total",
)  # fmt: skip
WORKERS = "decoders_resident_memory_bytes"
_PAGE = os.sysconf("SC_PAGE_SIZE")


async def metrics(http: httpx2.AsyncClient) -> dict[str, float]:
    """The numbers that are watched; devices added up."""
    found: dict[str, float] = {}
    for line in (await http.get("/metrics")).text.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in _WATCHED:
            found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0: it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name before it, in brackets, may hold anything.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


class Watch:
    """Takes a row of numbers every so often, says how it goes, and lets a caller save.

    Attributes:
      rows: so far, each with "seconds" since the first.
    """

    def __init__(
        self, http: httpx2.AsyncClient, server: int, every: float, progress: Callable[[], str]
    ):
        """
        Args:
          server: process id, whose descendants decode media; 0: of another machine.
          every: seconds between rows.
          progress: the beginning of the line that is written every half minute.
        """
        self._http, self._server, self._every, self._progress = http, server, every, progress
        self.rows: list[dict] = []

    async def run(self, save: Callable[[], None]) -> None:
        """Until it is cancelled.

        Args:
          save: called every half minute.
        """
        began = told = time.perf_counter()
        while True:
            row = {"seconds": round(time.perf_counter() - began, 1), **await metrics(self._http)}
            if self._server:
                sizes = [resident(pid) for pid in descendants(self._server)]
                row |= {WORKERS: sum(sizes), "decoders": len(sizes)}
            self.rows.append(row)
            if time.perf_counter() - told >= 30:
                told = time.perf_counter()
                say(f"{self._progress()}; {_shown(row)}")
                save()
            await asyncio.sleep(self._every)

    def memory(self) -> dict[str, dict | None]:
        """How memory and open files grew, see `growth`."""
        return {
            "rss": growth(self.rows, "process_resident_memory_bytes"),
            "decoders_rss": growth(self.rows, WORKERS),
            "device": growth(self.rows, "storm_device_memory_bytes"),
            "open_files": growth(self.rows, "process_open_fds"),
        }


def growth(rows: list[dict], name: str) -> dict | None:
    """Medians of the second and the last quarter of the time; the first one fills caches."""
    values = [row[name] for row in rows if name in row]
    if len(values) < 8:
        return None
    quarter = len(values) // 4
    early, late = np.median(values[quarter : 2 * quarter]), np.median(values[-quarter:])
    if not early:
        return None
    return {"early": float(early), "late": float(late), "ratio": round(float(late / early), 4)}


def written(result: dict, out: Path) -> None:
    """Writes JSON so that a reader finds the old file or the new one whole."""
    beside = out.with_name(out.name + ".new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(out)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(row: dict) -> str:
    parts = [
        f"{row.get('storm_requests_running', 0):.0f} running",
        f"{row.get('storm_requests_waiting', 0):.0f} wait",
    ]
    for name, what in [
        ("process_resident_memory_bytes", "server"),
        (WORKERS, "decoders"),
        ("storm_device_memory_bytes", "device"),
    ]:
        if name in row:
            parts.append(f"{what} {row[name] / 2**20:,.0f} MiB")
    return ", ".join(parts)
