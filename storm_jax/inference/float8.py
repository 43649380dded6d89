"""Products of two float8 (e4m3, arXiv 2209.05433) matrices.

A Hopper GPU computes them twice as fast as products of bfloat16. XLA makes one of them one cuBLASLt
call where both matrices have two axes with the summed one last, and takes into that call what
follows: a scale, where it is one number and no constant of the program; then a bias, a GELU or a
residual, where they have the product's dtype; then a scale, the limits of float8 and the conversion
to it. On other devices the operands are widened and the numbers are the same.

A number in e4m3 has 4 significant bits as long as it is within 2**14 of the largest, so how finely
scales are chosen matters little, and one that is too small costs nothing until its numbers fall
below that. Scales that are powers of two add no rounding in any dtype.

Axis letters: T tokens, I inputs, O outputs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0
# Rounding makes a number larger by this factor at most.
_GROWTH = 1 + 2**-4
_SMALL = 1e-30  # zeros have a scale too


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is not above x, float32; x > 0 and no subnormal number."""
    # The exponent alone: a power function need not be exact.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def fitting_scale(bound: jax.Array | float) -> jax.Array:
    """A power of two, float32, that keeps within float8 what is at most `bound`."""
    return power_below(LARGEST / jnp.maximum(jnp.asarray(bound, jnp.float32), _SMALL))


def rounded(x: jax.Array, scale: jax.Array | float) -> jax.Array:
    """x * scale in float8; what is beyond its range becomes its largest number.

    Args:
      scale: a power of two, so that it can be in the dtype of x.
    """
    return jnp.clip(x * jnp.asarray(scale, x.dtype), -LARGEST, LARGEST).astype(DTYPE)


def by_token(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds every token with a scale of its own, so that none depends on those beside it.

    Returns:
      float8 [T, I], and float32 [T, 1] that these numbers are to be multiplied by.
    """
    # All in the dtype of x: XLA would keep what it computes x from in float32 between its passes.
    scale = fitting_scale(jnp.max(jnp.abs(x_TI), axis=1, keepdims=True))
    return (x_TI * scale.astype(x_TI.dtype)).astype(DTYPE), 1 / scale


def product(x_TI: jax.Array, weight_OI: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[T, O] in `dtype` of two float8 matrices; Hopper GPUs sum with some 14 bits in between."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_TI, weight_OI, dims, preferred_element_type=dtype)


class ScaledMap(NamedTuple):
    """x @ w + b for inputs in float8 of one scale that is known beforehand."""

    weight: jax.Array  # float8 [O, I]
    scale: jax.Array  # float32 [], a power of two: of the product
    bias: jax.Array | None  # [O], in the model's dtype

    def __call__(self, x_TI: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """float8 [T, I] -> [T, O] in the model's dtype."""
        y = product(x_TI, self.weight, dtype) * self.scale.astype(dtype)
        return y if self.bias is None else y + self.bias


def scaled_map(
    weight_IO: jax.Array, bias: jax.Array | None, scale: jax.Array | float, dtype: jnp.dtype
) -> ScaledMap:
    """Stores a map in float8.

    Args:
      weight_IO: float32, rounded with one scale for all of it.
      bias: float32 [O]; None: there is none.
      scale: that the inputs will have been multiplied by.
    """
    own = fitting_scale(jnp.max(jnp.abs(weight_IO)))
    return ScaledMap(
        rounded(weight_IO.T, own),
        1 / (own * scale),
        None if bias is None else bias.astype(dtype),
    )


def standardised_scale(width: int) -> float:
    """A scale for rows (y - mean) / std of `width` numbers: none is above sqrt(width)."""
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(width)))


def largest_output(weight_IO: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """No output of standardised inputs is above it, by Cauchy and Schwarz; float32.

    Args:
      weight_IO: float32, and both it and the inputs may be rounded to float8.
      bias: float32 [O].
    """
    lengths = jnp.sqrt(jnp.sum(weight_IO * weight_IO, axis=0))
    most = math.sqrt(weight_IO.shape[0]) * _GROWTH**2
    return jnp.max(most * lengths + jnp.abs(bias))
