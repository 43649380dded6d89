"""`selective_scan_bidirectional` is two calls, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_kernels.selective_scan import selective_scan, selective_scan_bidirectional
from tests.kernels import scan_suite
from tests.kernels.scan_cases import QUICK_COMPILE, inputs, swapped

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def paired(shared=()):
    """Operands of both directions: pairs, but for the names in `shared`; and the segment ids."""
    forward = inputs(1, groups=2, segments=True, initial_state=True)
    backward = inputs(2, state=4, groups=3, initial_state=True)
    ids = forward.pop("segment_ids")
    return {k: v if k in shared else (v, backward[k]) for k, v in forward.items()}, ids


def one_call(case, ids, **options):
    return selective_scan_bidirectional(
        **case, segment_ids=ids, delta_softplus=True, return_final_state=True, **options
    )


def two_calls(case, ids, **options):
    results = []
    for index in (0, 1):
        own = {k: v[index] if isinstance(v, tuple) else v for k, v in case.items()}
        results.append(
            selective_scan(
                **own, segment_ids=ids, delta_softplus=True, return_final_state=True,
                reverse=index == 1, **options,
            )
        )  # fmt: skip
    return tuple(zip(*results, strict=True))


def with_gradients(run, case, ids, **options):
    def loss(case):
        outputs = run(case, ids, **options)
        return sum(jnp.sum(jnp.sin((1 + i) * x)) for i, x in enumerate(jax.tree.leaves(outputs)))

    return quick(lambda case: (run(case, ids, **options), jax.grad(loss)(case)))(case)


def check(got, expected, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for value, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, other, tolerance, tolerance)


@pytest.mark.parametrize("implementation", scan_suite.FAST)
@pytest.mark.parametrize("shared", [(), ("u", "z", "D")])
def test_it_is_two_calls(shared, implementation):
    case, ids = paired(shared)
    options = {"implementation": implementation, "chunk_size": 4}
    check(with_gradients(one_call, case, ids, **options),
          with_gradients(two_calls, case, ids, **options))  # fmt: skip


def test_layout_dtype_and_options_for_one_direction_alone():
    case, ids = paired()
    case = swapped({k: v[0] for k, v in case.items()})
    case |= {"z": (case["z"], None), "initial_state": (None, case["initial_state"])}
    options = {"layout": "bdl", "output_dtype": "bfloat16", "implementation": "reference"}
    got = one_call(case, ids, **options)
    check(got, two_calls(case, ids, **options))
    assert all(y.dtype == jnp.bfloat16 for y in got[0])
    y = selective_scan_bidirectional(**case, segment_ids=ids, delta_softplus=True, **options)
    check(y, got[0])


def test_a_wrong_argument_is_named_with_its_direction():
    case, ids = paired()
    with pytest.raises(ValueError, match=r"backward direction: A has shape \(6,\)"):
        one_call(case | {"A": (case["A"][0], jnp.zeros(6))}, ids)
    with pytest.raises(TypeError, match="forward direction: z has dtype int32"):
        one_call(case | {"z": case["u"][0].astype(int)}, ids)
    with pytest.raises(ValueError, match=r"sequence of 3, expected .* pair \(forward, backward\)"):
        one_call(case | {"u": case["u"] + case["u"][:1]}, ids)
