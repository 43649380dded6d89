"""The decoder against transformers' Gemma 2, Gemma 3 and Qwen2 with random weights."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from storm_jax.config import ConfigError, DecoderConfig
from storm_jax.models.attention_kernels import causal_mask, masked_attention
from storm_jax.models.decoder import Decoder
from storm_jax.models.layers import rotary
from tests.models.references import decoder_config, decoder_params, randomise, with_params
from tests.tiny import tiny_model

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5  # absolute, on logits of size 1
WINDOW = 5
LENGTH = 24  # of sequences: several windows long

COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    max_position_embeddings=128,
    attn_implementation="eager",
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def gemma2():
    """Soft caps small enough to bend; queries not scaled by head_dim ** -0.5."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            **COMMON,
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=10,
            sliding_window=WINDOW,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            rms_norm_eps=1e-5,
        )
    )


def gemma3():
    """One global layer in three, its positions scaled as the 4B model's config.json has it."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            num_hidden_layers=6,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=7,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
            rope_theta=1_000_000.0,
            rope_local_base_freq=100.0,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            rms_norm_eps=1e-6,
        )
    )


def qwen2(tied):
    return Qwen2ForCausalLM(
        Qwen2Config(
            **COMMON,
            num_hidden_layers=3,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            rope_theta=1_000_000.0,
            rms_norm_eps=1e-6,
        )
    )


class Family(NamedTuple):
    """One model twice: transformers' and ours."""

    hf: torch.nn.Module
    config: DecoderConfig
    params: dict

    def reference(self, ids):
        """Logits float32 [B, S, V] of ids [B, S]."""
        with torch.no_grad():
            return self.hf(torch.as_tensor(np.asarray(ids, np.int64))).logits.numpy()


BUILDERS = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "qwen2_tied": partial(qwen2, True),
    "qwen2_untied": partial(qwen2, False),
}


@pytest.fixture(scope="module", params=BUILDERS)
def family(request):
    hf = randomise(BUILDERS[request.param]())
    config = decoder_config(hf.config)
    return Family(hf, config, decoder_params(hf, config))


def bound(config, params) -> Decoder:
    return with_params(lambda: Decoder(config, nnx.Rngs(0)), params)


@partial(jax.jit, static_argnums=0)
def logits(config, params, ids, positions, segments):
    decoder = bound(config, params)
    x = decoder(decoder.embed(ids, jnp.float32), positions, segments)
    return decoder.logits(x)


