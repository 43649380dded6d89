"""The paper's ablations on the controlled benchmark, as one command.

python -m storm_jax.evidence --grid=core --out=DIR            everything that is missing, the report
python -m storm_jax.evidence --grid=core --part=table4 ...    one of table3, table4, table5, table7
python -m storm_jax.evidence --report --out=DIR --docs=docs/evidence.md    the report alone
python -m storm_jax.evidence --grid=smoke --out=DIR           two minutes on a CPU: the machinery

Videos are written and decoded into --data (default OUT/data) once. Each grid point, five seeds at
once, leaves OUT/runs/NAME.json; the same command again does what is missing and refuses results of
another recipe. docs/evidence.md says what is tested and how it is
decided.

Exit status: 0 done; 1 a grid point failed (the others are done); 2 arguments, data or results that
cannot be used.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from storm_jax import disk
from storm_jax.evidence_grid import clips
from storm_jax.evidence_grid.grids import GRIDS
from storm_jax.evidence_grid.recipe import EvidenceError
from storm_jax.evidence_grid.results import Folder
from storm_jax.evidence_grid.workers import run_all, say

DONE, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _arguments(argv)
    try:
        disk.results("--out", args.out)
        disk.on_disk("--data", args.data, "frames are memory-mapped; give a folder on a disk")
        return _report(args) if args.report else _run(args)
    except (EvidenceError, disk.NotOnDiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.evidence",
        description="The paper's ablations on a controlled benchmark of mp4 files.",
    )
    add = parser.add_argument
    add("--grid", choices=sorted(GRIDS), default="core", help="which experiment")
    add("--out", required=True, help="folder of results")
    add("--part", default="", help="table3, table4, table5 or table7 (default: all)")
    add("--only", default="", help="names of grid points, separated by commas (default: all)")
    add("--data", default="", help="folder of videos (default: OUT/data)")
    add("--workers", type=int, default=4, help="grid points that share the device")
    add("--decoders", type=int, default=0, help="processes that write videos (default: one a core)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="changes the grid, may be repeated: short.steps=1000, sizes.width=128, seeds=3",
    )
    add("--prepare", action="store_true", help="only write and decode the videos")
    add("--report", action="store_true", help="only the report, from what is there")
    add("--latency", default="", help="JSON of benchmarks/latency.py for table 13")
    add("--docs", default="", help="page to complete, docs/evidence.md")
    add("--noplots", action="store_true", help="no plots (they need matplotlib)")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise EvidenceError(f"--workers={args.workers}: at least one process is needed")
    grid = GRIDS[args.grid].changed(args.set)
    recipes = grid.recipes(args.part)
    if args.only:
        names = args.only.split(",")
        unknown = sorted(set(names) - {recipe.point.name for recipe in recipes})
        if unknown:
            raise EvidenceError(
                f"--only={','.join(unknown)}: the points are"
                f" {', '.join(recipe.point.name for recipe in recipes)}"
            )
        recipes = [recipe for recipe in recipes if recipe.point.name in names]
    data = args.data or os.path.join(args.out, "data")
    clips.check(data, grid.videos)
    say(f"writing and decoding videos in {data}")
    with ThreadPoolExecutor(1) as thread:
        # Points train on short clips, and compile, while the long ones are made.
        videos = thread.submit(clips.prepare, data, grid.videos, args.decoders)
        failed = [] if args.prepare else run_all(recipes, data, args.out, args.workers)
        videos.result()
    if args.prepare:
        return DONE
    if any(Folder(args.out).has(recipe) for recipe in recipes):
        _report(args)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return FAILED if failed else DONE


def _report(args: argparse.Namespace) -> int:
    from storm_jax.evidence_grid import report

    for line in report.write(args.out, args.latency, args.docs, not args.noplots):
        print(line)
    say(f"tables and plots are in {os.path.join(args.out, 'report')}")
    return DONE


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    sys.exit(main())
