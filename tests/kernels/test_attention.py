"""Attention for heads of 72 channels: the kernels' PTX in the emulator against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402

from storm_kernels import attention as package  # noqa: E402
from storm_kernels import triton_launch  # noqa: E402
from storm_kernels.attention import gpu  # noqa: E402
from tests.kernels import ptx_emulator  # noqa: E402
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: E402, F401

C = gpu.CHANNELS
SCALE = C**-0.5


@pytest.fixture
def emulated(emulated_gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)


def operands(B, N, H, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, N, H, C)).astype(bfloat16) for _ in range(3)]


def reference(q, k, v):
    """The result in float64, and how far bfloat16 may be from it."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) * SCALE
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhc->bqhc", weights, v)
    # Half a unit in the last of 8 places: of each weight, of their sum, and of the result.
    size = np.einsum("bhqk,bkhc->bqhc", weights, np.abs(v))
    return out, 2.0**-9 * 1.02 * (size + 2 * np.abs(out)) + 1e-6


def check(q, k, v):
    got = np.asarray(package.attention(*map(jnp.asarray, (q, k, v)), scale=SCALE), np.float64)
    want, bound = reference(q, k, v)
    assert (np.abs(got - want) <= bound).all(), np.max(np.abs(got - want) / bound)


def gradients(q, k, v, dy):
    return jax.vjp(functools.partial(package.attention, scale=SCALE), q, k, v)[1](dy)


def reference_gradients(q, k, v, dy):
    """Gradients in float64, and how far bfloat16 may be from each."""
    q, k, v, dy = (x.astype(np.float64) for x in (q, k, v, dy))
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) * SCALE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhc->bqhc", p, v)
    t = np.einsum("bqhc,bkhc->bhqk", dy, v)
    of_scores = p * (t - np.einsum("bqhc,bqhc->bhq", y, dy)[..., None])
    # Half a unit in the last of 8 places: of each weight, of their sum, of the gradient of a score,
    # which also has that of the rounded result in it, and of what comes out.
    error = 2.0**-9 * 1.02
    score_error = 2 * np.abs(of_scores)
    score_error += p * np.einsum("bqhc,bqhc->bhq", np.abs(y), np.abs(dy))[..., None]
    found = []
    for weights, size, form, x in (
        (of_scores * SCALE, score_error * SCALE, "bhqk,bkhc->bqhc", k),
        (of_scores * SCALE, score_error * SCALE, "bhqk,bqhc->bkhc", q),
        (p, 2 * p, "bhqk,bqhc->bkhc", dy),
    ):
        want = np.einsum(form, weights, x)
        found.append((want, error * (np.einsum(form, size, np.abs(x)) + np.abs(want)) + 1e-6))
    return found


def check_gradients(q, k, v, dy):
    got = gradients(*map(jnp.asarray, (q, k, v, dy)))
    for name, x, (want, bound) in zip("qkv", got, reference_gradients(q, k, v, dy), strict=True):
        x = np.asarray(x, np.float64)
        assert (np.abs(x - want) <= bound).all(), (name, np.max(np.abs(x - want) / bound))


