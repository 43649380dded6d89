"""What a checkpoint folder's config.json says about ViT and decoder, as our configurations."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from storm_jax.config import ConfigError, DecoderConfig, VitConfig

DECODERS = ("gemma", "gemma2", "gemma3_text", "qwen2")


def read(folder: Path) -> Any:
    """The transformers configuration of a folder.

    Raises:
      ConfigError: there is none, or transformers does not know its model_type.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a transformers model")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json: {error}") from error


def vit_config(hf: Any, wanted: VitConfig) -> VitConfig:
    """The ViT of a SigLIP, PaliGemma or Gemma 3 configuration.

    Args:
      hf: a transformers configuration.
      wanted: gives what a checkpoint does not fix: the resolution, the layer whose output is
        taken, the frames encoded at once.

    Raises:
      ConfigError: it is of another family, or contradicts `wanted`.
    """
    vision = getattr(hf, "vision_config", hf)
    if vision.model_type != "siglip_vision_model":
        raise ConfigError(
            f"model_type {vision.model_type!r} is no SigLIP vision tower; SigLIP and SigLIP2 of"
            " fixed resolution, PaliGemma and Gemma 3 have one"
        )
    _require_value("hidden_act", vision.hidden_act, "gelu_pytorch_tanh")
    _require_value("num_channels", vision.num_channels, 3)
    found = dataclasses.replace(
        wanted,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        mlp=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        norm_eps=vision.layer_norm_eps,
    )
    _no_contradiction("vit", found, wanted)
    return found


def stored_positions(hf: Any) -> int:
    """Side of the square table of position embeddings in the checkpoint."""
    vision = getattr(hf, "vision_config", hf)
    return vision.image_size // vision.patch_size


def decoder_config(hf: Any, wanted: DecoderConfig | None = None) -> DecoderConfig:
    """The text decoder of a Gemma 1, 2, 3 or Qwen2 configuration, alone or inside a larger model.

    Args:
      hf: a transformers configuration.
      wanted: what the run's configuration says, to be compared; None compares with nothing.

    Raises:
      ConfigError: it is of another family, uses what `Decoder` has not, or contradicts `wanted`.
    """
    text = hf.get_text_config()
    family = "qwen2" if text.model_type == "qwen2_vl_text" else text.model_type
    if family not in DECODERS:
        raise ConfigError(
            f"model_type {text.model_type!r} is no decoder that can be imported;"
            f" {', '.join(DECODERS)} and the text model of qwen2_vl are"
        )
    gemma = family.startswith("gemma")
    full = [kind == "full_attention" for kind in getattr(text, "layer_types", None) or []]
    every = full.index(True) + 1 if True in full else 1
    if full and full != [(i + 1) % every == 0 for i in range(len(full))]:
        raise ConfigError(
            f"layer_types of {text.model_type} mixes local and global attention irregularly;"
            " only every n-th layer global is offered"
        )
    ropes = text.rope_parameters
    wide = near = ropes
    if family == "gemma3_text":
        wide, near = ropes["full_attention"], ropes["sliding_attention"]
    # Qwen2-VL's rotation in three axes is the plain one where all three positions are equal.
    for rope, kinds in ((wide, ("default", "linear", "mrope")), (near, ("default", "mrope"))):
        kind = rope.get("rope_type", "default")
        if kind not in kinds and (rope is wide or near is not wide):
            raise ConfigError(f"rope_type {kind!r} is not offered; {', '.join(kinds)} are")
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    activation = (getattr(text, "hidden_activation", None) if gemma else None) or text.hidden_act
    if activation not in ("gelu_pytorch_tanh", "silu"):
        raise ConfigError(f"activation {activation!r} is not offered; gelu_pytorch_tanh, silu are")
    local = every > 1
    found = DecoderConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        mlp=text.intermediate_size,
        activation="silu" if activation == "silu" else "gelu_tanh",
        norm_eps=text.rms_norm_eps,
        norm_plus_one=gemma,
        post_norms=family in ("gemma2", "gemma3_text"),
        qkv_bias=not gemma,
        qk_norm=family == "gemma3_text",
        query_scale=(getattr(text, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        attention_softcap=getattr(text, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
        global_every=every,
        window=text.sliding_window if local else 0,
        rope_theta=wide["rope_theta"],
        rope_theta_local=near["rope_theta"] if local else wide["rope_theta"],
        rope_scaling=wide.get("factor", 1.0) if wide.get("rope_type") == "linear" else 1.0,
        tied_embeddings=hf.tie_word_embeddings,
        scale_embeddings=gemma,
    )
    if wanted is not None:
        _no_contradiction("decoder", found, _normal(wanted))
    return found


def _normal(config: DecoderConfig) -> DecoderConfig:
    """The same decoder with every field that has no effect as `decoder_config` sets it."""
    local = config.global_every > 1
    return dataclasses.replace(
        config,
        query_scale=config.query_scale or config.head_dim**-0.5,
        window=config.window if local else 0,
        rope_theta_local=config.rope_theta_local if local else config.rope_theta,
    )


def _require_value(field: str, value: Any, needed: Any) -> None:
    if value != needed:
        raise ConfigError(f"{field}={value!r} in config.json; only {needed!r} is offered")


def _no_contradiction(part: str, found: Any, wanted: Any) -> None:
    lines = []
    for field in dataclasses.fields(found):
        have, want = getattr(found, field.name), getattr(wanted, field.name)
        same = math.isclose(have, want, rel_tol=1e-6) if isinstance(have, float) else have == want
        if not same:
            lines.append(f"  model.{part}.{field.name}: {have} in config.json, {want} in --config")
    if lines:
        raise ConfigError(
            "the checkpoint is of another architecture than --config:\n"
            + "\n".join(lines)
            + "\nchange --config (on the command line --config.model... works too)"
        )
