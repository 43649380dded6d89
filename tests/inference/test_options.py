"""Test-time options: what they refuse, and that the tokens they report are those that come out."""

import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import ConfigError
from storm_jax.inference.options import Options
from storm_jax.inference.prune import DuplicateFilter
from storm_jax.models.reduction import reduce_tokens
from tests.tiny import run_config

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
