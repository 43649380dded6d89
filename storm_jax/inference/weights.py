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

from storm_jax.config import ConfigError, ModelConfig
from storm_jax.inference import vit as vits
from storm_jax.inference.linear import Float8Matrix, Matrix, outputs_first, quantized
from storm_jax.inference.vit import Float8Layer, VitLayer
from storm_jax.models.storm import Params
from storm_jax.parallel import sharding

Quantization = Literal["", "int8", "fp8", "fp8_dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = ("", "int8", "fp8", "fp8_dynamic")


class LayerWeights(NamedTuple):
    """One layer of the decoder; None where the family has no such parameter."""

    attention_norm: jax.Array  # [D]
    qkv: Matrix  # [K, G + 2, C, D]: the queries of a key-value head, its key, its value
    qkv_bias: jax.Array | None  # [K, G + 2, C]
    query_norm: jax.Array | None  # [C]
    key_norm: jax.Array | None  # [C]
    out: Matrix  # [D, K, G, C]
    attention_post_norm: jax.Array | None  # [D]
    mlp_norm: jax.Array  # [D]
    gate_up: Matrix  # [2, M, D]
    down: Matrix  # [D, M]
    mlp_post_norm: jax.Array | None  # [D]


class Weights(NamedTuple):
    """All parameters of a model."""

    encoder: Params  # projector and temporal encoder, as `StormModel` takes them, rest of the ViT
    vit: tuple[VitLayer | Float8Layer, ...]
    embedding: jax.Array  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: jax.Array  # [D]
    head: Matrix | None  # [V, D]; None: the embedding

    def of_decoder(self) -> "Weights":
        """Without the encoder's and the ViT's: each argument of a call costs time."""
        return self._replace(encoder={}, vit=())


_AXES: dict[str, sharding.Axes] = {
    "qkv": ("kv_heads", None, None, None),
    "qkv_bias": ("kv_heads", None, None),
    "out": (None, "kv_heads", None, None),
    "gate_up": (None, "mlp", None),
    "down": (None, "mlp"),
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
        "fp8_dynamic" products of `linear.FEWEST_TOKENS` tokens or more take float8 on both sides,
        the head's excepted, and the ViT's products do.

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
            store = jax.jit(lambda w: _stored(w, ("vocab", None), 1, kind))
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
    """A parameter as it is kept: a matrix, if axes are contracted, or what is no matrix."""
    weight = sharding.shard(outputs_first(weight, contracted), *axes)
    if not (contracted and kind):
        return weight
    matrix = quantized(weight, contracted, "int8" if kind == "int8" else "fp8")
    return Float8Matrix(matrix) if kind == "fp8_dynamic" else matrix
