"""The sharding table, and the whole model on eight simulated devices against one."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_jax.config import VISUAL, MeshConfig
from storm_jax.models.storm import StormModel
from storm_jax.parallel import sharding
from storm_jax.parallel.mesh import make_mesh
from tests.tiny import tiny_model

BATCH = ("data", "fsdp")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.mark.parametrize(
    "axes,shape,expected",
    [
        (("batch", None, None), (8, 5, 6), P(BATCH, None, None)),
        (("batch", None), (6, 5), P(None, None)),  # 6 rows on 4 devices: whole
        (("embed", "heads", None), (4, 6, 8), P(("fsdp",), ("tensor",), None)),
        # One key-value head on two devices.
        (("embed", "kv_heads", None), (4, 1, 8), P(("fsdp",), None, None)),
        (("layers", "embed", "mlp"), (2, 4, 6), P(None, ("fsdp",), ("tensor",))),
        (("layers", "embed", None, "inner"), (2, 4, 2, 6), P(None, ("fsdp",), None, ("tensor",))),
        (("vocab", "embed"), (10, 4), P(("tensor",), ("fsdp",))),
        (("vocab", "embed"), (11, 3), P(None, None)),
        ((), (), P()),
    ],
)
def test_table(mesh, axes, shape, expected):
    assert sharding.spec(axes, shape, mesh) == expected
    placed = jax.device_put(np.zeros(shape, np.float32), sharding.named(axes, shape, mesh))
    parts = [size // _parts(entry) for size, entry in zip(shape, expected, strict=True)]
    assert all(s.data.shape == tuple(parts) for s in placed.addressable_shards)


def _parts(entry):
    names = (entry,) if isinstance(entry, str) else entry or ()
    return 2 ** len(names)


def test_an_axis_of_one_device_is_not_split():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    assert sharding.spec(("embed", "heads"), (8, 8), mesh) == P(None, None)
    assert sharding.spec(("batch",), (8,), mesh) == P("data")


def test_an_unknown_axis_is_an_error(mesh):
    with pytest.raises(KeyError, match="hedas"):
        sharding.spec(("hedas",), (8,), mesh)


def test_without_a_mesh_nothing_happens():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.active_mesh() is None
    assert sharding.shard(x, "batch", None) is x
    assert sharding.gathered(x, ("embed", "mlp")) is x
    np.testing.assert_array_equal(sharding.reshape(x, 3, 2), x.reshape(3, 2))
    double = sharding.per_device(lambda x: 2 * x, (("batch", None),), ("batch", None))
    np.testing.assert_array_equal(double(x), 2 * x)


def test_helpers_under_a_mesh(mesh):
    x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(x):
            y = sharding.shard(x, "batch", "mlp")
            assert jax.typeof(y).sharding.spec == P(BATCH, ("tensor",))
            local = []

            def double(x):
                local.append(x.shape)
                assert sharding.active_mesh() is None  # models may be called inside
                return 2 * x

            y = sharding.per_device(double, (("batch", "mlp"),), ("batch", "mlp"))(y)
            assert local[0] == (2, 3)
            assert jax.typeof(y).sharding.spec == P(BATCH, ("tensor",))
            y = sharding.gathered(y, ("batch", "embed"))
            assert jax.typeof(y).sharding.spec == P(BATCH, None)
            y = sharding.reshape(y, 8, 2, 3)
            assert jax.typeof(y).sharding.spec == P(BATCH, None, None)
            return y

        np.testing.assert_array_equal(run(x), 2 * x.reshape(8, 2, 3))


# --------------------------------------------------------------------- the whole model

ROWS, FRAMES, LENGTH = 8, 4, 16


def model_of(heads, kv_heads, vocab_size=48, layers=1) -> StormModel:
    decoder = dict(heads=heads, kv_heads=kv_heads, vocab_size=vocab_size)
    config = tiny_model(decoder=decoder)
    temporal = dataclasses.replace(config.temporal, layers=layers)
    return StormModel(dataclasses.replace(config, temporal=temporal))


def random_params(model):
    """Random numbers of a fixed size for every parameter, so that none is neutral."""
    leaves, tree = jax.tree.flatten(model.abstract())
    rng = np.random.default_rng(0)
    values = [(0.3 * rng.normal(size=x.shape)).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, values)


def random_batch():
    """Rows that differ: two videos, one and padding, text alone."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 48, (ROWS, LENGTH))
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    frame_segments = np.full((ROWS, FRAMES), -1)
    frame_groups = np.full((ROWS, FRAMES), -1)
    for row in range(ROWS):
        segments[row, 8:] = 1
        positions[row] = np.arange(LENGTH) % 8
        if row % 4 == 3:
            continue
        tokens[row, 1:5] = VISUAL
        frame_segments[row, :2], frame_groups[row, :2] = 0, 0
        if row % 2:
            segments[row, 8:] = -1
        else:
            tokens[row, 9:13] = VISUAL
            frame_segments[row, 2:], frame_groups[row, 2:] = 1, 1
    targets = np.where(rng.random((ROWS, LENGTH)) < 0.5, rng.integers(0, 48, (ROWS, LENGTH)), -1)
    targets = np.where(segments < 0, -1, targets)
    batch = dict(
        frames=rng.integers(0, 256, (ROWS, FRAMES, 12, 12, 3), np.uint8),
        frame_segments=frame_segments,
        frame_groups=frame_groups,
        tokens=tokens,
        segments=segments,
        positions=positions,
        targets=targets,
    )
    return {k: v if k == "frames" else v.astype(np.int32) for k, v in batch.items()}


