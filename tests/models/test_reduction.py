"""Token reduction against plain loops in float64, and the count that everyone relies on."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import ConfigError, ReductionConfig
from storm_jax.models.reduction import reduce_tokens
from tests.tiny import tiny_model


def reduced(video, config: ReductionConfig):
    """[F, N, D] float64 -> [tokens, D], written from the paper's section 3.3."""
    F, N, D = video.shape
    k, s, step = config.temporal_pool, config.spatial_pool, config.temporal_sampling
    pooled = [video[i : i + k].mean(axis=0) for i in range(0, F, k)][::step]
    side = int(N**0.5)
    out = []
    for frame in pooled:
        square = frame.reshape(side, side, D)
        for i, j in itertools.product(range(0, side, s), repeat=2):
            out.append(square[i : i + s, j : j + s].mean(axis=(0, 1)))
    return np.stack(out)


def video(frames, side=4, width=3, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, side * side, width))


SETTINGS = [
    (1, 1, 1),  # none
    (4, 1, 1),
    (1, 2, 1),
    (4, 2, 1),
    (1, 1, 3),
    (2, 1, 2),
    (3, 4, 2),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_reduction_of_one_video(setting, frames):
    config = ReductionConfig(*setting)
    x = video(frames)
    groups = config.groups(frames)
    got = reduce_tokens(
        jnp.asarray(x[None], jnp.float32),
        jnp.asarray(config.frame_groups(frames)[None]),
        groups,
        config.spatial_pool,
    )
    expected = reduced(x, config)
    assert got.shape[1:] == expected.shape
    np.testing.assert_allclose(got[0], expected, atol=1e-6, rtol=0)


def test_last_group_averages_what_is_there():
    x = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 5, 1, 1)
    groups = ReductionConfig(temporal_pool=3).frame_groups(5)
    np.testing.assert_array_equal(groups, [0, 0, 0, 1, 1])
    got = reduce_tokens(x, jnp.asarray(groups[None]), 2, 1)
    np.testing.assert_allclose(got[0, :, 0], [7 / 3, 12], rtol=1e-6)


def test_windows_of_tokens_by_hand():
    x = jnp.arange(16.0).reshape(1, 1, 16, 1)
    got = reduce_tokens(x, jnp.zeros((1, 1), jnp.int32), 1, 2)
    np.testing.assert_array_equal(got[0, :, 0], [2.5, 4.5, 10.5, 12.5])


def test_sampling_keeps_every_third_pooled_frame():
    config = ReductionConfig(temporal_pool=2, temporal_sampling=3)
    got = config.frame_groups(15)
    np.testing.assert_array_equal(got, [0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2, -1])
    assert config.groups(15) == 3


def test_packed_row_with_padding():
    """A video, an image and padding frames; groups that nothing reaches are zero."""
    config = ReductionConfig(temporal_pool=4, spatial_pool=2)
    first, image = video(6, seed=1), video(1, seed=2)
    padding = np.full((3, 16, 3), 1e6)
    x = jnp.asarray(np.concatenate([first, image, padding])[None], jnp.float32)
    groups = jnp.asarray([[0, 0, 0, 0, 1, 1, 2, -1, -1, -1]])
    got = np.asarray(reduce_tokens(x, groups, 5, 2)[0])
    np.testing.assert_allclose(got[:8], reduced(first, config), atol=1e-6)
    np.testing.assert_allclose(got[8:12], reduced(image, config), atol=1e-6)
    np.testing.assert_array_equal(got[12:], 0)


def test_bfloat16_sums_in_float32():
    """Sixty-four ones and a small value: a bfloat16 sum would lose it."""
    x = jnp.full((1, 64, 1, 1), 1.0, jnp.bfloat16).at[0, 63].set(3.0)
    got = reduce_tokens(x, jnp.zeros((1, 64), jnp.int32), 1, 1)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0]) == float(jnp.bfloat16(66 / 64))


# 12 pixels of patch 3: grid 4, 2x2 tokens. 15: grid 5, padded to 3x3. 384 with patch 14 likewise
# makes 27 -> 14.
@pytest.mark.parametrize("side,pools", [(12, (1, 2)), (15, (1, 3)), (24, (1, 2, 4))])
def test_visual_tokens_is_what_comes_out(side, pools):
    for k, step, frames in itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3, 5, 8, 13)):
        for pool in pools:
            reduction = dict(temporal_pool=k, spatial_pool=pool, temporal_sampling=step)
            config = tiny_model(vit=dict(image_size=side), reduction=reduction)
            x = np.ones((frames, config.frame_tokens, 1))
            expected = len(reduced(x, config.reduction))
            assert config.visual_tokens(frames) == expected, (reduction, frames)
            # Every frame's group has a place, and no place is left without frames.
            groups = config.reduction.frame_groups(frames)
            kept = sorted(set(groups.tolist()) - {-1})
            assert kept == list(range(config.reduction.groups(frames)))


def test_published_token_counts():
    """So400m/14: 256 tokens a frame at 448 pixels, 14x14 at 384 (27 patches a side, padded)."""
    paper = tiny_model(vit=dict(image_size=448, patch_size=14), reduction=dict(temporal_pool=4))
    assert paper.frame_tokens == 256
    assert paper.visual_tokens(128) == 8192  # the paper's 8K budget: 128 frames, 4 at a time
    assert paper.visual_tokens(130) == 33 * 256
    small = tiny_model(vit=dict(image_size=384, patch_size=14), reduction=dict(temporal_pool=1))
    assert small.visual_tokens(32) == 32 * 196


def test_bad_values_name_the_field():
    with pytest.raises(ConfigError, match=r"reduction\.temporal_pool=0"):
        ReductionConfig(temporal_pool=0)
    with pytest.raises(ConfigError, match=r"2 tokens a side, not a multiple of\s+.*spatial_pool=3"):
        tiny_model(reduction=dict(spatial_pool=3))
