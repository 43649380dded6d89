"""The whole model: against published parts chained by hand, packing, merging, gradients."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, SiglipVisionConfig, SiglipVisionModel

from storm_jax.config import VISUAL, RematConfig, TemporalConfig
from storm_jax.models.storm import PARTS, StormModel, count_parameters
from tests.compilation import FUSED
from tests.models.references import (
    decoder_config,
    decoder_params,
    flat_square,
    pixels,
    randomise,
    shapes,
    temporal_encoder,
    temporal_params,
    vit_params,
)
from tests.tiny import tiny_model

torch = pytest.importorskip("torch")

V = VISUAL
FRAMES, LENGTH = 5, 20
# A frame is 4 tokens; two frames are averaged: the video of 3 frames makes 8 tokens, an image 4.
VIDEO_SAMPLE = [5, *[V] * 8, 7, 9]
IMAGE_SAMPLE = [3, *[V] * 4, 8]
TEXT_SAMPLE = [11, 12, 13, 14, 15, 16, 17]


@pytest.fixture(scope="module")
def siglip():
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=3,
        vision_use_head=False,
        attn_implementation="eager",
    )
    return randomise(SiglipVisionModel(config))


@pytest.fixture(scope="module")
def gemma():
    config = Gemma3TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        attn_implementation="eager",
    )
    return randomise(Gemma3ForCausalLM(config), seed=1)


@pytest.fixture(scope="module")
def model(gemma):
    temporal = TemporalConfig(layers=2, state=4, dt_rank=2)
    config = tiny_model()
    decoder = decoder_config(gemma.config)
    return StormModel(dataclasses.replace(config, temporal=temporal, decoder=decoder))


@pytest.fixture(scope="module")
def params(model, siglip, gemma):
    rng = np.random.default_rng(3)
    D_v, D = 16, 32

    def normal(*shape, scale):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    params = {
        "vit": vit_params(siglip, 2, final_norm=True),
        "projector": {
            "norm": {"scale": 1 + normal(4 * D_v, scale=0.3), "bias": normal(4 * D_v, scale=0.3)},
            "linear": {"weight": normal(4 * D_v, D, scale=1 / 8), "bias": normal(D, scale=0.3)},
        },
        "temporal": temporal_params(D, model.config.temporal),
        "decoder": decoder_params(gemma, model.config.decoder),
    }
    assert shapes(params) == shapes(model.abstract())
    return jax.tree.map(jnp.asarray, params)


def random_frames(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), np.uint8)


VIDEO, IMAGE = random_frames(3, 0), random_frames(1, 1)


def row(*samples):
    """One row of a batch, laid out by hand; a sample is (tokens, frames or None)."""
    out = {
        "frames": np.zeros((FRAMES, 12, 12, 3), np.uint8),
        "frame_segments": np.full(FRAMES, -1, np.int32),
        "frame_groups": np.full(FRAMES, -1, np.int32),
        "tokens": np.zeros(LENGTH, np.int32),
        "segments": np.full(LENGTH, -1, np.int32),
        "positions": np.zeros(LENGTH, np.int32),
    }
    at = frame = group = 0
    for number, (tokens, frames) in enumerate(samples):
        stop = at + len(tokens)
        out["tokens"][at:stop] = tokens
        out["segments"][at:stop] = number
        out["positions"][at:stop] = np.arange(len(tokens))
        at = stop
        for i in range(0, 0 if frames is None else len(frames), 2):
            for one in frames[i : i + 2]:
                out["frames"][frame] = one
                out["frame_segments"][frame] = number
                out["frame_groups"][frame] = group
                frame += 1
            group += 1
    return out


def batch_of(*rows):
    return jax.tree.map(lambda *x: np.stack(x), *rows)


PACKED = batch_of(row((VIDEO_SAMPLE, VIDEO), (IMAGE_SAMPLE, IMAGE)), row((TEXT_SAMPLE, None)))
SEPARATE = batch_of(
    row((IMAGE_SAMPLE, IMAGE)), row((VIDEO_SAMPLE, VIDEO)), row((TEXT_SAMPLE, None))
)


@partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


@pytest.fixture(scope="module")
def packed_logits(model, params):
    return np.asarray(apply(model, params, PACKED))


def visual_tokens(frames, siglip, params):
    """SigLIP, VILA's shuffle, torch's norm and linear, Mamba in float64, a mean over frames."""
    p = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params["projector"])
    with torch.no_grad():
        x = siglip(pixels(frames)).last_hidden_state
        x = flat_square(x.reshape(len(frames), 4, 4, -1))
        norm = p["norm"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm["scale"], norm["bias"], 1e-6)
        x = x @ p["linear"]["weight"] + p["linear"]["bias"]
    x = x.double().numpy().reshape(len(frames) * 4, -1)
    if "temporal" in params:
        x = temporal_encoder(x, jax.tree.map(np.asarray, params["temporal"]))
    x = x.reshape(len(frames), 4, -1)
    return np.concatenate([x[i : i + 2].mean(axis=0) for i in range(0, len(frames), 2)])


def reference(tokens, frames, siglip, gemma, params):
    """Logits of one sample from the published implementations."""
    tokens = np.asarray(tokens)
    with torch.no_grad():
        x = gemma.model.embed_tokens(torch.from_numpy(np.maximum(tokens, 0)))
        if frames is not None:
            visual = visual_tokens(frames, siglip, params)
            x[torch.from_numpy(tokens == V)] = torch.from_numpy(visual.astype(np.float32))
        return gemma(inputs_embeds=x[None]).logits[0].numpy()


def test_samples_of_a_packed_batch_equal_the_published_parts(packed_logits, siglip, gemma, params):
    samples = [
        (0, 0, VIDEO_SAMPLE, VIDEO),
        (0, len(VIDEO_SAMPLE), IMAGE_SAMPLE, IMAGE),
        (1, 0, TEXT_SAMPLE, None),
    ]
    for b, start, tokens, frames in samples:
        expected = reference(tokens, frames, siglip, gemma, params)
        assert expected.std() > 0.2
        got = packed_logits[b, start : start + len(tokens)]
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)
    assert packed_logits.dtype == np.float32 and np.isfinite(packed_logits).all()


def test_packed_equals_separate_samples(model, params, packed_logits):
    image, video, text = np.asarray(apply(model, params, SEPARATE))
    a, b = len(VIDEO_SAMPLE), len(VIDEO_SAMPLE) + len(IMAGE_SAMPLE)
    np.testing.assert_allclose(packed_logits[0, :a], video[:a], atol=1e-5, rtol=0)
    np.testing.assert_allclose(packed_logits[0, a:b], image[: b - a], atol=1e-5, rtol=0)
    text_length = len(TEXT_SAMPLE)
    np.testing.assert_allclose(packed_logits[1, :text_length], text[:text_length], atol=1e-5)


def test_a_sample_sees_only_its_own_frames(model, params, packed_logits):
    """Other pixels in the image: bit for bit the same logits for the video, others for it."""
    changed = {**PACKED, "frames": PACKED["frames"].copy()}
    changed["frames"][0, 3] = 255 - changed["frames"][0, 3]
    changed["frames"][:, 4] = 77  # padding
    got = np.asarray(apply(model, params, changed))
    a, b = len(VIDEO_SAMPLE), len(VIDEO_SAMPLE) + len(IMAGE_SAMPLE)
    np.testing.assert_array_equal(got[0, :a], packed_logits[0, :a])
    np.testing.assert_array_equal(got[1], packed_logits[1])
    assert np.abs(got - packed_logits)[0, a + 1 : b].max() > 1e-3
    np.testing.assert_array_equal(got[0, a], packed_logits[0, a])  # before its first visual token


def test_visual_tokens_stand_at_visual_positions(model, params):
    tokens = jnp.asarray([[7, V, V, 3, V, 0], [V, 2, V, V, V, V], [1, 2, 3, 4, 5, 6]])
    visual = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 32)), jnp.float32)
    got = np.asarray(jax.jit(lambda p: model.bind(p).embed(tokens, visual))(params))
    table = np.asarray(params["decoder"]["embedding"]["table"]) * np.float32(np.sqrt(32))
    expected = [
        [table[7], visual[0, 0], visual[0, 1], table[3], visual[0, 2], table[0]],
        [visual[1, 0], table[2], visual[1, 1], visual[1, 2], visual[1, 3], visual[1, 4]],
        [table[i] for i in range(1, 7)],
    ]
    np.testing.assert_allclose(got, np.asarray(expected), atol=1e-6, rtol=0)


def test_a_batch_with_no_room_for_a_frame_is_text(model, params, gemma):
    """Three positions cannot hold a frame's four tokens; frames are not even encoded."""
    batch = {k: v[1:] for k, v in PACKED.items()}
    batch |= {k: batch[k][:, :3] for k in ("tokens", "segments", "positions")}
    got = apply(model, params, batch)
    with torch.no_grad():
        expected = gemma(torch.tensor([TEXT_SAMPLE[:3]])).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def loss(model, params, batch):
    weights = np.random.default_rng(8).normal(size=(LENGTH, 48)).astype(np.float32)
    scores = model.apply(params, batch) * (batch["segments"] >= 0)[..., None]
    return jnp.sum(scores * weights)