def loss(model, params, batch):
    logits = sharding.shard(model.apply(params, batch), "batch", None, None)
    nll = -jax.nn.log_softmax(logits)
    wanted = batch["targets"][..., None] == jnp.arange(logits.shape[-1])
    return jnp.sum(jnp.where(wanted, nll, 0)) / jnp.sum(batch["targets"] >= 0)


def place(model, params, batch, mesh):
    params = jax.tree.map(
        lambda x, axes: jax.device_put(x, sharding.named(axes, x.shape, mesh)),
        params,
        model.axes(),
    )
    batch = {
        k: jax.device_put(x, sharding.named(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh))
        for k, x in batch.items()
    }
    return params, batch


@functools.cache
def on_one_device(model):
    params, batch = random_params(model), random_batch()
    return jax.jit(jax.value_and_grad(partial(loss, model)))(params, batch)


def assert_equal_to_one_device(model, mesh):
    params, batch = random_params(model), random_batch()
    expected_loss, expected = on_one_device(model)
    with jax.set_mesh(mesh):
        placed, placed_batch = place(model, params, batch, mesh)
        step = jax.jit(jax.value_and_grad(partial(loss, model)))
        got_loss, got = step(placed, placed_batch)
    assert float(got_loss) == pytest.approx(float(expected_loss), rel=1e-5)

    for (path, g), e, p in zip(
        jax.tree_util.tree_leaves_with_path(got),
        jax.tree.leaves(expected),
        jax.tree.leaves(placed),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim), name
        g, e = np.asarray(g), np.asarray(e)
        if "vit" in name and "key" in name and "bias" in name:
            continue  # zero but for rounding
        assert np.linalg.norm(e) > 0, name
        error = np.linalg.norm(g - e) / np.linalg.norm(e)
        assert error < 1e-5, (name, error)


def test_channels_first_equals_one_device(mesh, monkeypatch):
    """The layout of the scan on GPUs, through the same mesh."""
    model = model_of(heads=4, kv_heads=2)
    on_one_device(model)
    monkeypatch.setattr("storm_jax.models.temporal.preferred_layout", lambda x: "bdl")
    assert_equal_to_one_device(model, mesh)


def test_data_fsdp_tensor_equals_one_device(mesh):
    """Two key-value heads on two devices; every mesh axis at work."""
    model = model_of(heads=4, kv_heads=2)
    placed, _ = place(model, random_params(model), random_batch(), mesh)
    query = placed["decoder"]["blocks"]["layers"]["query"]["weight"]
    assert query.shape == (2, 32, 4, 8)
    assert query.addressable_shards[0].data.shape == (2, 16, 2, 8)
    A_log = placed["temporal"]["blocks"]["layers"]["forward"]["A_log"]
    assert A_log.shape == (1, 64, 4)
    assert A_log.addressable_shards[0].data.shape == (1, 32, 4)
    assert_equal_to_one_device(model, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,heads,kv_heads,vocab_size",
    [
        (MeshConfig(data=8, fsdp=1, tensor=1), 4, 2, 48),
        (MeshConfig(data=1, fsdp=8, tensor=1), 4, 2, 48),
        # Fewer key-value heads than devices, and a vocabulary that eight do not divide.
        (MeshConfig(data=1, fsdp=1, tensor=8), 8, 2, 50),
        # 3 key-value heads on 2 devices: neither a multiple nor a divisor.
        (MeshConfig(data=2, fsdp=2, tensor=2), 6, 3, 48),
        # 6 heads on 4 devices: attention is not split at all.
        (MeshConfig(data=2, fsdp=1, tensor=4), 6, 2, 48),
    ],
)
def test_other_meshes_equal_one_device(config, heads, kv_heads, vocab_size):
    assert_equal_to_one_device(model_of(heads, kv_heads, vocab_size), make_mesh(config))
