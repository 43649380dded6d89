"""The pieces of a split row, each against the whole: convolution, heads, frames, reduction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_jax.config import VISUAL, MeshConfig
from storm_jax.models.attention_kernels import Pattern, xla_attention
from storm_jax.models.reduction import reduce_into
from storm_jax.parallel import frames, sharding
from storm_jax.parallel.halo import conv_state
from storm_jax.parallel.heads import by_heads, padded_heads
from storm_jax.parallel.mesh import make_mesh
from storm_kernels.causal_conv1d import causal_conv1d


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


# 16 positions, two a device. Segments that end on a device's border and inside, a device of
# padding alone, padding inside a segment, an id that comes back.
IDS = np.array(
    [
        [0] * 16,
        [0, 0, 1, 1, 1, -1, -1, -1, 1, 2, 2, 2, 3, 3, -1, -1],
        [-1, -1, -1, 4, 4, 4, -1, 4, 5, 4, 4, 4, 4, 4, 4, 4],
    ],
    np.int32,
)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width,layout", [(4, "bld"), (3, "bdl"), (7, "bld"), (1, "bdl")])
def test_convolution(reverse, width, layout):
    """A convolution of 7 looks back over three devices."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 5)).astype(np.float32)
    x[IDS < 0] = np.nan  # padding is not read
    x = x if layout == "bld" else x.swapaxes(1, 2)
    weight, bias = rng.normal(size=(width, 5)), rng.normal(size=5)
    conv = functools.partial(causal_conv1d, reverse=reverse, layout=layout)
    spec = P(None, "seq") if layout == "bld" else P(None, None, "seq")

    mesh, row = mesh_of(seq=8), P(None, "seq")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, row), out_specs=spec)
    def split(x, ids):
        state = conv_state(x, ids, width - 1, axis_name="seq", reverse=reverse, layout=layout)
        return conv(x, weight, bias, segment_ids=ids, initial_state=state)

    expected = conv(x, weight, bias, segment_ids=IDS)
    args = (jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in ((x, spec), (IDS, row)))
    np.testing.assert_allclose(split(*args), expected, 1e-6, 1e-6)


@pytest.mark.parametrize(
    "heads,kv_heads,sizes,computed",
    [
        (4, 2, dict(seq=8), 8),
        (28, 4, dict(seq=8), 32),
        (28, 4, dict(seq=2, tensor=4), 32),
        (28, 4, dict(seq=4, tensor=2), 32),
        (6, 3, dict(seq=4, fsdp=2), 12),
        (8, 1, dict(seq=4, tensor=2), 8),
        (6, 2, dict(seq=4, data=2), 8),  # rows are split, too,
        (14, 2, dict(data=4, tensor=2), 14),
    ],
)
def test_heads(heads, kv_heads, sizes, computed):
    rng = np.random.default_rng(0)
    B, S, C = 2, 16, 4
    q, k, v = (
        rng.normal(size=(B, S, n, C)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    segments = np.repeat([[0, 1], [0, -1]], [11, 5], axis=1).astype(np.int32)
    pattern = Pattern(causal=True, window=6, scale=0.5, softcap=4.0)
    seen = []

    def attend(q, k, v, segments):
        seen.append((q.shape[2], k.shape[2]))
        return xla_attention(q, k, v, segments, pattern)

    mesh = mesh_of(**sizes)
    devices = mesh.shape["tensor"] * mesh.shape["seq"]
    assert padded_heads(heads, kv_heads, mesh.shape["tensor"], mesh.shape["seq"]) == computed

    @jax.jit
    def split(q, k, v):
        axes = ("batch", "length")
        q = sharding.shard(q, *axes, "heads", None)
        k, v = (sharding.shard(x, *axes, "kv_heads", None) for x in (k, v))
        out = by_heads(attend, q, k, v, segments)
        assert jax.typeof(out).sharding.spec == jax.typeof(q).sharding.spec
        return out

    with jax.set_mesh(mesh):
        got = split(q, k, v)
    assert seen[-1][0] == computed // devices
    np.testing.assert_allclose(got, xla_attention(q, k, v, segments, pattern), 1e-5, 1e-6)


@pytest.mark.parametrize(
    "sizes,rows,count,share",
    [
        (dict(data=8), 8, 3, 3),
        (dict(seq=4, tensor=2), 1, 20, 3),  # 5 frames each on 4, cut in two: 3
        (dict(data=2, tensor=4), 2, 5, 2),
        (dict(fsdp=8), 1, 17, 3),  # a row that fsdp cannot split, as when generating
        (dict(fsdp=2, seq=2, tensor=2), 4, 6, 4),
    ],
)
def test_frames_over_all_devices(sizes, rows, count, share):
    """Every device has the same number of frames, and all come back to their places."""
    x = np.arange(rows * count * 2, dtype=np.float32).reshape(rows, count, 2)
    mesh = mesh_of(**sizes)

    @jax.jit
    def run(x):
        split, collect = frames.spread(x)
        batches, restore = frames.batches(split, 2)
        assert mesh.devices.size * share == split.shape[0] * split.shape[1]
        local = jax.typeof(batches).sharding.shard_shape(batches.shape)
        assert local[1] <= 2 and local[0] == -(-share // 2)
        return collect(restore(batches + 1))

    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(run(x), x + 1)


@pytest.mark.parametrize("pool", [1, 2])
def test_reduction_into_a_split_sequence(pool):
    """Means worked out token by token; text between the visual tokens, groups on two devices."""
    B, F, N, D, S = 2, 16, 4, 3, 24
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, F, N, D)).astype(np.float32)
    groups = np.full((B, F), -1, np.int32)
    groups[0, :13] = [0, 0, 0, 1, 1, 1, 2, -1, 2, 3, 4, 4, 4]
    groups[1, 15] = 0  # the last device's frame, and the first stretch of the sequence
    cells = x if pool == 1 else x.mean(axis=2, keepdims=True)
    text = rng.normal(size=(B, S, D)).astype(np.float32)
    tokens, expected = np.ones((B, S), np.int32), text.copy()
    for row, places in enumerate(([1, 2, *range(5, 20), 21, 22, 23], range(1, 5))):
        reduced = [
            cells[row, groups[row] == g, n].mean(axis=0)
            for g in range(groups[row].max() + 1)
            for n in range(cells.shape[2])
        ]
        for place, token in zip(places, reduced, strict=False):
            tokens[row, place], expected[row, place] = VISUAL, token

    @jax.jit
    def run(text, x):
        text = sharding.shard(text, "batch", "length", None)
        x = sharding.shard(x, "batch", "frames", None, None)
        return reduce_into(text, x, jnp.asarray(groups), jnp.asarray(tokens), pool)

    with jax.set_mesh(mesh_of(seq=8)):
        np.testing.assert_allclose(run(text, x), expected, 1e-6, 1e-6)
