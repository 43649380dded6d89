"""The sharding table, and the whole model on meshes without seq against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_jax.config import MeshConfig
from storm_jax.models.storm import StormModel
from storm_jax.parallel import sharding
from storm_jax.parallel.mesh import make_mesh
from tests.parallel.cases import (
    assert_equal_to_one_device,
    place,
    random_params,
)
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
        (("batch", "length", None), (8, 6, 3), P(BATCH, None, None)),  # no seq here
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


def test_reshape_keeps_what_is_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    x = np.arange(8 * 4 * 3 * 5, dtype=np.float32).reshape(8, 4, 3, 5)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(x):
            x = sharding.shard(x, "batch", "frames", None, None)
            assert sharding.parts("frames") == 2 and sharding.parts("batch") == 4
            assert sharding.split_axis("frames", 4) == "seq"
            assert sharding.split_axis("frames", 5) is None  # it would stay whole
            merged = sharding.reshape(x, 8, 12, 5)
            assert jax.typeof(merged).sharding.spec == P(BATCH, "seq", None)
            cut = sharding.reshape(x, 4, 2, 4, 3, 5)
            assert jax.typeof(cut).sharding.spec == P(BATCH, None, "seq", None, None)
            by_device = sharding.stretches(merged)
            assert by_device.shape == (8, 2, 6, 5)
            assert jax.typeof(by_device).sharding.spec == P(BATCH, "seq", None, None)
            with pytest.raises(AssertionError):
                sharding.reshape(x, 32, 15)  # frames would lie in the middle of an axis
            return merged, cut, by_device

        merged, cut, by_device = run(x)
        np.testing.assert_array_equal(merged, x.reshape(8, 12, 5))
        np.testing.assert_array_equal(cut, x.reshape(4, 2, 4, 3, 5))
        np.testing.assert_array_equal(by_device, x.reshape(8, 2, 6, 5))


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


def model_of(heads, kv_heads, vocab_size=48, layers=1) -> StormModel:
    decoder = dict(heads=heads, kv_heads=kv_heads, vocab_size=vocab_size)
    return StormModel(tiny_model(decoder=decoder, temporal=dict(layers=layers)))


def test_data_fsdp_tensor_equals_one_device(mesh):
    """Two key-value heads on two devices; every mesh axis at work."""
    model = model_of(heads=4, kv_heads=2)
    placed, _ = place(model, random_params(model), {}, mesh)
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
        # Fewer key-value heads than devices, and a vocabulary that eight do not divide.
        (MeshConfig(data=1, fsdp=1, tensor=8), 8, 2, 50),
        # 3 key-value heads on 2 devices: neither a multiple nor a divisor.
        (MeshConfig(data=2, fsdp=2, tensor=2), 6, 3, 48),
        # 6 heads on 4 devices: their parameters are whole, attention is split with 8 heads.
        pytest.param(MeshConfig(data=2, fsdp=1, tensor=4), 6, 2, 48, marks=pytest.mark.exhaustive),
    ],
)
def test_other_meshes_equal_one_device(config, heads, kv_heads, vocab_size):
    assert_equal_to_one_device(model_of(heads, kv_heads, vocab_size), make_mesh(config))
