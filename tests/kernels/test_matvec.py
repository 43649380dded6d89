"""Products of a matrix and one vector: the kernel's PTX in the emulator against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16, float8_e4m3fn  # noqa: E402

from storm_kernels import matvec as package  # noqa: E402
from storm_kernels import triton_launch  # noqa: E402
from storm_kernels.matvec import gpu  # noqa: E402
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: E402, F401


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda float8: None)


@pytest.fixture
def emulated(emulated_gpu, served):  # noqa: F811
    pass


def matrix(rng, shape, dtype):
    if dtype == np.int8:
        return rng.integers(-128, 128, shape, np.int8)
    return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)


UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # half of the last place


def rounding(y, size, dtype):
    """`size` and what rounding y to a dtype adds."""
    return size + 1.01 * UNITS[np.dtype(dtype).name] * (np.abs(y) + size)


def reference(
    x, w, scale_R=None, norm=None, bias_R=None, activation="", residual_R=None, dtype=None
):
    """The result in float64, and how far roundings may take another from it."""
    kept = x.dtype
    final = kept if activation or residual_R is not None else dtype or kept
    x = x.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt(np.mean(x * x) + norm.eps)
        x = x * (np.asarray(norm.weight, np.float64) + norm.plus_one)
    w = w.astype(np.float64)
    y, size = w @ x, 2.0**-20 * (np.abs(w) @ np.abs(x))
    if scale_R is not None:
        y, size = y * scale_R, size * scale_R
    size = rounding(y, size, final)
    if bias_R is not None:
        y = y + bias_R.astype(np.float64)
        size = rounding(y, size, final)
    if activation:
        gate, up = y
        steep = gate
        if activation == "gelu_tanh":
            steep = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        with np.errstate(over="ignore"):
            smooth = gate / (1 + np.exp(-steep))
        # Nowhere is the slope above 1.13.
        y, size = smooth * up, 1.13 * size[0] * (np.abs(up) + size[1]) + np.abs(smooth) * size[1]
        size = rounding(y, size, final)
    if residual_R is not None:
        y = y + residual_R.astype(np.float64)
        size = rounding(y, size, final)
    return y, size + 1e-6


def check(x, w, **given):
    want, bound = reference(x, w, **given)
    got = package.matvec(jnp.asarray(x), jnp.asarray(w), **given)
    assert got.dtype == (given.get("dtype") or x.dtype)
    off = np.abs(np.asarray(got, np.float64) - want) / bound
    assert (off <= 1).all(), off.max()
    # Nothing but the result is within the bounds.
    assert np.mean(bound) < 0.1 * np.mean(np.abs(want))


def operands(R, C, dtype, kept=bfloat16, lead=()):
    rng = np.random.default_rng(R + C)
    return rng.standard_normal(C).astype(kept), matrix(rng, (*lead, R, C), dtype), rng


def scales(rng, w):
    """Such that results are around one."""
    size = 74 * w.shape[-1] ** 0.5 if w.dtype == np.int8 else 1
    return (rng.uniform(0.5, 1.5, w.shape[:-1]) / size).astype(np.float32)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [bfloat16, np.int8, float8_e4m3fn])
# Outputs that fill programs or do not; inputs that fill tiles or do not, one tile and several.
@pytest.mark.parametrize(("R", "C"), [(32, 512), (19, 48), (16, 1040)])
def test_product(R, C, dtype):
    x, w, rng = operands(R, C, dtype)
    check(x, w, scale_R=None if dtype == bfloat16 else scales(rng, w))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [bfloat16, np.int8])
# Warps that have nothing to read, several tiles a row; parts that end within the last rows.
@pytest.mark.parametrize("cut", [(2, 1, 3), (1, 2, 4), (8, 4, 2)])
def test_cuts(dtype, cut, monkeypatch):
    monkeypatch.setattr(gpu, "_cut", lambda *_: gpu._Cut(*cut))
    x, w, rng = operands(19, 1040, dtype)
    norm = package.Norm(rng.standard_normal(1040).astype(np.float32), 1e-6)
    check(x, w, scale_R=None if dtype == bfloat16 else scales(rng, w), norm=norm)


@pytest.mark.usefixtures("emulated")
def test_every_number_of_eight_bits():
    """Each as a matrix of one row that picks it."""
    numbers = np.arange(256, dtype=np.uint8)
    for dtype in (np.int8, float8_e4m3fn):
        held = numbers.view(dtype)
        held = held[np.isfinite(held.astype(np.float32))]
        w = np.zeros((len(held), 32), dtype)
        w[np.arange(len(held)), np.arange(len(held)) % 32] = held
        got = package.matvec(jnp.ones(32, bfloat16), jnp.asarray(w), dtype=jnp.float32)
        np.testing.assert_array_equal(got, held.astype(np.float32))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kept", [bfloat16, np.float16])
@pytest.mark.parametrize("dtype", [None, np.int8])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norm_and_bias(kept, dtype, plus_one):
    x, w, rng = operands(24, 592, dtype or kept, kept)
    norm = package.Norm(rng.standard_normal(592).astype(np.float32), 1e-3, plus_one)
    check(
        (x.astype(np.float32) * 0.05).astype(kept), w,
        scale_R=scales(rng, w) if dtype else None,
        norm=norm, bias_R=rng.standard_normal(24).astype(kept if plus_one else np.float32),
    )  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [bfloat16, np.int8])
@pytest.mark.parametrize("activation", package.ACTIVATIONS)
def test_gate(dtype, activation):
    x, w, rng = operands(19, 272, dtype, lead=(2,))
    norm = package.Norm(rng.standard_normal(272).astype(np.float32), 1e-6)
    # Some gates are far out, where exponentials are zero or infinite.
    scale = scales(rng, w)
    scale[0, :4] *= 200
    if dtype == bfloat16:
        check(x, w, norm=norm, activation=activation)
    else:
        check(x, w, scale_R=scale, norm=norm, activation=activation)


@pytest.mark.usefixtures("emulated")
def test_residual():
    x, w, rng = operands(40, 128, np.int8)
    check(x, w, scale_R=scales(rng, w), residual_R=rng.standard_normal(40).astype(bfloat16))


@pytest.mark.usefixtures("emulated")
def test_scores_in_float32():
    x, w, rng = operands(21, 512, bfloat16)
    norm = package.Norm(rng.standard_normal(512).astype(np.float32), 1e-6)
    check(x, w, norm=norm, dtype=np.dtype(np.float32))


@pytest.mark.usefixtures("emulated")
def test_a_number_that_is_not_finite_spoils_its_output_alone():
    x, w, _ = operands(20, 64, bfloat16)
    w[3, 5] = np.inf
    w[4, 6] = np.nan
    got = np.asarray(package.matvec(jnp.asarray(x), jnp.asarray(w)), np.float64)
    assert np.isinf(got[3])
    assert np.isnan(got[4])
    assert np.isfinite(np.delete(got, [3, 4])).all()


@pytest.mark.usefixtures("served")
def test_a_derivative_is_refused():
    x, w = jnp.ones(32, jnp.bfloat16), jnp.ones((8, 32), jnp.bfloat16)
    with (
        recorded_launches(),
        pytest.raises(NotImplementedError, match="jax.numpy"),
    ):
        jax.grad(lambda x: package.matvec(x, w).astype(jnp.float32).sum())(x)


X, W = jnp.ones(32, jnp.bfloat16), jnp.ones((8, 32), jnp.bfloat16)
WRONG = [
    ((X.astype(jnp.float32), W), {}, "bfloat16 or float16, not float32"),
    ((X, W.astype(jnp.float32)), {}, "int8 or float8_e4m3fn, not float32"),
    ((X[:7], W[:, :7]), {}, r"shape \(8, 7\)"),
    ((jnp.tile(X, 1024), jnp.tile(W, 1024)), {}, "up to 24576, not 32768"),
    ((X[:16], W), {}, r"must be \('R', 16\)"),
    ((X, W), {"activation": "silu"}, r"must be \(2, 'R', 32\)"),
    ((X, W[None].repeat(2, 0)), {"activation": "relu"}, "'relu', not one of silu, gelu_tanh"),
    (
        (X, W[None].repeat(2, 0)),
        {"activation": "silu", "bias_R": jnp.ones((2, 8))},
        "bias_R is given",
    ),
    ((X, W), {"scale_R": jnp.ones(7)}, r"scale_R is float32 \(7,\), not float32 \(8,\)"),
    ((X, W), {"residual_R": jnp.ones(8)}, "residual_R is float32 .* not bfloat16"),
    ((X, W), {"norm": package.Norm(jnp.ones(31), 1e-6)}, "norm.weight"),
    ((X, W), {"residual_R": W[:, 0], "dtype": jnp.float32}, "dtype is float32"),
]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("operands", "given", "message"), WRONG)
def test_wrong_operands(operands, given, message):
    with pytest.raises(ValueError, match=message):
        package.matvec(*operands, **given)


def test_it_needs_a_gpu(monkeypatch):
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        package.matvec(X, W)
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)

    class Device:
        compute_capability = "8.6"

    monkeypatch.setattr(triton_launch.jax, "local_devices", lambda backend: [Device])
    assert package.unsupported(X, W) is None
    float8 = W.astype(jnp.float8_e4m3fn)
    assert package.unsupported(X, float8) == "it is for compute capability 8.9 and later, not 8.6"
    Device.compute_capability = "7.5"
    assert "8.0 and later, not 7.5" in package.unsupported(X, W)
    Device.compute_capability = "12.0"
    assert package.unsupported(X, float8) is None


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    ("R", "C", "activation"), [(4608, 3584, ""), (18944, 3584, "silu"), (3584, 24576, "")]
)
@pytest.mark.usefixtures("served")
def test_compiled(target, dtype, R, C, activation):
    """At Qwen2 7B's widths and at the largest; the matrix is read in 16 bytes a thread."""
    if target == 80 and dtype == jnp.float8_e4m3fn:
        pytest.skip("compute capability 8.0 has no such conversion")
    lead = (2,) if activation else ()
    x = jax.ShapeDtypeStruct((C,), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((*lead, R, C), dtype)
    weight = jax.ShapeDtypeStruct((C,), jnp.float32)
    with recorded_launches() as found:
        jax.eval_shape(
            lambda x, w, norm: package.matvec(
                x, w, norm=package.Norm(norm, 1e-6), activation=activation
            ),
            x, w, weight,
        )  # fmt: skip
    code = found[0].compiled(target)
    # For 10.0 ptxas puts three registers aside, in one case and before the loop.
    assert code.stack_bytes <= (16 if target == 100 else 0)
    assert len(re.findall(r"LDG\.E\.(?:EF\.)?128", code.sass())) >= 8  # this tile and the next
