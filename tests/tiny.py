"""A model small enough for every test, and batches for it."""

import json

import numpy as np

from configs import debug
from storm_jax.config import VISUAL, ModelConfig, RunConfig, from_mapping


def run_config(**overrides) -> RunConfig:
    """configs/debug.py with dotted fields replaced: run_config(**{"train.steps": 3})."""
    config = debug.get_config()
    with config.unlocked():
        for path, value in overrides.items():
            group, _, name = path.rpartition(".")
            target = config
            for part in filter(None, group.split(".")):
                target = target[part]
            target[name] = value
    return from_mapping(RunConfig, json.loads(config.to_json_best_effort()))


def packed_batch(config: ModelConfig, rows: int, length: int, frames: int, seed: int) -> dict:
    """Random rows of one video of `frames` frames followed by text, the last third with targets."""
    rng = np.random.default_rng(seed)
    side = config.vit.image_size
    visual = config.visual_tokens(frames)
    tokens = rng.integers(0, config.decoder.vocab_size, (rows, length))
    targets = np.full((rows, length), -1)
    answer = slice(length - length // 3 - 1, length - 1)
    targets[:, answer] = tokens[:, answer.start + 1 : answer.stop + 1]
    tokens[:, 1 : 1 + visual] = VISUAL
    groups = config.reduction.frame_groups(frames)
    whole = {
        "frames": rng.integers(0, 256, (rows, frames, side, side, 3), dtype=np.uint8),
        "frame_segments": np.zeros((rows, frames)),
        "frame_groups": np.tile(groups, (rows, 1)),
        "tokens": tokens,
        "segments": np.zeros((rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "targets": targets,
    }
    return {k: v if k == "frames" else v.astype(np.int32) for k, v in whole.items()}


def tiny_model(**parts) -> ModelConfig:
    """A whole model of a few thousand parameters; `parts` replaces fields of its parts."""
    config = {
        "vit": dict(
            image_size=12,
            patch_size=3,
            width=16,
            mlp=24,
            layers=2,
            heads=2,
            position_grid=4,
            position_scale=0.4,
        ),
        "projector": {},
        "temporal": dict(layers=2, state=4, conv=4),
        "reduction": dict(temporal_pool=2),
        "decoder": dict(
            vocab_size=48,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp=48,
            activation="gelu_tanh",
            norm_eps=1e-6,
            norm_plus_one=True,
            post_norms=True,
            qkv_bias=False,
            qk_norm=True,
            query_scale=0.0,
            attention_softcap=0.0,
            logit_softcap=0.0,
            global_every=2,
            window=6,
            rope_theta=1e6,
            rope_theta_local=1e4,
            rope_scaling=1.0,
            tied_embeddings=True,
            scale_embeddings=True,
        ),
        "dtype": "float32",
    }
    for name, fields in parts.items():
        if isinstance(fields, dict):
            config[name] |= fields
        else:
            config[name] = fields
    return from_mapping(ModelConfig, config)
