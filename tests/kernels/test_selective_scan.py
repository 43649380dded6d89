"""Values of the selective scan against an independent float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from storm_kernels.selective_scan import selective_scan
from storm_kernels.selective_scan import xla as xla_module
from tests.kernels.scan_cases import QUICK_COMPILE, flipped, inputs, loop, swapped

# kernels.md section 2, the table of mamba_ssm's tests: (rtol, atol) of y and of the last state.
TOLERANCE = {
    "float32": (6e-4, 2e-3),
    "float16": (3e-3, 5e-3),
    "bfloat16": (3e-2, 5e-2),
}
TIGHT = {"rtol": 2e-5, "atol": 2e-5}

both = pytest.mark.parametrize("implementation", ["reference", "xla"])


def options(test):
    for name, values in {
        "reverse": [False, True],
        "layout": ["bld", "bdl"],
        "segments": [False, True],
    }.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


@functools.partial(
    jax.jit,
    static_argnames=("implementation", "reverse", "layout", "chunk_size", "delta_softplus"),
    compiler_options=QUICK_COMPILE,
)
def run(case, *, implementation, reverse=False, layout="bld", chunk_size=None, delta_softplus=True):
    return selective_scan(
        **case,
        implementation=implementation,
        reverse=reverse,
        layout=layout,
        chunk_size=chunk_size,
        delta_softplus=delta_softplus,
        return_final_state=True,
    )


def check(got, expected, rtol, atol):
    for value, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float64), reference, rtol, atol)


@pytest.fixture(params=["steps", "associative"])
def form(request, monkeypatch):
    """Both forms of the recurrence inside a chunk, the other platforms' one included."""
    platforms = ("cpu",) if request.param == "associative" else ()
    monkeypatch.setattr(xla_module.xla_chunk, "ASSOCIATIVE_PLATFORMS", platforms)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@both
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("optional", "groups"), [(True, 2), (False, 1)])
def test_the_case_of_mamba_ssm(implementation, dtype, optional, groups):
    rtol, atol = TOLERANCE[dtype]
    case = inputs(
        batch=2, length=134, channels=4, state=8, groups=groups, dtype=jnp.dtype(dtype),
        optional=optional,
    )  # fmt: skip
    y, h = run(case, implementation=implementation)
    assert y.dtype == dtype and h.dtype == jnp.float32
    check((y, h), loop(**case, delta_softplus=True), rtol, atol)


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 372, 512, 784, 1024, 1134, 2048, 4096])
def test_the_other_lengths_of_mamba_ssm(length):
    case = inputs(batch=2, length=length, channels=4, state=8, groups=2)
    expected = loop(**case, delta_softplus=True)
    check(run(case, implementation="xla"), expected, *TOLERANCE["float32"])


def check_options(implementation, reverse, layout, segments, chunk_size=None):
    case = inputs(3, groups=2, segments=segments, initial_state=True)
    y, h = loop(**case, delta_softplus=True, reverse=reverse)
    if layout == "bdl":
        case, y = swapped(case), np.swapaxes(y, 1, 2)
    got = run(
        case, implementation=implementation, reverse=reverse, layout=layout, chunk_size=chunk_size
    )
    check(got, (y, h), **TIGHT)


@options
def test_reference_in_every_layout_and_direction(reverse, layout, segments):
    check_options("reference", reverse, layout, segments)


@options
def test_xla_in_every_layout_and_direction(reverse, layout, segments, form):
    if form == "associative" and layout == "bdl":
        pytest.skip("the layout concerns loading and storing alone")
    check_options("xla", reverse, layout, segments, chunk_size=4)


@pytest.mark.parametrize("chunk_size", [1, 19, 100, None])
def test_any_chunk_size(chunk_size):
    check_options("xla", False, "bld", True, chunk_size)


@both
@pytest.mark.parametrize("name", ["D", "z", "delta_bias", "initial_state", "segment_ids"])
def test_one_option_alone(implementation, name):
    full = inputs(4, segments=True, initial_state=True)
    case = {k: full[k] for k in ("u", "delta", "A", "B", "C", name)}
    got = run(case, implementation=implementation, delta_softplus=False)
    check(got, loop(**case), **TIGHT)


@both
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 1, "channels": 1, "state": 1},
        {"length": 7, "channels": 10, "state": 5, "groups": 10},
        {"length": 9, "channels": 3, "state": 64, "batch": 1},
        {"length": 5, "channels": 12, "state": 16, "groups": 3, "batch": 5},
    ],
)
def test_any_size(implementation, sizes):
    case = inputs(5, **sizes, initial_state=True, segments=True)
    check(
        run(case, implementation=implementation, chunk_size=3),
        loop(**case, delta_softplus=True),
        **TIGHT,
    )


