"""Rows that are kept for the next turn."""

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from storm_jax.inference.engine import Engine
from storm_jax.inference.sampling import Sampling
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.parked import Found, Parked
from storm_jax.serving.scheduler import Generation, Scheduler
from tests.serving.harness import CONTEXT
from tests.serving.test_scheduler import answered


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_the_longest_beginning_is_found():
    parked = Parked()
    parked.park(0, ids(1, 2), ())
    parked.park(1, ids(1, 2, 3), ())
    parked.park(2, ids(1, 2, 4), ())
    for found in (Found(1, 3, 0), Found(0, 2, 0)):
        assert parked.find(ids(1, 2, 3, 5), ()) == found
        parked.take(found.slot)
    assert parked.find(ids(1, 2, 3, 5), ()) is None
    assert len(parked) == 1 and parked.oldest() == 2


def test_what_is_not_reused():
    parked = Parked()
    parked.park(0, ids(-1, 2), ("video",))
    assert parked.find(ids(-1, 2), ("video",)) is None  # nothing is new: no scores to go on from
    assert parked.find(ids(-1, 2, 3), ("other",)) is None
    assert parked.find(ids(-1, 3, 3), ("video",)) is None
    assert parked.find(np.concatenate([ids(-1, 2), np.zeros(1025, np.int32)]), ("video",)) is None
    assert parked.find(ids(-1, 2, -1, 3), ("video", "other")) == Found(0, 2, 1)


@pytest.fixture
def scheduler(loaded, tokenizer):
    found = Scheduler(Engine(loaded, slots=2, context=CONTEXT), tokenizer, Metrics())
    yield found
    found.close()


def ask(scheduler, prompt: np.ndarray, new: int = 9) -> tuple[list[int], Generation]:
    generation, got = answered(scheduler, prompt, new)
    assert got[-1].finish == "length"
    return generation.answer, generation


def test_answers_are_those_of_whole_prompts(scheduler, loaded):
    """Turns of two conversations that alternate, against prefills of everything."""
    whole = Engine(loaded, slots=1, context=CONTEXT)
    prompts = [ids(*range(10, 40)), ids(*range(50, 75))]
    for turn in range(3):
        for i, prompt in enumerate(prompts):
            answer, generation = ask(scheduler, prompt)
            slot = whole.admit(prompt, [], Sampling(max_new_tokens=9))
            expected, finish = [], ""
            while not finish:
                (progress,) = whole.step()
                expected, finish = expected + progress.tokens, progress.finish
            whole.release(slot)
            assert answer == expected
            assert generation.reused == (len(prompt) - 3 if turn else 0)
            prompts[i] = np.concatenate([prompt, ids(*answer), ids(3, 4, 5)])
    assert scheduler.free_slots == 2


def test_kept_rows_make_room(scheduler):
    first = ids(1, 2, 3)
    answer, _ = ask(scheduler, first)
    for start in (20, 30):  # two others, for which both slots are needed
        assert ask(scheduler, ids(start, start + 1))[1].reused == 0
    further = np.concatenate([first, ids(*answer), ids(7)])
    assert ask(scheduler, further)[1].reused == 0
    assert scheduler.free_slots == 2
