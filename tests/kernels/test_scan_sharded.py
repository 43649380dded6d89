"""The scan over a split length equals the scan of the whole sequence, on simulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_kernels.selective_scan import selective_scan, selective_scan_sharded
from tests.kernels import scan_suite
from tests.kernels.scan_cases import QUICK_COMPILE, inputs, swapped

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

LENGTH = 24  # three positions on each of eight shards
IDS = np.array(
    [
        [4] * 24,
        [-1] * 24,
        # Borders of segments on borders of shards (3, 12), shards of padding alone, an id again.
        [1] * 3 + [2] * 4 + [-1] * 5 + [2] * 0 + [3] * 3 + [-1] * 6 + [3] * 3,
        [-1] * 4 + [5] * 4 + [-1] + [6] * 6 + [5] * 5 + [-1] * 4,
    ],
    np.int32,
)


def case_of(seed, dtype=np.float64, **options):
    return inputs(
        seed, batch=4, length=LENGTH, channels=4, state=3, groups=2, dtype=dtype,
        initial_state=True, **options,
    )  # fmt: skip


def with_gradients(scan, case, ids):
    def loss(case):
        y, h = scan(case, ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(h)), (y, h)

    gradients, outputs = quick(jax.grad(loss, has_aux=True))(case)
    return *outputs, gradients


def sharded(case, ids, mesh, layout="bld", check_vma=True, **options):
    """`selective_scan_sharded` over the mesh axis "seq", and the batch over "data" if it exists."""
    data = "data" if "data" in mesh.axis_names else None
    wide = P(data, "seq") if layout == "bld" else P(data, None, "seq")
    specs = {k: P(data, "seq") for k in ("B", "C")} | dict.fromkeys(("u", "delta", "z"), wide)
    specs |= {"initial_state": P(data)} | dict.fromkeys(("A", "D", "delta_bias"), P())
    specs = {k: specs[k] for k in case}
    ids_spec = None if ids is None else P(data, "seq")
    scan = jax.shard_map(
        lambda case, ids: selective_scan_sharded(
            **case, segment_ids=ids, axis_name="seq", delta_softplus=True, layout=layout,
            return_final_state=True, **options,
        ),
        mesh=mesh, in_specs=(specs, ids_spec), out_specs=(wide, P(data)), check_vma=check_vma,
    )  # fmt: skip
    placed = {k: jax.device_put(v, jax.NamedSharding(mesh, specs[k])) for k, v in case.items()}
    if ids is not None:
        ids = jax.device_put(ids, jax.NamedSharding(mesh, ids_spec))
    return with_gradients(scan, placed, ids)


def whole(case, ids, **options):
    def scan(case, ids):
        return selective_scan(
            **case, segment_ids=ids, delta_softplus=True, return_final_state=True,
            implementation="reference", **options,
        )  # fmt: skip

    return with_gradients(scan, case, ids)


def check(got, expected, rtol=1e-10, atol=1e-11):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, value), other in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(value, other, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("implementation", "reverse", "segments", "layout", "shape"),
    [
        ("xla", False, True, "bld", {"seq": 8}),
        ("xla", True, True, "bdl", {"data": 2, "seq": 4}),
        ("xla", True, False, "bld", {"seq": 8}),
        ("reference", False, True, "bdl", {"data": 2, "seq": 4}),
        ("reference", True, True, "bld", {"seq": 8}),
    ],
)
def test_it_is_the_scan_of_the_whole_sequence(implementation, reverse, segments, layout, shape):
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape))
    with jax.enable_x64(True):
        case, ids = case_of(1), jnp.asarray(IDS) if segments else None
        expected = whole(case, ids, reverse=reverse)
        if layout == "bdl":
            case = swapped(case)
        y, h, gradients = sharded(
            case, ids, mesh, layout, reverse=reverse, implementation=implementation, chunk_size=2
        )
        if layout == "bdl":
            y, gradients = jnp.swapaxes(y, 1, 2), swapped(gradients)
        check((y, h, gradients), expected)


@pytest.mark.parametrize("implementation", scan_suite.FAST)
def test_without_the_optional_operands_and_in_16_bits(implementation):
    mesh = jax.make_mesh((8,), ("seq",))
    case = case_of(2, jnp.bfloat16, optional=False)
    y, h, gradients = sharded(case, jnp.asarray(IDS), mesh, implementation=implementation)
    assert y.dtype == jnp.bfloat16 and h.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in case.items()}
    expected = whole(case, jnp.asarray(IDS))
    # Both round y once; before, float32 is added up in another order.
    check((y.astype(float), h), (expected[0].astype(float), expected[1]), 2**-7, 1e-5)


@pytest.mark.parametrize("implementation", scan_suite.KERNEL)
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_in_float32(implementation, reverse):
    mesh = jax.make_mesh((8,), ("seq",))
    case, ids = case_of(5, np.float32), jnp.asarray(IDS)
    options = {"implementation": implementation, "reverse": reverse}
    check(sharded(case, ids, mesh, **options), whole(case, ids, reverse=reverse), 1e-4, 1e-4)


def test_it_works_without_tracked_varying_axes():
    mesh = jax.make_mesh((8,), ("seq",))
    case, ids = case_of(3, np.float32), jnp.asarray(IDS)
    check(sharded(case, ids, mesh, check_vma=False), whole(case, ids), 1e-4, 1e-5)


def test_an_infinite_state_and_padding_that_is_no_number_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("seq",))
    case, ids = case_of(4, np.float32, optional=False), jnp.asarray(IDS)
    case["u"] = case["u"].at[2, 4].set(jnp.inf)  # in segment 2, which ends with position 6
    padding = (ids < 0)[..., None]
    case |= {k: jnp.where(jnp.expand_dims(padding, range(3, case[k].ndim)), jnp.nan, case[k])
             for k in ("u", "delta")}  # fmt: skip
    y, h, _ = sharded(case, ids, mesh)
    assert np.isfinite(np.asarray(h)).all() and np.isfinite(np.asarray(y)[2, 7:]).all()
    assert not np.isfinite(np.asarray(y)[2, 4]).any()


def test_an_axis_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="axis_name='seq' is not an axis of a jax.shard_map"):
        selective_scan_sharded(**inputs(), axis_name="seq")
