"""Paths that must lie on a disk."""

from pathlib import Path


class NotOnDiskError(ValueError):
    """A bucket or another URL where a path on a disk is needed; the message names the remedy."""


def on_disk(flag: str, path: str, remedy: str) -> Path:
    """The path, which is not of a bucket.

    `pathlib` would make "gs:/" of "gs://", and a folder of this name here.

    Args:
      flag: that gave it, "--out".
      remedy: what to do instead.

    Raises:
      NotOnDiskError: it is a URL.
    """
    if "://" in path:
        raise NotOnDiskError(f"{flag}={path} is not on a disk: {remedy}")
    return Path(path)


def results(flag: str, path: str) -> Path:
    """`on_disk` for a folder of results, which are appended to and locked."""
    return on_disk(
        flag,
        path,
        "results are appended to, locked and renamed, which buckets cannot do; give a folder on a"
        " disk (that all processes share) and copy it up afterwards",
    )