@both
def test_real_initialisation_over_a_long_sequence(implementation):
    case = inputs(6, batch=1, length=3000, channels=4, state=16, real=True, optional=False)
    got = run(case, implementation=implementation, delta_softplus=False)
    check(got, loop(**case), **TIGHT)


@pytest.mark.slow
def test_real_initialisation_at_65537_positions():
    case = inputs(7, batch=1, length=65537, channels=2, state=16, real=True, optional=False)
    got = run(case, implementation="xla", delta_softplus=False)
    check(got, loop(**case), **TIGHT)


@both
def test_mixed_dtypes(implementation):
    case = inputs(8, segments=True, initial_state=True)
    halves = {"u": jnp.bfloat16, "delta": jnp.float16, "B": jnp.bfloat16, "z": jnp.float16}
    case |= {k: case[k].astype(dtype) for k, dtype in halves.items()}
    y, h = run(case, implementation=implementation)
    assert y.dtype == jnp.bfloat16 and h.dtype == jnp.float32
    expected = loop(**case, delta_softplus=True)
    # The operands are rounded the same for both, so only y's own rounding is left.
    check((y,), expected[:1], 2**-8, 1e-5)
    check((h,), expected[1:], **TIGHT)


@both
def test_the_dtype_of_y_can_be_chosen(implementation):
    case = inputs(25, dtype=jnp.bfloat16, segments=True)
    y = selective_scan(**case, implementation=implementation, output_dtype="float32")
    assert y.dtype == jnp.float32
    check((y,), loop(**case)[:1], **TIGHT)
    gradient = jax.grad(
        lambda u: jnp.sum(
            selective_scan(
                **(case | {"u": u}), implementation=implementation, output_dtype="float16"
            ).astype(jnp.float32)
        )
    )
    assert gradient(case["u"]).dtype == jnp.bfloat16


@both
def test_softplus_is_the_identity_above_20(implementation):
    case = inputs(9, optional=False)
    case["delta"] = jnp.full_like(case["delta"], 30.0).at[:, 3].set(19.9)
    check(run(case, implementation=implementation), loop(**case, delta_softplus=True), **TIGHT)
    case["delta"] = case["delta"].at[:, 5].set(200.0)  # exp(200) is infinite in float32
    assert np.isfinite(run(case, implementation=implementation)[0]).all()


@both
def test_float64_keeps_its_precision(implementation):
    with jax.enable_x64(True):
        case = inputs(10, dtype=np.float64, segments=True, initial_state=True)
        y, h = run(case, implementation=implementation, chunk_size=4)
        assert y.dtype == h.dtype == jnp.float64
        check((y, h), loop(**case, delta_softplus=True), 1e-12, 1e-12)


@both
def test_reverse_is_the_flipped_scan(implementation):
    case = inputs(11, segments=True, initial_state=True)
    y, h = run(case, implementation=implementation, reverse=True, chunk_size=4)
    y_flipped, h_flipped = run(flipped(case), implementation=implementation, chunk_size=4)
    check((y, h), (jnp.flip(y_flipped, 1), h_flipped), 1e-6, 1e-6)


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_row_is_its_videos_one_by_one(implementation, reverse):
    case = inputs(12, batch=1, length=24)
    # Padding in the middle of video 7 and between videos; id 7 comes back as a third video.
    ids = np.array([-1, 7, 7, 7, -1, -1, 7, 7, 3, 3, 3, 3, -1, 7, 7, 7, 9, 9, 9, 9, 9, -1, -1, -1])
    videos = [[1, 2, 3, 6, 7], [8, 9, 10, 11], [13, 14, 15], [16, 17, 18, 19, 20]]
    packed = case | {"segment_ids": jnp.asarray(ids[None], jnp.int32)}
    y, h = run(packed, implementation=implementation, reverse=reverse, chunk_size=5)
    for positions in videos:
        one = {k: v[:, jnp.array(positions)] if v.ndim > 2 else v for k, v in case.items()}
        y_one, h_one = run(one, implementation=implementation, reverse=reverse)
        check((y[:, jnp.array(positions)],), (y_one,), 1e-5, 1e-6)
    np.testing.assert_array_equal(np.asarray(y[:, ids < 0]), 0)
    if not reverse:
        check((h,), (h_one,), 1e-5, 1e-6)


