"""The vision transformer as it is used to answer: norms and constants folded into its matrices.

`models.vit.VitBlock.folded` derives the same from the parameters at every call; here it is done
once, layer by layer, and biases have the dtype of the activations. Then each matrix product, its
bias, its activation and the residual it is added to are one cuBLASLt call. XLA makes them one only
where it does not consider its own Triton products (`compiler_options`).

Axis letters: B frames, N patches, D width, H heads, C head dim, M hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import VitConfig
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


def prepare(params: Params, config: VitConfig, dtype: jnp.dtype) -> tuple[Params, tuple]:
    """Folds the layers of `params` of a `models.vit.Vit`.

    Returns:
      The parameters that are used as they are (patches, positions, the last norm), and the layers,
      a `VitLayer` each.
    """
    D = config.width
    blocks = params["blocks"]["layers"]

    @jax.jit
    def fold(index, blocks) -> VitLayer:
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
        return jax.tree.map(lambda x: sharding.shard(x.astype(dtype), *[None] * x.ndim), folded)

    count = config.layers + 1 + config.output_layer
    layers = tuple(fold(np.int32(index), blocks) for index in range(count))
    return {name: tree for name, tree in params.items() if name != "blocks"}, layers


def encode(
    vit: Vit, layers: tuple[VitLayer, ...], frames_BHWC: jax.Array, dtype: jnp.dtype
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
