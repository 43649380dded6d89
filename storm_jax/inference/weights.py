"""Parameters as they are used to answer: layer by layer, matrices of one input side by side.

A scan over stacked layers would copy each layer's weights out of the stack, which for one token
costs more than the layer itself. Queries, keys and values are one matrix, and so are gate and up:
half as many, larger products.

Axis letters beside the project's own: G query heads that share a key-value head, M hidden units.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from storm_jax.config import DecoderConfig
from storm_jax.models.layers import product
from storm_jax.models.storm import Params
from storm_jax.parallel import sharding

Quantization = Literal["", "int8", "fp8"]
_STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

Matrix = jax.Array | qwix.QArray


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

    encoder: Params  # ViT, projector and temporal encoder, as `StormModel` takes them
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


def prepare(
    params: Params,
    config: DecoderConfig,
    mesh: jax.sharding.Mesh,
    quantization: Quantization = "",
) -> Weights:
    """Rearranges the parameters of a model.

    The decoder's leave `params` one by one, so that no more than one of them is held twice.

    Args:
      params: of `StormModel`; its "decoder" is emptied.
      mesh: the devices; matrices are split over "tensor" where it divides them.
      quantization: of the decoder's matrices, the head's included, one scale an output channel;
        "": they keep their dtype. The embedding keeps it, also where it is the head's matrix.
    """
    decoder = params["decoder"]
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
            store = jax.jit(lambda w: _stored(w, (None, "vocab"), 1, quantization))
            head = store(decoder.pop("head")["weight"])
        store = jax.jit(lambda table: sharding.shard(table, "vocab", None))
        embedding = store(decoder.pop("embedding")["table"])
    return Weights(
        encoder={part: tree for part, tree in params.items() if part != "decoder"},
        embedding=embedding,
        layers=tuple(
            LayerWeights(**{name: values[i] for name, values in fields.items()})
            for i in range(config.layers)
        ),
        norm=decoder.pop("norm")["scale"],
        head=head,
    )


def _stored(weight, axes: sharding.Axes, contracted: int, kind: Quantization) -> Matrix:
    matrix = quantized(weight, contracted, kind) if contracted else weight
    return jax.tree.map(lambda x: sharding.shard(x, *axes), matrix)


def quantized(weight: jax.Array, contracted: int, kind: Quantization) -> Matrix:
    """A matrix in eight bits with one float32 scale for each output channel.

    Args:
      weight: its first `contracted` axes are summed over.
      kind: "" leaves it as it is.
    """
    if not kind:
        return weight
    channels = tuple(range(contracted, weight.ndim))
    return qwix.quantize(weight, _STORED[kind], channelwise_axes=channels, scale_dtype=jnp.float32)


def apply(
    x: jax.Array, weight: Matrix, contracted: int, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x @ weight over the last `contracted` axes of x.

    A quantized matrix is widened as it is read, and the result scaled.

    Args:
      dtype: of the result; None: that of x.
    """
    n = contracted
    dims = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    values = weight.qvalue if isinstance(weight, qwix.QArray) else weight

    def layout(x, w):
        return (*x[: len(x) - n], *w[n:])

    if not isinstance(weight, qwix.QArray):
        return product(x, values.astype(x.dtype), dims, layout, dtype=dtype)
    y = product(x, values.astype(x.dtype), dims, layout, dtype=jnp.float32)
    scale = jnp.squeeze(weight.scale, axis=tuple(range(n)))
    return (y * scale).astype(dtype or x.dtype)
