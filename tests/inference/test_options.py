"""Test-time options: what they refuse, and that the tokens they report are those that come out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.inference.load import made_ready
from storm_jax.inference.options import Options
from storm_jax.inference.prefill import Encoder
from storm_jax.inference.prune import DuplicateFilter
from storm_jax.models.reduction import reduce_tokens
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import perturbed
from tests.inference.test_prune import by_hand
from tests.tiny import run_config, tiny_model

CONFIG = run_config(**{"model.reduction.temporal_pool": 4})


def test_nothing_asked_changes_nothing():
    assert Options().apply(CONFIG) == CONFIG


def test_frames_and_sampling():
    applied = Options(frames=700, temporal_sampling=3).apply(CONFIG)
    assert applied.data.frames.max_frames == applied.data.row_frames == 700
    assert applied.model.reduction.temporal_sampling == 3
    assert applied.model.reduction.temporal_pool == 4
    # 175 pooled frames, 59 of them sampled, fit
    assert applied.model.visual_tokens(700) == 59 * applied.model.group_tokens
    assert applied.data.sequence_length >= applied.model.visual_tokens(700)
    assert applied.data.frames.fps == CONFIG.data.frames.fps


def test_pooling_only_as_trained():
    same = Options(temporal_pool=4, spatial_pool=CONFIG.model.reduction.spatial_pool)
    assert same.apply(CONFIG) == CONFIG
    for name, trained in (("temporal_pool", 4), ("spatial_pool", 1)):
        with pytest.raises(ConfigError, match=f"{name}=2: .* trained with {name}={trained}"):
            Options(**{name: 2}).apply(CONFIG)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(frames=-1), "frames=-1 is negative"),
        (dict(temporal_sampling=-2), "temporal_sampling=-2 is negative"),
        (dict(duplicate_threshold=-0.5), "duplicate_threshold=-0.5"),
        (dict(duplicate_threshold=float("nan")), "duplicate_threshold=nan"),
        (dict(keep_tokens=0.0), "keep_tokens=0 "),
        (dict(keep_tokens=1.5), "keep_tokens=1.5"),
    ],
)
def test_values_out_of_range(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Options(**wrong)


def test_kept_tokens_are_those_of_the_model():
    options = Options(frames=30, temporal_sampling=2, duplicate_threshold=1.0, keep_tokens=0.5)
    model = options.apply(CONFIG).model
    frames = np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 2)[:30]  # every frame twice
    frames = np.broadcast_to(frames[:, None, None, None], (30, 8, 8, 3))
    kept = DuplicateFilter(options.duplicate_threshold)(frames)
    found = options.tokens_kept(model, len(frames), len(kept))
    assert (found.frames_sampled, found.frames) == (30, 15)
    x = jnp.zeros((1, 15, model.frame_tokens, 4))
    assert found.mixed == x.shape[1] * x.shape[2]
    groups = model.reduction.frame_groups(15)
    tokens = reduce_tokens(x, groups[None], int(groups.max()) + 1, model.reduction.spatial_pool)
    assert found.sampled == tokens.shape[1]
    assert found.pooled == 4 * model.group_tokens  # 4 + 4 + 4 + 3 frames
    assert found.pruned == max(model.group_tokens, found.sampled // 2)
    assert str(found).startswith("30 frames sampled, 15 encoded; visual tokens: ")


@pytest.mark.parametrize("devices, counts", [(1, (3, 14)), (2, (9,))])
def test_encoding_with_options_is_the_model_and_then_numpy(devices, counts):
    """Duplicates by their pixels, sampling and pruning by hand, on what the whole model gives."""
    config = dataclasses.replace(run_config(), model=tiny_model())  # groups of two frames
    model = StormModel(config.model)
    params = perturbed(model.init(jax.random.key(0)))
    kept_params = jax.tree.map(jnp.copy, params)
    mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
    encoder = Encoder(made_ready(config, params, mesh))
    rng = np.random.default_rng(0)
    group = config.model.group_tokens
    options = Options(temporal_sampling=2, duplicate_threshold=2.0, keep_tokens=0.6)
    for count in counts:
        frames = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
        # Every frame stays for a while, and a little noise comes with it.
        shown = np.repeat(frames, rng.integers(1, 4, count), axis=0)
        shown = np.clip(shown.astype(int) + rng.integers(-1, 2, shown.shape), 0, 255)
        shown = shown.astype(np.uint8)
        found = encoder((shown[i : i + 5] for i in range(0, len(shown), 5)), options)
        assert found.frames == count and found.mixed == count * config.model.frame_tokens

        first_shown = [i for i in range(len(shown)) if i == 0 or (
            np.abs(shown[i].astype(int) - shown[i - 1]).mean() > 20)]  # fmt: skip
        pooled = np.arange(count) // 2
        groups = np.where(pooled % 2 == 0, pooled // 2, -1).astype(np.int32)
        T = int(groups.max()) + 1

        @jax.jit
        def whole(params, frames, groups, T=T):
            segments = jnp.zeros((1, frames.shape[0]), jnp.int32)
            storm = model.bind(params)
            return storm.encode(frames[None], segments, groups[None], T)[0]

        tokens = np.asarray(whole(kept_params, shown[first_shown], groups))
        wanted = by_hand(tokens, group, max(group, int(0.6 * T * group)))
        assert found.count == len(wanted) < T * group or T == 1
        scale = np.abs(tokens).max()
        np.testing.assert_allclose(found.tokens[: found.count], tokens[wanted], atol=1e-5 * scale)
        expected = options.tokens_kept(options.apply(config).model, len(shown), count)
        assert (expected.pruned, expected.sampled) == (found.count, T * group)


def test_a_pooling_that_was_not_trained_is_refused_when_encoding():
    config = dataclasses.replace(run_config(), model=tiny_model())
    params = StormModel(config.model).init(jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=1, tensor=1), jax.devices()[:1])
    encoder = Encoder(made_ready(config, params, mesh))
    with pytest.raises(ConfigError, match="trained with temporal_pool=2"):
        encoder(np.zeros((2, 12, 12, 3), np.uint8), Options(temporal_pool=4))
