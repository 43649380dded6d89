"""Building the configuration: every field checked, every mistake named with its place."""

import dataclasses
import json

import numpy as np
import pytest

from configs import align, debug, long, sft
from storm_jax.config import (
    ConfigError,
    ReductionConfig,
    RunConfig,
    from_json,
    from_mapping,
    to_json,
)

STAGES = {"align": align, "sft": sft, "long": long, "debug": debug}
SIZES = ("tiny", "gemma2_2b", "gemma2_9b", "gemma3_1b", "gemma3_4b", "gemma3_12b", "qwen2_1_5b")


def mapping(stage=long, arg="size=tiny") -> dict:
    return json.loads(stage.get_config(arg).to_json_best_effort())


def changed(path: str, value) -> dict:
    config = mapping()
    *parents, last = path.split(".")
    group = config
    for name in parents:
        group = group[name]
    group[last] = value
    return config


@pytest.mark.parametrize("size", (*SIZES, "qwen2_7b"))
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_builds_in_every_size(stage, size):
    config = from_mapping(RunConfig, mapping(STAGES[stage], f"size={size}"))
    assert config.name == f"{stage}_{size}"


@pytest.mark.parametrize("stage", STAGES)
def test_configs_set_every_field(stage):
    """A field that only its default gives a value cannot be set on the command line."""

    def names(cls_or_value, config, path=""):
        for field in dataclasses.fields(cls_or_value):
            where = f"{path}.{field.name}".lstrip(".")
            assert field.name in config, f"{stage}: {where} is not in the config"
            value = getattr(cls_or_value, field.name)
            if dataclasses.is_dataclass(value):
                names(value, config[field.name], where)

    raw = mapping(STAGES[stage])
    names(from_mapping(RunConfig, raw), raw)


def test_json_round_trip():
    config = from_mapping(RunConfig, mapping())
    assert from_json(RunConfig, to_json(config)) == config


def test_long_is_the_papers_setting():
    config = from_mapping(RunConfig, mapping(long, "size=qwen2_7b"))
    assert config.model.frame_tokens == 256  # paper: 256 tokens per frame
    assert config.model.visual_tokens(128) == 8192  # paper: 128 frames, pooled by 4, 8K tokens
    assert config.model.visual_tokens(1) == 256  # an image


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.temporal.layer", 1, "model.temporal has no field layer; it has .*layers"),
        ("train.steps", "many", r"train.steps='many' must be of type int"),
        ("train.steps", True, r"train.steps=True must be of type int"),
        ("train.steps", 0, "train.steps=0 is below 1"),
        ("train.remat.vit", "some", r"train.remat.vit='some' is not one of 'none', 'dots', "),
        ("train.remat.saved", ("mlps",), "train.remat.saved names mlps; there are attention, mlp"),
        ("train.accumulation", 3, "train.batch=64 is not a multiple of train.accumulation=3"),
        ("model.reduction.temporal_pool", 0, "reduction.temporal_pool=0"),
        ("model.reduction.spatial_pool", 3, "1 tokens a side, not a multiple of"),
        ("model.vit.output_layer", -3, "vit.output_layer=-3"),
        ("model.vit.heads", 5, "vit.width=64 is not a multiple of vit.heads=5"),
        ("model.decoder.kv_heads", 3, "decoder.heads=4 is not a multiple of decoder.kv_heads=3"),
        ("model.decoder.window", 0, "has local layers: set decoder.window"),
        ("data.row_frames", 4, "data.row_frames=4 cannot hold one video of"),
        ("data.sequence_length", 2, "8 frames are 2 visual tokens, but data.sequence_length=2;"),
        ("data.train", 5, "data.train=5 must be a list"),
        ("data.frames", 5, "data.frames=5 must be a group of fields"),
    ],
)
def test_mistakes_are_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(RunConfig, changed(path, value))


def test_missing_field_is_named():
    config = mapping()
    del config["model"]["vit"]["width"]
    with pytest.raises(ConfigError, match="model.vit.width is missing"):
        from_mapping(RunConfig, config)


def test_config_argument_is_checked():
    with pytest.raises(ValueError, match="'frames=3' is not understood: write size=NAME"):
        long.get_config("frames=3")


@pytest.mark.parametrize(
    "pool, sampling, frames, groups",
    [
        (1, 1, 3, [0, 1, 2]),
        (4, 1, 6, [0, 0, 0, 0, 1, 1]),  # the last group averages two
        (4, 1, 1, [0]),  # an image
        (1, 2, 5, [0, -1, 1, -1, 2]),
        (2, 2, 7, [0, 0, -1, -1, 1, 1, -1]),
    ],
)
def test_frame_groups(pool, sampling, frames, groups):
    reduction = ReductionConfig(temporal_pool=pool, temporal_sampling=sampling)
    np.testing.assert_array_equal(reduction.frame_groups(frames), groups)
    assert reduction.groups(frames) == max(groups) + 1
