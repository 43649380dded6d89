"""Controls for the temporal encoder against float64 NumPy, and everything that meets a mixer."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import long
from storm_jax.config import ConfigError, MeshConfig, Remat, RunConfig, TemporalConfig, from_mapping
from storm_jax.flops import Work, forward_flops
from storm_jax.inference.load import made_ready
from storm_jax.inference.prefill import Encoder
from storm_jax.interop.settings import model_settings
from storm_jax.models.attention import self_attention
from storm_jax.models.storm import StormModel, count_parameters
from storm_jax.models.temporal import MambaLayer, TemporalEncoder, empty_state
from storm_jax.models.temporal_controls import ControlEncoder, frame_positions
from storm_jax.parallel.checks import check_divisible
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import init_state
from storm_jax.training.step import make_train_step
from tests.parallel.cases import assert_equal_to_one_device
from tests.parallel.cases import random_params as random_whole
from tests.tiny import packed_batch, run_config, tiny_model

WIDTH, TOKENS = 16, 3
CONTROLS = ("mlp", "convolution", "attention")
slow = pytest.mark.slow
EVERY = pytest.mark.parametrize("mixer", CONTROLS)
BOTH = pytest.mark.parametrize("direction", ["bidirectional", "forward"])
# Two videos, an image and padding; a row of one video; a row of padding alone.
SEGMENTS = np.asarray([[0, 0, 0, 1, 1, 2, -1, -1], [0] * 8, [-1] * 8], np.int32)


def config(mixer, direction="bidirectional", layers=2) -> TemporalConfig:
    return TemporalConfig(layers=layers, mixer=mixer, direction=direction, state=4)


def build(temporal: TemporalConfig, width=WIDTH):
    kind = TemporalEncoder if temporal.mixer == "mamba" else ControlEncoder
    return kind(temporal, width, nnx.Rngs(0))


def random_params(temporal: TemporalConfig, width=WIDTH) -> dict:
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(temporal, width))))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(0)
    draws = [(0.4 * rng.normal(size=x.shape)).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, draws)


@partial(jax.jit, static_argnums=(0, 4))
def encode(temporal, params, x, segments, remat="none"):
    graph, state = nnx.split(nnx.eval_shape(lambda: build(temporal, x.shape[-1])))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, segments, Remat(remat))


def tokens(*lead, seed=1):
    lead = lead or SEGMENTS.shape
    return np.random.default_rng(seed).normal(size=(*lead, TOKENS, WIDTH)).astype(np.float32)


# -------------------------------------------------------------------------------------- reference


def mlp(x, p):
    up = np.einsum("fnd,dgm->fngm", x, p["up"]["weight"])
    gate = up[:, :, 0]
    return (gate / (1 + np.exp(-gate)) * up[:, :, 1]) @ p["down"]["weight"]


def convolution(x, p, forward):
    """TSM's shift in place of its own loop over a padded copy."""
    n = WIDTH // 8
    out = np.zeros_like(x)
    for f in range(len(x)):
        out[f] = x[f]
        out[f, :, :n] = x[f - 1, :, :n] if f > 0 else 0
        if not forward:
            out[f, :, n : 2 * n] = x[f + 1, :, n : 2 * n] if f + 1 < len(x) else 0
    return mlp(out, p["mlp"])


