"""Do processes that feed the same rows of a batch feed the same?"""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from storm_jax.parallel.mesh import AXES


class SameRows:
    """Compares what processes have loaded of the rows that they share.

    A file that one of them reads and another does not (it was too slow, a disk failed) leaves its
    sample out of the row on one side alone. What follows it moves, and the devices of the row would
    compute with two different rows without an error.
    """

    def __init__(self, layout: jax.NamedSharding, batch: int):
        """
        Args:
          layout: of an array [batch] of rows.
        """
        self._layout, self._batch = layout, batch
        entries = layout.spec[0] if layout.spec else None
        split = (entries,) if isinstance(entries, str) else tuple(entries or ())
        others = tuple(axis for axis in AXES if axis not in split)

        def count(marks_B: jax.Array) -> jax.Array:
            differ = jax.lax.pmax(marks_B, others) != jax.lax.pmin(marks_B, others)
            return jax.lax.psum(differ.sum(), split) if split else differ.sum()

        self._count = jax.jit(
            jax.shard_map(
                count,
                mesh=layout.mesh,
                in_specs=layout.spec,
                out_specs=jax.P(),
                check_vma=False,  # an array says that its replicas are equal; here they may not be
            )
        )

    def differing(self, rows: Sequence[Sequence[str]]) -> jax.Array:
        """Rows of the global batch that are not the same on all devices.

        Every process calls it, and does not wait for the devices.

        Args:
          rows: ids of the samples in each row of this process, in order.

        Returns:
          Their number, int32 [], on every process.
        """
        marks = np.array([_mark(row) for row in rows], np.int32)
        return self.count(
            jax.make_array_from_process_local_data(self._layout, marks, (self._batch,))
        )

    def count(self, marks_B: jax.Array) -> jax.Array:
        """The same from a mark of each row, int32 [batch] in `layout`."""
        return self._count(marks_B)


def _mark(row: Sequence[str]) -> int:
    return zlib.crc32("\n".join(row).encode()) & 0x7FFFFFFF
