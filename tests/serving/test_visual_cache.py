"""Which media are kept, and that each is made once."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("prometheus_client")

from storm_jax.inference.prefill import Visual
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.visual_cache import _OVERHEAD, VisualCache


def medium(kilobytes: int) -> Visual:
    return Visual(np.zeros((kilobytes, 256), np.float32), kilobytes, 1, kilobytes)


def maker(visual, made: list, seconds=0.0):
    async def make():
        made.append(visual)
        await asyncio.sleep(seconds)
        if isinstance(visual, Exception):
            raise visual
        return visual

    return make


def test_least_recently_used_go_first():
    async def run():
        room = (10 << 10) + 3 * _OVERHEAD  # 10 kB of tokens in three media
        cache, made, media = VisualCache(room, Metrics()), [], {}
        for key in "abc":
            media[key] = medium(3)
            assert await cache.get(key, maker(media[key], made)) == (media[key], False)
        assert await cache.get("a", maker(None, made)) == (media["a"], True)
        await cache.get("d", maker(medium(4), made))  # 13 kB: b goes
        assert (await cache.get("a", maker(None, made)))[1]
        assert (await cache.get("c", maker(None, made)))[1]
        assert len(made) == 4
        assert not (await cache.get("b", maker(media["b"], made)))[1]
        # One that is larger than all leaves nothing, and is returned all the same.
        huge = medium(60)
        assert await cache.get("huge", maker(huge, made)) == (huge, False)
        assert await cache.get("huge", maker(huge, made)) == (huge, False)
        assert not (await cache.get("a", maker(media["a"], made)))[1]

    asyncio.run(run())


def test_nothing_is_kept_without_room():
    async def run():
        cache, made = VisualCache(0, Metrics()), []
        for _ in range(2):
            assert not (await cache.get("a", maker(medium(1), made)))[1]
        assert len(made) == 2

    asyncio.run(run())


def test_made_once_for_all_who_ask_meanwhile():
    async def run():
        cache, made, one = VisualCache(1 << 20, Metrics()), [], medium(1)
        results = await asyncio.gather(*(cache.get("a", maker(one, made, 0.05)) for _ in range(5)))
        assert all(visual is one for visual, _ in results) and made == [one]

    asyncio.run(run())


def test_errors_are_not_kept():
    async def run():
        cache, made = VisualCache(1 << 20, Metrics()), []
        error = ValueError("broken")
        asking = (cache.get("a", maker(error, made, 0.02)) for _ in range(3))
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert results == [error] * 3 and made == [error]
        one = medium(1)
        assert await cache.get("a", maker(one, made)) == (one, False)

    asyncio.run(run())


def test_whoever_leaves_does_not_stop_the_others():
    async def run():
        cache, made, one = VisualCache(1 << 20, Metrics()), [], medium(1)
        first = asyncio.create_task(cache.get("a", maker(one, made, 0.05)))
        second = asyncio.create_task(cache.get("a", maker(None, made)))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == (one, False) and made == [one]
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_what_nobody_waits_for_is_given_up():
    async def run():
        cache, made, finished = VisualCache(1 << 20, Metrics()), [], []

        async def make():
            made.append(1)
            await asyncio.sleep(0.05)
            finished.append(1)
            return medium(1)

        tasks = [asyncio.create_task(cache.get("a", make)) for _ in range(2)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.1)
        assert made == [1] and not finished
        assert not (await cache.get("a", make))[1]

    asyncio.run(run())
