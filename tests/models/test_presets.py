"""Every preset of configs/common.py against the published models, nothing allocated.

The configurations below are the published config.json files, written down here on their own.
"""

import dataclasses

import jax
import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from configs import common
from storm_jax.config import DecoderConfig, ModelConfig, VitConfig, from_mapping
from storm_jax.models.storm import PARTS, StormModel, count_parameters
from tests.models.references import decoder_config
from tests.tiny import tiny_model

torch = pytest.importorskip("torch")

GEMMA2 = dict(
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    sliding_window=4096,
    vocab_size=256_000,
)
GEMMA3 = dict(
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    rope_local_base_freq=10_000.0,
    sliding_window_pattern=6,
)
MULTIMODAL = dict(
    **GEMMA3,
    vocab_size=262_208,
    sliding_window=1024,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
)
QWEN2 = dict(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    sliding_window=32_768,
    use_sliding_window=False,
)


def sizes(width, mlp, layers, heads, kv_heads) -> dict:
    return dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


SIGLIP_896, GEMMA3_4B_PROJECTOR, GEMMA3_12B_PROJECTOR = 416_866_032, 2_950_272, 4_424_832

DECODERS = {
    # class, configuration, published parameters (of the text model)
    "gemma2_2b": (
        Gemma2ForCausalLM,
        Gemma2Config(**GEMMA2, **sizes(2304, 9216, 26, 8, 4)),
        2_614_341_888,
    ),
    "gemma2_9b": (
        Gemma2ForCausalLM,
        Gemma2Config(**GEMMA2, **sizes(3584, 14336, 42, 16, 8)),
        9_241_705_984,
    ),
    "gemma3_1b": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA3, **sizes(1152, 6912, 26, 4, 1), vocab_size=262_144, sliding_window=512
        ),
        999_885_952,
    ),
    "gemma3_4b": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**MULTIMODAL, **sizes(2560, 10240, 34, 8, 4)),
        4_300_079_472 - SIGLIP_896 - GEMMA3_4B_PROJECTOR,
    ),
    "gemma3_12b": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**MULTIMODAL, **sizes(3840, 15360, 48, 16, 8)),
        12_187_325_040 - SIGLIP_896 - GEMMA3_12B_PROJECTOR,
    ),
    "qwen2_1_5b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **QWEN2, **sizes(1536, 8960, 28, 12, 2), vocab_size=151_936, tie_word_embeddings=True
        ),
        1_543_714_304,
    ),
    "qwen2_7b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **QWEN2, **sizes(3584, 18944, 28, 28, 4), vocab_size=152_064, tie_word_embeddings=False
        ),
        7_615_616_512,
    ),
}

SO400M = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    patch_size=14,
    layer_norm_eps=1e-6,
    vision_use_head=False,
)
BASE = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=16,
    layer_norm_eps=1e-6,
    vision_use_head=False,
)


def on_meta(cls, config) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(config)


def count(module: torch.nn.Module, *prefixes: str) -> int:
    """Parameters whose names start so, tied ones once."""
    return sum(p.numel() for n, p in module.named_parameters() if n.startswith(prefixes or ""))


def decoder_preset(name) -> DecoderConfig:
    return from_mapping(DecoderConfig, common.decoder(name).to_dict())


def abstract(config: ModelConfig) -> dict:
    params = StormModel(config).abstract()
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    return params


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_preset(name):
    cls, hf_config, published = DECODERS[name]
    preset = decoder_preset(name)

    # Every number, not only those that show in the count.
    expected = decoder_config(hf_config)
    assert preset.query_scale == 0 and expected.query_scale == preset.head_dim**-0.5
    ignored = {"query_scale": 0.0}
    if expected.global_every == 1:
        ignored["rope_theta_local"] = preset.rope_theta_local  # no layer is local
    assert preset == dataclasses.replace(expected, **ignored)

    hf = on_meta(cls, hf_config)
    ours = abstract(dataclasses.replace(tiny_model(), decoder=preset))["decoder"]
    assert count_parameters(ours) == count(hf) == published
    assert count_parameters(ours["blocks"]) == count(hf, "model.layers.")
    assert count_parameters(ours["embedding"]) == count(hf, "model.embed_tokens.")
    assert count_parameters(ours["norm"]) == count(hf, "model.norm.")
    assert count_parameters(ours.get("head", {})) == count(hf, "lm_head.")


