"""What a checkpoint folder's config.json says about ViT and decoder, as our configurations."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from storm_jax.config import ConfigError, DecoderConfig, VitConfig

# model_type of a text model -> the family that it is built like.
DECODERS = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
}


def read(folder: Path) -> Any:
    """The transformers configuration of a folder.

    Raises:
      ConfigError: there is none, or transformers does not know its model_type or refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a transformers model")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
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
    if vision.model_type == "siglip2_vision_model":
        raise ConfigError(
            f"model_type {vision.model_type!r} is a NaFlex tower (patches of any aspect ratio,"
            " positions resized for every image), which is not offered; take the SigLIP2 of a fixed"
            " resolution, as google/siglip2-so400m-patch14-384, whose model_type is 'siglip'"
        )
    if vision.model_type != "siglip_vision_model":
        raise ConfigError(
            f"model_type {vision.model_type!r} is no SigLIP vision tower; SigLIP and SigLIP2 of"
            " fixed resolution, PaliGemma and Gemma 3 have one"
        )
    _require_value("hidden_act", vision.hidden_act, "gelu_pytorch_tanh")
    _require_value("num_channels", vision.num_channels, 3)
    stored_positions(hf)  # of a square
    found = dataclasses.replace(
        wanted,
        patch_size=_side("patch_size", vision.patch_size),
        width=vision.hidden_size,
        mlp=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        norm_eps=vision.layer_norm_eps,
    )
    no_contradiction("vit", found, wanted)
    return found


def stored_positions(hf: Any) -> int:
    """Side of the square table of position embeddings in the checkpoint."""
    vision = getattr(hf, "vision_config", hf)
    return _side("image_size", vision.image_size) // _side("patch_size", vision.patch_size)


