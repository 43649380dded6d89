"""Our configurations as a config.json of transformers: the inverse of `architecture`."""

import dataclasses
import math
from typing import Any

from storm_jax.config import ConfigError, DecoderConfig, ModelConfig, VitConfig

_FAMILIES = ("gemma", "gemma2", "gemma3_text", "qwen2")


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of the architecture; fields of the twin's `StormConfig`.

    Raises:
      ConfigError: transformers has no such decoder, or the twin no such temporal encoder.
    """
    if model.temporal.mixer != "mamba":
        raise ConfigError(
            f"temporal.mixer={model.temporal.mixer!r} is a control that exports do not have: only"
            ' models with "mamba" can be exported'
        )
    temporal = dataclasses.asdict(model.temporal)
    del temporal["mixer"], temporal["heads"]  # nothing to say about Mamba
    projector = dataclasses.asdict(model.projector)
    return {
        "vision_config": vision_settings(model.vit),
        "text_config": text_settings(model.decoder),
        "tie_word_embeddings": model.decoder.tied_embeddings,
        "image_size": model.vit.image_size,
        "frames_per_call": model.vit.frames_per_call,
        "vision_output_layer": model.vit.output_layer,
        **{f"projector_{field}": value for field, value in projector.items()},
        **{f"temporal_{field}": value for field, value in temporal.items()},
        **dataclasses.asdict(model.reduction),
    }


def text_settings(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a text decoder; `decoder_config` of it is `config` again.

    Fields without effect become as `decoder_config` sets them (no window with `global_every=1`).

    Raises:
      ConfigError: no family of transformers is this decoder; the fields that none has are named.
    """
    if not config.norm_plus_one:
        family = "qwen2"
    elif not config.post_norms:
        family = "gemma"
    else:
        family = "gemma3_text" if config.qk_norm else "gemma2"
    _refuse_other_decoders(config, family)
    gemma2, gemma3 = family == "gemma2", family == "gemma3_text"
    local = config.global_every > 1
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling}
    settings: dict[str, Any] = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": rope,
        # Ids belong to the tokenizer; a padding id would also stop the gradient of its embedding.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    activation = "silu" if config.activation == "silu" else "gelu_pytorch_tanh"
    settings["hidden_activation" if gemma2 or gemma3 else "hidden_act"] = activation
    if family != "gemma":
        settings["layer_types"] = [
            "sliding_attention" if (layer + 1) % config.global_every else "full_attention"
            for layer in range(config.layers)
        ]
        # Gemma 2 and 3 make the mask of a window even where no layer has one.
        settings["sliding_window"] = config.window or 4096
    if family == "qwen2":
        settings["use_sliding_window"] = local
    if gemma2 or gemma3:
        settings["query_pre_attn_scalar"] = round(_score_divisor(config))
        settings["attn_logit_softcapping"] = config.attention_softcap or None
        settings["final_logit_softcapping"] = config.logit_softcap or None
    if gemma3:
        near = {"rope_type": "default", "rope_theta": config.rope_theta_local}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": near}
    return settings


def _score_divisor(config: DecoderConfig) -> float:
    """Scores are divided by the root of it; a whole number in transformers."""
    return (config.query_scale or config.head_dim**-0.5) ** -2


def _refuse_other_decoders(config: DecoderConfig, family: str) -> None:
    gemma, gemma3 = family != "qwen2", family == "gemma3_text"
    new = family in ("gemma2", "gemma3_text")
    divisor = _score_divisor(config)
    whole = math.isclose(divisor, round(divisor), rel_tol=1e-6)
    same_theta = config.rope_theta_local == config.rope_theta
    fits = {
        "scale_embeddings": config.scale_embeddings == gemma,
        "post_norms": config.post_norms == new,
        "qkv_bias": config.qkv_bias != gemma,
        "qk_norm": config.qk_norm == gemma3,
        "attention_softcap": not config.attention_softcap or family == "gemma2",
        "logit_softcap": not config.logit_softcap or new,
        "query_scale": whole and (new or round(divisor) == config.head_dim),
        "global_every": config.global_every == 1 or family != "gemma",
        "rope_theta_local": config.global_every == 1 or gemma3 or same_theta,
        "rope_scaling": config.rope_scaling == 1 or config.global_every == 1 or gemma3,
        # transformers refuses Gemma 2 and 3 of another width.
        "heads": not new or config.width % config.heads == 0,
    }
    wrong = [f"decoder.{field}={getattr(config, field)}" for field, ok in fits.items() if not ok]
    if wrong:
        raise ConfigError(
            f"no decoder of transformers ({', '.join(_FAMILIES)}) is like this one; in {family},"
            f" the nearest, there is no {', '.join(wrong)}"
        )


def vision_settings(config: VitConfig) -> dict[str, Any]:
    """The config.json of a SigLIP tower that runs the layers which the model has."""
    # The table of positions stays as it is; its side is image_size // patch_size there.
    image_size = config.image_size
    if config.grid != config.position_grid:
        image_size = config.position_grid * config.patch_size
    return {
        "model_type": "siglip_vision_model",
        "image_size": image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers + 1 + config.output_layer,
        "num_attention_heads": config.heads,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "vision_use_head": False,
    }