@pytest.fixture(scope="module")
def gradient(model):
    return jax.jit(jax.grad(partial(loss, model)))


def test_gradients_reach_every_parameter_of_every_layer(gradient, params):
    grads = jax.device_get(gradient(params, PACKED))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        stacked = "blocks" in name
        size = np.abs(g).reshape(len(g) if stacked else 1, -1).max(axis=1)
        if "vit" in name and "key" in name and "bias" in name:
            assert (size < 1e-3).all(), name  # shifts all scores of a query alike
        else:
            assert (size > 1e-4).all(), (name, size)
            assert np.isfinite(g).all(), name


def test_text_gives_no_gradient_to_the_visual_parts(gradient, params):
    text = batch_of(row((TEXT_SAMPLE, None)), row((TEXT_SAMPLE[::-1], None)))
    grads = gradient(params, text)
    for part in ("vit", "projector", "temporal"):
        for g in jax.tree.leaves(grads[part]):
            np.testing.assert_array_equal(g, 0)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["decoder"])) > 1e-4


@pytest.fixture(scope="module")
def gradient_with(model, params):
    """The gradient of a loss, by remat."""

    @functools.cache
    def gradient(remat):
        @functools.partial(jax.jit, compiler_options=FUSED)
        @jax.grad
        def of(params):
            storm = model.bind(params)
            weights = np.random.default_rng(8).normal(size=(LENGTH, 48)).astype(np.float32)
            scores = storm.decoder.logits(storm(PACKED, RematConfig(remat, remat, remat)))
            return jnp.sum(scores * (PACKED["segments"] >= 0)[..., None] * weights)

        return of(params)

    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(gradient_with, remat):
    """Against the same program without remat: another program rounds differently by 1e-5."""

    def close(ours, theirs):
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * scale, rtol=0)

    jax.tree.map(close, gradient_with(remat), gradient_with("none"))


