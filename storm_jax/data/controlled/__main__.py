"""Writes a data set; see the package's docstring and docs/controlled.md."""

import argparse
import os
import sys
from collections.abc import Sequence

from storm_jax.data.controlled.families import FAMILIES
from storm_jax.data.controlled.writing import DataSetError, Parameters, write_data_set


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    default = Parameters()
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.data.controlled",
        description="Write mp4 files and questions about them, most of which need time.",
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="separated by commas (default: all)"
    )
    for name, meaning in (
        ("train", "training records"),
        ("test", "records with appearances and positions that training never shows"),
        ("test_seen", "records drawn like the training records"),
        ("frames", "frames in a video, two groups or more"),
        ("size", "side of a frame, pixels"),
        ("group", "frames that the model will average"),
        ("seed", "of everything random"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=meaning)
    parser.add_argument(
        "--backgrounds", default="", help="folder of videos to show behind, or still"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    args = parser.parse_args(argv)
    try:
        parameters = Parameters(
            families=tuple(args.families.split(",")),
            train=args.train,
            test=args.test,
            test_seen=args.test_seen,
            frames=args.frames,
            size=args.size,
            group=args.group,
            seed=args.seed,
            backgrounds=args.backgrounds,
        )
        print(write_data_set(args.out, parameters, args.workers))
    except DataSetError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    main()
