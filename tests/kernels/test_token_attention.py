"""Attention of one token to its cache: the kernels' PTX in the emulator against float64.

Rotary angles and the write to the cache are theirs too.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")
from jax.sharding import PartitionSpec as P  # noqa: E402
from ml_dtypes import bfloat16  # noqa: E402

from storm_jax.inference import token_attention as dispatch  # noqa: E402
from storm_jax.models.layers import rotary, rotate  # noqa: E402
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


def number(x):
    return jnp.full(1, x, jnp.int32)


class Token(NamedTuple):
    """Of a row: the first arguments of the kernel."""

    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    k: np.ndarray
    v: np.ndarray
    position: int

    @property
    def slot(self):
        return self.position % len(self.k)

    @property
    def read(self):
        """Slots of the tokens before it."""
        is_read = np.arange(len(self.k)) < self.position
        is_read[self.slot] = False
        return is_read

    def call(self, held=None, **given):
        """The result and the cache, without the axis of rows."""
        held = self.position if held is None else held
        found = package.token_attention(
            *self.arrays(), number(self.position), number(held), **given
        )
        return tuple(x[0] for x in found)

    def arrays(self):
        return tuple(jnp.asarray(x)[None] for x in self[:5])

    def turned(self):
        """Queries, key and value of the token; float32 rounded to its dtype, as `rotate` has it."""
        qk = rotate(jnp.asarray(self.qkv[None, None, :, :-1]), *self.angles())
        return *np.split(np.asarray(qk[0, 0]), [-1], axis=1), self.qkv[:, -1:]

    def angles(self):
        return (jnp.asarray(x[None, None, None]) for x in (self.cos, self.sin))


def operands(K, G, C, T, position, dtype=bfloat16):
    """What stands in slots that are empty or replaced must not be used."""
    rng = np.random.default_rng(K + G + C + T + position)
    qkv = rng.standard_normal((K, G + 2, C)).astype(dtype)
    k, v = (rng.standard_normal((T, K, C)).astype(dtype) for _ in "kv")
    # Of one more token the key is like a query: it must weigh something.
    qkv[:, G] = qkv[:, 0] / 2
    cos, sin = (np.asarray(x)[0, 0] for x in rotary(jnp.full((1, 1), position), C, 1e4))
    token = Token(qkv, cos, sin, k, v, position)
    k[~token.read], v[~token.read] = np.nan, np.inf
    return token


def reference(token, scale, softcap, read=None):
    """The result in float64, and how far roundings may take another from it."""
    unit = UNITS[token.k.dtype.name]
    read = token.read if read is None else read
    q, new_k, new_v = (x.astype(np.float64) for x in token.turned())
    k, v = (
        np.concatenate([x[read].astype(np.float64), new.swapaxes(0, 1)])
        for x, new in ((token.k, new_k), (token.v, new_v))
    )
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


def check_cache(token, k, v):
    """The new token is in its slot, bit for bit but for the last place of the turned key."""
    _, new_k, new_v = token.turned()
    for old, new, got in ((token.k, new_k, k), (token.v, new_v, v)):
        want, got = old.copy(), np.asarray(got)
        want[token.slot] = new[:, 0]
        assert got.dtype == want.dtype
        if new is new_k:
            x, y = (a[token.slot].astype(np.float32) for a in (want, got))
            # float32's products are added with one rounding less, or not.
            assert np.mean(x != y) < 0.01
            np.testing.assert_allclose(y, x, rtol=2.1 * UNITS[old.dtype.name], atol=1e-6)
            want[token.slot] = got[token.slot]
        assert got.tobytes() == want.tobytes()


def check(token, scale=None, softcap=0.0):
    scale = scale or 2 * token.k.shape[-1] ** -0.5
    want, bound = reference(token, scale, softcap)
    got, k, v = token.call(scale=scale, softcap=softcap)
    assert got.dtype == token.k.dtype
    off = np.abs(np.asarray(got, np.float64) - want) / bound
    assert (off <= 1).all(), off.max()  # NaN is not less either
    # Nothing but the result is within the bounds.
    assert np.mean(bound) < 0.1 * np.mean(np.abs(want))
    check_cache(token, k, v)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("K", "G", "C", "T", "position"),
    [
        (2, 7, 128, 150, 133),  # of Qwen2 7B's, with fewer heads
        (1, 4, 256, 70, 70),  # Gemma 3 1B
        (2, 2, 256, 64, 1040),  # Gemma 3 4B
        (3, 8, 64, 130, 97),
        (1, 16, 64, 33, 32),
        (1, 1, 128, 17, 17),
    ],
)
def test_heads(K, G, C, T, position):
    check(operands(K, G, C, T, position))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("softcap", [0.0, 1.5, 50.0])
@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
def test_dtypes_and_softcap(dtype, softcap):
    check(operands(2, 3, 64, 100, 90, dtype), softcap=softcap)


# Programs without slots, stretches of one slot; full tiles and not; a ring of 200 that is full.
POSITIONS = [0, 1, 2, 16, 17, 63, 64, 65, 128, 199, 200, 201, 205, 265, 399, 1000]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("position", POSITIONS)
def test_positions(position):
    check(operands(1, 2, 64, 200, position))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("T", [1, 2])
def test_short_rings(T):
    for position in (0, 1, 7):
        check(operands(1, 2, 64, T, position))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("position", [0, 70, 150])
def test_a_row_that_is_not_wanted(position):
    """No slot is read; the token is written."""
    token = operands(2, 3, 64, 100, position)
    got, k, v = token.call(held=0, scale=0.2)
    check_cache(token, k, v)
    value = token.qkv[:, -1:]
    assert (np.asarray(got) == value).all()


@pytest.mark.usefixtures("emulated")
# More tiles than are in shared memory, one program or several; other numbers of warps.
@pytest.mark.parametrize(
    "given", [(1, 32, 1, 4), (1, 32, 2, 4), (3, 32, 3, 2), (2, 64, 2, 8), (100, 32, 2, 4)]
)
def test_cuts(given, cut):
    cut(*given)
    check(operands(1, 5, 64, 310, 297))
    check(operands(1, 5, 64, 310, 900))


@pytest.mark.usefixtures("emulated")
def test_many_stretches(cut):
    """More of them than are added at a time."""
    cut(70, 32, 2, 1)
    check(operands(1, 2, 64, 70 * 32, 70 * 16 - 5))


@pytest.mark.usefixtures("emulated")
def test_scores_that_grow(cut):
    """The largest score comes last, or first, and lies so high that others vanish."""
    cut(2, 32, 2, 4)
    token = operands(1, 2, 64, 256, 255)
    k = token.k[:-1]
    rising = np.argsort(k[:, 0].astype("f4") @ token.turned()[0][0, 0].astype("f4"))
    for order in (rising, rising[::-1]):
        held = np.concatenate([k[order], token.k[-1:]])
        check(token._replace(k=held), scale=4.0)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_float32s_exponents(sign):
    token = operands(1, 2, 64, 40, 39)
    token.qkv[:, 2] *= sign
    check(token, scale=200.0)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("where", ["query", "slot", "key", "value"])
def test_a_number_that_is_not_finite_is_seen(where, cut):
    cut(4, 32, 2, 4)
    token = operands(2, 2, 64, 128, 127)
    match where:
        case "query":
            token.qkv[1, 1] = np.nan
        case "slot":
            token.k[70, 1] = np.nan
        case "key":
            token.qkv[1, 2] = np.nan
        case "value":
            token.qkv[1, 3] = np.nan
    got = np.asarray(token.call(scale=0.1)[0], np.float64)
    assert np.isfinite(got[0]).all()
    assert np.isfinite(got[1, 0]).all() == (where == "query")
    assert np.isnan(got[1, 1]).all()


@pytest.mark.usefixtures("emulated")
def test_inside_jit_positions_are_known_at_run_time_alone():
    token = operands(1, 2, 64, 100, 99)
    call = jax.jit(lambda n: package.token_attention(*token.arrays(), n, n, scale=0.1))
    for position in (3, 99):
        want, bound = reference(token._replace(position=position), 0.1, 0.0)
        got, _, _ = call(number(position))
        assert (np.abs(np.asarray(got[0], np.float64) - want) <= bound).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_one_row_is_dispatched(softcap):
    """In a ring that is full; two rows are served without the kernel."""
    token = operands(2, 7, 64, 90, 200)
    for x in (token.k, token.v):
        x[token.slot] = 0

    def attend(rows):
        args = (jnp.repeat(x, rows, 0) for x in token.arrays())
        numbers = jnp.full(rows, 200, jnp.int32), jnp.ones(rows, bool)
        found = dispatch.token_attention(*args, *numbers, 0.125, softcap)
        return [x.astype(jnp.float32) for x in found]

    with recorded_launches() as found:
        want = attend(2)
        assert not found
        jax.eval_shape(lambda: attend(1))
        assert [x.name for x in found] == ["token_attention_parts", "token_attention_whole"]
    got = attend(1)
    np.testing.assert_allclose(got[0], want[0][:1], atol=0.01, rtol=0.02)
    for x, y in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(x, y[:1], rtol=2.0**-7, atol=1e-6)


@pytest.mark.usefixtures("emulated")
def test_inside_shard_map():
    token = operands(2, 3, 64, 50, 60)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    heads, slots = P(None, "model"), P(None, None, "model")
    call = jax.shard_map(
        lambda *args: package.token_attention(*args, scale=0.25),
        mesh=mesh,
        in_specs=(heads, P(), P(), slots, slots, P(), P()),
        out_specs=(heads, slots, slots),
    )
    found = jax.jit(call)(*token.arrays(), number(60), number(60))
    got, k, v = (x[0] for x in found)
    want, bound = reference(token, 0.25, 0.0)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()
    check_cache(token, k, v)


@pytest.mark.usefixtures("served")
def test_a_derivative_is_refused():
    token = operands(1, 2, 64, 32, 3)
    with (
        recorded_launches(),
        pytest.raises(NotImplementedError, match="jax.nn.dot_product_attention"),
    ):
        jax.grad(lambda qkv: token._replace(qkv=qkv).call(scale=1.0)[0].astype("f4").sum())(
            jnp.asarray(token.qkv)
        )


QKV, X = jnp.ones((1, 2, 9, 64), jnp.bfloat16), jnp.ones((1, 32, 2, 64), jnp.bfloat16)
ANGLE, ONE = jnp.ones((1, 32)), number(1)
RIGHT = dict(
    qkv_BKHC=QKV, cos_BA=ANGLE, sin_BA=ANGLE, k_BTKC=X, v_BTKC=X, position_B=ONE, held_B=ONE
)
WRONG = [
    (
        dict(qkv_BKHC=QKV.astype("f4"), k_BTKC=X.astype("f4"), v_BTKC=X.astype("f4")),
        "or float16, not float32",
    ),
    (dict(k_BTKC=X.astype("f2"), v_BTKC=X.astype("f2")), "dtype of the token, not float16"),
    (
        dict(
            qkv_BKHC=QKV[..., :32], k_BTKC=X[..., :32], v_BTKC=X[..., :32],
            cos_BA=ANGLE[:, :16], sin_BA=ANGLE[:, :16],
        ),
        "64, 128, 256 channels, not 32",
    ),
    (dict(qkv_BKHC=QKV.repeat(3, 2)), "up to 16 query heads .* not 25"),
    (dict(qkv_BKHC=QKV[:, :, :2]), "up to 16 query heads .* not 0"),
    ({name: x.repeat(2, 0) for name, x in RIGHT.items()}, "one row, not 2"),
    (dict(k_BTKC=X[:, :0], v_BTKC=X[:, :0]), r"keys of the shape \(1, 0, 2, 64\)"),
    (dict(qkv_BKHC=QKV[:, :1]), "B, K and C must be equal"),
    (dict(qkv_BKHC=QKV[0]), "B, K and C must be equal"),
    (dict(v_BTKC=X[:, :3]), "they must be alike"),
    (dict(cos_BA=jnp.ones((1, 64))), r"cos_BA is float32 \(1, 64\), not float32 \(1, 32\)"),
    (dict(sin_BA=ANGLE.astype("f2")), "sin_BA is float16"),
    (dict(position_B=jnp.int32(1)), r"position_B is int32 \(\), not int32 \(1,\)"),
    (dict(held_B=jnp.ones(1)), "held_B is float32"),
    (dict(scale=float("nan")), "scale is nan"),
    (dict(softcap=-1.0), "softcap is -1.0"),
]  # fmt: skip


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("given", "message"), WRONG)
def test_wrong_operands(given, message):
    with pytest.raises(ValueError, match=message):
        package.token_attention(**{**RIGHT, "scale": 1.0, **given})


def test_offsets_are_of_32_bits():
    long = jax.ShapeDtypeStruct((1, 2**20, 16, 128), jnp.bfloat16)
    qkv = jax.ShapeDtypeStruct((1, 16, 3, 128), jnp.bfloat16)
    assert "keys of the shape" in gpu._operands_unsupported(qkv, long)  # pyrefly: ignore


def test_it_needs_a_gpu(monkeypatch):
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        package.token_attention(**RIGHT, scale=1.0)
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)

    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(triton_launch.jax, "local_devices", lambda backend: [Device])
    assert package.unsupported(QKV, X) is None
    Device.compute_capability = "7.5"
    assert "8.0 and later, not 7.5" in str(package.unsupported(QKV, X))


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
    qkv = jax.ShapeDtypeStruct((1, K, G + 2, C), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, T, K, C), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((1, C // 2), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    with recorded_launches() as found:
        jax.eval_shape(
            lambda *args: package.token_attention(*args, scale=0.1, softcap=softcap),
            qkv, angle, angle, x, x, one, one,
        )  # fmt: skip
    for launch in found:
        code = launch.compiled(target)
        assert code.stack_bytes == 0, launch.name
        assert code.registers * code.num_threads <= 65536 // 2
        assert code.shared_bytes <= 99 * 1024
    ptx = found[0].compiled(target).ptx
    assert re.search(r"ldmatrix\S*\.trans", ptx)
    assert not re.search(r"ld\.shared\S*b16", ptx)
