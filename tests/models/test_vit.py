"""The vision transformer against transformers' SigLIP."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import SiglipVisionConfig, SiglipVisionModel

from storm_jax.config import ConfigError, Remat, VitConfig
from storm_jax.models.vit import Vit, VitBlock, normalise, resize_positions
from tests.compilation import FUSED
from tests.models.references import pixels, randomise, vit_params, with_params

torch = pytest.importorskip("torch")

LAYERS, WIDTH, HEADS, MLP, PATCH = 3, 24, 3, 40, 7
TABLE = 4  # side of the position table
ROWS, FRAMES = 2, 5


def config(image_size, output_layer=-1, frames_per_call=0, table=TABLE) -> VitConfig:
    return VitConfig(
        image_size=image_size,
        patch_size=PATCH,
        width=WIDTH,
        mlp=MLP,
        layers=LAYERS,
        heads=HEADS,
        position_grid=table,
        position_scale=0.4,
        output_layer=output_layer,
        frames_per_call=frames_per_call,
    )


@pytest.fixture(scope="module")
def siglip():
    hf = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=TABLE * PATCH,
        patch_size=PATCH,
        vision_use_head=False,
        attn_implementation="eager",
    )
    return randomise(SiglipVisionModel(hf))


def frames(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (ROWS, FRAMES, side, side, 3), np.uint8)


def params_of(siglip, vit_config) -> dict:
    last = vit_config.output_layer == -1
    return vit_params(siglip, LAYERS if last else LAYERS - 1, final_norm=last)


def features(vit_config, params, images, remat="none", calls=False):
    return with_params(lambda: Vit(vit_config, nnx.Rngs(0)), params)(
        images, jnp.float32, Remat(remat, ("attention",)), calls
    )


def reference(siglip, images, output_layer):
    flat = images.reshape(-1, *images.shape[2:])
    with torch.no_grad():
        out = siglip(pixels(flat), interpolate_pos_encoding=True, output_hidden_states=True)
    hidden = out.last_hidden_state if output_layer == -1 else out.hidden_states[-2]
    return hidden.numpy().reshape(*images.shape[:2], -1, WIDTH)


# 28: the table as it is; 30: two pixels are not seen (384 = 27 * 14 + 6 likewise); 45: the table
# grows to 6x6, three pixels are not seen; 21: it shrinks to 3x3.
@pytest.mark.parametrize("output_layer", [-1, -2])
@pytest.mark.parametrize("side", [28, 30, 45, 21])
def test_features_are_those_of_siglip(siglip, side, output_layer):
    images = frames(side)
    vit_config = config(side, output_layer)
    got = jax.jit(partial(features, vit_config))(params_of(siglip, vit_config), images)
    expected = reference(siglip, images, output_layer)
    assert expected.std() > 0.5  # else the tolerance would mean little
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("old,new", [(4, 6), (4, 3), (27, 32), (32, 27), (5, 1)])
def test_resized_positions_are_those_of_torch(old, new):
    # In float64: torch's own float32 coordinates are off by 5e-6 of a value here.
    table = np.random.default_rng(0).normal(size=(old * old, 6))
    square = torch.from_numpy(table.reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, size=(new, new), mode="bicubic", align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(new * new, 6).numpy()
    got = resize_positions(jnp.asarray(table, jnp.float32), new)
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)


def test_gradients_are_those_of_torch(siglip):
    """Through the resized table, and the pixels that are not seen."""
    images = frames(45)
    weights = np.random.default_rng(1).normal(size=(ROWS, FRAMES, 36, WIDTH)).astype(np.float32)

    def loss(params):
        return jnp.sum(features(config(45), params, images) * weights)

    got = jax.jit(jax.grad(loss))(params_of(siglip, config(45)))
    siglip.zero_grad()
    out = siglip(pixels(images.reshape(-1, 45, 45, 3)), interpolate_pos_encoding=True)
    target = torch.from_numpy(weights.reshape(-1, 36, WIDTH))
    (out.last_hidden_state * target).sum().backward()
    expected = vit_params(siglip, LAYERS, final_norm=True, grads=True)

    def close(path, ours, theirs):
        # A bias on keys shifts all scores of a query alike: its gradient is zero up to rounding.
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, rtol=0, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, got, expected)


@pytest.fixture(scope="module")
def loss_and_gradient(siglip):
    """Features and gradients of everything, by frames_per_call and remat."""
    images = frames(30)
    weights = np.random.default_rng(2).normal(size=(ROWS, FRAMES, 16, WIDTH)).astype(np.float32)

    def run(frames_per_call, remat="none", calls=False):
        vit_config = config(30, frames_per_call=frames_per_call)

        def loss(params):
            out = features(vit_config, params, images, remat, calls)
            return jnp.sum(jnp.sin(out) * weights), out

        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FUSED)
        (_, out), grads = step(params_of(siglip, vit_config))
        return jax.device_get((out, grads))

    return run


@pytest.fixture(scope="module")
def all_at_once(loss_and_gradient):
    return loss_and_gradient(0)


# 5 frames: shares of 1, of 2 (one frame of padding), of 3 (5 = 3 + 2), more than there are.
@pytest.mark.parametrize(
    "frames_per_call,remat,calls",
    [
        (2, "full", True),
        (3, "none", False),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in [
                (1, "none", True),
                (8, "none", False),
                (2, "names", False),
            ]
        ),
        *(pytest.param(0, r, False, marks=pytest.mark.slow) for r in ("full", "dots")),
    ],
)
def test_micro_batches_and_remat_change_nothing(
    loss_and_gradient, all_at_once, frames_per_call, remat, calls
):
    out, grads = loss_and_gradient(frames_per_call, remat, calls)
    # Of other shapes, sums have another order, which depends on the machine: some 16 roundings of
    # the largest value.
    largest = np.abs(all_at_once[0]).max()
    np.testing.assert_allclose(out, all_at_once[0], atol=2e-6 * largest, rtol=0)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1.0))

    jax.tree.map(close, grads, all_at_once[1])


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_micro_batches_bound_the_memory_of_many_frames(siglip, remat):
    """Forward alone without remat, forward and backward with it."""

    params = vit_params(siglip, LAYERS, final_norm=True)
    images = jax.ShapeDtypeStruct((1, 64, 28, 28, 3), jnp.uint8)

    def temporaries(frames_per_call):
        def total(params, images):
            return features(
                config(28, frames_per_call=frames_per_call), params, images, remat, remat == "full"
            ).sum()

        f = total if remat == "none" else jax.grad(total)
        return jax.jit(f).lower(params, images).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < temporaries(0) / 3


def test_pixels_are_the_same_bits_everywhere():
    values = np.arange(256, dtype=np.uint8)
    alone, compiled = normalise(jnp.asarray(values)), jax.jit(normalise)(values)
    table = (torch.from_numpy(values).float() * 2 - 255) * (1 / 255)
    assert alone.dtype == jnp.float32
    np.testing.assert_array_equal(alone, table.numpy())
    np.testing.assert_array_equal(compiled, table.numpy())
    np.testing.assert_allclose(compiled, values / 127.5 - 1, rtol=0, atol=1e-7)


def test_bad_values_name_the_field():
    with pytest.raises(ConfigError, match=r"vit\.output_layer=-3"):
        config(28, output_layer=-3)
    with pytest.raises(ConfigError, match=r"vit\.image_size=5 is smaller than one patch \(7\)"):
        config(5)


def test_folded_layer_is_the_published_one(siglip):
    """Values and gradients, every parameter random: in float32, where both ways can be taken."""
    vit_config = config(28)
    params = jax.tree.map(lambda x: x[0], params_of(siglip, vit_config)["blocks"]["layers"])
    x = np.random.default_rng(3).normal(size=(2, 16, WIDTH)).astype(np.float32)
    weights = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)

    def run(name):
        def loss(params, x):
            block = with_params(lambda: VitBlock(vit_config, nnx.Rngs(0)), params)
            out = getattr(block, name)(x)
            return jnp.sum(out * weights), out

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=FUSED)
        (_, out), grads = step(params, x)
        return out, grads

    def close(ours, theirs):
        atol = 1e-5 * max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)

    jax.tree.map(close, run("folded"), run("as_published"))