@both
def test_the_first_segment_alone_continues_the_initial_state(implementation):
    case = inputs(13, batch=1, length=8, initial_state=True)
    case["segment_ids"] = jnp.array([[-1, 4, -1, 4, 2, 2, -1, -1]], jnp.int32)
    y, h = run(case, implementation=implementation)
    y_zero, h_zero = run(
        case | {"initial_state": jnp.zeros_like(case["initial_state"])},
        implementation=implementation,
    )
    differs = np.any(np.asarray(y != y_zero), axis=(0, 2))
    np.testing.assert_array_equal(differs, [False, True, False, True, False, False, False, False])
    np.testing.assert_array_equal(np.asarray(h), np.asarray(h_zero))


@both
def test_a_row_of_padding_passes_the_state_through_untouched(implementation):
    case = inputs(14, initial_state=True)
    case["segment_ids"] = jnp.full((2, 19), -3, jnp.int32)
    y, h = run(case, implementation=implementation, chunk_size=4)
    np.testing.assert_array_equal(np.asarray(y), 0)
    np.testing.assert_array_equal(np.asarray(h), np.asarray(case["initial_state"]))


@both
def test_nothing_at_padding_is_read(implementation):
    case = inputs(15, segments=True, initial_state=True)
    padding = (case["segment_ids"] < 0)[..., None]
    poisoned = case | {
        k: jnp.where(padding, jnp.nan, case[k]) for k in ("u", "delta", "z", "B", "C")
    }
    expected = run(case, implementation=implementation)
    check(run(poisoned, implementation=implementation), expected, 0, 0)


@both
def test_an_infinite_state_stays_in_its_segment(implementation):
    case = inputs(16, batch=1, length=6, optional=False)
    case["segment_ids"] = jnp.array([[0, 0, 0, 1, 1, 1]], jnp.int32)
    case["u"] = case["u"].at[:, 1].set(jnp.inf)
    y, h = run(case, implementation=implementation)
    assert np.isfinite(y[:, 3:]).all() and np.isfinite(h).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_calls_with_a_carried_state_equal_one_call(reverse, segments):
    case = inputs(17, length=21, initial_state=True)
    if segments:
        case["segment_ids"] = jnp.tile(jnp.array([[1] * 12 + [-1] * 4 + [1] * 3 + [2] * 2]), (2, 1))
    y, h = run(case, implementation="xla", reverse=reverse, chunk_size=5)
    parts, state = [], case["initial_state"]
    cuts = [(0, 6), (6, 14), (14, 21)]
    for start, stop in reversed(cuts) if reverse else cuts:
        piece = {k: v[:, start:stop] if v.shape[:2] == (2, 21) else v for k, v in case.items()}
        piece["initial_state"] = state
        part, state = run(piece, implementation="xla", reverse=reverse)
        parts.append(part)
    joined = jnp.concatenate(parts[::-1] if reverse else parts, axis=1)
    check((joined, state), (y, h), 1e-6, 1e-6)


@both
def test_vmap(implementation):
    cases = [inputs(seed, segments=True, initial_state=True) for seed in (18, 19, 20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    y, h = jax.vmap(lambda c: run(c, implementation=implementation, chunk_size=4))(stacked)
    for i, case in enumerate(cases):
        check((y[i], h[i]), run(case, implementation=implementation, chunk_size=4), 1e-6, 1e-6)


def test_implementation_none_serves_every_call_and_y_alone_is_the_default():
    case = inputs(21, segments=True)
    y = jax.jit(lambda case: selective_scan(**case, delta_softplus=True))(case)
    check((y,), run(case, implementation="xla")[:1], 1e-6, 1e-6)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)]
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
    check(outputs, expected_outputs, 1e-5, 1e-6)
    for name in case:
        check((gradients[name],), (expected_gradients[name],), 1e-4, 1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 40),
    channels=st.sampled_from([1, 4, 6]),
    state=st.integers(1, 5),
    chunk_size=st.integers(1, 17),
    reverse=st.booleans(),
    segments=st.booleans(),
    initial_state=st.booleans(),
    optional=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
)
def test_random_calls(
    seed, length, channels, state, chunk_size, reverse, segments, initial_state, optional, dtype
):
    case = inputs(
        seed, length=length, channels=channels, state=state, groups=channels // 2 or 1,
        dtype=dtype, segments=segments, initial_state=initial_state, optional=optional,
    )  # fmt: skip
    got = run(case, implementation="xla", reverse=reverse, chunk_size=chunk_size)
    expected = loop(**case, delta_softplus=True, reverse=reverse)
    check(got, expected, *TOLERANCE[jnp.dtype(dtype).name])


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