# One tile of keys and several, whole ones and not; queries that do not fill a program.
SHAPES = [
    (1, 64, 2),
    (2, 40, 1),
    (1, 129, 1),
    pytest.param(2, 256, 2, marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    pytest.param(1, 320, 1, marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    pytest.param(1, 729, 1, marks=pytest.mark.slow),
    pytest.param(1, 1024, 1, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("B", "N", "H"), SHAPES)
def test_gradients_against_float64(B, N, H):
    q, k, v = operands(B, N, H)
    check_gradients(q, k, v, operands(B, N, H, seed=1)[0])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("height", [8, -8])
def test_gradients_of_scores_far_from_zero(height):
    """Exponentials of the scores themselves are not finite, or zero; N is no multiple of a tile."""
    q, k, v = operands(1, 72, 1)
    q[..., :10] = 16
    k[..., :10] = height
    scores = np.einsum("bqhc,bkhc->bhqk", *(x.astype(np.float64) for x in (q, k))) * SCALE
    assert (np.sign(height) * scores).min() > 104
    check_gradients(q, k, v, operands(1, 72, 1, seed=1)[0])


@pytest.mark.usefixtures("emulated")
def test_gradients_are_the_same_bits_from_run_to_run():
    arguments = [*operands(1, 100, 1), operands(1, 100, 1, seed=1)[0]]
    first, second = (gradients(*map(jnp.asarray, arguments)) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.usefixtures("emulated")
def test_the_gradient_of_a_gradient_is_refused():
    q, k, v = map(jnp.asarray, operands(1, 40, 1))

    def loss(q):
        return jnp.sum(jnp.square(package.attention(q, k, v, scale=SCALE).astype(jnp.float32)))

    with pytest.raises(NotImplementedError, match="once, in reverse.*jax.nn.dot_product_attention"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q).astype(jnp.float32)))(q)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("B", "N", "H"), SHAPES)
def test_against_float64(B, N, H):
    check(*operands(B, N, H))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("N", [192, 150])
def test_scores_far_above_those_of_the_first_keys(N):
    q, k, v = operands(1, N, 1)
    k[:, 100:] = (k[:, 100:].astype(np.float32) * 30).astype(bfloat16)
    scores = np.einsum("bqhc,bkhc->bhqk", *(x.astype(np.float64) for x in (q, k))) * SCALE
    above = scores.max(-1) - scores[..., :64].max(-1)
    assert above.max() > 89  # its exponential is not finite in float32
    check(q, k, v)


@pytest.mark.usefixtures("emulated")
def test_scores_far_below_those_of_the_first_keys():
    q, k, v = operands(1, 192, 1)
    k[:, :64] = (k[:, :64].astype(np.float32) * 100).astype(bfloat16)
    check(q, k, v)


@pytest.mark.usefixtures("emulated")
def test_a_query_that_is_nan_spoils_no_other():
    q, k, v = operands(1, 130, 1)
    q[0, 7] = np.nan
    got = np.asarray(package.attention(*map(jnp.asarray, (q, k, v)), scale=SCALE), np.float64)
    assert np.isnan(got[0, 7]).all()
    q[0, 7] = 0
    want, bound = reference(q, k, v)
    others = np.arange(130) != 7
    assert (np.abs(got - want) <= bound)[:, others].all()


def launches_of(B, N, H):
    """Of the forward pass, of the gradients of keys and values, of that of queries."""

    def loss(*args):
        return jnp.sum(package.attention(*args, scale=SCALE).astype(jnp.float32))

    x = jax.ShapeDtypeStruct((B, N, H, C), jnp.bfloat16)
    with recorded_launches() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "platform_of", lambda x: "gpu")
        patch.setattr(gpu, "_device_unsupported", lambda: None)
        jax.eval_shape(jax.grad(loss, (0, 1, 2)), x, x, x)
    return found


def run_at_row(launch, row, arrays):
    """Runs the first program of a row of the batch; `arrays` are that row, B being 1."""
    code = launch.compiled()
    ptx, changed = re.subn(r"%ctaid\.z", str(row), code.ptx)
    assert changed
    windows = [ptx_emulator.Window({row * x.nbytes: x}) for x in arrays]
    ptx_emulator.run(ptx, (1, 1, 1), code.num_threads, windows, code.shared_bytes)


