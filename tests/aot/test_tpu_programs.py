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


# ---------------------------------------------------------------------------------- several slices


@pytest.fixture(scope="module")
def slices():
    """[4 slices, 2, 2]."""
    devices = sorted(describe("v5e:2x2", 4).devices, key=lambda d: (d.slice_index, d.id))
    return jax.sharding.Mesh(np.array(devices).reshape(4, 2, 2), ("s", "a", "b"))


def exchanged(function, mesh, rows=8 * 1024):
    """What `function` does in `shard_map` to rows of 256 bfloat16, as (kind, axes) -> bytes."""
    spec = P(mesh.axis_names)
    body = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = compiled(body, mesh, (spec,), (rows, 256))
    assert program.partitions == mesh.size // len({d.slice_index for d in mesh.devices.flat})
    found = collectives(program, mesh)
    return found, {(c.kind, c.axes): c.received_bytes * c.times for c in found}


ONE = 8 * 1024 * 256 * 2 // 16  # a device's rows


@pytest.mark.parametrize(
    "function,expected",
    [
        (lambda x: jax.lax.psum(x, "s"), {("all-reduce", ("s",)): 2 * ONE * 3 / 4}),
        (
            lambda x: jax.lax.all_gather(x, "s", tiled=True),
            {("all-gather", ("s",)): 3 * ONE},
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "s", tiled=True),
            {("reduce-scatter", ("s",)): ONE * 3 / 4},
        ),
        (
            lambda x: jax.lax.all_to_all(x, "s", 0, 0, tiled=True),
            {("all-to-all", ("s",)): ONE * 3 / 4},
        ),
        (
            lambda x: jax.lax.ppermute(x, "s", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            {("collective-permute", ("s",)): ONE},
        ),
        (  # a quarter inside each slice, this between slices, and together again
            lambda x: jax.lax.psum(x, ("s", "a", "b")),
            {
                ("reduce-scatter", ("a", "b")): ONE * 3 / 4,
                ("all-reduce", ("s",)): 2 * ONE / 4 * 3 / 4,
                ("all-gather", ("a", "b")): ONE * 3 / 4,
            },
        ),
        (
            lambda x: jax.lax.scan(
                lambda x, _: (jnp.sin(jax.lax.psum(x, "s")), None), x, None, length=3
            )[0],
            {("all-reduce", ("s",)): 3 * 2 * ONE * 3 / 4},
        ),
    ],
)  # fmt: skip
def test_what_crosses_slices(slices, function, expected):
    found, received = exchanged(function, slices)
    assert received == expected
    for c in found:
        if c.axes == ("s",) and c.kind != "collective-permute":
            assert c.groups.tolist() == [[p, p + 4, p + 8, p + 12] for p in range(4)]


def test_some_of_the_slices(slices):
    pairs = jax.sharding.Mesh(slices.devices.reshape(2, 2, 4), ("s", "t", "b"))
    found, received = exchanged(lambda x: jax.lax.psum(x, "t"), pairs)
    assert received == {("all-reduce", ("t",)): ONE}
    groups = [[p + 8 * s, p + 4 + 8 * s] for s in range(2) for p in range(4)]
    assert found[0].groups.tolist() == groups


def test_devices_of_a_slice_in_another_order(slices):
    order = slices.devices.reshape(4, 4)[:, [0, 3, 1, 2]]
    order[0] = order[0][[2, 0, 1, 3]]  # and in one slice unlike the others
    mesh = jax.sharding.Mesh(order.reshape(4, 2, 2), ("s", "a", "b"))
    found, received = exchanged(lambda x: jax.lax.psum(x, ("s", "b")), mesh)
    assert received == {
        ("reduce-scatter", ("b",)): ONE / 2,
        ("all-reduce", ("s",)): 2 * ONE / 2 * 3 / 4,
        ("all-gather", ("b",)): ONE / 2,
    }
    [between] = [c for c in found if c.axes == ("s",)]
    assert between.groups.tolist() == [[p, p + 4, p + 8, p + 12] for p in range(4)]


def test_a_transfer_reads_and_writes_memory_once(slices):
    spec = P(slices.axis_names)
    body = jax.shard_map(
        lambda x: jnp.cos(jax.lax.psum(x, "s")),
        mesh=slices, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    program = compiled(body, slices, (spec,), (8 * 1024, 256))
    # What is sent, what arrives, and both sides of the cosine.
    assert device_work(program).hbm_bytes == pytest.approx(4 * ONE, rel=0.01)


def test_traffic_leaves_vector_memory_out(mesh):
    program = compiled(lambda x, w: x @ w, mesh, (P(), P()), (4096, 4096), (4096, 4096))
    assert device_work(program).hbm_bytes == pytest.approx(3 * 4096 * 4096 * 2, rel=0.05)
