"""From patches to decoder-width tokens: pixel shuffle, LayerNorm, one linear (paper fig. 6)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import ModelConfig
from storm_jax.models.layers import LayerNorm, Linear
from storm_jax.parallel.sharding import reshape


class Projector(nnx.Module):
    """[B, F, N_v, D_v] -> [B, F, N, D] with N = N_v / shuffle^2."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.shuffle = config.projector.shuffle
        channels = config.vit.width * self.shuffle**2
        self.norm = (
            LayerNorm(channels, config.projector.norm_eps) if config.projector.norm else None
        )
        axes = (None, "embed")
        self.linear = Linear((channels,), (config.decoder.width,), axes, bias=True, rngs=rngs)

    def __call__(self, x_BFND: jax.Array) -> jax.Array:
        x = pixel_shuffle(x_BFND, self.shuffle)
        return self.linear(x if self.norm is None else self.norm(x))


def pixel_shuffle(x_BFND: jax.Array, factor: int) -> jax.Array:
    """Concatenates the channels of each factor x factor window of patches.

    The output cell (i, j) holds, for factor 2, the patches (2i, 2j), (2i, 2j+1), (2i+1, 2j),
    (2i+1, 2j+1) in this order; a grid that the factor does not divide is padded with zeros at its
    end (VILA's `mlp_downsample`).
    """
    B, F, N, D = x_BFND.shape
    side = math.isqrt(N)
    cells = math.ceil(side / factor)
    if cells * factor != side:
        x = reshape(x_BFND, B, F, side, side, D)
        more = (0, cells * factor - side)
        x_BFND = jnp.pad(x, ((0, 0), (0, 0), more, more, (0, 0)))
    x = reshape(x_BFND, B, F, cells, factor, cells, factor, D).transpose(0, 1, 2, 4, 3, 5, 6)
    return reshape(x, B, F, cells * cells, factor * factor * D)
