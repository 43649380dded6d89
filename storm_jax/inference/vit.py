"""The vision transformer as it is used to answer: norms and constants folded into its matrices.

`models.vit.VitBlock.folded` derives the same from the parameters at every call; here it is done
once, layer by layer, and biases have the dtype of the activations. Then each matrix product, its
bias, its activation and the residual it is added to are one cuBLASLt call. XLA makes them one only
where it does not consider its own Triton products (`compiler_options`).

A layer may also be kept in float8, and then every product has float8 inputs with one scale. The
scales follow from the weights: a standardised row, and what is made of it, cannot be larger than
`float8.largest_output`. So nothing is measured on the way and nothing can be cut off, and GELU's
result leaves its product in float8.

Axis letters: B frames, N patches, D width, H heads, C head dim, M hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import VitConfig
from storm_jax.inference import float8
from storm_jax.inference.float8 import ScaledMap, scaled_map
from storm_jax.models.attention import self_attention
from storm_jax.models.layers import standardise
from storm_jax.models.storm import Params
from storm_jax.models.vit import Vit
from storm_jax.parallel import sharding


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """For `jax.jit` of programs whose large products are to be cuBLASLt calls."""
    gpu = mesh.devices.flat[0].platform == "gpu"
    return {"xla_gpu_enable_triton_gemm": False} if gpu else {}


class VitLayer(NamedTuple):
    """Matrices [inputs, outputs] and biases [outputs] of one layer, in the model's dtype."""

    query: jax.Array
    query_bias: jax.Array
    key: jax.Array  # a bias of the keys would change nothing
    value: jax.Array  # that of the values is in `out_bias`
    out: jax.Array
    out_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    down: jax.Array
    down_bias: jax.Array


class Float8Layer(NamedTuple):
    """The same with matrices in float8, for inputs in float8."""

    query: ScaledMap
    key: ScaledMap
    value: ScaledMap
    attended: jax.Array  # float32 [], by which attention's result is multiplied for float8
    out: ScaledMap
    up: ScaledMap
    activated: jax.Array  # float32 [], likewise GELU's
    down: ScaledMap


def prepare(
    params: Params, config: VitConfig, dtype: jnp.dtype, *, small: bool = False
) -> tuple[Params, tuple[VitLayer | Float8Layer, ...]]:
    """Folds the layers of `params` of a `models.vit.Vit`.

    Args:
      dtype: the model's.
      small: the products are to be float8's.

    Returns:
      The parameters that are used as they are (patches, positions, the last norm), and the layers,
      a `VitLayer` or a `Float8Layer` each.
    """
    D = config.width
    blocks = params["blocks"]["layers"]

    @jax.jit
    def fold(index, blocks) -> VitLayer | Float8Layer:
        # Whole: frames are split over all devices, heads and hidden units are not.
        layer = jax.tree.map(
            lambda x: sharding.shard(x[index].astype(jnp.float32), *[None] * (x.ndim - 1)), blocks
        )
        one, two = layer["norm1"], layer["norm2"]

        def after(norm, linear):
            """Weight and bias that act on (x - mean) / std as `linear` acts on norm(x)."""
            w = linear["weight"].reshape(D, -1)
            moved = jnp.einsum("d,de->e", norm["bias"], w, precision="highest")
            return norm["scale"][:, None] * w, moved + linear["bias"].reshape(-1)

        query, query_bias = after(one, layer["query"])
        key, _ = after(one, layer["key"])
        value, value_bias = after(one, layer["value"])
        out = layer["out"]["weight"].reshape(-1, D)
        moved = jnp.einsum("e,ed->d", value_bias, out, precision="highest")
        up, up_bias = after(two, layer["up"])
        folded = VitLayer(
            query, query_bias, key, value, out, layer["out"]["bias"] + moved,
            up, up_bias, layer["down"]["weight"], layer["down"]["bias"],
        )  # fmt: skip
        if small:
            return _in_float8(folded, dtype)
        return jax.tree.map(lambda x: sharding.shard(x.astype(dtype), *[None] * x.ndim), folded)

    count = config.layers + 1 + config.output_layer
    layers = tuple(fold(np.int32(index), blocks) for index in range(count))
    return {name: tree for name, tree in params.items() if name != "blocks"}, layers


