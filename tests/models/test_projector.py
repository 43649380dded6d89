"""Pixel shuffle, norm and linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from storm_jax.models.projector import Projector, pixel_shuffle
from tests.models.references import flat_square, with_params
from tests.tiny import tiny_model

torch = pytest.importorskip("torch")


def test_order_of_an_even_grid():
    """Windows row by row, in each window row by row, as VILA does."""
    x = jnp.arange(16.0).reshape(1, 1, 16, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, 0], expected)


def test_channels_of_a_patch_stay_together():
    x = jnp.asarray([[[[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]]])
    np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, 0], [np.arange(1, 13)])


def test_an_odd_grid_is_padded_at_its_end():
    x = jnp.arange(1.0, 10.0).reshape(1, 1, 9, 1)
    expected = [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]
    np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, 0], expected)


def test_a_window_of_three_and_no_window():
    x = jnp.arange(36.0).reshape(1, 1, 36, 1)
    first = [0, 1, 2, 6, 7, 8, 12, 13, 14]
    np.testing.assert_array_equal(pixel_shuffle(x, 3)[0, 0, 0], first)
    np.testing.assert_array_equal(pixel_shuffle(x, 1), x)


@pytest.mark.parametrize("grid", [4, 5])
@pytest.mark.parametrize("norm", [True, False])
def test_projector_is_shuffle_norm_linear_of_torch(grid, norm):
    config = tiny_model(
        vit=dict(image_size=3 * grid, position_grid=grid), projector=dict(norm=norm, norm_eps=1e-3)
    )
    B, F, D_v, D = 2, 3, config.vit.width, config.decoder.width
    torch.manual_seed(0)
    layer_norm, linear = torch.nn.LayerNorm(4 * D_v, eps=1e-3), torch.nn.Linear(4 * D_v, D)
    params = {"linear": {"weight": linear.weight.detach().numpy().T}}
    params["linear"]["bias"] = linear.bias.detach().numpy()
    if norm:
        torch.nn.init.normal_(layer_norm.weight)
        torch.nn.init.normal_(layer_norm.bias)
        params["norm"] = {
            "scale": layer_norm.weight.detach().numpy(),
            "bias": layer_norm.bias.detach().numpy(),
        }
    x = torch.randn(B * F, grid, grid, D_v)
    cells = -(-grid // 2)
    shuffled = flat_square(x)
    with torch.no_grad():
        expected = linear(layer_norm(shuffled) if norm else shuffled)
    expected = expected.numpy().reshape(B, F, cells * cells, D)

    @jax.jit
    def project(params, x):
        return with_params(lambda: Projector(config, nnx.Rngs(0)), params)(x)

    got = project(params, x.numpy().reshape(B, F, grid * grid, D_v))
    assert config.frame_tokens == cells * cells
    np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)
