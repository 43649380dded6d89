"""Which pooled frames of an endless stream are kept when there is room for a fixed number."""

POLICIES = ("recent", "spread")


class History:
    """Gives the items 0, 1, 2, ... of a stream one of `slots` slots each, or none.

    "recent": the oldest item makes room for the newest.

    "spread": all of the history, thinned evenly. While there is room, every item is kept. An item
    that finds no room has every second kept one dropped, and from then on every second new one is
    taken; next time every fourth; and so on. So at any time the kept items are the multiples of a
    power of two, between half of the slots and all of them are in use, and the newest kept item is
    less than 2 / slots of the history old.
    """

    def __init__(self, slots: int, policy: str):
        """`policy` is one of `POLICIES`."""
        if slots < 1:
            raise ValueError(f"slots={slots}: at least one is needed")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {', '.join(map(repr, POLICIES))}")
        self.slots = slots
        self.policy = policy
        self.stride = 1  # of the items that are taken
        self._kept: dict[int, int] = {}  # item -> slot, in the order of items
        self._free = list(range(slots))[::-1]

    def add(self, item: int) -> None:
        """Takes the next item, or passes it over. Items come in order and none is left out."""
        if item % self.stride:
            return
        if not self._free:
            if self.policy == "recent":
                self._drop([next(iter(self._kept))])
            else:
                self.stride *= 2
                self._drop([kept for kept in self._kept if kept % self.stride])
                if item % self.stride:
                    return
        self._kept[item] = self._free.pop()

    def _drop(self, items: list[int]) -> None:
        self._free += [self._kept.pop(item) for item in items]

    def slot(self, item: int) -> int | None:
        """Where an item is kept; None: it is not."""
        return self._kept.get(item)

    @property
    def kept(self) -> dict[int, int]:
        """The kept items in order, and their slots."""
        return dict(self._kept)
