"""Rows of the engine whose answer is finished and whose conversation may go on."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

# New tokens up to which going on is sure to be cheaper than a prefill of everything:
# `Engine.extend` computes 512 at a time and without fused attention.
_MOST_NEW = 1024


class Found(NamedTuple):
    """A row that holds the beginning of a prompt.

    Attributes:
      slot: of the engine.
      tokens, media: of the prompt that it holds, numbers of them.
    """

    slot: int
    tokens: int
    media: int


class Parked:
    """Rows by what is in their caches; the one that was parked first is given up first."""

    def __init__(self):
        self._rows: OrderedDict[int, tuple[np.ndarray, tuple[Hashable, ...]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def park(self, slot: int, tokens: np.ndarray, media: Sequence[Hashable]) -> None:
        """Keeps a row.

        Args:
          tokens: int32 [n], prompt and answer.
          media: keys of the prompt's media, in order; equal for equal visual tokens.
        """
        self._rows[slot] = tokens, tuple(media)

    def find(self, tokens: np.ndarray, media: Sequence[Hashable]) -> Found | None:
        """The row that holds the most of a prompt's beginning and nothing else.

        None: there is none, or too much of the prompt is new.
        """
        best = None
        for slot, (held, keys) in self._rows.items():
            n = len(held)
            if (
                n < len(tokens) <= n + _MOST_NEW
                and keys == tuple(media[: len(keys)])
                and np.array_equal(held, tokens[:n])
                and (best is None or n > best.tokens)
            ):
                best = Found(slot, n, len(keys))
        return best

    def take(self, slot: int) -> None:
        """The row is not parked any more."""
        del self._rows[slot]

    def oldest(self) -> int:
        """The row to give up; it is not parked any more."""
        return self._rows.popitem(last=False)[0]