def _in_float8(layer: VitLayer, dtype: jnp.dtype) -> Float8Layer:
    """A layer in float32, rounded."""
    standard = float8.standardised_scale(layer.query.shape[0])
    # Attention takes means of the values, and |GELU(x)| <= |x|.
    attended = float8.fitting_scale(float8.largest_output(layer.value))
    activated = float8.fitting_scale(float8.largest_output(layer.up, layer.up_bias))
    return Float8Layer(
        scaled_map(layer.query, layer.query_bias, standard, dtype),
        scaled_map(layer.key, None, standard, dtype),
        scaled_map(layer.value, None, standard, dtype),
        attended,
        scaled_map(layer.out, layer.out_bias, attended, dtype),
        scaled_map(layer.up, layer.up_bias, standard, dtype),
        activated,
        scaled_map(layer.down, layer.down_bias, activated, dtype),
    )


def encode(
    vit: Vit,
    layers: tuple[VitLayer | Float8Layer, ...],
    frames_BHWC: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Every frame alone: uint8 [B, side, side, 3] -> [B, N, D].

    Args:
      vit: with the parameters that `prepare` returned; its blocks are not used.
      layers: of `prepare`.
      frames_BHWC: whole, or split over devices along B.
    """
    x_BND = vit.patches(frames_BHWC, dtype)
    heads = vit.config.heads
    for layer in layers:
        if isinstance(layer, Float8Layer):
            x_BND = _float8_layer(layer, x_BND, heads, vit.config.norm_eps)
        else:
            x_BND = _layer(layer, x_BND, heads, vit.config.norm_eps)
    return x_BND if vit.norm is None else vit.norm(x_BND)


def _layer(layer: VitLayer, x_BND: jax.Array, H: int, eps: float) -> jax.Array:
    B, N, D = x_BND.shape
    h = standardise(x_BND, eps)
    products = h @ layer.query + layer.query_bias, h @ layer.key, h @ layer.value
    q, k, v = (sharding.reshape(y, B, N, H, D // H) for y in products)
    h = self_attention(q, k, v, causal=False, scale=q.shape[-1] ** -0.5)
    x_BND = x_BND + (sharding.reshape(h, B, N, D) @ layer.out + layer.out_bias)
    h = standardise(x_BND, eps) @ layer.up + layer.up_bias
    return x_BND + (jax.nn.gelu(h, approximate=True) @ layer.down + layer.down_bias)


def _float8_layer(layer: Float8Layer, x_BND: jax.Array, H: int, eps: float) -> jax.Array:
    B, N, D = x_BND.shape
    dtype = x_BND.dtype
    # Products keep two axes throughout: XLA joins nothing across a change of shape.
    x_TD = x_BND.reshape(B * N, D)
    scale = float8.standardised_scale(D)

    def standardised(x_TD):
        return float8.rounded(standardise(x_TD.astype(jnp.float32), eps), scale)

    h = standardised(x_TD)
    maps = layer.query, layer.key, layer.value
    q, k, v = (linear(h, dtype).reshape(B, N, H, D // H) for linear in maps)
    h = self_attention(q, k, v, causal=False, scale=q.shape[-1] ** -0.5).reshape(B * N, D)
    x_TD = x_TD + layer.out(float8.rounded(h, layer.attended), dtype)
    h = jax.nn.gelu(layer.up(standardised(x_TD), dtype), approximate=True)
    x_TD = x_TD + layer.down(float8.rounded(h, layer.activated), dtype)
    return x_TD.reshape(B, N, D)
