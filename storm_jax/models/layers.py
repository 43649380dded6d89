"""Linear maps, norms, embeddings and rotary positions: what every part is made of.

Parameters are float32; a layer computes in the dtype of its input, norms in float32. Each parameter
carries the logical names of its axes, which `parallel.sharding` lays out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from storm_jax.config import Remat
from storm_jax.parallel import sharding
from storm_jax.parallel.sharding import Axes


def parameter(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A trainable array with a logical name for each axis."""
    assert value.ndim == len(axes), (value.shape, axes)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """x @ w + b over the last axes of x.

    Weights start normal with variance 1 / inputs, biases at zero. The bias is added in float32, so
    that its gradient, a sum over all tokens, is one in float32.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.contracted = len(inputs)
        self.axes = axes
        scale = 1 / math.sqrt(math.prod(inputs))
        weight = scale * jax.random.normal(rngs.params(), inputs + outputs)
        self.weight = parameter(weight, *axes)
        if bias:
            self.bias = parameter(jnp.zeros(outputs), *axes[len(inputs) :])
        self.has_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x, self.whole_weight(x.dtype))
        return add_bias(y, self.whole_bias()).astype(x.dtype) if self.has_bias else y

    def product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """x @ weight over the last axes of x, in the dtype of x; `weight` has this map's axes."""
        n = self.contracted
        dims = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        # Batch axes keep their layout; a contraction over a split axis is summed here.
        return product(x, weight, dims, lambda x, w: (*x[: len(x) - n], *w[n:]))

    def whole_weight(self, dtype: jnp.dtype) -> jax.Array:
        """The weight as it is used, see `sharding.gathered`."""
        return sharding.gathered(self.weight[...].astype(dtype), self.axes)

    def whole_bias(self) -> jax.Array:
        """The bias as it is used, float32."""
        bias = self.bias[...].astype(jnp.float32)
        return sharding.gathered(bias, self.axes[self.contracted :])

    def with_constant(self, x: jax.Array, constant: jax.Array) -> jax.Array:
        """The result for x + constant, which has the contracted axes and is float32."""
        n = self.contracted
        w = self.whole_weight(x.dtype)
        dims = (tuple(range(n)), tuple(range(n)))
        exact = w.astype(jnp.float32)
        moved = product(constant, exact, dims, lambda _, w: w[n:], exact=True)
        return add_bias(self.product(x, w), moved + self.whole_bias()).astype(x.dtype)

    def after(self, norm: "LayerNorm", dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Weight and bias that act on `norm.normalised(x)` as this map acts on `norm(x)`.

        (y s + t) w + b = y (s w) + (t w + b): the gradients of s and t then come from that of the
        weight, and not from two more sums over all tokens. For one contracted axis.

        Returns:
          The weight in `dtype`, the bias in float32.
        """
        w = self.whole_weight(dtype)
        scale = norm.scale[...].astype(jnp.float32).reshape(-1, *[1] * (w.ndim - 1))
        shift = norm.bias[...].astype(jnp.float32)
        moved = product(shift, w.astype(jnp.float32), ((0,), (0,)), lambda _, w: w[1:], exact=True)
        return (w * scale).astype(dtype), moved + self.whole_bias()

    def to_channels_first(self, x_BLD: jax.Array) -> jax.Array:
        """[B, L, D] -> [*outputs, B, L], for one contracted axis and no bias.

        The product is written in this order: for B = 1, [B, outputs, L] of it costs nothing.
        """
        w = sharding.gathered(self.weight[...].astype(x_BLD.dtype), self.axes)
        return product(w, x_BLD, ((0,), (2,)), lambda w, x: (*w[1:], *x[:2]))

    def from_channels_first(self, x_BDL: jax.Array) -> jax.Array:
        """[B, D, L] -> [B, L, *outputs], for one contracted axis and no bias."""
        w = sharding.gathered(self.weight[...].astype(x_BDL.dtype), self.axes)
        return product(x_BDL, w, ((1,), (0,)), lambda x, w: (x[0], x[2], *w[1:]))


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias, whose axes are the last ones of y; float32.

    The gradient of the bias is the float32 sum of y's gradient in the dtype of y. Left to itself,
    XLA writes that gradient to memory once in float32 for the sum and once in the dtype of y.
    """
    return y.astype(jnp.float32) + bias


def _add_bias_fwd(y, bias):
    return add_bias(y, bias), (jnp.zeros((), y.dtype), bias)


def _add_bias_bwd(residuals, gradient):
    like, bias = residuals
    dy = jax.lax.optimization_barrier(gradient.astype(like.dtype))
    summed = tuple(range(dy.ndim - bias.ndim))
    return dy, jnp.sum(dy, axis=summed, dtype=jnp.float32)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def product(
    left: jax.Array,
    right: jax.Array,
    contracted,
    out_spec,
    *,
    exact: bool = False,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`dot_general` without batch axes; `out_spec` of both partitions is the result's.

    Args:
      exact: with all digits of float32.
      dtype: of the result; None: that of the operands.
    """
    out = None
    if sharding.active_mesh() is not None:
        specs = [tuple(jax.typeof(x).sharding.spec) for x in (left, right)]
        out = PartitionSpec(*out_spec(*specs))
    precision = "highest" if exact else None
    dims = (contracted, ((), ()))
    return jax.lax.dot_general(
        left,
        right,
        dims,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out,
    )


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (`jax.nn.gelu(approximate=True)`) of float32, for a bfloat16 result.

    (1 + tanh z) / 2 is the logistic function of 2 z, which takes a GPU fewer instructions.
    """
    return x * jax.nn.sigmoid(x * (2 * math.sqrt(2 / math.pi)) * (1 + 0.044715 * x * x))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, plus_one: bool) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32; see `RMSNorm`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (1 + scale if plus_one else scale)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * w, or * (1 + w) with `plus_one` (Gemma stores w around zero)."""

    def __init__(self, width: int, eps: float, *, plus_one: bool = False):
        self.eps = eps
        self.plus_one = plus_one
        self.scale = parameter(jnp.zeros(width) if plus_one else jnp.ones(width), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps, plus_one=self.plus_one)


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std over the last axis, in float32; in the dtype of x. See `LayerNorm`."""
    return _standardised(x, eps).astype(x.dtype)


def _standardised(x: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """(x - mean) / std * w + b."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = parameter(jnp.ones(width), None)
        self.bias = parameter(jnp.zeros(width), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _standardised(x, self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

    def normalised(self, x: jax.Array) -> jax.Array:
        """(x - mean) / std, for a map that has w and b in it (`Linear.after`)."""
        return standardise(x, self.eps)


class Embedding(nnx.Module):
    """A table of vectors, looked up by token id."""

    def __init__(self, vocab_size: int, width: int, scale: float, *, rngs: nnx.Rngs):
        table = scale * jax.random.normal(rngs.params(), (vocab_size, width))
        self.table = parameter(table, "vocab", "embed")

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, S] -> [B, S, D] in `dtype`."""
        table = sharding.gathered(self.table[...].astype(dtype), ("vocab", "embed"))
        mesh = sharding.active_mesh()
        out = None
        if mesh is not None:
            out = PartitionSpec(*jax.typeof(ids).sharding.spec, None)
        return table.at[ids].get(mode="clip", out_sharding=out)


class Head(nnx.Module):
    """The matrix of `vocabulary_scores` where it is not the embedding's."""

    def __init__(self, width: int, vocab_size: int, *, rngs: nnx.Rngs):
        weight = jax.random.normal(rngs.params(), (width, vocab_size)) / math.sqrt(width)
        self.weight = parameter(weight, "embed", "vocab")


def vocabulary_scores(x_BSD: jax.Array, weight: jax.Array, *, transposed: bool) -> jax.Array:
    """Scores of every token, float32 [B, S, V].

    Args:
      weight: [D, V] of a `Head`, or with `transposed` [V, D] of an `Embedding`.
    """
    axes = ("vocab", "embed") if transposed else ("embed", "vocab")
    contract = 1 if transposed else 0
    w = sharding.gathered(weight.astype(x_BSD.dtype), axes)
    out = None
    if sharding.active_mesh() is not None:
        lead = jax.typeof(x_BSD).sharding.spec[:2]
        out = PartitionSpec(*lead, jax.typeof(w).sharding.spec[1 - contract])
    dims = (((2,), (contract,)), ((), ()))
    return jax.lax.dot_general(x_BSD, w, dims, preferred_element_type=jnp.float32, out_sharding=out)


def rotary(positions: jax.Array, head_dim: int, theta: float, scaling: float = 1.0):
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), halves convention.

    Args:
      positions: int32 [B, S].
      theta: base of the wavelengths.
      scaling: positions are divided by it (Gemma 3, global layers).

    Returns:
      (cos, sin), float32 [B, S, head_dim / 2] each.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / scaling / theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BSHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (x[c], x[c + C/2]) by its angle, in float32."""
    a, b = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHC.dtype)


KEEP_ALL = Remat()


def rematerialised(f: Callable, remat: Remat) -> Callable:
    """`f`, the body of a scan, whose backward pass computes again what `remat` says."""
    offered = jax.checkpoint_policies
    match remat.policy:
        case "none":
            return f
        case "dots":
            policy = offered.dots_with_no_batch_dims_saveable
        case "names":
            policy = offered.save_only_these_names(*remat.saved)
        case "offload":
            policy = offered.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=list(remat.saved),
                offload_src="device",
                offload_dst="pinned_host",
            )
        case "full":
            policy = offered.nothing_saveable
    # In a scan XLA cannot take what is computed again for what it has already.
    return jax.checkpoint(f, policy=policy, prevent_cse=False)


class Stack(nnx.Module):
    """`count` modules of one kind; their parameters carry a leading "layers" axis."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], count: int, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), count)
        self.layers = jax.vmap(lambda key: build(nnx.Rngs(key)))(keys)
        self.count = count

    def scan(self, body: Callable, x, xs=None, *, remat: Remat = KEEP_ALL):
        """Runs `x, y = body(module, x, xs[i])` for every module in order.

        Args:
          body: sees one unstacked module.
          x: carried array or tree.
          xs: tree with a leading axis of `count`, one slice a module, or None.
          remat: what the backward pass recomputes of each module.

        Returns:
          (x, ys) with the ys stacked.
        """
        graph, state = nnx.split(self.layers)

        def step(x, inputs):
            layer_state, slice_ = inputs
            return body(nnx.merge(graph, layer_state), x, slice_)

        return jax.lax.scan(rematerialised(step, remat), x, (state, xs))
