"""Our parameters' names and those in Hugging Face checkpoints: one table for both directions.

Ours are paths inside a part ("blocks/layers/query/weight"), with all layers stacked on the first
axis; theirs have one tensor a layer, "{layer}" in the table, and PyTorch's order [outputs, inputs].
`storm_names` has the whole model, as an export spells it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from storm_jax.config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    TemporalConfig,
    VitConfig,
)

Form = Literal["same", "joined", "linear", "taps", "patches"]

# Where the parts stand in an exported model; these are attributes of the PyTorch twin.
PREFIXES = {
    "vit": "vision_tower.",
    "projector": "projector.",
    "temporal": "temporal.",
    "decoder": "language_model.",
}


@dataclass(frozen=True)
class Name:
    """One parameter in both worlds.

    Attributes:
      ours: path inside its part.
      hf: name in the checkpoint, with "{layer}" if our parameter stacks the layers.
      form: "same": the same array;
        "joined": the same numbers in the same order, on one axis there;
        "linear": ours is [*inputs, *outputs], theirs [outputs, inputs];
        "taps": ours is [taps, channels], theirs a depthwise Conv1d's [channels, 1, taps];
        "patches": ours is [row * column * channel, outputs], theirs a Conv2d's [outputs, channel,
        row, column].
      inputs: leading axes of a "linear", that of layers not counted, that are inputs.
    """

    ours: str
    hf: str
    form: Form = "same"
    inputs: int = 1

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of a checkpoint as one layer of our parameter, which has `shape`.

        Raises:
          ValueError: the tensor has another shape than `hf_shape(shape)`.
        """
        wanted = self.hf_shape(shape)
        if array.shape != wanted:
            raise ValueError(f"has shape {array.shape}, this model needs {wanted}")
        if self.form in ("linear", "taps"):
            array = array.T
        elif self.form == "patches":
            array = array.transpose(2, 3, 1, 0)
        return array.reshape(shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """One layer of our parameter as the checkpoint has it; the inverse of `to_ours`."""
        shape = self.hf_shape(array.shape)
        if self.form in ("linear", "taps"):
            return array.reshape(shape[::-1]).T
        if self.form == "patches":
            outputs, channels, rows, columns = shape
            return array.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1)
        return array.reshape(shape)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the checkpoint of what has `shape` (of one layer) here."""
        if self.form == "linear":
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        if self.form == "taps":
            return shape[1], 1, shape[0]
        if self.form == "patches":
            side = math.isqrt(shape[0] // 3)
            return shape[1], 3, side, side
        return (math.prod(shape),) if self.form == "joined" else shape


def _both(ours: str, hf: str, *, bias: bool, inputs: int = 1) -> list[Name]:
    """Weight and bias of a linear map."""
    names = [Name(f"{ours}/weight", f"{hf}.weight", "linear", inputs)]
    return [*names, Name(f"{ours}/bias", f"{hf}.bias", "joined")] if bias else names


def vit_names(config: VitConfig) -> list[Name]:
    """Of a `SiglipVisionModel` without prefix. Its pooling head ("head.*") has no counterpart."""
    layer = "encoder.layers.{layer}."
    names = [
        Name("patch/weight", "embeddings.patch_embedding.weight", "patches"),
        Name("patch/bias", "embeddings.patch_embedding.bias"),
        Name("positions", "embeddings.position_embedding.weight"),
    ]
    for ours, hf in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        names += [
            Name(f"blocks/layers/{ours}/scale", f"{layer}{hf}.weight"),
            Name(f"blocks/layers/{ours}/bias", f"{layer}{hf}.bias"),
        ]
    for ours, hf, inputs in (
        ("query", "self_attn.q_proj", 1),
        ("key", "self_attn.k_proj", 1),
        ("value", "self_attn.v_proj", 1),
        ("out", "self_attn.out_proj", 2),  # heads and their channels
        ("up", "mlp.fc1", 1),
        ("down", "mlp.fc2", 1),
    ):
        names += _both(f"blocks/layers/{ours}", layer + hf, bias=True, inputs=inputs)
    if config.output_layer == -1:
        names += [
            Name("norm/scale", "post_layernorm.weight"),
            Name("norm/bias", "post_layernorm.bias"),
        ]
    return names


def projector_names(config: ProjectorConfig) -> list[Name]:
    """Of the twin's projector."""
    names = _both("linear", "linear", bias=True)
    if config.norm:
        names += [Name("norm/scale", "norm.weight"), Name("norm/bias", "norm.bias")]
    return names


