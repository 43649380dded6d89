"""Memory by part against arrays that are really there, and the compiler's refusals."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.aot.memory import local_bytes, memory_of, whole_parameters
from storm_jax.aot.program import Compiled, OutOfMemory, abstract_batch, out_of_memory, trace_step
from storm_jax.aot.topology import describe
from storm_jax.config import ConfigError
from storm_jax.models.storm import StormModel
from storm_jax.training.optim import make_optimizer, split_parts
from storm_jax.training.state import init_state
from tests.tiny import run_config

GiB = 2**30


@pytest.fixture(scope="module", params=(False, True), ids=("all_train", "vit_frozen"))
def step(request):
    frozen = {"train.optimizer.rates.vit": 0.0} if request.param else {}
    config = run_config(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, **frozen)
    return config, trace_step(config, describe("h100:8"))


def on_first_device(tree) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == first
    )


def test_parts_are_what_a_device_holds(step):
    config, traced = step
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = init_state(StormModel(config.model), optimizer, traced.parts, traced.mesh, seed=0)
    memory = memory_of(traced, Compiled("", 0, 0, 0, 0, 0, 0.0, 0.0), GiB)
    for part, tree in state.params.items():
        assert memory.parameters[part] == on_first_device(tree), part
    trained = split_parts(state.params, traced.parts)[0]
    assert memory.gradients == {part: on_first_device(tree) for part, tree in trained.items()}
    assert sum(memory.optimizer.values()) == on_first_device((state.step, state.opt_state))


def test_the_batch_is_split_over_data_and_fsdp(step):
    config, traced = step
    side, rows = config.model.vit.image_size, config.train.batch
    F, S = config.data.row_frames, config.data.sequence_length
    assert local_bytes(abstract_batch(config, traced.mesh)) == (
        rows // 4 * (F * (3 * side**2 + 2 * 4) + S * 4 * 4)
    )


def test_what_stays_whole_is_named(step):
    _, traced = step
    found = {whole.path: whole for whole in whole_parameters(traced)}
    norm = found["vit/norm/scale"]
    assert norm.axes == ("fsdp", "tensor") and norm.bytes == 64 * 4
    assert "decoder/blocks/layers/up/weight" not in found  # split along both


def test_totals_of_a_compiled_and_of_a_refused_step(step):
    _, traced = step
    result = Compiled("", 1000, 500, 400, 3 * GiB, 20, 0.0, 1.0)
    memory = memory_of(traced, result, 3 * GiB)
    assert memory.total == 1000 + 100 + 3 * GiB + 20 and not memory.fits
    assert memory_of(traced, result, 4 * GiB).fits
    refused = memory_of(traced, OutOfMemory(5 * GiB, "temporaries", "", 1.0), 4 * GiB)
    stored = sum(refused.parameters.values()) + sum(refused.optimizer.values()) + refused.batch
    assert refused.total == 5 * GiB + stored and not refused.fits
    # Even if the sum looks small enough: the compiler has refused.
    assert not memory_of(traced, OutOfMemory(1, "temporaries", "", 1.0), 4 * GiB).fits


def test_a_batch_that_the_mesh_does_not_divide():
    config = run_config(**{"train.batch": 4})
    with pytest.raises(ConfigError, match="multiple of 8"):
        trace_step(config, describe("h100:8"))


@pytest.mark.parametrize(
    "message,needed,counted",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (41.04G) exceeds available HBM (15.75G).",
            41.04,
            "temporaries",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 20.50G of 15.48G hbm. Exceeded hbm capacity by 5.02G.",
            20.5,
            "everything",
        ),
    ],
)
def test_refusals_are_read(message, needed, counted):
    refused = out_of_memory(message)
    assert refused.needed_bytes == int(needed * GiB) and refused.counted == counted


def test_other_errors_are_no_refusals():
    assert out_of_memory("INVALID_ARGUMENT: no such thing") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_real_refusal():
    device = describe("v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct(
        (2**16, 2**20), np.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    square = jax.jit(lambda x: jnp.sin(x).T @ x)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        square.trace(x).lower(lowering_platforms=("tpu",)).compile()
    refused = out_of_memory(str(error.value))
    assert refused is not None and refused.needed_bytes > 16 * GiB
