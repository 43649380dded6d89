"""Gradients: finite differences, both forms of the XLA scan, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from storm_kernels.selective_scan import selective_scan, xla_chunk
from tests.kernels import scan_suite
from tests.kernels.scan_cases import inputs


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("xla", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_finite_differences_in_float64(implementation, reverse):
    with jax.enable_x64(True):
        case = inputs(
            1, batch=2, length=9, channels=4, state=2, groups=2, dtype=np.float64, segments=True,
            initial_state=True,
        )  # fmt: skip
        operands, ids = scan_suite.split(case)

        @jax.jit
        def scan(operands):
            return selective_scan(
                **operands, segment_ids=ids, delta_softplus=True, reverse=reverse,
                implementation=implementation, return_final_state=True, chunk_size=4,
            )  # fmt: skip

        check_grads(scan, (operands,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "reverse", "segments"),
    [
        ("steps", False, True),
        ("steps", True, False),
        ("associative", False, True),
        ("associative", True, True),
        pytest.param("associative", True, False, marks=pytest.mark.slow),
    ],
)
def test_both_forms_of_xla_in_float64(form, reverse, segments, monkeypatch):
    """The recurrence inside a chunk, step by step and at once, whatever the platform prefers."""
    platforms = (jax.default_backend(),) if form == "associative" else ()
    monkeypatch.setattr(xla_chunk, "ASSOCIATIVE_PLATFORMS", platforms)
    jax.clear_caches()
    with jax.enable_x64(True):
        case = inputs(3, groups=2, dtype=np.float64, segments=segments, initial_state=True)
        scan_suite.compare("xla", case, tolerance=1e-12, reverse=reverse, chunk_size=5)
    jax.clear_caches()


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
