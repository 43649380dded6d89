"""Attention of one token to its cache: the kernels' PTX in the emulator against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")
from jax.sharding import PartitionSpec as P  # noqa: E402
from ml_dtypes import bfloat16  # noqa: E402

from storm_jax.inference import token_attention as dispatch  # noqa: E402
from storm_kernels import token_attention as package  # noqa: E402
from storm_kernels import triton_launch  # noqa: E402
from storm_kernels.token_attention import gpu  # noqa: E402
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: E402, F401

UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half of the last place


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)


@pytest.fixture
def emulated(emulated_gpu, served):  # noqa: F811
    pass


@pytest.fixture
def cut(monkeypatch):
    """Sets the cut of the work."""
    return lambda *cut: monkeypatch.setattr(gpu, "_cut", lambda channels: gpu._Cut(*cut))


def operands(K, G, C, T, valid, dtype=bfloat16):
    """Queries, keys and values; what stands behind the valid slots must not be used."""
    rng = np.random.default_rng(K + G + C + T + valid)
    q = rng.standard_normal((K, G, C)).astype(dtype)
    k, v = (rng.standard_normal((T, K, C)).astype(dtype) for _ in "kv")
    k[valid:], v[valid:] = np.nan, np.inf
    return q, k, v


def reference(q, k, v, valid, scale, softcap):
    """The result in float64, and how far roundings may take another from it."""
    unit = UNITS[q.dtype.name]
    q, k, v = (x.astype(np.float64) for x in (q, k[:valid], v[:valid]))
    s = scale * np.einsum("KGC,TKC->KGT", q, k)
    size = 2.0**-20 * scale * np.einsum("KGC,TKC->KGT", np.abs(q), np.abs(k)) + 2.0**-18 * softcap
    if softcap:
        s = softcap * np.tanh(s / softcap)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("KGT,TKC->KGC", p, v)
    # Weights are rounded, and what a score is off by takes its weight and their sum with it.
    off = np.einsum("KGT,TKC->KGC", p * (unit + 2 * size.max() + 2.0**-18), np.abs(v))
    return y, 1.01 * unit * (np.abs(y) + off) + off + 1e-6


def check(q, k, v, valid, scale=None, softcap=0.0):
    scale = scale or 2 * q.shape[-1] ** -0.5
    want, bound = reference(q, k, v, valid, scale, softcap)
    got = package.token_attention(
        *map(jnp.asarray, (q, k, v)), jnp.int32(valid), scale=scale, softcap=softcap
    )
    assert got.dtype == q.dtype
    off = np.abs(np.asarray(got, np.float64) - want) / bound
    assert (off <= 1).all(), off.max()  # NaN is not less either
    # Nothing but the result is within the bounds.
    assert np.mean(bound) < 0.1 * np.mean(np.abs(want))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("K", "G", "C", "T", "valid"),
    [
        (2, 7, 128, 150, 133),  # of Qwen2 7B's, with fewer heads
        (1, 4, 256, 70, 70),  # Gemma 3 1B
        (2, 2, 256, 64, 40),  # Gemma 3 4B
        (3, 8, 64, 130, 97),
        (1, 16, 64, 33, 32),
        (1, 1, 128, 17, 17),
    ],
)
def test_heads(K, G, C, T, valid):
    check(*operands(K, G, C, T, valid), valid)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("softcap", [0.0, 1.5, 50.0])
@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
def test_dtypes_and_softcap(dtype, softcap):
    check(*operands(2, 3, 64, 100, 90, dtype), 90, softcap=softcap)


# Programs without slots, stretches of one slot; full tiles and not; the last of a ring of 200.
VALID = [1, 2, 16, 17, 63, 64, 65, 128, 199, 200]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("valid", VALID)
def test_valid(valid):
    check(*operands(1, 2, 64, 200, valid), valid)


@pytest.mark.usefixtures("emulated")
# More tiles than are in shared memory, one program or several; other numbers of warps.
@pytest.mark.parametrize(
    "given", [(1, 32, 1, 4), (1, 32, 2, 4), (3, 32, 3, 2), (2, 64, 2, 8), (100, 32, 2, 4)]
)
def test_cuts(given, cut):
    cut(*given)
    check(*operands(1, 5, 64, 310, 297), 297)


@pytest.mark.usefixtures("emulated")
def test_many_stretches(cut):
    """More of them than are added at a time."""
    cut(70, 32, 2, 1)
    check(*operands(1, 2, 64, 70 * 32, 70 * 16 - 5), 70 * 16 - 5)


@pytest.mark.usefixtures("emulated")
def test_scores_that_grow(cut):
    """The largest score comes last, or first, and lies so high that others vanish."""
    cut(2, 32, 2, 4)
    q, k, v = operands(1, 2, 64, 256, 256)
    rising = np.argsort(k[:, 0].astype("f4") @ q[0, 0].astype("f4"))
    for order in (rising, rising[::-1]):
        check(q, k[order], v, 256, scale=4.0)


@pytest.mark.usefixtures("emulated")
def test_scores_beyond_float32s_exponents():
    q, k, v = operands(1, 2, 64, 40, 40)
    check(q, k, v, 40, scale=200.0)


@pytest.mark.usefixtures("emulated")
def test_a_number_that_is_not_finite_is_seen(cut):
    cut(4, 32, 2, 4)
    q, k, v = operands(2, 2, 64, 128, 128)
    q[0, 1] = np.nan
    k[70, 1] = np.nan
    got = np.asarray(
        package.token_attention(*map(jnp.asarray, (q, k, v)), jnp.int32(128), scale=0.1),
        np.float64,
    )
    assert np.isfinite(got[0, 0]).all()
    assert np.isnan(got[0, 1]).all()
    assert np.isnan(got[1]).all()


@pytest.mark.usefixtures("emulated")
def test_inside_jit_valid_is_known_at_run_time_alone():
    q, k, v = (jnp.asarray(x) for x in operands(1, 2, 64, 100, 100))
    call = jax.jit(lambda n: package.token_attention(q, k, v, n, scale=0.1))
    for valid in (3, 100):
        want, bound = reference(*map(np.asarray, (q, k, v)), valid, 0.1, 0.0)
        assert (np.abs(np.asarray(call(jnp.int32(valid)), np.float64) - want) <= bound).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_one_row_is_dispatched(softcap):
    q, k, v = (jnp.asarray(x) for x in operands(2, 7, 64, 90, 90))

    def attend(rows):
        args = (jnp.tile(x[None], (rows, 1, 1, 1)) for x in (q, k, v))
        valid = jnp.full(rows, 75, jnp.int32)
        return dispatch.token_attention(*args, valid, 0.125, softcap).astype(jnp.float32)

    with recorded_launches() as found:
        want = attend(2)[:1]
        assert not found
        jax.eval_shape(lambda: attend(1))
        assert [x.name for x in found] == ["token_attention_parts", "token_attention_whole"]
    np.testing.assert_allclose(attend(1), want, atol=0.01, rtol=0.02)


@pytest.mark.usefixtures("emulated")
def test_inside_shard_map():
    q, k, v = operands(2, 3, 64, 50, 40)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    call = jax.shard_map(
        lambda q, k, v, n: package.token_attention(q, k, v, n, scale=0.25),
        mesh=mesh,
        in_specs=(P("model"), P(None, "model"), P(None, "model"), P()),
        out_specs=P("model"),
    )
    got = jax.jit(call)(*map(jnp.asarray, (q, k, v)), jnp.int32(40))
    want, bound = reference(q, k, v, 40, 0.25, 0.0)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


@pytest.mark.usefixtures("served")
def test_a_derivative_is_refused():
    q, k, v = (jnp.asarray(x) for x in operands(1, 2, 64, 32, 32))
    with (
        recorded_launches(),
        pytest.raises(NotImplementedError, match="jax.nn.dot_product_attention"),
    ):
        jax.grad(
            lambda q: package.token_attention(q, k, v, jnp.int32(3), scale=1.0).astype("f4").sum()
        )(q)


Q, X = jnp.ones((2, 7, 64), jnp.bfloat16), jnp.ones((32, 2, 64), jnp.bfloat16)
ONE = jnp.int32(1)
WRONG = [
    ((Q.astype("f4"), X.astype("f4"), X.astype("f4"), ONE), {}, "or float16, not float32"),
    ((Q, X.astype("f2"), X.astype("f2"), ONE), {}, "dtype of the queries, not float16"),
    ((Q[..., :32], X[..., :32], X[..., :32], ONE), {}, "64, 128, 256 channels, not 32"),
    ((Q.repeat(3, 1), X, X, ONE), {}, "up to 16 query heads .* not 21"),
    ((Q, X[:0], X[:0], ONE), {}, r"keys of the shape \(0, 2, 64\)"),
    ((Q[:1], X, X, ONE), {}, "K and C must be the same"),
    ((Q, X, X[:3], ONE), {}, "they must be alike"),
    ((Q, X, X, jnp.ones(2, jnp.int32)), {}, r"valid is int32 \(2,\), not one int32"),
    ((Q, X, X, jnp.float32(1)), {}, "valid is float32"),
    ((Q, X, X, ONE), {"scale": float("nan")}, "scale is nan"),
    ((Q, X, X, ONE), {"softcap": -1.0}, "softcap is -1.0"),
]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("operands", "given", "message"), WRONG)
def test_wrong_operands(operands, given, message):
    with pytest.raises(ValueError, match=message):
        package.token_attention(*operands, **{"scale": 1.0, **given})


def test_offsets_are_of_32_bits():
    long = jax.ShapeDtypeStruct((2**20, 16, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((16, 1, 128), jnp.bfloat16)
    assert "keys of the shape" in gpu._operands_unsupported(q, long)  # pyrefly: ignore


def test_it_needs_a_gpu(monkeypatch):
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        package.token_attention(Q, X, X, ONE, scale=1.0)
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)

    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(triton_launch.jax, "local_devices", lambda backend: [Device])
    assert package.unsupported(Q, X) is None
    Device.compute_capability = "7.5"
    assert "8.0 and later, not 7.5" in str(package.unsupported(Q, X))


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    ("K", "G", "C", "T", "softcap"),
    [
        (4, 7, 128, 10240, 0.0),
        (1, 4, 256, 10240, 0.0),
        (8, 2, 256, 4096, 50.0),
        (2, 8, 64, 64, 0.0),
    ],
)
@pytest.mark.usefixtures("served")
def test_compiled(target, K, G, C, T, softcap):
    """At sizes of models: no spills, and shared memory for two programs, or one of 8.6."""
    q = jax.ShapeDtypeStruct((K, G, C), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((T, K, C), jnp.bfloat16)
    with recorded_launches() as found:
        jax.eval_shape(
            lambda q, k, v, n: package.token_attention(q, k, v, n, scale=0.1, softcap=softcap),
            q, x, x, jax.ShapeDtypeStruct((), jnp.int32),
        )  # fmt: skip
    for launch in found:
        code = launch.compiled(target)
        assert code.stack_bytes == 0, launch.name
        assert code.registers * code.num_threads <= 65536 // 2
        assert code.shared_bytes <= 99 * 1024
    ptx = found[0].compiled(target).ptx
    assert re.search(r"ldmatrix\S*\.trans", ptx)
    assert not re.search(r"ld\.shared\S*b16", ptx)
