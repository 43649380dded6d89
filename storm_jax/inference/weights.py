"""Parameters as they are used to answer: layer by layer, matrices of one input side by side.

A scan over stacked layers would copy each layer's weights out of the stack, which for one token
costs more than the layer itself. Queries, keys and values are one matrix, and so are gate and up:
half as many, larger products.

Axis letters beside the project's own: G query heads that share a key-value head, M hidden units.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from storm_jax.config import ConfigError, ModelConfig
from storm_jax.inference import float8
from storm_jax.inference import vit as vits
from storm_jax.inference.vit import Float8Layer, VitLayer
from storm_jax.models.layers import product
from storm_jax.models.storm import Params
from storm_jax.parallel import sharding

Quantization = Literal["", "int8", "fp8", "fp8_dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = ("", "int8", "fp8", "fp8_dynamic")
Stored = Literal["int8", "fp8"]
_STORED = {"int8": jnp.int8, "fp8": float8.DTYPE}
# Products of fewer tokens are bound by reading the matrix: their inputs are not rounded too.
FEWEST_TOKENS = 32


class Float8Matrix(NamedTuple):
    """A matrix in float8 whose inputs are rounded to float8 too where there are many."""

    stored: qwix.QArray


Matrix = jax.Array | qwix.QArray | Float8Matrix


class LayerWeights(NamedTuple):
    """One layer of the decoder; None where the family has no such parameter."""

    attention_norm: jax.Array  # [D]
    qkv: Matrix  # [D, K, G + 2, C]: the queries of a key-value head, its key, its value
    qkv_bias: jax.Array | None  # float32 [K, G + 2, C]
    query_norm: jax.Array | None  # [C]
    key_norm: jax.Array | None  # [C]
    out: Matrix  # [K, G, C, D]
    attention_post_norm: jax.Array | None  # [D]
    mlp_norm: jax.Array  # [D]
    gate_up: Matrix  # [D, 2, M]
    down: Matrix  # [M, D]
    mlp_post_norm: jax.Array | None  # [D]


class Weights(NamedTuple):
    """All parameters of a model."""

    encoder: Params  # projector and temporal encoder, as `StormModel` takes them, rest of the ViT
    vit: tuple[VitLayer | Float8Layer, ...]
    embedding: jax.Array  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: jax.Array  # [D]
    head: Matrix | None  # [D, V]; None: the embedding's


_AXES: dict[str, sharding.Axes] = {
    "qkv": (None, "kv_heads", None, None),
    "qkv_bias": ("kv_heads", None, None),
    "out": ("kv_heads", None, None, None),
    "gate_up": (None, None, "mlp"),
    "down": ("mlp", None),
}


def check_quantization(quantization: str, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError: there is none of this name, or it is not for so many devices."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(repr(kind) for kind in QUANTIZATIONS)
        raise ConfigError(f"quantization={quantization!r} is not known: take one of {known}")
    if quantization == "fp8_dynamic" and mesh.size > 1:
        raise ConfigError(
            f"quantization=fp8_dynamic is for one device, but the model is on {mesh.size}: show one"
            " to this process (CUDA_VISIBLE_DEVICES=0), or take quantization=fp8"
        )


def prepare(
    params: Params,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    quantization: Quantization = "",
) -> Weights:
    """Rearranges the parameters of a model.

    The decoder's leave `params` one by one, so that no more than one of them is held twice.

    Args:
      params: of `StormModel`; they are used up.
      model: their configuration.
      mesh: the devices; matrices are split over "tensor" where it divides them.
      quantization: of the decoder's matrices, the head's included, one scale an output channel;
        "": they keep their dtype. The embedding keeps it, also where it is the head's matrix. With
        "fp8_dynamic" products of `FEWEST_TOKENS` tokens or more take float8 on both sides, the
        head's excepted, and the ViT's products do.

    Raises:
      ConfigError: an unknown kind, or "fp8_dynamic" on several devices.
    """
    check_quantization(quantization, mesh)
    config, decoder = model.decoder, params["decoder"]
    blocks = decoder.pop("blocks")["layers"]
    K, G = config.kv_heads, config.heads // config.kv_heads

    def each(name: str, make: Callable[..., jax.Array], *sources, contracted: int = 0) -> list:
        """A layer's arrays made of the stacked `sources`, which are given up."""

        @jax.jit
        def one(layer, *stacked):
            # Whole for a moment: what is put together may be split differently.
            parts = (jax.lax.dynamic_index_in_dim(x, layer, 0, False) for x in stacked)
            made = make(*(sharding.shard(x, *[None] * x.ndim) for x in parts))
            return _stored(made, _AXES.get(name, (None,)), contracted, quantization)

        stacked = [blocks[source].pop(leaf) for source, leaf in sources]
        return [one(layer, *stacked) for layer in range(config.layers)]

    def norm(name: str) -> list:
        there = name in blocks
        return each(name, lambda x: x, (name, "scale")) if there else [None] * config.layers

    def heads(q, k, v):
        q = q.reshape(*q.shape[:-2], K, G, q.shape[-1])
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    qkv = ("query", "key", "value")
    with jax.set_mesh(mesh):
        rest, vit = vits.prepare(
            params["vit"], model.vit, jnp.dtype(model.dtype), small=quantization == "fp8_dynamic"
        )
        bias: list = [None] * config.layers
        if config.qkv_bias:
            bias = each("qkv_bias", heads, *((name, "bias") for name in qkv))
        fields = {
            "attention_norm": norm("attention_norm"),
            "qkv": each("qkv", heads, *((name, "weight") for name in qkv), contracted=1),
            "qkv_bias": bias,
            "query_norm": norm("query_norm"),
            "key_norm": norm("key_norm"),
            "out": each(
                "out", lambda w: w.reshape(K, G, *w.shape[1:]), ("out", "weight"), contracted=3
            ),
            "attention_post_norm": norm("attention_post_norm"),
            "mlp_norm": norm("mlp_norm"),
            "gate_up": each(
                "gate_up",
                lambda gate, up: jnp.stack([gate, up], axis=1),
                ("gate", "weight"),
                ("up", "weight"),
                contracted=1,
            ),
            "down": each("down", lambda w: w, ("down", "weight"), contracted=1),
            "mlp_post_norm": norm("mlp_post_norm"),
        }
        head = None
        if not config.tied_embeddings:
            kind: Quantization = "fp8" if quantization == "fp8_dynamic" else quantization
            store = jax.jit(lambda w: _stored(w, (None, "vocab"), 1, kind))
            head = store(decoder.pop("head")["weight"])
        store = jax.jit(lambda table: sharding.shard(table, "vocab", None))
        embedding = store(decoder.pop("embedding")["table"])
    return Weights(
        encoder={part: params[part] for part in params if part != "decoder"} | {"vit": rest},
        vit=vit,
        embedding=embedding,
        layers=tuple(
            LayerWeights(**{name: values[i] for name, values in fields.items()})
            for i in range(config.layers)
        ),
        norm=decoder.pop("norm")["scale"],
        head=head,
    )


