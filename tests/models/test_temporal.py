"""The temporal encoder against Mamba's equations in float64 and against transformers' Mamba."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import MambaConfig

from storm_jax.config import ConfigError, MeshConfig, Remat, TemporalConfig
from storm_jax.models.temporal import TemporalEncoder, empty_state
from storm_jax.parallel.mesh import make_mesh
from tests.compilation import FUSED
from tests.models.references import temporal_encoder, temporal_params, with_params

torch = pytest.importorskip("torch")

WIDTH, STATE, CONV, RANK, INNER = 6, 4, 4, 3, 12
TOKENS = 3  # of a frame


def config(direction, layers=1, conv=CONV) -> TemporalConfig:
    return TemporalConfig(
        layers=layers, direction=direction, expand=2, state=STATE, conv=conv, dt_rank=RANK
    )


def random_params(direction, layers=1, conv=CONV) -> dict:
    return temporal_params(WIDTH, config(direction, layers, conv))


@partial(jax.jit, static_argnums=(0, 4))
def encode(temporal, params, x, segments, remat="none"):
    module = with_params(lambda: TemporalEncoder(temporal, WIDTH, nnx.Rngs(0)), params)
    return module(x, segments, Remat(remat))


def reference(x_BFND, segments_BF, params):
    """Each video of each row on its own, in float64; padding goes through unchanged."""
    out = np.asarray(x_BFND, np.float64).copy()
    for b, segments in enumerate(segments_BF):
        for video in sorted(set(segments.tolist()) - {-1}):
            mine = segments == video
            tokens = temporal_encoder(out[b][mine].reshape(-1, WIDTH), params)
            out[b][mine] = tokens.reshape(-1, TOKENS, WIDTH)
    return out


# Two videos, an image and padding; a row of one video; a row of padding alone.
SEGMENTS = np.asarray([[0, 0, 0, 1, 1, 2, -1, -1], [0] * 8, [-1] * 8], np.int32)


def tokens(*lead, seed=1):
    lead = lead or SEGMENTS.shape
    return np.random.default_rng(seed).normal(size=(*lead, TOKENS, WIDTH)).astype(np.float32)


BOTH = pytest.mark.parametrize("direction", ["bidirectional", "forward"])


@BOTH
@pytest.mark.parametrize("layers,conv", [(2, CONV), (1, 1), (1, 5)])
def test_packed_rows_follow_the_equations(direction, layers, conv):
    params, x = random_params(direction, layers, conv), tokens()
    got = encode(config(direction, layers, conv), params, x, SEGMENTS)
    expected = reference(x, SEGMENTS, params)
    valid = SEGMENTS >= 0
    assert np.abs(expected - x)[valid].std() > 0.1  # the mixer has a say
    np.testing.assert_allclose(got[valid], expected[valid], atol=2e-5, rtol=0)
    # Padding is left as it was.
    np.testing.assert_array_equal(got[~valid], x[~valid])


def test_forward_layer_is_the_mixer_of_transformers():
    hf_config = MambaConfig(
        hidden_size=WIDTH,
        state_size=STATE,
        conv_kernel=CONV,
        expand=2,
        time_step_rank=RANK,
        num_hidden_layers=1,
        use_bias=False,
        use_conv_bias=True,
        vocab_size=8,
    )
    from transformers.models.mamba.modeling_mamba import MambaMixer  # needs torch when imported

    mixer = MambaMixer(hf_config, layer_idx=0).eval()
    norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*mixer.parameters(), *norm.parameters()]:
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    w = {n: p.detach().numpy() for n, p in mixer.named_parameters()}
    layer = {
        "norm": {"scale": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()},
        "in_proj": {"weight": w["in_proj.weight"].T.reshape(WIDTH, 2, INNER)},
        "forward": {
            "conv_weight": w["conv1d.weight"][:, 0].T,
            "conv_bias": w["conv1d.bias"],
            "x_proj": {"weight": w["x_proj.weight"].T},
            "dt_proj": {"weight": w["dt_proj.weight"].T},
            "dt_bias": w["dt_proj.bias"],
            "A_log": w["A_log"],
            "D": w["D"],
        },
        "out_proj": {"weight": w["out_proj.weight"].T},
    }
    params = {"blocks": {"layers": jax.tree.map(lambda a: a[None], layer)}}
    x = tokens(2, 7)
    sequence = torch.from_numpy(x.reshape(2, -1, WIDTH))
    with torch.no_grad():
        expected = (sequence + mixer(norm(sequence))).numpy().reshape(x.shape)
    got = encode(config("forward"), params, x, np.zeros((2, 7), np.int32))
    assert np.abs(expected - x).std() > 0.05
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def test_gradients_follow_the_equations():
    """A directional derivative of the float64 equations, by central differences."""
    params, x = random_params("bidirectional", 2), tokens()
    rng = np.random.default_rng(5)
    weights = rng.normal(size=x.shape) * (SEGMENTS >= 0)[..., None, None]
    heading = jax.tree.map(lambda a: rng.normal(size=a.shape), (params, x))

    def loss(params, x):
        out = encode(config("bidirectional", 2), params, x, SEGMENTS)
        return jnp.sum(out * jnp.asarray(weights, jnp.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = jax.tree.map(lambda a, d, s=sign: a + s * step * d, (params, x), heading)
        values.append(np.sum(reference(moved[1], SEGMENTS, moved[0]) * weights))
    expected = (values[0] - values[1]) / (2 * step)

    dots = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g, np.float64) * d)), grads, heading)
    sizes = jax.tree.map(lambda g: float(np.abs(g).max()), grads)
    assert min(jax.tree.leaves(sizes)) > 1e-3  # every parameter has a say
    assert sum(jax.tree.leaves(dots)) == pytest.approx(expected, rel=1e-4)


@BOTH
def test_nothing_leaks_between_videos(direction):
    """Changing one video, or padding, leaves every bit of the others' outputs and gradients."""
    temporal, params, x = config(direction, 2), random_params(direction, 2), tokens()
    base = encode(temporal, params, x, SEGMENTS)

    @jax.jit
    def gradient_of(video, x):
        def total(x):
            out = encode(temporal, params, x, SEGMENTS)
            return jnp.sum(jnp.square(out[0]) * (SEGMENTS[0] == video)[:, None, None])

        return jax.grad(total)(x)

    for video in (0, 1, 2, -1):
        mine = np.zeros_like(SEGMENTS, bool)
        mine[0] = SEGMENTS[0] == video
        changed = np.where(mine[..., None, None], 100 * tokens(seed=7), x)
        out = encode(temporal, params, changed, SEGMENTS)
        np.testing.assert_array_equal(out[~mine], base[~mine], err_msg=str(video))
        assert np.abs(out - base)[mine].max() > 1e-3
        grads = np.asarray(gradient_of(video, x))
        np.testing.assert_array_equal(grads[~mine], 0, err_msg=str(video))
        assert np.abs(grads[mine]).max() > 1e-3