def test_rows_of_the_batch_beyond_four_gigabytes():
    N, row = 512, 65535
    forward, keys, queries = launches_of(1, N, 1)
    q, k, v = operands(1, N, 1)
    out = np.full_like(q, np.nan)
    lse = np.full((1, 1, N), np.nan, np.float32)
    assert row * q.nbytes > 2**32
    run_at_row(forward, row, (q, k, v, out, lse))
    want, bound = reference(q, k, v)
    first = forward.constants["QUERIES"]
    assert (np.abs(out.astype(np.float64) - want) <= bound)[:, :first].all()
    assert np.isnan(out[:, first:].astype(np.float64)).all()

    scores = np.einsum("bqhc,bkhc->bhqk", *(x.astype(np.float64) for x in (q, k))) * SCALE
    sums = np.log(np.exp(scores).sum(-1))
    # The weights that are added up are rounded.
    np.testing.assert_allclose(lse[..., :first] * np.log(2), sums[..., :first], 0, 2.0**-9)
    dy = operands(1, N, 1, seed=1)[0]
    products = np.einsum("bqhc,bqhc->bqh", dy.astype(np.float64), want)
    pads = [
        np.asarray(gpu._in_three(jnp.asarray(x, jnp.float32)))
        for x in (-sums.swapaxes(1, 2) / SCALE, -products)
    ]
    dq, dk, dv = (np.full_like(q, np.nan) for _ in range(3))
    run_at_row(keys, row, (q, k, v, dy, *pads, dk, dv))
    run_at_row(queries, row, (q, k, v, dy, *pads, dq))
    wanted = reference_gradients(q, k, v, dy)
    for got, (want, bound), launch in zip((dq, dk, dv), wanted, (queries, keys, keys), strict=True):
        got, first = got.astype(np.float64), launch.constants["ROWS"]
        assert (np.abs(got - want) <= bound)[:, :first].all()
        assert np.isnan(got[:, first:]).all()


# Triton 3.9.0 spills 16 bytes where the last tile is not whole, 3.6.0 none.
@pytest.mark.parametrize(
    ("N", "spilled"), [(1024, 0), pytest.param(729, 16, marks=pytest.mark.slow)]
)
def test_registers_and_products_that_overlap(N, spilled):
    for launch in launches_of(64, N, 16):
        code = launch.compiled(90)
        assert code.num_threads == 32 * launch.warps
        # Two programs on a multiprocessor.
        assert 2 * code.registers * code.num_threads <= 65536
        assert 2 * (code.shared_bytes + 1024) <= 228 * 1024
        assert code.stack_bytes <= spilled and code.local_bytes == 0
        # ptxas lets products run while other work is done: it waits where the source does, not
        # after each product.
        waits = len(re.findall(r"WARPGROUP\.DEPBAR", code.sass()))
        assert waits == len(re.findall(r"wgmma\.wait_group", code.ptx))


def test_a_float32_in_three_bfloat16():
    x = np.random.default_rng(0).standard_normal((1, 64, 2)).astype(np.float32) * 300
    parts = np.asarray(gpu._in_three(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(parts.sum(-1), x, 2.0**-24, 0)
    assert not parts[..., 3:].any()


def test_what_is_not_served(monkeypatch):
    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    served = like(64, 1024, 16, C)
    assert package.unsupported(served) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert "jax-triton is not installed" in package.unsupported(served)
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)
    if jax.default_backend() == "cpu":
        assert package.unsupported(served) == "this process has no GPU"

    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(gpu.jax, "local_devices", lambda backend: [Device])
    assert "9.0, not 8.0" in package.unsupported(served)
    Device.compute_capability = "9.0"
    assert package.unsupported(served) is None
    assert "not 64" in package.unsupported(like(64, 1024, 16, 64))
    assert "float32" in package.unsupported(like(64, 1024, 16, C, dtype=jnp.float32))
    assert "(65536, 64, 1, 72)" in package.unsupported(like(65536, 64, 1, C))
    assert "(1, 0, 1, 72)" in package.unsupported(like(1, 0, 1, C))
    assert package.unsupported(like(1, 2**31 // C, 1, C)) is None
    assert package.unsupported(like(1, 2**31 // C + 1, 1, C)) is not None


def test_errors():
    q = jnp.zeros((1, 64, 1, C), jnp.bfloat16)
    with pytest.raises(ValueError, match="does not serve this call: it needs an NVIDIA GPU"):
        package.attention(q, q, q, scale=SCALE)
    with pytest.raises(ValueError, match=r"v is bfloat16 \(1, 32, 1, 72\) and q"):
        package.attention(q, q, q[:, :32], scale=SCALE)
    with pytest.raises(ValueError, match="scale is -1"):
        package.attention(q, q, q, scale=-1)
