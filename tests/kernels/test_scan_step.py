"""`selective_scan_step`: position by position it is the scan, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_kernels.selective_scan import selective_scan, selective_scan_step
from tests.kernels.scan_cases import QUICK_COMPILE, inputs, loop

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
BY_POSITION = ("u", "delta", "z", "B", "C")


def stepped(case, delta_softplus=True, output_dtype=None):
    """y and the final state of a case, by calls of one position."""
    case = dict(case)
    along = {k: jnp.moveaxis(case.pop(k), 1, 0) for k in BY_POSITION if k in case}
    state = case.pop("initial_state")

    def body(state, position):
        y, state = selective_scan_step(
            state, **case, **position, delta_softplus=delta_softplus, output_dtype=output_dtype
        )
        return state, y

    state, y = jax.lax.scan(body, state, along)
    return jnp.moveaxis(y, 0, 1), state


@pytest.mark.parametrize(("groups", "optional"), [(None, True), (3, True), (2, False)])
def test_step_by_step_it_is_the_loop(groups, optional):
    case = inputs(1, length=7, groups=groups, optional=optional, initial_state=True)
    for softplus in (True, False):
        got = quick(functools.partial(stepped, delta_softplus=softplus))(case)
        for value, expected in zip(got, loop(**case, delta_softplus=softplus), strict=True):
            np.testing.assert_allclose(value, expected, 2e-5, 2e-5)


def test_its_gradients_are_the_scans():
    case = inputs(2, length=6, groups=2, initial_state=True)

    def loss(run, case):
        y, h = run(case)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(h))

    def whole(case):
        return selective_scan(**case, delta_softplus=True, return_final_state=True)

    got, expected = (quick(jax.grad(functools.partial(loss, f)))(case) for f in (stepped, whole))
    for name in case:
        np.testing.assert_allclose(got[name], expected[name], 2e-5, 2e-5, err_msg=name)


def test_dtypes():
    case = inputs(3, length=2, dtype=jnp.bfloat16, initial_state=True)
    y, h = stepped(case)
    assert y.dtype == jnp.bfloat16 and h.dtype == jnp.float32
    y, _ = stepped(case, output_dtype="float32")
    assert y.dtype == jnp.float32
    expected = loop(**case, delta_softplus=True)
    np.testing.assert_allclose(y, expected[0], 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": jnp.zeros((2, 3, 6))}, ValueError, r"state has .*3, 6\), expected \(2, 6, 3\)"),
        ({"state": jnp.zeros((2, 6, 3), "bfloat16")}, TypeError, "state has dtype bfloat16"),
        ({"u": jnp.zeros((2, 1, 6))}, ValueError, r"u has .*expected \[batch, channels\]"),
        ({"delta": jnp.zeros((2, 5))}, ValueError, r"delta has shape \(2, 5\), expected \(2, 6\)"),
        ({"B": jnp.zeros((2, 4))}, ValueError, r"B has .*expected \(2, 3\) or \(2, groups, 3\)"),
        ({"C": jnp.zeros((2, 4, 3))}, ValueError, "4 groups do not divide 6 channels"),
        ({"z": jnp.zeros((2, 6), int)}, TypeError, "z has dtype int"),
        ({"output_dtype": "float64"}, TypeError, "output_dtype=float64, but the arithmetic is"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    case = inputs(4, initial_state=True)
    case["state"] = case.pop("initial_state")
    case |= {k: case[k][:, 0] for k in BY_POSITION}
    with pytest.raises(error, match=message):
        selective_scan_step(**(case | change))
