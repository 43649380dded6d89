"""Attention of whole rows: every kernel that runs here against float64, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.models import attention
from storm_jax.models import attention_kernels as kernels
from storm_jax.models.attention_kernels import Pattern, splash_attention, xla_attention

PATTERNS = {
    "whole": Pattern(causal=False, window=0, scale=0.3, softcap=0.0),
    "causal": Pattern(causal=True, window=0, scale=0.3, softcap=0.0),
    "window": Pattern(causal=True, window=17, scale=0.3, softcap=0.0),
    "softcap": Pattern(causal=True, window=0, scale=1.3, softcap=2.0),
}


def operands(S: int, C: int, seed: int = 0):
    """q, k, v and the gradient of the result: 4 heads that share 2 of keys and values."""
    rng = np.random.default_rng(seed)
    shapes = [(2, S, heads, C) for heads in (4, 2, 2, 4)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def packed(S: int) -> np.ndarray:
    """Two rows: three segments and padding, one segment and padding."""
    rows = np.full((2, S), -1, np.int32)
    rows[0, : S // 3], rows[0, S // 3 : S // 2], rows[0, S // 2 : S - 9] = 0, 1, 2
    rows[1, : S - 3] = 0
    return rows


def by_hand(q, k, v, segments, pattern: Pattern):
    """One query after another, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, S, H, _ = q.shape
    share = H // k.shape[2]
    for b, s, h in np.ndindex(B, S, H):
        seen = np.ones(S, bool)
        if pattern.causal:
            seen[s + 1 :] = False
            if pattern.window:
                seen[: max(0, s + 1 - pattern.window)] = False
        if segments is not None:
            seen &= segments[b] == segments[b, s]
        scores = pattern.scale * k[b, seen, h // share] @ q[b, s, h]
        if pattern.softcap:
            scores = pattern.softcap * np.tanh(scores / pattern.softcap)
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, seen, h // share]
    return out


def gradients(attend, q, k, v, dy):
    return jax.jit(jax.grad(lambda *args: jnp.vdot(attend(*args), dy), (0, 1, 2)))(q, k, v)


def dense(q, k, v, segments, pattern: Pattern):
    """The form whose scores are all there at once, differentiated by JAX."""
    S = q.shape[1]
    places = jnp.arange(S)[None]
    mask = kernels.causal_mask(places, places, window=pattern.window) if pattern.causal else None
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        mask = same if mask is None else mask & same
    return kernels.masked_attention(q, k, v, mask, pattern.scale, pattern.softcap)


@pytest.mark.parametrize("rows", ["one segment", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_in_chunks_equals_float64(pattern, rows, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 16)
    S = 57
    q, k, v, dy = operands(S, 24)
    segments = packed(S) if rows == "packed" else None
    expected = by_hand(q, k, v, segments, pattern)
    attend = lambda *args: xla_attention(*args, segments, pattern)  # noqa: E731
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=5e-6, rtol=0)
    whole = lambda *args: dense(*args, segments, pattern)  # noqa: E731
    np.testing.assert_allclose(whole(q, k, v), expected, atol=5e-6, rtol=0)
    for got, wanted in zip(
        gradients(attend, q, k, v, dy), gradients(whole, q, k, v, dy), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=0)


def test_chunks_keep_no_scores_of_the_whole_row(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 16)
    S = 16 * 16
    q, k, v, dy = operands(S, 8)
    attend = lambda *args: xla_attention(*args, None, PATTERNS["causal"])  # noqa: E731
    f = jax.jit(jax.grad(lambda *args: jnp.vdot(attend(*args), dy), (0, 1, 2)))
    needed = f.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert needed < 2 * 4 * S * S * 4  # the scores of two rows, four heads, in float32


@pytest.mark.parametrize("rows", ["one segment", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_splash_equals_float64(pattern, rows):
    """In Pallas' interpreter; a head dim and a length that splash itself does not take."""
    S = 200
    q, k, v, dy = operands(S, 72)
    segments = packed(S) if rows == "packed" else None
    attend = lambda *args: splash_attention(*args, segments, pattern, interpret=True)  # noqa: E731
    expected = by_hand(q, k, v, segments, pattern)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=5e-6, rtol=0)
    whole = lambda *args: dense(*args, segments, pattern)  # noqa: E731
    for got, wanted in zip(
        gradients(attend, q, k, v, dy), gradients(whole, q, k, v, dy), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=0)


HEADS_OF_72 = jax.ShapeDtypeStruct((2, 64, 2, 72), jnp.bfloat16)


@pytest.fixture
def hopper(monkeypatch):
    """As if calls were traced for a Hopper GPU."""
    from storm_kernels.attention import gpu

    monkeypatch.setattr(kernels, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)


@pytest.mark.usefixtures("hopper")
def test_our_kernel_serves_what_sees_everything():
    whole = PATTERNS["whole"]
    ours = kernels.hopper_attention
    assert kernels.fused_for(HEADS_OF_72, whole, plain=True) is ours
    assert kernels.fused_for(HEADS_OF_72, whole, plain=False) is not ours
    assert kernels.fused_for(HEADS_OF_72, PATTERNS["causal"], plain=True) is not ours
    assert kernels.fused_for(HEADS_OF_72, whole._replace(softcap=2.0), plain=True) is not ours
    other = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    assert kernels.fused_for(other, whole, plain=True) is not ours


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", ["packed", "shared keys"])
def test_our_kernel_is_left_out_where_it_does_not_serve(rows, monkeypatch):
    def never(*_):
        raise AssertionError("it was called")

    monkeypatch.setattr(kernels, "hopper_attention", never)
    q = jnp.ones((2, 64, 2, 72), jnp.bfloat16)
    segments = jnp.zeros((2, 64), jnp.int32) if rows == "packed" else None
    k = q if rows == "packed" else q[:, :, :1]
    out = attention.self_attention(q, k, k, segments, causal=False, scale=1.0)
    np.testing.assert_array_equal(out, q)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("saved", "forward_runs"), [(("attention", "qkv"), 1), (("qkv",), 2)])
def test_our_kernel_runs_again_only_if_its_result_is_not_kept(saved, forward_runs):
    pytest.importorskip("triton")
    from tests.kernels.gpu_emulation import recorded_launches

    def layer(q, k, v):
        q, k, v = (jax.ad_checkpoint.checkpoint_name(2 * x, kernels.OPERANDS) for x in (q, k, v))
        return 3 * kernels.hopper_attention(q, k, v, None, PATTERNS["whole"])

    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    kept = jax.checkpoint(layer, policy=policy)

    def loss(*args):
        return jnp.sum(jnp.sin(kept(*args).astype(jnp.float32)))

    with recorded_launches():
        program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*[HEADS_OF_72] * 3)
    # Two for the gradients.
    assert str(program).count("pure_callback[") == forward_runs + 2