def _side(field: str, value: Any) -> int:
    """A size that transformers writes as one number or as [height, width]."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ConfigError(f"{field}={value!r} in config.json; only squares are offered")
    return sides.pop()


def decoder_config(hf: Any, wanted: DecoderConfig | None = None) -> DecoderConfig:
    """The text decoder of a Gemma 1, 2, 3 or Qwen2 configuration, alone or inside a larger model.

    Args:
      hf: a transformers configuration.
      wanted: what the run's configuration says, to be compared; None compares with nothing.

    Raises:
      ConfigError: it is of another family, uses what `Decoder` has not, or contradicts `wanted`.
    """
    text = hf.get_text_config()
    family = DECODERS.get(text.model_type)
    if family is None:
        raise ConfigError(
            f"model_type {text.model_type!r} is no decoder that can be imported;"
            f" {', '.join(DECODERS)} are"
        )
    # Fields of other families may stand in a config.json without any effect: each family reads
    # those that its model in transformers reads.
    gemma, gemma3 = family != "qwen2", family == "gemma3"
    softcaps = family in ("gemma2", "gemma3")
    if gemma:
        _require_value("attention_bias", bool(text.attention_bias), False)
        # A PaliGemma sees its prompt in both directions. Here every token is read causally.
        if hf.model_type != "paligemma":
            both = bool(text.use_bidirectional_attention)
            _require_value("use_bidirectional_attention", both, False)
    if gemma3:  # transformers reads it there and does not apply it
        _require_value("attn_logit_softcapping", text.attn_logit_softcapping, None)
    activation = text.hidden_activation if softcaps else text.hidden_act
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu"}
    if activation not in activations:
        raise ConfigError(f"activation {activation!r} is not offered; {', '.join(activations)} are")
    every = _global_every(text)
    local = every > 1
    wide = near = text.rope_parameters
    if gemma3:
        wide, near = wide["full_attention"], wide["sliding_attention"]
    theta, scaling = _rotary(wide)
    theta_local, scaling_local = _rotary(near) if local else (theta, scaling)
    if local and scaling_local != 1:
        raise ConfigError(
            f"rope_parameters={near} in config.json: a linear factor in layers with a sliding"
            " window is not offered, only in those with full attention"
        )
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if text.model_type in ("qwen2_vl_text", "qwen2_5_vl_text"):
        # Their attention takes it from the width, their rotation from the field.
        _require_value("head_dim", head_dim, text.hidden_size // heads)
    found = DecoderConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        mlp=text.intermediate_size,
        activation=activations[activation],  # pyrefly: ignore[bad-argument-type]
        norm_eps=text.rms_norm_eps,
        norm_plus_one=gemma,
        post_norms=softcaps,
        qkv_bias=not gemma,
        qk_norm=gemma3,
        query_scale=(text.query_pre_attn_scalar if softcaps else head_dim) ** -0.5,
        attention_softcap=(text.attn_logit_softcapping if family == "gemma2" else None) or 0.0,
        logit_softcap=(text.final_logit_softcapping if softcaps else None) or 0.0,
        global_every=every,
        window=text.sliding_window if local else 0,
        rope_theta=theta,
        rope_theta_local=theta_local,
        rope_scaling=scaling,
        tied_embeddings=hf.tie_word_embeddings,
        scale_embeddings=gemma,
    )
    if wanted is not None:
        no_contradiction("decoder", normal(found), normal(wanted))
    return found


def _global_every(text: Any) -> int:
    """The period of global layers; one more than there are layers if none is global."""
    kinds = getattr(text, "layer_types", None)
    if not kinds:  # Gemma 1
        return 1
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    full = [kind == "full_attention" for kind in kinds]
    every = full.index(True) + 1 if True in full else len(full) + 1
    if unknown or full != [(i + 1) % every == 0 for i in range(len(full))]:
        raise ConfigError(
            f"layer_types of {text.model_type} is {kinds}; only sliding_attention with every n-th"
            " layer full_attention is offered"
        )
    if every > 1 and not text.sliding_window:
        raise ConfigError(f"sliding_window={text.sliding_window}, but layer_types has such layers")
    return every


def _rotary(rope: Any) -> tuple[float, float]:
    """Base and linear scaling of a rotary embedding."""
    kind = rope.get("rope_type", "default")
    # Qwen2-VL's rotation in three axes is the plain one where all three positions are equal.
    if kind not in ("default", "linear", "mrope"):
        raise ConfigError(f"rope_type {kind!r} is not offered; default, linear, mrope are")
    if rope.get("partial_rotary_factor", 1.0) != 1:
        raise ConfigError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} in config.json; only 1 is"
            " offered"
        )
    return rope["rope_theta"], rope["factor"] if kind == "linear" else 1.0


def normal(config: DecoderConfig) -> DecoderConfig:
    """The same decoder, every field that has no effect set to one value: equal ones compare so."""
    every = min(config.global_every, config.layers + 1)
    changes: dict[str, Any] = {
        "query_scale": config.query_scale or config.head_dim**-0.5,
        "global_every": every,
    }
    if every == 1:
        changes |= {"window": 0, "rope_theta_local": config.rope_theta}
    elif every > config.layers:
        changes |= {"rope_theta": config.rope_theta_local, "rope_scaling": 1.0}
    return dataclasses.replace(config, **changes)


def _require_value(field: str, value: Any, needed: Any) -> None:
    if value != needed:
        raise ConfigError(f"{field}={value!r} in config.json; only {needed!r} is offered")


def no_contradiction(part: str, found: Any, wanted: Any, source: str = "config.json") -> None:
    """Compares what a checkpoint is with what the run wants.

    Raises:
      ConfigError: lists every field that differs.
    """
    lines = []
    for field in dataclasses.fields(found):
        have, want = getattr(found, field.name), getattr(wanted, field.name)
        same = math.isclose(have, want, rel_tol=1e-6) if isinstance(have, float) else have == want
        if not same:
            lines.append(f"  model.{part}.{field.name}: {have} in {source}, {want} in --config")
    if lines:
        raise ConfigError(
            "the checkpoint is of another architecture than --config:\n"
            + "\n".join(lines)
            + "\nchange --config (on the command line --config.model... works too)"
        )