def _stored(weight, axes: sharding.Axes, contracted: int, kind: Quantization) -> Matrix:
    if not (contracted and kind):
        return sharding.shard(weight, *axes)
    turned = (*axes[contracted:], *axes[:contracted])
    matrix = quantized(weight, contracted, "int8" if kind == "int8" else "fp8")
    matrix = jax.tree.map(lambda x: sharding.shard(x, *turned), matrix)
    return Float8Matrix(matrix) if kind == "fp8_dynamic" else matrix


def quantized(weight: jax.Array, contracted: int, kind: Stored) -> qwix.QArray:
    """A matrix in eight bits with one float32 scale for each output channel.

    Args:
      weight: its first `contracted` axes are summed over.

    Returns:
      With these axes last: an output channel's weights lie side by side, so that a sum over them
      reads memory in order.
    """
    outputs = weight.ndim - contracted
    turned = jnp.transpose(weight, (*range(contracted, weight.ndim), *range(contracted)))
    channels = tuple(range(outputs))
    return qwix.quantize(turned, _STORED[kind], channelwise_axes=channels, scale_dtype=jnp.float32)


def apply(
    x: jax.Array, weight: Matrix, contracted: int, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x @ weight over the last `contracted` axes of x.

    A quantized matrix is widened as it is read, and the result scaled. For a single token XLA's
    sums read it twice as fast as its products do. For many tokens and a `Float8Matrix` x is rounded
    to float8, token by token, and nothing is widened.

    Args:
      dtype: of the result; None: that of x.
    """
    n = contracted
    summed = tuple(range(x.ndim - n, x.ndim))
    if isinstance(weight, Float8Matrix):
        if math.prod(x.shape[: x.ndim - n]) >= FEWEST_TOKENS:
            return _in_float8(x, weight.stored, n).astype(dtype or x.dtype)
        weight = weight.stored
    if not isinstance(weight, qwix.QArray):
        dims = (summed, tuple(range(n)))
        return product(x, weight, dims, lambda x, w: (*x[:-n], *w[n:]), dtype=dtype)
    values, outputs = weight.qvalue, weight.ndim - n
    lead = x.shape[: x.ndim - n]
    if math.prod(lead) == 1:
        # Without the barrier x would be computed again for every output channel.
        x = jax.lax.optimization_barrier(x)
        wide = x.reshape(x.shape[x.ndim - n :]).astype(jnp.float32) * values.astype(jnp.float32)
        y = jnp.sum(wide, axis=tuple(range(outputs, weight.ndim)))
        y = jnp.expand_dims(y, tuple(range(len(lead))))
    else:
        dims = (summed, tuple(range(outputs, weight.ndim)))
        y = product(
            x,
            values.astype(x.dtype),
            dims,
            lambda x, w: (*x[:-n], *w[:outputs]),
            dtype=jnp.float32,
        )
    scale = jnp.squeeze(weight.scale, axis=tuple(range(outputs, weight.ndim)))
    return (y * scale).astype(dtype or x.dtype)


def _in_float8(x: jax.Array, weight: qwix.QArray, contracted: int) -> jax.Array:
    """`apply` with float8 on both sides; float32."""
    lead, inputs = x.shape[: x.ndim - contracted], math.prod(x.shape[x.ndim - contracted :])
    outputs = weight.shape[: weight.ndim - contracted]
    x_TI, scale_T1 = float8.by_token(x.reshape(math.prod(lead), inputs))
    weight_OI = weight.qvalue.reshape(math.prod(outputs), inputs)
    # The product in x's dtype: half of what would be written, and read again, in float32.
    y_TO = float8.product(x_TI, weight_OI, x.dtype).astype(jnp.float32)
    return (y_TO * scale_T1 * weight.scale.reshape(-1)).reshape(*lead, *outputs)
