"""Linear maps of the decoder as it answers: matrices in the model's dtype or in eight bits.

A matrix lies with its output channels first: for one token it is read once, in the order of memory.

Axis letters: T tokens, I inputs, O outputs.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from storm_jax.inference import float8
from storm_jax.models.layers import product
from storm_jax.parallel import sharding
from storm_kernels import matvec

Stored = Literal["int8", "fp8"]
_STORED = {"int8": jnp.int8, "fp8": float8.DTYPE}
# Products of fewer tokens are bound by reading the matrix: their inputs are not rounded too.
FEWEST_TOKENS = 32


class Float8Matrix(NamedTuple):
    """A matrix in float8 whose inputs are rounded to float8 too where there are many."""

    stored: qwix.QArray


Matrix = jax.Array | qwix.QArray | Float8Matrix


def outputs_first(weight: jax.Array, contracted: int) -> jax.Array:
    """A matrix whose first `contracted` axes are summed over, with these axes last."""
    return jnp.transpose(weight, (*range(contracted, weight.ndim), *range(contracted)))


def quantized(weight: jax.Array, contracted: int, kind: Stored) -> qwix.QArray:
    """A matrix in eight bits with one float32 scale for each output channel.

    Args:
      weight: its last `contracted` axes are summed over.
    """
    channels = tuple(range(weight.ndim - contracted))
    return qwix.quantize(weight, _STORED[kind], channelwise_axes=channels, scale_dtype=jnp.float32)


def apply(
    x: jax.Array, weight: Matrix, contracted: int, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x @ weight over the last `contracted` axes of both.

    A quantized matrix is widened as it is read, and the result scaled. For a single token XLA's
    sums read it twice as fast as its products do. For many tokens and a `Float8Matrix` x is rounded
    to float8, token by token, and nothing is widened.

    Args:
      dtype: of the result; None: that of x.
    """
    n = contracted
    tokens = math.prod(x.shape[: x.ndim - n])
    if isinstance(weight, Float8Matrix) and tokens >= FEWEST_TOKENS:
        return _in_float8(x, weight.stored, n).astype(dtype or x.dtype)
    values, scale = _parts(weight, contracted)
    outputs = values.ndim - n
    if scale is None:
        return _product(x, values, n, dtype)
    if tokens == 1:
        # Without the barrier x would be computed again for every output channel.
        x = jax.lax.optimization_barrier(x)
        wide = x.reshape(x.shape[x.ndim - n :]).astype(jnp.float32) * values.astype(jnp.float32)
        y = jnp.sum(wide, axis=tuple(range(outputs, values.ndim)))
        y = jnp.expand_dims(y, tuple(range(x.ndim - n)))
    else:
        y = _product(x, values.astype(x.dtype), n, jnp.float32)
    return (y * scale).astype(dtype or x.dtype)


def kernel_serves(x: jax.Array, weight: Matrix, contracted: int) -> bool:
    """Whether `apply_to_token` serves such a product: one token, on one GPU."""
    mesh = sharding.active_mesh()
    if x.size != math.prod(x.shape[x.ndim - contracted :]) or (mesh is not None and mesh.size > 1):
        return False
    values, _ = _parts(weight, contracted)
    return matvec.unsupported(x.reshape(-1), values.reshape(-1, x.size)) is None


def apply_to_token(
    x: jax.Array,
    weight: Matrix,
    contracted: int,
    *,
    norm: matvec.Norm | None = None,
    bias: jax.Array | None = None,
    activation: str = "",
    residual: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`apply` to one token, and what stands around it, in one kernel: see `matvec.matvec`.

    Args:
      x: leading axes of one, then those that are summed over.
      activation: with one, the first axis of the weight is that of the gate and what it multiplies.

    Returns:
      Leading axes as x has them, then those of the outputs.
    """
    values, scale = _parts(weight, contracted)
    lead = x.shape[: x.ndim - contracted]
    outputs = values.shape[: values.ndim - contracted]
    rows = (2, -1) if activation else (-1,)
    operands = {
        "x_C": x.reshape(-1),
        "w_RC": values.reshape(*rows, x.size),
        "scale_R": None if scale is None else scale.reshape(rows),
        "bias_R": None if bias is None else bias.reshape(rows),
        "residual_R": None if residual is None else residual.reshape(-1),
        "weight": None if norm is None else norm.weight,
    }
    there = {name: value for name, value in operands.items() if value is not None}

    def run(*arrays):
        given = dict(zip(there, arrays, strict=True))
        own = None if norm is None else norm._replace(weight=given.pop("weight"))
        return matvec.matvec(**given, norm=own, activation=activation, dtype=dtype)

    axes = tuple((None,) * value.ndim for value in there.values())
    y = sharding.per_device(run, axes, (None,), checked=False)(*there.values())
    return y.reshape(*lead, *outputs[1 if activation else 0 :])


def _parts(weight: Matrix, contracted: int) -> tuple[jax.Array, jax.Array | None]:
    """The numbers as they are stored, and the scales of the output channels."""
    if isinstance(weight, Float8Matrix):
        weight = weight.stored
    if not isinstance(weight, qwix.QArray):
        return weight, None
    summed = range(weight.ndim - contracted, weight.ndim)
    return weight.qvalue, jnp.squeeze(weight.scale, axis=tuple(summed))


def _product(x: jax.Array, values: jax.Array, contracted: int, dtype) -> jax.Array:
    n = contracted
    outputs = values.ndim - n
    dims = tuple(range(x.ndim - n, x.ndim)), tuple(range(outputs, values.ndim))
    return product(x, values, dims, lambda x, w: (*x[:-n], *w[:outputs]), dtype=dtype)


def _in_float8(x: jax.Array, weight: qwix.QArray, contracted: int) -> jax.Array:
    """`apply` with float8 on both sides; float32."""
    lead, inputs = x.shape[: x.ndim - contracted], math.prod(x.shape[x.ndim - contracted :])
    outputs = weight.shape[: weight.ndim - contracted]
    x_TI, scale_T1 = float8.by_token(x.reshape(math.prod(lead), inputs))
    weight_OI = weight.qvalue.reshape(math.prod(outputs), inputs)
    # The product in x's dtype: half of what would be written, and read again, in float32.
    y_TO = float8.product(x_TI, weight_OI, x.dtype).astype(jnp.float32)
    return (y_TO * scale_T1 * weight.scale.reshape(-1)).reshape(*lead, *outputs)
