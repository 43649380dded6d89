"""Static tokens against NumPy written by hand; near-duplicate frames on real encoded video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.data.conversation import Media
from storm_jax.data.video import sample
from storm_jax.frames import FrameConfig
from storm_jax.inference.prune import (
    DuplicateFilter,
    kept_tokens,
    prune_static,
    small_luma,
)


def by_hand(x_VD, group, wanted):
    """Places of the wanted tokens, one token after another in float64."""
    score = []
    for i, token in enumerate(x_VD.astype(np.float64)):
        if i < group:
            score.append((0, np.inf, -i))
            continue
        before = x_VD[i - group].astype(np.float64)
        cosine = token @ before / (np.sqrt(token @ token) * np.sqrt(before @ before))
        score.append((0, 1 - cosine, -i))
    best = sorted(range(len(x_VD)), key=lambda i: score[i], reverse=True)[:wanted]
    return sorted(best)


def video_tokens(rng, groups, group, width, moving=0.4):
    """Tokens that mostly repeat the frame before with a little noise."""
    frames = [rng.normal(size=(group, width))]
    for _ in range(groups - 1):
        still = frames[-1] * rng.uniform(0.5, 2, (group, 1))  # a longer vector is no other one
        noise = 0.01 * rng.normal(size=(group, width))
        new = rng.normal(size=(group, width))
        frames.append(np.where(rng.random((group, 1)) < moving, new, still + noise))
    return np.concatenate(frames).astype(np.float32)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("groups,group", [(1, 4), (2, 1), (7, 9), (12, 16)])
def test_same_tokens_as_by_hand(groups, group, share):
    x = video_tokens(np.random.default_rng(groups), groups, group, 24)
    keep = kept_tokens(len(x), group, share)
    kept, index = jax.jit(prune_static, static_argnums=(1, 2))(x, group, keep)
    assert index.tolist() == by_hand(x, group, keep)
    np.testing.assert_array_equal(kept, x[index])
    assert index.tolist()[:group] == list(range(group))  # the first frame whole, in order


def test_padding_is_never_kept_and_one_program_serves_all_lengths():
    group, groups, share = 6, 10, 0.5
    rng = np.random.default_rng(1)
    compiled = []

    @jax.jit
    def prune(x, count, quota):
        compiled.append(1)
        return prune_static(x, group, kept_tokens(groups * group, group, share), count, quota)

    for real in (1, 3, 4, 10):
        count = real * group
        x = video_tokens(rng, real, group, 16)
        # What stands in the padding is most unlike everything.
        garbage = 100 * rng.normal(size=((groups - real) * group, 16)).astype(np.float32)
        quota = kept_tokens(count, group, share)
        kept, index = prune(np.concatenate([x, garbage]), count, quota)
        assert index.shape == (30,) and kept.shape == (30, 16)
        assert index[:quota].tolist() == by_hand(x, group, quota)
        np.testing.assert_array_equal(kept[:quota], x[index[:quota]])
        assert (np.asarray(index[quota:]) == groups * group).all()
        assert not np.asarray(kept[quota:]).any()
    assert len(compiled) == 1


def test_of_equal_tokens_the_earlier_stay_and_zeros_do_no_harm():
    x = jnp.zeros((12, 8)).at[:, 0].set(1.0)
    assert prune_static(x, 3, 5)[1].tolist() == [0, 1, 2, 3, 4]
    zeros, index = prune_static(jnp.zeros((12, 8), jnp.bfloat16), 3, 7)
    assert index.tolist() == list(range(7)) and zeros.dtype == jnp.bfloat16


def test_quota():
    # floor(share * tokens), the first frame at least, never more than there are
    assert kept_tokens(100, 10, 0.29) == 29  # 28.999999999999996 in floating point
    assert kept_tokens(100, 10, 0.299) == 29
    assert kept_tokens(100, 10, 0.01) == 10
    assert kept_tokens(10, 10, 0.5) == 10
    assert kept_tokens(0, 10, 0.5) == 0


def test_arguments_of_prune_static():
    x = jnp.ones((12, 4))
    with pytest.raises(ValueError, match="12 tokens are not a multiple of 5"):
        prune_static(x, 5, 6)
    for keep in (2, 13):
        with pytest.raises(ValueError, match=f"keep={keep} is not between a frame"):
            prune_static(x, 3, keep)


@pytest.mark.parametrize("side", [12, 32, 40, 50, 448])
def test_small_luma_is_the_mean_of_each_cell(side):
    frames = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    found = small_luma(frames)
    cells = min(32, side)
    assert found.shape == (2, cells, cells)
    for i, j in ((0, 0), (3, 7), (cells - 1, cells - 1)):
        rows, columns = (slice(k * side // cells, (k + 1) * side // cells) for k in (i, j))
        red, green, blue = frames[1, rows, columns].reshape(-1, 3).mean(0)
        assert found[1, i, j] == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, rel=1e-5)


def grey(level):
    return np.full((1, 64, 64, 3), level, np.uint8)


def test_frames_are_compared_with_the_last_kept_one():
    levels = [100, 101, 102, 103, 104, 105, 200, 199, 100]
    frames = np.concatenate([grey(x) for x in levels])
    duplicates = DuplicateFilter(3.0)
    kept = duplicates(frames)
    # 103 differs by 3 from 100, 105 by 2 from 103; slow changes add up.
    assert kept[:, 0, 0, 0].tolist() == [100, 103, 200, 100]
    assert (duplicates.seen, duplicates.kept) == (9, 4)
    # In chunks of any size it is the same.
    for size in (1, 2, 4):
        again = DuplicateFilter(3.0)
        chunks = [frames[i : i + size] for i in range(0, 9, size)]
        found = list(again.filtered(chunks))
        assert all(len(x) for x in found)
        np.testing.assert_array_equal(np.concatenate(found), kept)
    assert len(DuplicateFilter(0.0)(np.repeat(grey(7), 5, 0))) == 5


def test_noise_of_compression_is_below_the_stated_level(tmp_path):
    """A still, textured scene with camera noise, as x264 compresses it, and one that moves."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    texture = rng.integers(40, 216, (30, 40, 3)).repeat(8, 0).repeat(8, 1)

    def write(path, shift):
        with av.open(str(path), "w") as output:
            stream = output.add_stream("libx264", rate=30, options={"crf": "28"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for i in range(90):
                image = np.roll(texture, i * shift, 1) + rng.normal(0, 4, texture.shape)
                image = np.clip(image, 0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return sample(Media("video", str(path)), FrameConfig(30), 224)[0]

    still = DuplicateFilter(0.5)
    still(write(tmp_path / "still.mp4", 0))
    moving = DuplicateFilter(2.0)
    moving(write(tmp_path / "moving.mp4", 3))
    assert (still.kept, moving.kept) == (1, 30)