@BOTH
def test_a_packed_row_equals_separate_rows(direction):
    """Each video of the first row alone, in a row of its own."""
    temporal, params, x = config(direction, 2), random_params(direction, 2), tokens()
    packed = encode(temporal, params, x, SEGMENTS)
    segments, alone = np.full_like(SEGMENTS, -1), np.zeros_like(x)
    for video in (0, 1, 2):
        mine = SEGMENTS[0] == video
        segments[video, : mine.sum()] = 5
        alone[video, : mine.sum()] = x[0, mine]
    out = encode(temporal, params, alone, segments)
    for video in (0, 1, 2):
        mine = SEGMENTS[0] == video
        np.testing.assert_allclose(packed[0, mine], out[video, : mine.sum()], atol=5e-6, rtol=0)


def test_only_bidirectional_looks_ahead():
    x = tokens()
    later = np.where(np.arange(8)[:, None, None] < 4, x, -x)
    for direction, sees in (("forward", False), ("bidirectional", True)):
        params = random_params(direction, 2)
        a, b = (encode(config(direction, 2), params, v, SEGMENTS) for v in (x, later))
        assert (np.abs(a - b)[1, :4].max() > 1e-3) == sees
        assert np.abs(a - b)[1, 4:].max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    temporal, params, x = config("forward", 2), random_params("forward", 2), tokens()

    def gradient(remat):
        def loss(params, x):
            return jnp.sum(jnp.sin(encode(temporal, params, x, SEGMENTS, remat)))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=FUSED)
        return gradients(params, x)

    def close(ours, theirs):
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)

    jax.tree.map(close, gradient(remat), gradient("none"))


def test_initial_values_are_mambas():
    """A = -(1..N) in every channel, D = 1, step sizes within [dt_min, dt_max]."""
    temporal = TemporalConfig(layers=2, state=STATE, dt_min=1e-3, dt_max=0.1)
    module = TemporalEncoder(temporal, 64, nnx.Rngs(0))
    layers = nnx.to_pure_dict(nnx.state(module))["blocks"]["layers"]
    for direction in ("forward", "backward"):
        p = layers[direction]
        assert p["x_proj"]["weight"].shape == (2, 128, 4 + 2 * STATE)  # dt_rank ceil(64 / 16)
        rates = np.broadcast_to(np.arange(1, STATE + 1), (2, 128, STATE))
        np.testing.assert_allclose(np.exp(p["A_log"]), rates, rtol=1e-6)
        np.testing.assert_array_equal(p["D"], 1)
        dt = np.log1p(np.exp(np.asarray(p["dt_bias"], np.float64)))
        assert 0.99e-3 < dt.min() < 3e-3 and 0.03 < dt.max() < 0.101
        assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.3  # log-uniform
    assert not np.array_equal(layers["forward"]["dt_bias"], layers["backward"]["dt_bias"])


