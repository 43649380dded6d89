"""Encoded media, kept by their content, and encoded once however many ask at the same time."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

from storm_jax.inference.prefill import Visual
from storm_jax.serving.metrics import Metrics

_OVERHEAD = 16 << 10  # bytes of host memory that an array and its entry take, about


class VisualCache:
    """Least recently used media go first. All calls come from the thread of one event loop."""

    def __init__(self, max_bytes: int, metrics: Metrics):
        """
        Args:
          max_bytes: of tokens, and of what keeping each medium takes besides. A medium in use may
            outlive its place here.
        """
        self._max_bytes, self._metrics = max_bytes, metrics
        self._kept: OrderedDict[Hashable, Visual] = OrderedDict()
        self._bytes = 0
        self._making: dict[Hashable, tuple[asyncio.Task[Visual], list[None]]] = {}

    async def get(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Visual]]
    ) -> tuple[Visual, bool]:
        """The medium `key`, made by `make` unless it is there or being made already.

        When nobody waits any longer, what is being made is cancelled.

        Returns:
          The medium, and whether it was there already.
        """
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            self._metrics.cache_hits.inc()
            return found, True
        if key not in self._making:
            self._metrics.cache_misses.inc()
            self._making[key] = asyncio.create_task(self._make(key, make)), []
        task, waiting = self._making[key]
        waiting.append(None)
        try:
            return await asyncio.shield(task), False
        finally:
            waiting.pop()
            if not waiting:
                self._making.pop(key, None)
                task.cancel()

    async def _make(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Visual]]) -> Visual:
        visual = await make()
        self._kept[key] = visual
        self._bytes += visual.tokens.nbytes + _OVERHEAD
        while self._bytes > self._max_bytes:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.tokens.nbytes + _OVERHEAD
        self._metrics.cache_bytes.set(self._bytes)
        self._metrics.cache_entries.set(len(self._kept))
        return visual
