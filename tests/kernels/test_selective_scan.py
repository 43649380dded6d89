"""The suite of properties on every implementation of the platform, and what concerns the call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from storm_kernels.selective_scan import selective_scan
from tests.kernels import scan_suite
from tests.kernels.scan_cases import QUICK_COMPILE, inputs, loop, swapped
from tests.kernels.scan_oracle import oracle

slow = pytest.mark.slow
each = pytest.mark.parametrize("implementation", scan_suite.IMPLEMENTATIONS)
# The reference is close to its definition, and its compilation would double the time.
each_reference_slow = pytest.mark.parametrize(
    "implementation",
    [pytest.param(i, marks=slow if i == "reference" else ()) for i in scan_suite.IMPLEMENTATIONS],
)
each_fast = pytest.mark.parametrize("implementation", scan_suite.FAST)
either_direction = pytest.mark.parametrize("reverse", [False, True])


@pytest.mark.parametrize("delta_softplus", [True, False])
@either_direction
def test_the_oracle_has_the_slopes_of_a_plainer_loop(delta_softplus, reverse):
    case = inputs(1, length=9, groups=2, segments=True, initial_state=True)
    ids = {"segment_ids": case.pop("segment_ids")}
    case = {k: np.asarray(v, np.float64) for k, v in case.items()}
    options = {"delta_softplus": delta_softplus, "reverse": reverse}
    rng = np.random.default_rng(2)
    dy, dh = rng.standard_normal(case["u"].shape), rng.standard_normal((2, 6, 3))

    def loss(case):
        y, h = loop(**case, **ids, **options)
        return (y * dy).sum() + (h * dh).sum()

    y, h, gradients = oracle(case | ids, dy, dh, **options)
    for value, plain in zip((y, h), loop(**case, **ids, **options), strict=True):
        np.testing.assert_allclose(value, plain, 1e-13, 1e-13)
    assert gradients.keys() == case.keys()
    for name, value in case.items():
        step = 1e-5 * rng.standard_normal(value.shape)
        slope = loss(case | {name: value + step}) - loss(case | {name: value - step})
        expected = 2 * np.sum(gradients[name] * step)
        np.testing.assert_allclose(slope, expected, 1e-6, 1e-11, err_msg=name)


@each_reference_slow
@pytest.mark.parametrize("check", scan_suite.PROPERTIES, ids=lambda check: check.__name__)
def test_property(check, implementation):
    check(implementation)


@each
@either_direction
@pytest.mark.parametrize(
    ("layout", "segments"),
    [
        ("bld", True),
        ("bdl", False),
        pytest.param("bld", False, marks=slow),
        pytest.param("bdl", True, marks=slow),
    ],
)
def test_every_layout_and_direction(implementation, reverse, layout, segments):
    scan_suite.options(implementation, reverse, layout, segments)


@each_reference_slow
@pytest.mark.parametrize("name", ["D", "z", "delta_bias", "initial_state", "segment_ids"])
def test_one_option_alone(implementation, name):
    scan_suite.one_option_alone(implementation, name)


@each_reference_slow
@pytest.mark.parametrize("sizes", scan_suite.SIZES)
def test_any_size(implementation, sizes):
    scan_suite.size(implementation, sizes)


@slow
@each_fast
@pytest.mark.parametrize("sizes", scan_suite.LARGER_SIZES)
def test_larger_sizes(implementation, sizes):
    scan_suite.size(implementation, sizes)


@each
@either_direction
def test_a_packed_row_is_its_videos_one_by_one(implementation, reverse):
    scan_suite.a_packed_row_is_its_videos_one_by_one(implementation, reverse)


@each_fast
@pytest.mark.parametrize(("reverse", "segments"), [(False, True), (True, True), (True, False)])
def test_calls_with_a_carried_state_equal_one_call(implementation, reverse, segments):
    scan_suite.calls_with_a_carried_state_equal_one_call(implementation, reverse, segments)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64_keeps_its_precision(implementation):
    with jax.enable_x64(True):
        case = inputs(10, dtype=np.float64, segments=True, initial_state=True)
        scan_suite.compare(implementation, case, tolerance=1e-12, chunk_size=4)


def test_implementation_none_serves_every_call_and_y_alone_is_the_default():
    case = inputs(21, segments=True)
    y = jax.jit(lambda case: selective_scan(**case, delta_softplus=True))(case)
    scan_suite.close(y, oracle(case)[0])


@pytest.mark.parametrize(
    "implementation", [*scan_suite.FAST, pytest.param("reference", marks=slow)]
)
def test_batch_and_channels_sharded_by_shard_map(implementation):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    case = inputs(22, batch=4, channels=8, segments=True, initial_state=True)
    ids = case.pop("segment_ids")
    ble, e = P("data", None, "tensor"), P("tensor")
    # B and C are whole on every shard of the channels, the weights on every shard of the batch:
    # their gradients are sums over shards.
    specs = {
        "u": ble, "delta": ble, "z": ble, "A": P("tensor", None), "B": P("data"), "C": P("data"),
        "D": e, "delta_bias": e, "initial_state": P("data", "tensor"),
    }  # fmt: skip

    def scan(case, ids):
        return selective_scan(
            **case, segment_ids=ids, delta_softplus=True, return_final_state=True,
            implementation=implementation, chunk_size=4,
        )  # fmt: skip

    def value_and_gradients(scan, case, ids):
        def loss(case):
            y, h = scan(case, ids)
            return jnp.sum(y**2) + jnp.sum(jnp.sin(h)), (y, h)

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(case)
        return outputs, gradients

    sharded = jax.shard_map(
        scan, mesh=mesh, in_specs=(specs, P("data")), out_specs=(ble, P("data", "tensor"))
    )
    placed = {k: jax.device_put(v, jax.NamedSharding(mesh, specs[k])) for k, v in case.items()}
    placed_ids = jax.device_put(ids, jax.NamedSharding(mesh, P("data")))
    jitted = jax.jit(value_and_gradients, static_argnums=0, compiler_options=QUICK_COMPILE)
    outputs, gradients = jitted(sharded, placed, placed_ids)
    expected_outputs, expected_gradients = jitted(scan, case, ids)
    for got, expected in zip(outputs, expected_outputs, strict=True):
        scan_suite.close(got, expected)
    for name in case:
        scan_suite.close(gradients[name], expected_gradients[name], name=name)


DRAWN = given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    channels_and_groups=st.sampled_from([(1, 1), (4, 2), (6, 3), (6, 1), (5, 5), (130, 2)]),
    state=st.sampled_from([1, 2, 5, 8, 16]),
    chunk_size=st.sampled_from([None, 1, 7, 16]),
    reverse=st.booleans(),
    layout=st.sampled_from(["bld", "bdl"]),
    segments=st.booleans(),
    initial_state=st.booleans(),
    optional=st.booleans(),
    delta_softplus=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
)


def random_call(implementation, channels_and_groups, **drawn):
    channels, groups = channels_and_groups
    scan_suite.random_call(implementation, channels=channels, groups=groups, **drawn)


@each_fast
@settings(max_examples=5, deadline=None, derandomize=True)
@DRAWN
def test_random_calls(implementation, **drawn):
    random_call(implementation, **drawn)


@slow
@each_fast
@settings(max_examples=20, deadline=None, derandomize=True)
@DRAWN
def test_many_random_calls(implementation, **drawn):
    random_call(implementation, **drawn)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": jnp.zeros((2, 19))}, ValueError, r"u has shape \(2, 19\), expected \[batch"),
        ({"u": jnp.zeros((2, 0, 6))}, ValueError, r"u has shape \(2, 0, 6\).*no axis empty"),
        ({"u": jnp.zeros((2, 19, 6), int)}, TypeError, "u has dtype int.*expected float16"),
        ({"delta": jnp.zeros((2, 18, 6))}, ValueError, r"delta has .*18.* expected \(2, 19, 6\)"),
        ({"A": jnp.zeros((3, 6))}, ValueError, r"A has shape \(3, 6\), expected \(6, state\)"),
        ({"A": jnp.zeros((6, 3), "complex64")}, TypeError, "A has dtype complex64"),
        ({"B": jnp.zeros((2, 19, 4))}, ValueError, r"B has .*19, 4\), expected \(2, 19, 3\) or"),
        ({"C": jnp.zeros((2, 1, 3))}, ValueError, r"C has shape \(2, 1, 3\), expected"),
        ({"B": jnp.zeros((2, 19, 4, 3))}, ValueError, "4 groups do not divide 6 channels"),
        ({"B": jnp.zeros((2, 19, 2, 3))}, ValueError, "C has 1 groups, expected 2, as B"),
        ({"D": jnp.zeros(5)}, ValueError, r"D has shape \(5,\), expected \(6,\): \[channels\]"),
        ({"z": jnp.zeros((2, 6, 19))}, ValueError, r"z has shape \(2, 6, 19\), expected \(2, 19"),
        ({"delta_bias": jnp.zeros((1, 6))}, ValueError, r"delta_bias has shape \(1, 6\)"),
        ({"initial_state": jnp.zeros((2, 3, 6))}, ValueError, r"initial_state.*\(2, 6, 3\)"),
        (
            {"initial_state": jnp.zeros((2, 6, 3), "bfloat16")},
            TypeError,
            "initial_state has dtype bfloat16, expected float32",
        ),
        ({"segment_ids": jnp.zeros((2, 19))}, TypeError, "segment_ids.*float32, expected int32"),
        ({"segment_ids": jnp.zeros((19,), "int32")}, ValueError, r"segment_ids.*\(2, 19\)"),
        ({"layout": "ldb"}, ValueError, "layout='ldb', expected 'bld' or 'bdl'"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0, expected a positive int"),
        ({"output_dtype": "int8"}, TypeError, "output_dtype=int8, expected float16, bf"),
        ({"output_dtype": "float64"}, TypeError, "output_dtype=float64, but the arithmetic is fl"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(inputs(23) | change))


def test_bdl_shapes_are_named_in_their_own_order():
    case = swapped(inputs(24))
    with pytest.raises(ValueError, match=r"z has .*expected \(2, 6, 19\): \[batch, channels, len"):
        selective_scan(**(case | {"z": jnp.zeros((2, 19, 6))}), layout="bdl")