def test_bad_values_name_the_field():
    with pytest.raises(ConfigError, match=r"temporal\.layers=-1"):
        TemporalConfig(layers=-1)
    with pytest.raises(ConfigError, match=r"temporal\.conv=0"):
        TemporalConfig(conv=0)


@BOTH
def test_both_layouts_of_the_scan_give_the_same(direction, monkeypatch):
    """On GPUs the projections write [batch, channels, length]; here XLA's scan reads it."""
    temporal, params = config(direction), random_params(direction)

    def loss(params, x):
        module = with_params(lambda: TemporalEncoder(temporal, WIDTH, nnx.Rngs(0)), params)
        return jnp.sum(jnp.sin(module(x, SEGMENTS)))

    x = jnp.asarray(tokens())
    expected = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
    monkeypatch.setattr("storm_jax.models.temporal.preferred_layout", lambda x: "bdl")
    got = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


# --------------------------------------------------------------------------- with a carried state


@partial(jax.jit, static_argnums=0)
def carry(temporal, params, x, segments, state):
    module = with_params(lambda: TemporalEncoder(temporal, WIDTH, nnx.Rngs(0)), params)
    return module.carry(x, segments, state)


def in_chunks(temporal, params, x, rng, size=5):
    """[B, F, N, D] through chunks of `size` frames, of which a random number are real.

    Real frames and padding, which holds NaNs, stand in random order; rows are cut differently.
    """
    B, F = x.shape[:2]
    state = empty_state(temporal, WIDTH, B, jnp.float32)
    out, done = np.full_like(x, np.nan), np.zeros(B, int)
    while (done < F).any():
        real = np.zeros((B, size), bool)
        chunk = np.full((B, size, *x.shape[2:]), np.nan, np.float32)
        for b in range(B):
            count = min(rng.integers(0, size + 1), F - done[b])
            real[b, rng.permutation(size)[:count]] = True
            chunk[b, real[b]] = x[b, done[b] : done[b] + count]
        segments = np.where(real, rng.integers(0, 9, (B, 1)), -1).astype(np.int32)
        got, state = carry(temporal, params, chunk, segments, state)
        got = np.asarray(got)
        np.testing.assert_array_equal(got[~real], chunk[~real])
        for b in range(B):
            count = real[b].sum()
            out[b, done[b] : done[b] + count] = got[b][real[b]]
            done[b] += count
    return out, state


@pytest.mark.parametrize("layout", ["bld", "bdl"])
@pytest.mark.parametrize("conv", [1, CONV, 9])  # 9 taps look back over more than two frames
def test_chunks_with_carried_state_are_the_whole_sequence(conv, layout, monkeypatch):
    monkeypatch.setattr("storm_jax.models.temporal.preferred_layout", lambda x: layout)
    temporal, params, x = (
        config("forward", 2, conv),
        random_params("forward", 2, conv),
        tokens(3, 11),
    )
    rng = np.random.default_rng(conv)
    segments = np.zeros(x.shape[:2], np.int32)
    carry.clear_cache()  # of the other layout
    expected = reference(x, segments, params)
    whole = with_params(lambda: TemporalEncoder(temporal, WIDTH, nnx.Rngs(0)), params)(x, segments)
    scale = np.abs(expected).max()
    states = []
    for _ in range(4):
        out, state = in_chunks(temporal, params, x, rng)
        for right in (whole, expected):
            np.testing.assert_allclose(out, right, atol=1e-5 * scale, rtol=0)
        states.append(state)
    # However it was cut, the same is left behind.
    for other in states[1:]:
        for a, b in zip(other, states[0], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, np.abs(b).max(initial=0)))
    assert all(np.abs(a).max() > 1e-3 for a in states[0] if a.size)


def test_padding_alone_leaves_the_state_as_it_is():
    temporal, params = config("forward", 2), random_params("forward", 2)
    _, state = carry(
        temporal,
        params,
        tokens(2, 5),
        np.zeros((2, 5), np.int32),
        empty_state(temporal, WIDTH, 2, jnp.float32),
    )
    nothing = np.full((2, 5, TOKENS, WIDTH), np.nan, np.float32)
    _, after = carry(temporal, params, nothing, np.full((2, 5), -1, np.int32), state)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_carried_state_over_a_mesh():
    temporal, params, x = config("forward", 2), random_params("forward", 2), tokens(2, 10)
    expected, _ = in_chunks(temporal, params, x, np.random.default_rng(0))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, seq=2))
    with jax.set_mesh(mesh):
        got, state = in_chunks(temporal, params, x, np.random.default_rng(0))
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    assert "tensor" in str(state.scan.sharding.spec)


def test_both_directions_cannot_be_carried():
    with pytest.raises(ConfigError, match=r"direction='bidirectional'.*\"forward\""):
        empty_state(config("bidirectional"), WIDTH, 1, jnp.float32)
