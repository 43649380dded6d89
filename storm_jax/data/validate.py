"""Checks a data set before it is trained on.

    python -m storm_jax.data.validate PATH [--media_root=DIR] [--decode]

reads every record, probes every medium once, prints a summary with each bad record and its reason,
and leaves PATH.probe.jsonl, the side table that training plans with. PATH is what `path` is in a
configuration: a file or several of any format, a TFDS folder, or a mixture, of which each data set
is checked. The exit status is 1 when a record is bad.
"""

import argparse
import collections
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from storm_jax.config import ConfigError, FrameConfig, SourceConfig, from_mapping
from storm_jax.data.open_records import Part, open_records
from storm_jax.data.probes import ProbeTable, load_or_probe, media_of, table_path
from storm_jax.data.records import RecordError, RecordSet
from storm_jax.data.video import MediaError, frame_count


def find_bad(records: RecordSet, chosen: Iterable[int], table: ProbeTable) -> list[tuple[int, str]]:
    """Index and reason of every record that training would leave out for its own sake."""
    bad = []
    any_frames = FrameConfig(max_frames=1)
    for i in chosen:
        try:
            for media in records[i].media:
                frame_count(table[media], media, any_frames)
        except RecordError as error:
            bad.append((i, str(error)))
        except MediaError as error:
            bad.append((i, f"{records.path}: record {i} (id {records[i].id}): {error}"))
    return bad


def summary(part: Part, table: ProbeTable, bad: Sequence[tuple[int, str]]) -> str:
    """What the data set holds, as text for people."""
    records = part.records
    of = f" of {len(records):,}" if len(part.chosen) < len(records) else ""
    probes = table.probes()
    kinds = collections.Counter(str(p.kind) for p in probes)
    lines = [
        f"{records.path}: {len(part.chosen):,}{of} records, {len(bad):,} bad",
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
    sources: collections.Counter[str] = collections.Counter()
    tasks: collections.Counter[str] = collections.Counter()
    for i in part.chosen.tolist():
        if i not in rejected:
            record = records[i]
            sources[record.source] += 1
            tasks.update([record.task] if record.task else [])
    lines.append(f"source      {_counts(sources)}")
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
    parser.add_argument("path", help="what data.train[...].path is in a configuration")
    parser.add_argument("--media_root", default="", help="folder of the media; that of PATH")
    parser.add_argument("--format", default="", help="where the path's ending does not say it")
    parser.add_argument("--split", default="train", help="of a TFDS data set")
    parser.add_argument("--decode", action="store_true", help="decode first and last frames too")
    args = parser.parse_args(argv)
    try:
        asked = {"path": args.path, "media_root": args.media_root}
        asked |= {"format": args.format, "split": args.split}
        parts = open_records(from_mapping(SourceConfig, asked))
    except (RecordError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    worst = 0
    for part in parts:
        numbers = part.chosen.tolist()
        media = media_of(part.records, numbers)
        table = load_or_probe(part.records, media, decode_ends=args.decode)
        bad = find_bad(part.records, numbers, table)
        print(summary(part, table, bad))
        print(f"\nside table: {table_path(part.records)}\n")
        worst |= bool(bad)
    return worst


if __name__ == "__main__":
    sys.exit(main())
