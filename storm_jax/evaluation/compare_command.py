"""`python -m storm_jax.evaluate compare OUT1 OUT2 ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from storm_jax.evaluation import compare_plots, compare_report, compare_results
from storm_jax.evaluation.compare import CompareError, compare

COMPARED, BAD_INPUT = 0, 1


def main(argv: Sequence[str]) -> int:
    """Prints the comparison and writes its files; returns the exit status, 2 for usage (raised)."""
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.evaluate compare",
        description="Puts results of storm_jax.evaluate beside each other: how their recipes"
        " differ, accuracies with 95 %% intervals by task and category, and differences to the"
        " first result with paired tests, on the items that all have.",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="OUT", help="what --out of an evaluation was"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for comparison.md, accuracy.csv, paired.csv and plots (with matplotlib)",
    )
    arguments = parser.parse_args(argv)
    try:
        comparison = compare(compare_results.read(arguments.results))
        text = compare_report.markdown(comparison)
        print(text, end="")
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "comparison.md").write_text(text)
            csv = compare_report.accuracy_csv(comparison)
            (arguments.out / "accuracy.csv").write_text(csv)
            (arguments.out / "paired.csv").write_text(compare_report.paired_csv(comparison))
            try:
                compare_plots.draw(comparison, arguments.out)
            except ImportError:
                print("no plots: matplotlib is not installed", file=sys.stderr)
    except (CompareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return COMPARED