def temporal_names(config: TemporalConfig) -> list[Name]:
    """Of the twin's Mamba layers, whose tensors are those of transformers' `MambaMixer`.

    No names where there is no temporal encoder.
    """
    if not config.layers:
        return []
    ours, layer = "blocks/layers/", "layers.{layer}."
    names = [
        Name(f"{ours}norm/scale", f"{layer}norm.weight"),
        Name(f"{ours}norm/bias", f"{layer}norm.bias"),
        *_both(f"{ours}in_proj", f"{layer}in_proj", bias=False),
        *_both(f"{ours}out_proj", f"{layer}out_proj", bias=False),
    ]
    both = config.direction == "bidirectional"
    for direction in ("forward", "backward") if both else ("forward",):
        # A PyTorch module's own `forward` is its call.
        here, there = f"{ours}{direction}/", f"{layer}{direction}_direction."
        names += [
            Name(f"{here}conv_weight", f"{there}conv1d.weight", "taps"),
            Name(f"{here}conv_bias", f"{there}conv1d.bias"),
            *_both(f"{here}x_proj", f"{there}x_proj", bias=False),
            *_both(f"{here}dt_proj", f"{there}dt_proj", bias=False),
            Name(f"{here}dt_bias", f"{there}dt_proj.bias"),
            Name(f"{here}A_log", f"{there}A_log"),
            Name(f"{here}D", f"{there}D"),
        ]
    return names


def decoder_names(config: DecoderConfig) -> list[Name]:
    """Of a Gemma 1, 2 or 3 or Qwen2 `*ForCausalLM`."""
    layer = "model.layers.{layer}."
    norms = {"attention_norm": "input_layernorm"}
    if config.post_norms:
        norms["attention_post_norm"] = "post_attention_layernorm"
        norms["mlp_norm"] = "pre_feedforward_layernorm"
        norms["mlp_post_norm"] = "post_feedforward_layernorm"
    else:
        norms["mlp_norm"] = "post_attention_layernorm"
    if config.qk_norm:
        norms["query_norm"] = "self_attn.q_norm"
        norms["key_norm"] = "self_attn.k_norm"
    names = [
        Name("embedding/table", "model.embed_tokens.weight"),
        Name("norm/scale", "model.norm.weight"),
        *(Name(f"blocks/layers/{a}/scale", f"{layer}{b}.weight") for a, b in norms.items()),
    ]
    for ours, hf, inputs, bias in (
        ("query", "self_attn.q_proj", 1, config.qkv_bias),
        ("key", "self_attn.k_proj", 1, config.qkv_bias),
        ("value", "self_attn.v_proj", 1, config.qkv_bias),
        ("out", "self_attn.o_proj", 2, False),
        ("gate", "mlp.gate_proj", 1, False),
        ("up", "mlp.up_proj", 1, False),
        ("down", "mlp.down_proj", 1, False),
    ):
        names += _both(f"blocks/layers/{ours}", layer + hf, bias=bias, inputs=inputs)
    if not config.tied_embeddings:
        names.append(Name("head/weight", "lm_head.weight", "linear"))
    return names


def storm_names(config: ModelConfig) -> list[Name]:
    """Of the whole model: our paths begin with the part, theirs with its prefix in an export."""
    parts = {
        "vit": vit_names(config.vit),
        "projector": projector_names(config.projector),
        "temporal": temporal_names(config.temporal),
        "decoder": decoder_names(config.decoder),
    }
    return [
        dataclasses.replace(name, ours=f"{part}/{name.ours}", hf=PREFIXES[part] + name.hf)
        for part, names in parts.items()
        for name in names
    ]