def attention(x, p, forward):
    """Each place and head for itself; rotary positions as products of complex numbers."""
    F, N, D = x.shape
    _, H, C = p["query"]["weight"].shape
    turn = np.exp(1j * np.arange(F)[:, None] * 10_000.0 ** (-np.arange(0, C, 2) / C))
    out = np.zeros_like(x)
    for n in range(N):
        for h in range(H):
            q, k, v = (x[:, n] @ p[name]["weight"][:, h] for name in ("query", "key", "value"))
            q, k = ((a[:, : C // 2] + 1j * a[:, C // 2 :]) * turn for a in (q, k))
            scores = (q @ k.conj().T).real / np.sqrt(C)
            if forward:
                scores[np.triu_indices(F, 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[:, n] += weights @ v @ p["out"]["weight"][h]
    return out


def reference(temporal, x_BFND, segments_BF, params):
    """Each video of each row on its own, in float64; padding goes through unchanged."""
    out = np.asarray(x_BFND, np.float64).copy()
    forward = temporal.direction == "forward"
    mixers = {
        "mlp": lambda x, p: mlp(x, p),
        "convolution": lambda x, p: convolution(x, p, forward),
        "attention": lambda x, p: attention(x, p, forward),
    }
    layers = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["blocks"]["layers"]
    for b, segments in enumerate(segments_BF):
        for video in sorted(set(segments.tolist()) - {-1}):
            x = out[b, segments == video]
            for i in range(temporal.layers):
                p = jax.tree.map(lambda a, i=i: a[i], layers)
                y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
                y = y * p["norm"]["scale"] + p["norm"]["bias"]
                x = x + mixers[temporal.mixer](y, p["mixer"])
            out[b, segments == video] = x
    return out


# ------------------------------------------------------------------------------------------- maths


@EVERY
@BOTH
def test_packed_rows_follow_the_equations(mixer, direction):
    temporal, x = config(mixer, direction), tokens()
    params = random_params(temporal)
    expected = reference(temporal, x, SEGMENTS, params)
    x_padded = np.where(
        (SEGMENTS < 0)[..., None, None], np.nan, x
    )  # what padding holds is no matter
    with jax.default_matmul_precision("highest"):
        got = encode(temporal, params, x_padded, SEGMENTS)
    valid = SEGMENTS >= 0
    assert np.abs(expected - x)[valid].std() > 0.1  # the mixer has a say
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got[valid], expected[valid], atol=1e-5 * scale, rtol=0)
    np.testing.assert_array_equal(got[~valid], x_padded[~valid])


@EVERY
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_rows_of_an_odd_number_of_frames(mixer, frames):
    temporal, x, segments = config(mixer), tokens(3, 7)[:, :frames], SEGMENTS[:, 1:][:, :frames]
    params = random_params(temporal)
    expected = reference(temporal, x, segments, params)
    with jax.default_matmul_precision("highest"):
        got = encode(temporal, params, x, segments)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_attention_always_gets_an_even_number_of_frames(monkeypatch):
    """cuDNN's backward pass refuses odd ones where there is a mask."""
    lengths = []

    def noted(q, *args, **options):
        lengths.append(q.shape[1])
        return self_attention(q, *args, **options)

    monkeypatch.setattr("storm_jax.models.temporal_controls.self_attention", noted)
    for frames in (1, 2, 7):
        build(config("attention"))(jnp.asarray(tokens(1, frames)), jnp.zeros((1, frames), int))
    assert lengths == [2, 2, 8]


@EVERY
@BOTH
def test_what_a_token_sees(mixer, direction):
    """Which frames' outputs change with one frame, of two layers; never another place."""
    temporal, x = config(mixer, direction), tokens()
    params, changed = random_params(temporal), tokens()
    changed[1, 3, 1] *= -1
    out, other = (np.asarray(encode(temporal, params, a, SEGMENTS)) for a in (x, changed))
    seen = np.abs(out - other).max(axis=-1)
    assert not seen[[0, 2]].any() and not seen[1, :, [0, 2]].any()
    first = 3 if direction == "forward" else 0
    frames = {
        "mlp": [3],
        "convolution": range(max(first, 1), 6),  # one frame further in each layer
        "attention": range(first, 8),
    }[mixer]
    assert set(np.flatnonzero(seen[1, :, 1] > 1e-6)) == set(frames)


def test_positions_count_within_the_video():
    segments = np.asarray([[4, 4, 4, 0, 0, 7, -1, -1]], np.int32)
    np.testing.assert_array_equal(frame_positions(segments), [[0, 1, 2, 0, 1, 0, 0, 1]])


def test_order_of_frames_reaches_attention():
    """Without positions, attention in both directions would be the same for any order."""
    temporal, x = config("attention", layers=1), tokens(1, 6)
    params, segments = random_params(temporal), np.zeros((1, 6), np.int32)
    a = encode(temporal, params, x, segments)
    b = encode(temporal, params, x[:, ::-1], segments)[:, ::-1]
    assert np.abs(np.asarray(a - b)).max() > 1e-2


@EVERY
def test_gradients_are_finite_and_those_of_the_equations(mixer):
    temporal = config(mixer)
    params, x = random_params(temporal), tokens()
    rng = np.random.default_rng(5)
    weights = rng.normal(size=x.shape) * (SEGMENTS >= 0)[..., None, None]
    heading = jax.tree.map(lambda a: rng.normal(size=a.shape), (params, x))

    def loss(params, x):
        out = encode(temporal, params, x, SEGMENTS, "full")
        return jnp.sum(out * jnp.asarray(weights, jnp.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = jax.tree.map(
            lambda a, d, s=sign: a.astype(np.float64) + s * step * d, (params, x), heading
        )
        values.append(np.sum(reference(temporal, moved[1], SEGMENTS, moved[0]) * weights))
    expected = (values[0] - values[1]) / (2 * step)
    dots = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g, np.float64) * d)), grads, heading)
    assert sum(jax.tree.leaves(dots)) == pytest.approx(expected, rel=2e-3)


# -------------------------------------------------------------------------------------- parameters


def parameters(temporal, width) -> int:
    if temporal.mixer == "mamba":
        layer = nnx.eval_shape(lambda: MambaLayer(temporal, width, nnx.Rngs(0)))
    else:
        layer = nnx.eval_shape(lambda: build(dataclasses.replace(temporal, layers=1), width))
    return count_parameters(nnx.to_pure_dict(nnx.state(layer)))


@BOTH
@pytest.mark.parametrize("width", [64, 128, 640, 1152, 2304, 3584])
def test_as_many_parameters_as_mamba(width, direction):
    mamba = TemporalConfig(direction=direction)
    count = parameters(mamba, width)
    assert count == mamba.mamba_parameters(width) + 2 * width
    for mixer, limit in (("mlp", 0.01), ("convolution", 0.01), ("attention", 0.02)):
        control = dataclasses.replace(mamba, mixer=mixer)
        assert abs(parameters(control, width) / count - 1) < limit, mixer
        if width >= 640:
            heads, channels = control.attention_heads(width)
            assert channels % 8 == 0 and 32 <= channels <= 128
            assert control.hidden(width) % 4 == 0


def test_heads_that_are_given():
    for heads in (1, 2, 8, 32):
        temporal = TemporalConfig(mixer="attention", heads=heads)
        got, channels = temporal.attention_heads(1152)
        exact = temporal.mamba_parameters(1152) / (4 * 1152)
        assert got == heads and channels % 2 == 0 and abs(heads * channels - exact) <= heads


def test_flops_count_every_matrix_and_every_pair_of_frames():
    raw = long.get_config("size=gemma3_1b").to_json_best_effort()
    model = from_mapping(RunConfig, json.loads(raw)).model
    batch = {
        "frame_segments": np.asarray([[0, 0, 0, 1, -1], [0, 1, 1, 1, 1]]),
        "segments": np.zeros((2, 4), int),
        "positions": np.zeros((2, 4), int),
        "targets": np.zeros((2, 4), int),
    }
    work = Work.of(batch)
    assert (work.frames, work.frame_pairs) == (9, 9 + 1 + 1 + 16)
    D = model.decoder.width
    for mixer in CONTROLS:
        for direction in ("bidirectional", "forward"):
            temporal = dataclasses.replace(model.temporal, mixer=mixer, direction=direction)
            changed = dataclasses.replace(model, temporal=temporal)
            weights = temporal.layers * (parameters(temporal, D) - 2 * D)
            expected = 2 * work.frames * model.frame_tokens * weights
            if mixer == "attention":
                heads, channels = temporal.attention_heads(D)
                pairs = 27 if direction == "bidirectional" else 6 + 1 + 1 + 10
                expected += 4 * temporal.layers * model.frame_tokens * pairs * heads * channels
            assert forward_flops(changed, work)["temporal"] == expected


# ---------------------------------------------------------------------------------- meshes, whole


@pytest.mark.parametrize("mixer", [pytest.param("convolution", marks=slow), "attention"])
def test_a_mesh_changes_nothing(mixer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_equal_to_one_device(model_with(mixer), mesh, 2e-5)


def test_a_split_frame_axis():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, seq=2))
    assert_equal_to_one_device(model_with("mlp"), mesh, 2e-5)
    for mixer in ("attention", "convolution"):
        with pytest.raises(ConfigError, match=rf"temporal.mixer='{mixer}' .* mesh.seq=2 .*seq=1"):
            assert_equal_to_one_device(model_with(mixer), mesh)


def model_with(mixer) -> StormModel:
    # 4 heads of attention and an even number of hidden units: tensor parallelism cuts them.
    heads = 4 if mixer == "attention" else 0
    model = StormModel(tiny_model(temporal=dict(state=4, conv=5, mixer=mixer, heads=heads)))
    assert model.config.temporal.hidden(32) % 2 == 0
    return model


def test_meshes_are_refused_before_anything_is_compiled():
    def check(mixer, heads=0, **sizes):
        shape = tuple(({"data": 1, "fsdp": 1, "tensor": 1, "seq": 1} | sizes).values())
        mesh = jax.sharding.AbstractMesh(shape, ("data", "fsdp", "tensor", "seq"))
        run = run_config(**{"model.temporal.mixer": mixer, "model.temporal.heads": heads})
        check_divisible(run, mesh)

    for mixer in ("attention", "convolution"):
        with pytest.raises(ConfigError, match=rf"temporal.mixer='{mixer}' .* mesh.seq=2"):
            check(mixer, seq=2)
    check("mlp", seq=2)
    check("attention", heads=2, tensor=2)
    with pytest.raises(ConfigError, match=r"model.temporal.heads=3 is not a multiple of mesh.tens"):
        check("attention", heads=3, tensor=2)


@pytest.mark.parametrize(
    "width,tensor,remedy",
    [
        # 92 heads of 64: 184 of 32 are as many parameters, and channels stay a multiple of 8.
        (3584, 8, r"makes 92 heads at model.decoder.width=3584, .*tensor=8: .*temporal.heads=184,"),
        (5376, 2, r"makes 137 heads .* set model.temporal.heads=138, .* mesh.tensor to 1 or"),
        # 53 x 2 channels instead of 159: too few to be called as many.
        (64, 64, r"makes 2 heads .* on every device; set mesh.tensor to 2 or another divisor of 2"),
    ],
)
def test_heads_that_nobody_gave_and_a_mesh_that_does_not_divide_them(width, tensor, remedy):
    def check(heads=0):
        sizes = {"decoder.width": width, "decoder.heads": tensor, "decoder.kv_heads": 1}
        sizes |= {"temporal.mixer": "attention", "temporal.heads": heads}
        config = run_config(**{f"model.{name}": value for name, value in sizes.items()})
        mesh = jax.sharding.AbstractMesh((1, 1, tensor, 1), ("data", "fsdp", "tensor", "seq"))
        check_divisible(config, mesh)
        return config.model.temporal

    with pytest.raises(ConfigError, match=remedy) as refused:
        check()
    said = re.search(r"set model.temporal.heads=(\d+)", str(refused.value))
    if said:  # what is said helps
        temporal = check(int(said[1]))
        heads, channels = temporal.attention_heads(width)
        exact = temporal.mamba_parameters(width) / (4 * width)
        assert heads == int(said[1]) and channels % 8 == 0
        assert abs(heads * channels / exact - 1) <= 0.005


@EVERY
def test_parts_of_the_model_have_logical_axes(mixer):
    axes = StormModel(tiny_model(temporal=dict(mixer=mixer))).axes()["temporal"]
    split = "heads" if mixer == "attention" else "inner"
    weights = jax.tree.leaves(axes["blocks"]["layers"]["mixer"], is_leaf=lambda x: type(x) is tuple)
    assert weights and all({"layers", "embed", split} <= set(w) for w in weights)


@EVERY
def test_batches_of_a_video_are_the_whole_video(mixer):
    """Inference sends frames through the ViT in batches and mixes all of them, also "forward"."""
    temporal = dict(layers=2, mixer=mixer, direction="forward")
    model = StormModel(tiny_model(vit=dict(frames_per_call=4), temporal=temporal))
    params = random_whole(model)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    run = dataclasses.replace(run_config(), model=model.config)
    frames = np.random.default_rng(2).integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)
    groups = model.config.reduction.frame_groups(7)
    expected = model.bind(params).encode(
        frames[None], np.zeros((1, 7), np.int32), groups[None], int(groups.max()) + 1
    )[0]
    got = Encoder(made_ready(run, jax.tree.map(jnp.copy, params), mesh))(frames)
    assert got.count == len(expected)
    np.testing.assert_allclose(got.tokens[: got.count], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "mixer", [pytest.param("mlp", marks=slow), pytest.param("convolution", marks=slow), "attention"]
)
def test_training_steps_lower_the_loss(mixer):
    overrides = {"train.steps": 4, "train.optimizer.warmup_fraction": 0.0, "model.vit.layers": 1}
    run = run_config(**overrides, **{"model.temporal.mixer": mixer})
    model, optimizer = StormModel(run.model), make_optimizer(run.train.optimizer, run.train.steps)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    parts = trainable_parts(run.train.optimizer)
    state = init_state(model, optimizer, parts, mesh, seed=0)
    before = jax.tree.map(np.asarray, state.params["temporal"])
    batch = packed_batch(run.model, rows=2, length=40, frames=6, seed=0)
    step, losses = jax.jit(make_train_step(model, optimizer, run.train)), []
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["nll"]))
    assert np.isfinite(losses).all() and losses[2] < losses[1] < losses[0]
    jax.tree.map(lambda a, b: _moved(a, np.asarray(b)), before, state.params["temporal"])


def _moved(before: np.ndarray, after: np.ndarray) -> None:
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-4


# ------------------------------------------------------------------------------------ what refuses


@EVERY
def test_streams_and_exports_refuse(mixer):
    with pytest.raises(ConfigError, match=rf"mixer='{mixer}' carries no state.*\"mamba\""):
        empty_state(config(mixer, "forward"), WIDTH, 1, jnp.float32)
    with pytest.raises(ConfigError, match=rf"mixer='{mixer}' is a control that exports do not"):
        model_settings(tiny_model(temporal=dict(mixer=mixer)))
    assert "temporal_mixer" not in model_settings(tiny_model())


def test_bad_values_name_the_field():
    with pytest.raises(ConfigError, match=r"temporal\.mixer='rnn' is not one of 'mamba', 'mlp'"):
        tiny_model(temporal=dict(mixer="rnn"))
    with pytest.raises(ConfigError, match=r"temporal\.heads=4 is of temporal\.mixer='attention'"):
        TemporalConfig(heads=4)
    with pytest.raises(ConfigError, match=r"temporal\.heads=-1"):
        TemporalConfig(mixer="attention", heads=-1)
