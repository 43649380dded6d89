"""How commands end that cannot do what they were asked for."""

import sys

from absl import flags

USAGE = 2  # exit status of flags that cannot be


def failed(error: object, status: int) -> int:
    """Says what is wrong; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return status


def parse(argv: list[str]) -> list[str]:
    """Flags, for `absl.app.run`; those that cannot be end with status `USAGE`."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(failed(f"{error} (--help lists the flags)", USAGE))
