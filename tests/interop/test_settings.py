"""config.json of an export: our configurations there and back, and what transformers lacks."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from configs import common
from storm_jax.config import ConfigError, DecoderConfig, VitConfig, from_mapping
from storm_jax.interop import architecture, torch_export
from storm_jax.interop.architecture import decoder_config
from storm_jax.interop.settings import model_settings, text_settings, vision_settings
from tests.interop.exported import DECODERS, run_of
from tests.tiny import tiny_model


def read_back(settings: dict) -> DecoderConfig:
    """As transformers reads the file."""
    return decoder_config(AutoConfig.for_model(**json.loads(json.dumps(settings))))


@pytest.mark.parametrize("name", common.TOKENIZERS)
def test_every_preset_comes_back(name):
    config = from_mapping(DecoderConfig, common.decoder(name).to_dict())
    found = read_back(text_settings(config))
    local = config.global_every > 1
    # A query scale of 0 means this one, and what has no effect comes back as nothing.
    expected = dataclasses.replace(
        config,
        query_scale=config.head_dim**-0.5,
        window=config.window if local else 0,
        rope_theta_local=config.rope_theta_local if local else config.rope_theta,
    )
    assert found == expected


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_comes_back(family):
    config = tiny_model(decoder=DECODERS[family]).decoder
    assert text_settings(config)["model_type"] in (family.split("_")[0], f"{family}_text")
    # `decoder_config` compares every field, and raises where one differs.
    decoder_config(AutoConfig.for_model(**text_settings(config)), config)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3", dict(attention_softcap=5.0), "decoder.attention_softcap=5.0"),
        ("gemma3", dict(query_scale=0.3), "decoder.query_scale=0.3"),
        ("gemma3", dict(heads=6), "decoder.heads=6"),
        ("gemma2", dict(rope_theta_local=1e4), "decoder.rope_theta_local=10000.0"),
        ("gemma2", dict(rope_scaling=8.0, qkv_bias=True), "qkv_bias=True, decoder.rope_scaling=8"),
        ("gemma", dict(logit_softcap=3.0), "decoder.logit_softcap=3.0"),
        ("gemma", dict(global_every=2), "decoder.global_every=2"),
        ("gemma", dict(scale_embeddings=False), "decoder.scale_embeddings=False"),
        ("qwen2", dict(query_scale=7**-0.5), "decoder.query_scale=0.3779"),
        ("qwen2", dict(qk_norm=True, qkv_bias=False), "qkv_bias=False, decoder.qk_norm=True"),
        ("qwen2", dict(post_norms=True), "decoder.post_norms=True"),
    ],
)
def test_decoders_that_transformers_lacks(family, changes, named):
    config = dataclasses.replace(tiny_model(decoder=DECODERS[family]).decoder, **changes)
    with pytest.raises(ConfigError, match="no decoder of transformers .* is like this one") as e:
        text_settings(config)
    assert named in str(e.value)


def test_the_tower_keeps_its_table_and_its_layers():
    vit = from_mapping(VitConfig, common.vit("so400m").to_dict())
    settings = vision_settings(vit)
    assert (settings["image_size"], settings["num_hidden_layers"]) == (448, 27)
    # The published 384 pixels: 27 patches and 6 pixels that are not seen.
    small = dataclasses.replace(vit, image_size=384, position_grid=27)
    hf = AutoConfig.for_model(**vision_settings(small))
    assert hf.image_size == 384 and architecture.stored_positions(hf) == 27
    assert architecture.vit_config(hf, small) == small
    # A table of another resolution stays what it is; VILA's output has a layer less.
    other = dataclasses.replace(vit, position_grid=27, output_layer=-2)
    hf = AutoConfig.for_model(**vision_settings(other))
    assert architecture.stored_positions(hf) == 27 and hf.num_hidden_layers == 26


def test_a_run_is_found_and_compared(tmp_path):
    run = run_of(tiny_model())
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="is no export of storm_jax"):
        torch_export.read_run(tmp_path)
    config = {
        "model_type": "storm",
        **model_settings(run.model),
        "storm_jax": {"run": dataclasses.asdict(run)},
    }
    path.write_text(json.dumps(config))
    assert torch_export.read_run(tmp_path) == run
    assert torch_export.read_run(tmp_path, run) == run
    config["temporal_pool"] = 7
    config["text_config"]["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the run that it names") as e:
        torch_export.read_run(tmp_path)
    assert "  text_config.rms_norm_eps: 1e-05 in config.json, 1e-06 there" in str(e.value)
    assert "  temporal_pool: 7 in config.json, 2 there" in str(e.value)
    with pytest.raises(ConfigError, match="and --config are of different models"):
        torch_export.read_run(tmp_path, run)
