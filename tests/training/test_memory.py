"""Out of memory: XLA's own error on this machine, and what is said about it."""

import jax
import jax.numpy as jnp
import pytest

from storm_jax.training.memory import OutOfMemory, explained, message
from tests.tiny import run_config

# As XLA's GPU client says it.
GPU = (
    "INTERNAL: while running: RESOURCE_EXHAUSTED: Out of memory while trying to allocate"
    " 17179869184 bytes.\n\nBufferAssignment: ..."
)


def test_an_allocation_that_no_machine_has():
    config = run_config(**{"train.batch": 8, "train.accumulation": 2})
    with pytest.raises(OutOfMemory) as caught, explained("training", config):
        jax.block_until_ready(jnp.ones((1 << 44,), jnp.float32))
    text = str(caught.value)
    assert text.startswith("out of memory while training: RESOURCE_EXHAUSTED")
    assert str(1 << 46) in text or "70368744177664" in text
    assert "train.accumulation=4: microbatches of 2 rows in place of 4" in text
    assert "train.remat.vit.policy=full in place of none" in text


def test_other_errors_pass():
    with pytest.raises(ValueError, match="no"), explained("training", run_config()):
        raise ValueError("no")


def test_only_what_is_left_is_named():
    full = {f"train.remat.{part}.policy": "full" for part in ("vit", "temporal", "decoder")}
    more = {"train.batch": 1, "train.remat.vit_calls": True, "mesh.fsdp": 4}
    config = run_config(**full, **more, **{"train.optimizer.kind": "adafactor"})
    text = message("training", GPU, config, activations=True)
    assert "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes" in text
    assert "BufferAssignment" not in text
    assert "mesh.fsdp (now 4)" in text
    assert not any(name in text for name in ("accumulation", "remat", "first_moment"))
    assert "sequence_length" not in message("making the state", GPU, config, activations=False)
