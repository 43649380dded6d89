"""Gradients of gradients: exact in plain JAX, refused in clear words by the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_kernels.selective_scan import selective_scan, xla_chunk
from storm_kernels.selective_scan.call import differentiable_once
from tests.kernels import scan_suite
from tests.kernels.scan_cases import QUICK_COMPILE, inputs

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@functools.partial(quick, static_argnames=("implementation", "reverse"))
def second_order(case, ids, *, implementation, reverse=False):
    """The gradient of a function of all gradients."""

    def loss(case):
        y, h = selective_scan(
            **case, segment_ids=ids, delta_softplus=True, return_final_state=True,
            implementation=implementation, reverse=reverse, chunk_size=3,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(h))

    def of_gradients(case):
        gradients = jax.tree.leaves(jax.grad(loss)(case))
        return sum(jnp.sum(jnp.sin((i + 1) * g)) for i, g in enumerate(gradients))

    return jax.grad(of_gradients)(case)


@pytest.mark.parametrize(
    ("form", "reverse"),
    [("steps", False), pytest.param("associative", True, marks=pytest.mark.slow)],
)
def test_xla_equals_the_reference(form, reverse, monkeypatch):
    platforms = ("cpu",) if form == "associative" else ()
    monkeypatch.setattr(xla_chunk, "ASSOCIATIVE_PLATFORMS", platforms)
    jax.clear_caches()
    with jax.enable_x64(True):
        case = inputs(
            1, batch=1, length=7, channels=2, state=2, dtype=np.float64, segments=True,
            initial_state=True,
        )  # fmt: skip
        ids = case.pop("segment_ids")
        expected = second_order(case, ids, implementation="reference", reverse=reverse)
        got = second_order(case, ids, implementation="xla", reverse=reverse)
        for name in case:
            np.testing.assert_allclose(got[name], expected[name], 1e-9, 1e-9, err_msg=name)
    jax.clear_caches()


@pytest.mark.parametrize("implementation", scan_suite.KERNEL)
def test_kernels_refuse_it(implementation):
    case = inputs(2, initial_state=True)
    with pytest.raises(NotImplementedError, match=f"'{implementation}' is diff.*='reference'"):
        second_order(case, None, implementation=implementation)


@differentiable_once("some_kernel")
def launch(x, factor):
    return x**2 * factor, {"slope": 2 * x * factor}


@jax.custom_vjp
def guarded(x, factor):
    return launch(x, factor)[0]


guarded.defvjp(
    lambda x, factor: (launch(x, factor)[0], launch(x, factor)[1]["slope"]),
    lambda slope, dy: (slope * dy, None),
)


def test_the_guard_lets_everything_of_first_order_pass():
    x = jnp.arange(3.0)

    def loss(x):
        # A second operand that no derivative reaches, a loop, and recomputation.
        y, _ = jax.lax.scan(lambda c, x: (c + guarded(x, 3.0), None), 0.0, x)
        return y

    for f in (loss, jax.checkpoint(loss)):
        np.testing.assert_array_equal(jax.jit(jax.grad(f))(x), 6 * x)
        np.testing.assert_array_equal(jax.vmap(jax.grad(f))(jnp.stack([x, x]))[1], 6 * x)
    # A derivative with respect to something else goes by.
    again = jax.grad(lambda s: jnp.sum(s**2 * jax.grad(loss)(x)))(2.0)
    np.testing.assert_allclose(again, 4 * 6 * np.sum(x))


@pytest.mark.parametrize("outer", [lambda f: jax.grad(lambda x: jnp.sum(f(x))), jax.jacfwd])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_the_guard_refuses_the_second_order_and_names_the_remedy(outer, wrap):
    inner = jax.grad(lambda x: jnp.sum(wrap(guarded)(x, 3.0)))
    with pytest.raises(NotImplementedError, match="'some_kernel' is diff.*='reference'"):
        outer(inner)(jnp.arange(3.0))
