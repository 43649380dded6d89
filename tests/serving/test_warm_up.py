"""What is compiled before the first request, and that it is enough."""

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from storm_jax.config import ConfigError
from storm_jax.data.conversation import Turn
from storm_jax.data.text import encode_prompt
from storm_jax.inference.engine import Engine
from storm_jax.inference.programs import CompileError
from storm_jax.inference.sampling import Sampling
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.scheduler import Scheduler
from storm_jax.serving.warm_up import frame_numbers, warm_up

CONTEXT, FRAMES = 120, 4


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("longest", (1, 8)), ("none", ()), ("all", None), ("3", (3,)), ("8,1,8", (8, 1))],
)
def test_what_the_flag_names(wanted, found):
    assert frame_numbers(wanted, 8) == found


@pytest.mark.parametrize("wanted", ["", "0", "9", "1,x", "1,,2", "true"])
def test_what_it_cannot_name(wanted):
    with pytest.raises(ConfigError, match="--warm-up=.*from 1 to 8"):
        frame_numbers(wanted, 8)


@pytest.mark.parametrize("frames", [None, (3,)])
def test_nothing_is_compiled_any_more(loaded, tokenizer, frames):
    engine = Engine(loaded, slots=2, context=CONTEXT)
    scheduler = Scheduler(engine, tokenizer, Metrics())
    lines = []
    try:
        warm_up(scheduler, engine, tokenizer, loaded.config, frames, FRAMES, lines.append)
    finally:
        scheduler.close()
    for slot in list(engine._slots):  # with finished answers
        engine.release(slot)
    known = len(engine.programs)
    assert lines[-1].startswith(f"{known} programs after")
    side = loaded.config.model.vit.image_size
    for count in frames or range(1, FRAMES + 1):
        assert engine.can_encode(count)
        visual = engine.encode(np.zeros((count, side, side, 3), np.uint8))
        prompt = encode_prompt(
            tokenizer, loaded.config.data.chat_template, [Turn("user", "<video>Why?")],
            [visual.count],
        )  # fmt: skip
        assert engine.can_admit(len(prompt), [visual])
    if frames is None:
        for n in range(20, CONTEXT):
            assert engine.can_admit(n), n
        slot = engine.admit(np.arange(30, dtype=np.int32), [], Sampling(max_new_tokens=3))
        while engine.step():
            pass
        for n in range(1, CONTEXT - 33):
            assert engine.can_extend(slot, n), n
        engine.extend(slot, np.arange(40, dtype=np.int32), [], Sampling(max_new_tokens=3))
        engine.release(slot)
    else:
        assert not engine.can_admit(CONTEXT - 1)
        engine.programs.wait()
        known += 1
    assert len(engine.programs) == known


def test_what_cannot_be_compiled_is_no_secret(loaded, tokenizer, monkeypatch):
    """Not even where no prompt runs through the program."""
    engine = Engine(loaded, slots=2, context=CONTEXT)
    scheduler = Scheduler(engine, tokenizer, Metrics())

    def fails(length):
        raise ValueError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(
        engine, "can_go_on", lambda n: engine.programs.ahead("extend", n, lambda: fails(n))
    )
    try:
        with pytest.raises(CompileError, match="extend 32: RESOURCE_EXHAUSTED"):
            warm_up(scheduler, engine, tokenizer, loaded.config, (1,), FRAMES, lambda line: None)
    finally:
        scheduler.close()
