"""The same counts in what libtpu writes: products as convolutions, loops without trip counts."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_jax.aot import hlo
from storm_jax.aot.collectives import collectives, table
from storm_jax.aot.topology import describe
from storm_jax.aot.work import device_work

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(describe("v5e:2x4").devices).reshape(2, 4)
    return jax.sharding.Mesh(devices, ("a", "b"))


def compiled(function, mesh, specs, *shapes) -> hlo.Program:
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return hlo.parse(lowered.compile().as_text())


def test_products_in_loops(mesh):
    def function(x, ws):
        def layer(x, w):
            return jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)), None

        return jax.lax.scan(layer, x, ws)[0]

    program = compiled(function, mesh, (P(), P()), (8, 256, 128), (5, 8, 128, 128))
    assert program.unknown_loops == ()
    assert device_work(program).flops == 5 * 2 * 8 * 256 * 128 * 128


@pytest.mark.parametrize("axis,n", [("a", 2), ("b", 4)])
def test_collectives_in_loops(mesh, axis, n):
    """Three rounds: gather 128 rows a device along the axis, multiply, scatter the sum."""

    def rounds(x, w):
        def one(x, _):
            whole = jax.lax.all_gather(x, axis, tiled=True)
            return jax.lax.psum_scatter(jnp.tanh(whole @ w), axis, tiled=True), None

        return jax.lax.scan(one, x, None, length=3)[0]

    spec = P(("a", "b"))
    body = jax.shard_map(rounds, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False)
    program = compiled(body, mesh, (spec, P()), (8 * 128, 256), (256, 256))
    work = device_work(program)
    assert work.flops == 3 * 2 * n * 128 * 256 * 256
    found = table(collectives(program, mesh))
    assert {axes for axes, _ in found} == {axis}
    received = sum(count for _, count in found.values())
    part = 128 * 256 * 2  # a device's rows, bfloat16
    # Gathering n parts and scattering n parts, or a sum that is not split (twice as much).
    assert 3 * 2 * part * (n - 1) <= received <= 3 * 3 * part * (n - 1)


def test_traffic_leaves_vector_memory_out(mesh):
    program = compiled(lambda x, w: x @ w, mesh, (P(), P()), (4096, 4096), (4096, 4096))
    assert device_work(program).hbm_bytes == pytest.approx(3 * 4096 * 4096 * 2, rel=0.05)
