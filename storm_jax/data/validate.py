"""Checks a data set before it is trained on.

    python -m storm_jax.data.validate FILE [--media_root=DIR] [--decode]

reads every record, probes every medium once, prints a summary with each bad record and its reason,
and leaves FILE.probe.jsonl, the side table that training plans with. The exit status is 1 when a
record is bad.
"""

import argparse
import collections
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from storm_jax.config import FrameConfig
from storm_jax.data.probes import ProbeTable, load_or_probe, table_path
from storm_jax.data.records import RecordError, RecordFile
from storm_jax.data.video import MediaError, frame_count


def find_bad(records: RecordFile, table: ProbeTable) -> list[tuple[int, str]]:
    """Index and reason of every record that training would leave out for its own sake."""
    bad = []
    any_frames = FrameConfig(max_frames=1)
    for i in range(len(records)):
        try:
            for media in records[i].media:
                frame_count(table[media], media, any_frames)
        except RecordError as error:
            bad.append((i, str(error)))
        except MediaError as error:
            bad.append((i, f"{records.path}: record {i} (id {records[i].id}): {error}"))
    return bad


def summary(records: RecordFile, table: ProbeTable, bad: Sequence[tuple[int, str]]) -> str:
    """What the data set holds, as text for people."""
    probes = table.probes()
    kinds = collections.Counter(str(p.kind) for p in probes)
    lines = [
        f"{records.path}: {len(records):,} records, {len(bad):,} bad",
        f"media root  {records.media_root}",
        f"media       {len(table):,}: {_counts(kinds) or 'none'},"
        f" unreadable {len(table) - len(probes):,}",
    ]
    videos = [p for p in probes if p.kind == "video"]
    if videos:
        duration = np.array([p.duration for p in videos])
        low, middle, high = np.quantile(duration, [0, 0.5, 1])
        lines += [
            f"duration    {duration.sum() / 3600:.2f} h in all; shortest {low:.2f} s,"
            f" median {middle:.2f} s, longest {high:.2f} s",
            f"frames      {sum(p.frames for p in videos):,}",
            f"frame rate  {_counts(collections.Counter(f'{p.fps:.4g}' for p in videos))}",
            f"codec       {_counts(collections.Counter(p.codec for p in videos))}",
            f"size        {_counts(collections.Counter(f'{p.width}x{p.height}' for p in videos))}",
            f"rotated     {sum(p.rotation != 0 for p in videos):,}",
        ]
    rejected = {i for i, _ in bad}
    good = [records[i] for i in range(len(records)) if i not in rejected]
    lines.append(f"source      {_counts(collections.Counter(r.source for r in good))}")
    tasks = collections.Counter(r.task for r in good if r.task)
    if tasks:
        lines.append(f"task        {_counts(tasks)}")
    if bad:
        lines += ["", f"bad records ({len(bad):,}):", *(f"  {reason}" for _, reason in bad)]
    return "\n".join(lines)


def _counts(counter: collections.Counter[str], most: int = 8) -> str:
    shown: Iterable[str] = (f"{name} {n:,}" for name, n in counter.most_common(most))
    rest = len(counter) - most
    return ", ".join(shown) + (f", {rest:,} more kinds" if rest > 0 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Probe a data set and report its bad records.")
    parser.add_argument("file", help="JSONL or JSON file of records")
    parser.add_argument("--media_root", default="", help="folder of the media; that of FILE")
    parser.add_argument("--decode", action="store_true", help="decode first and last frames too")
    args = parser.parse_args(argv)
    try:
        records = RecordFile(args.file, args.media_root)
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    table = load_or_probe(records, decode_ends=args.decode)
    bad = find_bad(records, table)
    print(summary(records, table, bad))
    print(f"\nside table: {table_path(records)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
