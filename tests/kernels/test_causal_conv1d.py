"""The causal convolution against a loop, with its packing, states and direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from storm_kernels import causal_conv1d as module
from tests.kernels.scan_cases import packed_ids

causal_conv1d = jax.jit(
    module.causal_conv1d, static_argnames=("reverse", "activation", "return_final_state", "layout")
)


def loop(x, weight, bias=None, *, segment_ids=None, initial_state=None, reverse=False):
    """Sums tap by tap in float64; a tap counts if no other segment lies on the way to it."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    batch, length, channels = x.shape
    width = len(weight)
    step = 1 if reverse else -1
    y = np.zeros(x.shape)
    for b in range(batch):
        for t in range(length):
            mine = 0 if segment_ids is None else segment_ids[b, t]
            if mine < 0:
                continue
            at = t
            for k in reversed(range(width)):
                if 0 <= at < length:
                    other = 0 if segment_ids is None else segment_ids[b, at]
                    if other >= 0 and other != mine:
                        break
                    if other >= 0:
                        y[b, t] += weight[k] * x[b, at]
                elif initial_state is not None:
                    place = at - length if reverse else at + width - 1
                    y[b, t] += weight[k] * np.asarray(initial_state[b, place], np.float64)
                at += step
            if bias is not None:
                y[b, t] += np.asarray(bias, np.float64)
    return y


def inputs(seed=0, length=17, channels=3, width=4, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "x": normal(2, length, channels),
        "weight": normal(width, channels),
        "bias": normal(channels),
        "initial_state": normal(2, width - 1, channels),
        "segment_ids": packed_ids(rng, 2, length),
    }


def close(got, expected, rtol=2e-6, atol=2e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol, atol)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("left_out", [(), ("bias",), ("segment_ids",), ("initial_state",)])
def test_against_the_loop(reverse, left_out):
    for length, width in [(17, 4), (1, 4), (2, 3), (9, 1), (3, 8)]:
        case = {k: v for k, v in inputs(1, length, width=width).items() if k not in left_out}
        close(causal_conv1d(**case, reverse=reverse), loop(**case, reverse=reverse))


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [("float32", 3e-4, 1e-3), ("float16", 3e-3, 5e-3), ("bfloat16", 1e-2, 5e-2)],
)
def test_dtypes_at_the_tolerances_of_causal_conv1d(dtype, rtol, atol):
    case = inputs(2, length=151, channels=64, dtype=jnp.dtype(dtype))
    y, state = causal_conv1d(**case, activation="silu", return_final_state=True)
    assert y.dtype == state.dtype == dtype
    expected = loop(**case)
    close(y, expected / (1 + np.exp(-expected)), rtol, atol)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_row_is_its_videos_one_by_one(reverse):
    case = inputs(3, length=12)
    ids = jnp.tile(jnp.array([[5, 5, 5, 6, 6, 5, 5, 5, 5, -1, -1, -1]], jnp.int32), (2, 1))
    del case["initial_state"]
    y = causal_conv1d(**(case | {"segment_ids": ids}), reverse=reverse)
    for start, stop in [(0, 3), (3, 5), (5, 9)]:
        one = case | {"x": case["x"][:, start:stop], "segment_ids": None}
        close(y[:, start:stop], causal_conv1d(**one, reverse=reverse))
    close(y[:, 9:], 0)


