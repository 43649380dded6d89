"""Functions of layers against float64."""

import jax.numpy as jnp
import numpy as np

from storm_jax.models.layers import gelu


def test_gelu():
    """Against the tanh form in float64."""
    x = np.linspace(-30, 30, 100_001)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    expected = 0.5 * x * (1 + np.tanh(inner))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), expected, rtol=2e-6, atol=1e-7)
