"""Which rows of a global batch a process loads: those that its devices hold."""

from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding

from storm_jax.config import ConfigError


@dataclass(frozen=True)
class RowShare:
    """Share `index` of `count` equal shares of a batch.

    Processes whose devices hold the same rows, as when a tensor or seq axis runs through several
    hosts, have the same share: each loads all of it.
    """

    index: int
    count: int


def row_share(layout: NamedSharding, rows: int, process: int | None = None) -> RowShare:
    """The share of process number `process` (default: this one).

    Args:
      layout: of an array with one dimension, the rows of the batch.
      rows: its length.

    Raises:
      ConfigError: two processes hold some rows in common and others not, so that there are no
        shares to load.
    """
    held: dict[int, set[int]] = {}
    for device, (part,) in layout.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).update(range(rows)[part])
    return share_of(held, jax.process_index() if process is None else process)


def share_of(held: dict[int, set[int]], process: int) -> RowShare:
    """The same from the rows that each process holds."""
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(
        set().union(*shares)
    ):
        listing = "; ".join(f"process {p}: {sorted(rows)}" for p, rows in sorted(held.items())[:4])
        raise ConfigError(
            "the devices of some processes hold rows of the batch partly in common"
            f" ({listing}): choose config.mesh so that tensor x seq divides the devices of a host,"
            " or is a multiple of them"
        )
    return RowShare(shares.index(tuple(sorted(held[process]))), len(shares))