@pytest.mark.parametrize(
    "name,total,projector",
    [
        ("gemma3_4b", 4_300_079_472, GEMMA3_4B_PROJECTOR),
        ("gemma3_12b", 12_187_325_040, GEMMA3_12B_PROJECTOR),
    ],
)
def test_published_totals_of_multimodal_gemma3(name, total, projector):
    """Text from our preset, SigLIP at 896 from our preset, the projector from transformers."""
    hf_text = DECODERS[name][1]
    hf_vision = SiglipVisionConfig(**SO400M, image_size=896)
    whole = on_meta(
        Gemma3ForConditionalGeneration,
        Gemma3Config(text_config=hf_text, vision_config=hf_vision, mm_tokens_per_image=256),
    )
    assert count(whole) == total
    assert count(whole, "model.multi_modal_projector.") == projector
    vit = common.vit("so400m").to_dict() | dict(image_size=896, position_grid=64)
    model = dataclasses.replace(
        tiny_model(), vit=from_mapping(VitConfig, vit), decoder=decoder_preset(name)
    )
    ours = abstract(model)
    assert count_parameters(ours["vit"]) == SIGLIP_896 == count(whole, "model.vision_tower.")
    assert count_parameters(ours["vit"]) + count_parameters(ours["decoder"]) + projector == total


@pytest.mark.parametrize(
    "name,hf,image_size",
    [("so400m", SO400M, 448), ("so400m", SO400M, 384), ("base", BASE, 224)],
)
def test_vit_preset(name, hf, image_size):
    fields = common.vit(name).to_dict()
    if image_size != fields["image_size"]:
        fields |= dict(image_size=image_size, position_grid=image_size // fields["patch_size"])
    vit = from_mapping(VitConfig, fields)
    config = SiglipVisionConfig(**hf, image_size=image_size)
    theirs = on_meta(SiglipVisionModel, config)
    assert vit.norm_eps == config.layer_norm_eps
    assert vit.heads == config.num_attention_heads
    assert config.hidden_act == "gelu_pytorch_tanh"

    ours = abstract(dataclasses.replace(tiny_model(), vit=vit))["vit"]
    assert count_parameters(ours) == count(theirs)
    assert count_parameters(ours["blocks"]) == count(theirs, "encoder.layers.")
    assert count_parameters(ours["patch"]) == count(theirs, "embeddings.patch_embedding.")
    assert ours["positions"].size == count(theirs, "embeddings.position_embedding.")
    assert count_parameters(ours["norm"]) == count(theirs, "post_layernorm.")

    # VILA's features: the last layer and the norm are not there at all.
    shorter = dataclasses.replace(tiny_model(), vit=dataclasses.replace(vit, output_layer=-2))
    last = f"encoder.layers.{config.num_hidden_layers - 1}."
    unused = count(theirs, last) + count(theirs, "post_layernorm.")
    assert count_parameters(abstract(shorter)["vit"]) == count(theirs) - unused


@pytest.mark.parametrize("size", common.TOKENIZERS)
def test_every_size_builds_whole(size):
    """Projector and temporal encoder counted by their formulas."""
    config = from_mapping(ModelConfig, common.run("test", size).model.to_dict())
    params = abstract(config)
    assert set(params) == set(PARTS)
    cells = {"tiny": 16}.get(size, 4)  # patches of one token
    D, channels = config.decoder.width, cells * config.vit.width
    assert count_parameters(params["projector"]) == 2 * channels + channels * D + D
    E, G, K, R = 2 * D, 16, 4, -(-D // 16)
    direction = K * E + E + E * (R + 2 * G) + R * E + E + E * G + E
    layer = 2 * D + D * 2 * E + E * D + 2 * direction
    assert count_parameters(params["temporal"]) == config.temporal.layers * layer
    axes = jax.tree.leaves(StormModel(config).axes(), is_leaf=lambda x: isinstance(x, tuple))
    ranks = [len(x.shape) for x in jax.tree.leaves(params)]
    assert [len(a) for a in axes] == ranks


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="size=gemma9_9b.*gemma2_2b.*v5p_512"):
        common.arguments("size=gemma9_9b", "tiny")
    with pytest.raises(ValueError, match="cluster=v9"):
        common.arguments("size=qwen2_7b,cluster=v9", "tiny")
    assert common.arguments("cluster=v5p_512", "qwen2_7b") == ("qwen2_7b", "v5p_512")