def test_without_temporal_encoder(model, params, siglip, gemma):
    """Same tokens, no Mamba: plain pooling of the projected patches."""
    plain = StormModel(dataclasses.replace(model.config, temporal=TemporalConfig(layers=0)))
    assert set(plain.abstract()) == set(PARTS) - {"temporal"}
    rest = {part: params[part] for part in PARTS if part != "temporal"}
    got = apply(plain, rest, PACKED)
    expected = reference(VIDEO_SAMPLE, VIDEO, siglip, gemma, rest)
    np.testing.assert_allclose(got[0, : len(VIDEO_SAMPLE)], expected, atol=2e-5, rtol=0)


def test_temporal_sampling_keeps_tokens_as_they_were(model, params):
    """Dropped frames have been mixed into the kept ones: these are the same with and without."""
    frames = random_frames(FRAMES, 4)[None]
    segments = np.zeros((1, FRAMES), np.int32)
    sampled = dataclasses.replace(model.config.reduction, temporal_sampling=2)

    @partial(jax.jit, static_argnums=2)
    def encode(params, groups_BF, groups):
        return model.bind(params).encode(frames, segments, groups_BF, groups)

    whole = encode(params, model.config.reduction.frame_groups(FRAMES)[None], 3)[0]
    kept = encode(params, sampled.frame_groups(FRAMES)[None], sampled.groups(FRAMES))[0]
    np.testing.assert_allclose(kept[:4], whole[:4], atol=1e-6)
    np.testing.assert_allclose(kept[4:], whole[8:12], atol=1e-6)


def test_bfloat16_is_finite_and_close(model, params, packed_logits):
    half = StormModel(dataclasses.replace(model.config, dtype="bfloat16"))
    got = np.asarray(apply(half, params, PACKED))
    assert got.dtype == np.float32 and np.isfinite(got).all()
    valid = PACKED["segments"] >= 0
    error = np.sqrt(np.mean((got - packed_logits)[valid] ** 2))
    assert 1e-4 * packed_logits.std() < error < 0.05 * packed_logits.std()


@pytest.mark.slow
def test_gradients_in_bfloat16_are_as_good_as_bfloat16_weights(model, gradient, params):
    """Rounding the weights alone, in a float32 model, sets the scale of the unavoidable error."""
    half = StormModel(dataclasses.replace(model.config, dtype="bfloat16"))
    exact = gradient(params, PACKED)
    rounded = gradient(
        jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), params), PACKED
    )
    grads = jax.jit(jax.grad(partial(loss, half)))(params, PACKED)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))

    def flat(grads, part):
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads[part])])

    for part in PARTS:
        error, scale = (np.linalg.norm(flat(g, part) - flat(exact, part)) for g in (grads, rounded))
        assert 0 < error < 4 * scale, (part, error, scale)


@pytest.mark.slow
def test_random_parameters_are_as_announced(model):
    init = jax.jit(model.init)
    a, b, c = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    assert shapes(a) == shapes(model.abstract())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(a))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    table = ("decoder", "embedding", "table")
    first, second = (p[table[0]][table[1]][table[2]] for p in (a, c))
    assert np.abs(first - second).max() > 0.01
    # Layers of a stack start apart.
    gate = a["decoder"]["blocks"]["layers"]["gate"]["weight"]
    assert np.abs(gate[0] - gate[1]).max() > 0.01
    assert count_parameters(a) == sum(np.prod(s) for s in shapes(a).values())
