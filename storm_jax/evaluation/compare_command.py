"""`python -m storm_jax.evaluate compare OUT1 OUT2 ...`."""

import argparse
import sys
from collections.abc import Sequence

from storm_jax.disk import NotOnDiskError, on_disk, results
from storm_jax.evaluation import compare_plots, compare_report, compare_results
from storm_jax.evaluation.compare import CompareError, compare

COMPARED, BAD_INPUT = 0, 1
_COPY = "results are read from files; copy the folder to a disk"


def main(argv: Sequence[str]) -> int:
    """Prints the comparison and writes its files; returns the exit status, 2 for usage (raised)."""
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.evaluate compare",
        description="Puts results of storm_jax.evaluate beside each other: how their recipes"
        " differ, accuracies with 95 %% intervals by task and category, and differences to the"
        " first result with paired tests, on the items that all have.",
    )
    parser.add_argument("results", nargs="+", metavar="OUT", help="what --out of an evaluation was")
    parser.add_argument(
        "--out",
        help="folder for comparison.md, accuracy.csv, paired.csv and plots (with matplotlib)",
    )
    arguments = parser.parse_args(argv)
    try:
        given = [on_disk("OUT", path, _COPY) for path in arguments.results]
        out = results("--out", arguments.out) if arguments.out is not None else None
        comparison = compare(compare_results.read(given))
        text = compare_report.markdown(comparison)
        print(text, end="")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "comparison.md").write_text(text)
            csv = compare_report.accuracy_csv(comparison)
            (out / "accuracy.csv").write_text(csv)
            (out / "paired.csv").write_text(compare_report.paired_csv(comparison))
            try:
                compare_plots.draw(comparison, out)
            except ImportError:
                print("no plots: matplotlib is not installed", file=sys.stderr)
    except (CompareError, NotOnDiskError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return COMPARED
