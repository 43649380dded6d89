"""Gradients of the selective scan: finite differences, mamba_ssm's tolerances, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from storm_kernels.selective_scan import selective_scan, xla_chunk
from tests.kernels.scan_cases import QUICK_COMPILE, inputs, loop, swapped

# kernels.md section 2: (rtol, atol) of the outputs and (rtolw, atolw) of the weights.
TOLERANCE = {"float32": (6e-4, 2e-3), "float16": (3e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}
WEIGHTS = (1e-3, 1e-3)

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def split(case):
    """The differentiable operands and the segment ids."""
    ids = case.get("segment_ids")
    return {k: v for k, v in case.items() if k != "segment_ids"}, ids


@functools.partial(
    quick, static_argnames=("implementation", "reverse", "layout", "chunk_size", "weight_dtype")
)
def gradients(
    operands, ids, *, implementation, reverse=False, layout="bld", chunk_size=None,
    weight_dtype=None,
):  # fmt: skip
    """Of a loss that weighs every element of y and of the final state differently."""

    def loss(operands):
        y, h = selective_scan(
            **operands, segment_ids=ids, delta_softplus=True, reverse=reverse, layout=layout,
            chunk_size=chunk_size, implementation=implementation, return_final_state=True,
        )  # fmt: skip
        y = y.swapaxes(1, 2) if layout == "bdl" else y
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(weight_dtype or h.dtype)
        weights_h = jnp.sin(jnp.arange(h.size)).reshape(h.shape)
        return jnp.sum(y.astype(h.dtype) * weights) + jnp.sum(h * weights_h)

    return jax.grad(loss)(operands)


def check(got, expected, rtol, atol):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol, atol, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("reverse", [False, True])
def test_finite_differences_in_float64(implementation, reverse):
    with jax.enable_x64(True):
        case = inputs(
            1, batch=2, length=9, channels=4, state=2, groups=2, dtype=np.float64, segments=True,
            initial_state=True,
        )  # fmt: skip
        operands, ids = split(case)

        @jax.jit
        def scan(operands):
            return selective_scan(
                **operands, segment_ids=ids, delta_softplus=True, reverse=reverse,
                implementation=implementation, return_final_state=True, chunk_size=4,
            )  # fmt: skip

        check_grads(scan, (operands,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_one_element_of_every_gradient_against_the_numpy_loop():
    with jax.enable_x64(True):
        case = inputs(2, batch=1, length=7, dtype=np.float64, segments=True, initial_state=True)
        operands, ids = split(case)
        got = gradients(operands, ids, implementation="reference")

        def loss(operands):
            y, h = loop(**operands, segment_ids=ids, delta_softplus=True)
            weights = np.cos(np.arange(y.size)).reshape(y.shape)
            return (y * weights).sum() + (h * np.sin(np.arange(h.size)).reshape(h.shape)).sum()

        for name, value in operands.items():
            value = np.asarray(value)
            at = tuple(n // 2 for n in value.shape)
            up, down = value.copy(), value.copy()
            up[at] += 1e-6
            down[at] -= 1e-6
            slope = (loss(operands | {name: up}) - loss(operands | {name: down})) / 2e-6
            np.testing.assert_allclose(got[name][at], slope, 1e-6, 1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("form", "reverse", "segments"),
    [
        ("steps", False, True),
        ("steps", True, True),
        ("steps", False, False),
        ("associative", False, True),
        ("associative", True, True),
    ],
)
def test_xla_equals_the_reference_in_float64(form, reverse, segments, monkeypatch):
    platforms = ("cpu",) if form == "associative" else ()
    monkeypatch.setattr(xla_chunk, "ASSOCIATIVE_PLATFORMS", platforms)
    jax.clear_caches()
    with jax.enable_x64(True):
        case = inputs(3, groups=2, dtype=np.float64, segments=segments, initial_state=True)
        operands, ids = split(case)
        expected = gradients(operands, ids, implementation="reference", reverse=reverse)
        got = gradients(operands, ids, implementation="xla", reverse=reverse, chunk_size=5)
        check(got, expected, 1e-10, 1e-11)
        if form == "associative" or not segments:
            return  # the layout concerns loading and storing alone
        got = gradients(
            swapped(operands), ids, implementation="xla", reverse=reverse, chunk_size=5,
            layout="bdl",
        )  # fmt: skip
        check(swapped(got), expected, 1e-10, 1e-11)
    jax.clear_caches()


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_case_of_mamba_ssm(dtype, optional):
    rtol, atol = TOLERANCE[dtype]
    case = inputs(
        0, length=134, channels=4, state=8, groups=2, dtype=jnp.dtype(dtype), optional=optional
    )
    got = gradients(case, None, implementation="xla")
    assert all(got[k].dtype == case[k].dtype for k in case)
    # As in mamba_ssm, the oracle takes the operands and y's cotangent as they are rounded.
    wide = {k: v.astype(jnp.float32) for k, v in case.items()}
    expected = gradients(wide, None, implementation="reference", weight_dtype=jnp.dtype(dtype))
    weight = (max(WEIGHTS[0], rtol), max(WEIGHTS[1], atol)) if optional else WEIGHTS
    tolerances = {
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (weight[0], 5 * weight[1]),
        "B": (rtol, atol),
        "C": (rtol, atol),
        "D": weight,
        "z": weight,
        "delta_bias": weight,
    }
    for name in case:
        value = np.asarray(got[name], np.float32)
        np.testing.assert_allclose(value, expected[name], *tolerances[name], err_msg=name)


def test_gradients_at_padding_are_zero_and_finite():
    case = inputs(4, segments=True, initial_state=True)
    operands, ids = split(case)
    padding = (ids < 0)[..., None]
    along = ("u", "delta", "z", "B", "C")
    poisoned = operands | {k: jnp.where(padding, jnp.nan, operands[k]) for k in along}
    for implementation in ("reference", "xla"):
        expected = gradients(operands, ids, implementation=implementation)
        got = gradients(poisoned, ids, implementation=implementation)
        check(got, expected, 0, 0)
        for name in along:
            assert not np.any(np.where(padding, got[name], 0))


def test_the_final_states_gradient_passes_trailing_padding():
    case = inputs(5, length=12, initial_state=True)
    kept = jax.tree.map(lambda x: x[:, :7] if x.shape[:2] == (2, 12) else x, case)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(12) < 7, 3, -1), (2, 12)).astype(jnp.int32)

    def final(operands, ids=None):
        _, h = selective_scan(
            **operands, segment_ids=ids, return_final_state=True, delta_softplus=True, chunk_size=5
        )
        return jnp.sum(jnp.sin(h))

    gradient = quick(jax.grad(final))
    got, expected = gradient(case, ids), gradient(kept)
    got = {k: v[:, :7] if v.shape[:2] == (2, 12) else v for k, v in got.items()}
    check(got, expected, 1e-6, 1e-7)


@pytest.mark.parametrize("reverse", [False, True])
def test_calls_with_a_carried_state_have_the_gradients_of_one_call(reverse):
    case = inputs(6, length=14, initial_state=True)

    def whole(operands):
        y, h = selective_scan(
            **operands, delta_softplus=True, reverse=reverse, return_final_state=True, chunk_size=4
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(h))

    def pieces(operands):
        state, total = operands["initial_state"], 0
        for cut in [slice(9, 14), slice(0, 9)] if reverse else [slice(0, 9), slice(9, 14)]:
            piece = {k: v[:, cut] if v.shape[:2] == (2, 14) else v for k, v in operands.items()}
            piece["initial_state"] = state
            y, state = selective_scan(
                **piece, delta_softplus=True, reverse=reverse, return_final_state=True, chunk_size=4
            )
            total += jnp.sum(jnp.sin(y))
        return total + jnp.sum(jnp.cos(state))

    check(quick(jax.grad(pieces))(case), quick(jax.grad(whole))(case), 2e-5, 2e-6)


def test_under_vmap_checkpoint_and_scan():
    cases = [inputs(seed, segments=True, initial_state=True) for seed in (7, 8)]
    expected = [gradients(*split(c), implementation="reference") for c in cases]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    operands, ids = split(stacked)
    one = functools.partial(gradients.__wrapped__, implementation="xla", chunk_size=4)
    mapped = quick(jax.vmap(one))(operands, ids)
    _, scanned = quick(
        lambda operands, ids: jax.lax.scan(lambda c, x: (c, one(*x)), 0, (operands, ids))
    )(operands, ids)
    for i in range(2):
        check(jax.tree.map(lambda x, i=i: x[i], mapped), expected[i], 2e-5, 2e-5)
        check(jax.tree.map(lambda x, i=i: x[i], scanned), expected[i], 2e-5, 2e-5)

    @jax.checkpoint
    def layer(operands, ids):
        return selective_scan(**operands, segment_ids=ids, delta_softplus=True)

    def loss(layer, operands, ids):
        return jnp.sum(jnp.sin(layer(operands, ids)))

    args = split(cases[0])
    got = quick(jax.grad(functools.partial(loss, layer)))(*args)
    check(got, quick(jax.grad(functools.partial(loss, layer.__wrapped__)))(*args), 1e-6, 1e-7)


def test_two_runs_give_the_same_bits():
    operands, ids = split(inputs(9, length=50, segments=True, initial_state=True))
    first = gradients(operands, ids, implementation="xla")
    check(gradients(operands, ids, implementation="xla"), first, 0, 0)


def test_temporaries_stay_under_512_mib_at_32768_positions():
    length, channels, state = 32768, 512, 16
    shapes = {
        "u": (1, length, channels), "delta": (1, length, channels), "A": (channels, state),
        "B": (1, length, state), "C": (1, length, state),
    }  # fmt: skip
    abstract = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}

    def loss(operands):
        return jnp.sum(selective_scan(**operands, implementation="xla") ** 2)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(abstract).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2**20