def whole(family, ids):
    """Our logits of sequences of one length."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return logits(family.config, family.params, ids, positions, np.zeros(ids.shape, np.int32))


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, COMMON["vocab_size"], shape).astype(np.int32)


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, WINDOW + 1, LENGTH])
def test_logits_are_those_of_transformers(family, length):
    ids = random_ids(2, length)
    expected = family.reference(ids)
    assert expected.std() > 0.2
    close(whole(family, ids), expected)


@pytest.mark.slow
def test_every_setting_has_its_part_in_these_models(family):
    """Each field that the families differ in changes the logits: the parity above is about it."""
    config, ids = family.config, random_ids(2, LENGTH)
    base = whole(family, ids)
    changes = {
        "query_scale": 2 * config.query_scale,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "window": config.window + 1,
        "rope_theta": 50.0,
        "rope_theta_local": 50.0,
        "rope_scaling": 4.0,
        "scale_embeddings": not config.scale_embeddings,
        "activation": "silu" if config.activation != "silu" else "gelu_tanh",
        "norm_plus_one": not config.norm_plus_one,
        "norm_eps": 0.1,
    }
    unused = {name for name in ("attention_softcap", "logit_softcap") if not getattr(config, name)}
    if config.global_every == 1:
        unused |= {"window", "rope_theta_local"}
    for name, value in changes.items():
        if name in unused:
            continue
        other = Family(family.hf, config.__class__(**{**vars(config), name: value}), family.params)
        assert np.abs(whole(other, ids) - base).max() > 100 * TOLERANCE, name


def test_packed_segments_equal_separate_sequences(family):
    lengths = (WINDOW + 6, 1, WINDOW + 2)
    ids = [random_ids(1, n, seed=n) for n in lengths]
    padding = LENGTH - sum(lengths)
    assert padding > 0
    row = np.concatenate([*ids, np.zeros((1, padding), np.int32)], axis=1)
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(padding)])
    segments = np.repeat([0, 1, 2, -1], [*lengths, padding])
    # A second row of one sequence: rows do not mix either.
    row = np.concatenate([row, random_ids(1, LENGTH, seed=99)])
    positions = np.stack([positions, np.arange(LENGTH)]).astype(np.int32)
    segments = np.stack([segments, np.full(LENGTH, 7)]).astype(np.int32)
    got = logits(family.config, family.params, row, positions, segments)
    start = 0
    for sequence in ids:
        stop = start + sequence.shape[1]
        close(got[0, start:stop], family.reference(sequence)[0])
        start = stop
    close(got[1], family.reference(row[1:])[0])
    assert np.isfinite(got).all()


# ------------------------------------------------------------------------------- parts by hand


def test_causal_mask_by_hand():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0]])
    segments = jnp.asarray([[0, 0, 0, 1, 1, -1]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    got = causal_mask(positions, positions, segments, segments, window=2)
    np.testing.assert_array_equal(got[0], np.asarray(expected, bool))


@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_attention_in_float64(softcap):
    """Two query heads a key-value head, in this order: heads 0 and 1 share key-value head 0."""
    rng = np.random.default_rng(0)
    S, H, K, C = 7, 4, 2, 6
    q, k, v = (rng.normal(size=(1, S, n, C)) for n in (H, K, K))
    mask = np.tril(np.ones((1, S, S), bool))
    expected = np.zeros((S, H, C))
    for h in range(H):
        scores = 1.3 * q[0, :, h] @ k[0, :, h // 2].T
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.where(mask[0], np.exp(scores), 0)
        expected[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[0, :, h // 2]
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    got = masked_attention(q, k, v, jnp.asarray(mask), 1.3, softcap)
    np.testing.assert_allclose(got[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("theta,scaling", [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])
def test_rotary_angles_at_long_positions(theta, scaling):
    """In float64; float32 angles are good to a few units of their last place."""
    positions = np.asarray([[0, 1, 1023, 32_767, 131_071]])
    frequency = theta ** (-np.arange(0, 128, 2) / 128)
    angle = positions[..., None] / scaling * frequency
    cos, sin = rotary(jnp.asarray(positions), 128, theta, scaling)
    tolerance = 4 * np.spacing(angle.astype(np.float32)) + 2e-7
    assert (np.abs(cos - np.cos(angle)) <= tolerance).all()
    assert (np.abs(sin - np.sin(angle)) <= tolerance).all()


def test_bfloat16_stays_close(family):
    """Activations in bfloat16, weights and norms in float32, logits out in float32."""
    ids = random_ids(2, LENGTH)

    @partial(jax.jit, static_argnums=0)
    def run(config, params, ids):
        decoder = bound(config, params)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
        x = decoder(decoder.embed(ids, jnp.bfloat16), positions)
        assert x.dtype == jnp.bfloat16
        return decoder.logits(x)

    got, expected = run(family.config, family.params, ids), family.reference(ids)
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()


def test_bad_values_name_the_field():
    with pytest.raises(ConfigError, match=r"decoder\.heads=4 .* decoder\.kv_heads=3"):
        tiny_model(decoder=dict(kv_heads=3))
    with pytest.raises(ConfigError, match=r"decoder\.head_dim=7"):
        tiny_model(decoder=dict(head_dim=7))
    with pytest.raises(ConfigError, match=r"set decoder\.window"):
        tiny_model(decoder=dict(window=0))
