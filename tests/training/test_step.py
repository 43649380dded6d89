"""The training step: accumulation, frozen parts, meshes, normalisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import SAVED_NAMES, MeshConfig
from storm_jax.models.storm import StormModel
from storm_jax.parallel import sharding
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import abstract_state, init_state
from storm_jax.training.step import gradient_names, make_train_step
from tests.tiny import packed_batch, run_config

slow = pytest.mark.slow
exhaustive = (slow, pytest.mark.exhaustive)
SCALE = jax.tree_util.DictKey("scale")
SMALL = {"model.decoder.layers": 1, "train.steps": 4, "train.optimizer.warmup_fraction": 0.0}


@functools.cache
def first_state(overrides: tuple, mesh_config: MeshConfig, devices: int):
    """The model, its optimizer, its mesh, and the state at the start with its layout."""
    config = run_config(**SMALL, **dict(overrides))
    model = StormModel(config.model)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    parts = trainable_parts(config.train.optimizer)
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    state = init_state(model, optimizer, parts, mesh, seed=0)
    layouts = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, parts, mesh))
    return model, optimizer, mesh, state, layouts


@functools.cache
def program(overrides: tuple, mesh_config: MeshConfig, devices: int):
    """A configuration, what `first_state` gives for it, and the jitted step."""
    config = run_config(**SMALL, **dict(overrides))
    # How steps are made does not change where they start.
    changed = tuple(x for x in overrides if x[0].startswith(("model.", "train.optimizer.")))
    first = first_state(changed, mesh_config, devices)
    step = jax.jit(make_train_step(*first[:2], config.train), donate_argnums=0)
    return config, *first[2:], step


def run(overrides: dict, mesh_config: MeshConfig, devices: int, steps: int = 2, targets=None):
    config, mesh, state, layouts, step = program(tuple(overrides.items()), mesh_config, devices)
    first = jax.tree.map(np.asarray, state.params)
    state = jax.tree.map(jnp.copy, state)  # the step takes the arrays it is given
    metrics = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            batch = packed_batch(config.model, rows=8, length=40, frames=6, seed=i)
            if targets is not None:
                batch["targets"][targets:] = -1
            placed = {
                k: jax.device_put(v, sharding.of_batch(k, v.shape, mesh)) for k, v in batch.items()
            }
            state, values = step(state, placed)
            metrics.append({k: float(v) for k, v in values.items() if v.ndim == 0})
    assert step._cache_size() == 1, "the second step compiled again"
    moved = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layouts)
    assert all(jax.tree.leaves(moved)), "the state changed its layout"
    return first, jax.tree.map(np.asarray, state.params), metrics


@pytest.fixture(scope="module")
def one_device():
    return run({}, MeshConfig(1, 1, 1), devices=1)


def assert_same(a, b, rtol):
    for step, (one, other) in enumerate(zip(a[2], b[2], strict=True)):
        for name in one:
            # AdamW's first update is the sign of a gradient, also where that is a rounding: the
            # norms of single parts of the second step feel it.
            if step == 0 or "/" not in name:
                np.testing.assert_allclose(one[name], other[name], rtol=rtol, err_msg=name)


def test_loss_is_the_mean_over_answer_tokens(one_device):
    metrics = one_device[2][0]
    assert metrics["answer_tokens"] == 8 * 13
    # Untrained: about log(vocabulary) for each token.
    assert abs(metrics["nll"] - np.log(512)) < 1


@pytest.mark.parametrize(
    "axes",
    [(2, 2, 2), pytest.param((1, 8, 1), marks=slow), pytest.param((8, 1, 1), marks=exhaustive)],
)
def test_meshes_give_the_loss_of_one_device(one_device, axes):
    assert_same(run({}, MeshConfig(*axes), devices=8), one_device, rtol=1e-5)


# In CI tests/parallel/test_sharding.py has the loss and the gradients of such a model.
@slow
@pytest.mark.exhaustive
def test_more_tensor_devices_than_kv_heads():
    overrides = {"model.decoder.kv_heads": 1}
    single = run(overrides, MeshConfig(1, 1, 1), devices=1)
    assert_same(run(overrides, MeshConfig(2, 1, 4), devices=8), single, rtol=1e-5)


def test_accumulation_gives_the_loss_of_the_whole_batch():
    # Rows without an answer make means of microbatch means wrong.
    whole = run({}, MeshConfig(1, 1, 1), devices=1, targets=3)
    cut = run({"train.accumulation": 4}, MeshConfig(1, 1, 1), devices=1, targets=3)
    assert_same(cut, whole, rtol=1e-5)
    # Rows of a microbatch stay split over data, its frames over seq.
    split = run({"train.accumulation": 4}, MeshConfig(data=2, seq=2), devices=4, targets=3)
    assert_same(split, whole, rtol=1e-5)


# Tests of the models have "dots" and "full".
@pytest.mark.parametrize(
    "remat",
    (pytest.param("dots", marks=exhaustive), "names", pytest.param("full", marks=slow), "offload"),
)
def test_remat_changes_nothing(one_device, remat):
    changes = {f"train.remat.{part}.policy": remat for part in ("vit", "temporal", "decoder")}
    changes |= {f"train.remat.{part}.saved": SAVED_NAMES for part in ("vit", "temporal", "decoder")}
    assert_same(run(changes, MeshConfig(1, 1, 1), devices=1), one_device, rtol=1e-6)


# One program for two tests: neither option changes what the other is about.
FROZEN_WITH_Z_LOSS = {
    "train.optimizer.rates.vit": 0.0,
    "train.optimizer.rates.decoder": 0.0,
    "train.z_loss": 0.01,
}


def test_frozen_parts_stay_and_the_rest_moves():
    before, after, _ = run(FROZEN_WITH_Z_LOSS, MeshConfig(1, 1, 1), devices=1)
    for part in before:
        same = jax.tree.leaves(jax.tree.map(np.array_equal, before[part], after[part]))
        if part in ("vit", "decoder"):
            assert all(same), part
        else:
            assert not any(same), part


def test_gradient_norms_by_part_and_parameter(one_device):
    metrics = one_device[2][0]
    parts = {name: value for name, value in metrics.items() if name.startswith("grad_norm/")}
    assert set(parts) == {f"grad_norm/{part}" for part in one_device[0]}
    assert sum(x**2 for x in parts.values()) == pytest.approx(metrics["grad_norm"] ** 2, rel=1e-5)


def test_updates_that_are_not_finite_are_skipped_if_asked(one_device):
    config = run_config(**SMALL, **{"train.skip_nonfinite": 1})
    model, optimizer, mesh, state, _ = first_state((), MeshConfig(1, 1, 1), 1)
    step = jax.jit(make_train_step(model, optimizer, config.train))

    def spoil(path, x):
        return x + jnp.inf if path[-2:] == (jax.tree_util.DictKey("norm"), SCALE) else x

    with jax.set_mesh(mesh):
        batch = packed_batch(config.model, rows=8, length=40, frames=6, seed=0)
        batch = jax.tree.map(jnp.asarray, batch)
        good, metrics = step(state, batch)
        broken = state._replace(params=jax.tree_util.tree_map_with_path(spoil, state.params))
        after, lost = step(broken, batch)

    # Finite: as without the option.
    assert metrics["skipped"] == 0 and int(good.step) == 1
    for name in ("loss", "grad_norm", "grad_norm/vit"):
        assert float(metrics[name]) == pytest.approx(one_device[2][0][name], rel=1e-5)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), good.params, state.params)
    assert all(any(jax.tree.leaves(tree)) for tree in moved.values())
    # Not finite: nothing but the position in the data changes.
    assert not np.isfinite(lost["loss"]) and lost["skipped"] == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, broken.opt_state)

    names = gradient_names(state.params, trainable_parts(config.train.optimizer))
    norms = np.asarray(metrics["grad_norms"])
    assert len(names) == len(norms) == len(set(names))
    for part in state.params:
        own = norms[[name.startswith(f"{part}/") for name in names]]
        np.testing.assert_allclose(np.linalg.norm(own), metrics[f"grad_norm/{part}"], rtol=1e-5)
    only = gradient_names(state.params, ("temporal", "projector"))
    assert only == [name for name in names if name.startswith(("projector/", "temporal/"))]


def test_z_loss_is_added(one_device):
    plain = one_device[2][0]
    with_z = run(FROZEN_WITH_Z_LOSS, MeshConfig(1, 1, 1), devices=1, steps=1)[2][0]
    assert with_z["nll"] == pytest.approx(plain["nll"], rel=1e-6)
    # log(Z) of an untrained model is near log(512) = 6.2
    assert 0.3 < with_z["loss"] - with_z["nll"] < 0.5