def test_reverse_is_the_flipped_convolution():
    case = inputs(4)
    along = ("x", "segment_ids", "initial_state")
    flipped = case | {k: jnp.flip(case[k], 1) for k in along}
    y, state = causal_conv1d(**case, reverse=True, return_final_state=True)
    y_flipped, state_flipped = causal_conv1d(**flipped, return_final_state=True)
    close(y, jnp.flip(y_flipped, 1))
    close(state, jnp.flip(state_flipped, 1))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_layout_changes_nothing_but_the_order_of_axes(reverse):
    case = inputs(11)
    turned = case | {"x": jnp.swapaxes(case["x"], 1, 2)}
    options = {"reverse": reverse, "activation": "silu", "return_final_state": True}

    def loss(case, layout):
        y, state = causal_conv1d(**case, **options, layout=layout)
        y = jnp.swapaxes(y, 1, 2) if layout == "bdl" else y
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

    def both(case, layout):
        ids = {"segment_ids": case["segment_ids"]}
        floats = {k: v for k, v in case.items() if k not in ids}
        return jax.jit(jax.grad(lambda floats: loss(floats | ids, layout), has_aux=True))(floats)

    (expected, outputs), (got, outputs_turned) = both(case, "bld"), both(turned, "bdl")
    got["x"] = jnp.swapaxes(got["x"], 1, 2)
    for value, other in zip(outputs_turned, outputs, strict=True):
        close(value, other, 1e-6, 1e-6)
    for name in expected:
        close(got[name], expected[name], 1e-5, 1e-6)


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_kernels_in_the_other_layout(width):
    case = inputs(12, length=3, width=width)
    turned = case | {"x": jnp.swapaxes(case["x"], 1, 2)}
    close(jnp.swapaxes(causal_conv1d(**turned, layout="bdl"), 1, 2), loop(**case))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_calls_with_a_carried_state_equal_one_call(reverse, segments):
    case = inputs(5, length=14)
    ids = jnp.tile(jnp.array([[1] * 7 + [-1] + [1] * 4 + [2] * 2]), (2, 1)).astype(jnp.int32)
    case["segment_ids"] = ids if segments else None

    def whole(case):
        return causal_conv1d(**case, reverse=reverse, return_final_state=True)

    def pieces(case):
        state, parts = case["initial_state"], []
        cuts = [(0, 5), (5, 6), (6, 9), (9, 14)]
        for start, stop in reversed(cuts) if reverse else cuts:
            piece = case | {"x": case["x"][:, start:stop], "initial_state": state}
            if segments:
                piece["segment_ids"] = case["segment_ids"][:, start:stop]
            y, state = causal_conv1d(**piece, reverse=reverse, return_final_state=True)
            parts.append(y)
        return jnp.concatenate(parts[::-1] if reverse else parts, 1), state

    for got, expected in zip(pieces(case), whole(case), strict=True):
        close(got, expected)

    def loss(run, x, state):
        y, final = run(case | {"x": x, "initial_state": state})
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final))

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), (0, 1)))(case["x"], case["initial_state"])
        for run in (pieces, whole)
    )
    for one, other in zip(got, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("reverse", [False, True])
def test_finite_differences_in_float64(reverse):
    with jax.enable_x64(True):
        case = inputs(6, length=8, dtype=np.float64)
        ids = case.pop("segment_ids")
        scan = functools.partial(
            causal_conv1d, segment_ids=ids, reverse=reverse, activation="silu",
            return_final_state=True,
        )  # fmt: skip
        check_grads(
            lambda case: scan(**case), (case,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )


def test_nothing_at_padding_is_read():
    case = inputs(7)
    padding = (case["segment_ids"] < 0)[..., None]
    poisoned = case | {"x": jnp.where(padding, jnp.nan, case["x"])}
    close(causal_conv1d(**poisoned), causal_conv1d(**case), 0, 0)
    gradient = jax.grad(lambda x: jnp.sum(causal_conv1d(**(case | {"x": x}), activation="silu")))
    got = gradient(poisoned["x"])
    assert np.isfinite(got).all() and not np.any(np.where(padding, got, 0))


def test_under_jit_and_vmap():
    cases = [inputs(seed) for seed in (8, 9)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    y = jax.jit(jax.vmap(lambda c: causal_conv1d(**c)))(stacked)
    for i, case in enumerate(cases):
        close(y[i], causal_conv1d(**case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.zeros((2, 17))}, ValueError, r"x has shape \(2, 17\), expected \[batch"),
        ({"x": jnp.zeros((2, 17, 3), int)}, TypeError, "x has dtype int"),
        ({"weight": jnp.zeros((4, 5))}, ValueError, r"weight has .*4, 5\), expected \(K, 3\)"),
        ({"bias": jnp.zeros(4)}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, ValueError, r"initial_state.*\(2, 3, 3\)"),
        ({"segment_ids": jnp.zeros((2, 3), "int32")}, ValueError, r"segment_ids.*\(2, 17\)"),
        ({"segment_ids": jnp.zeros((2, 17))}, TypeError, "segment_ids has dtype float32"),
        ({"layout": "ldb"}, ValueError, "layout='ldb', expected 'bld' or 'bdl'"),
        ({"layout": "bdl"}, ValueError, r"weight has shape \(4, 3\), expected \(K, 17\)"),
        ({"activation": "gelu"}, ValueError, "activation='gelu', expected None or 'silu'"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        module.causal_conv1d(**(inputs(10) | change))
