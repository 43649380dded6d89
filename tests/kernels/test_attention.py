"""Attention for heads of 72 channels: the kernel's PTX in the emulator against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")
from ml_dtypes import bfloat16  # noqa: E402

from storm_kernels import attention as package  # noqa: E402
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


# One tile of keys and several, whole ones and not; queries that do not fill a program.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("B", "N", "H"),
    [
        (1, 64, 2),
        (2, 40, 1),
        (1, 129, 1),
        (2, 256, 2),
        pytest.param(1, 320, 1, marks=pytest.mark.slow),
        pytest.param(1, 729, 1, marks=pytest.mark.slow),
        pytest.param(1, 1024, 1, marks=pytest.mark.slow),
    ],
)
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


def launch_of(B, N, H):
    x = jax.ShapeDtypeStruct((B, N, H, C), jnp.bfloat16)
    with recorded_launches() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "platform_of", lambda x: "gpu")
        patch.setattr(gpu, "_device_unsupported", lambda: None)
        jax.eval_shape(functools.partial(package.attention, scale=SCALE), x, x, x)
    (launch,) = found
    return launch


def test_rows_of_the_batch_beyond_four_gigabytes():
    N, row = 512, 65535
    code = launch_of(1, N, 1).compiled()
    q, k, v = operands(1, N, 1)
    out = np.full_like(q, np.nan)
    place = row * N * C * 2
    assert place > 2**32
    ptx, changed = re.subn(r"%ctaid\.z", str(row), code.ptx)
    assert changed
    windows = [ptx_emulator.Window({place: x}) for x in (q, k, v, out)]
    ptx_emulator.run(ptx, (1, 1, 1), code.num_threads, windows, code.shared_bytes)
    want, bound = reference(q, k, v)
    first = gpu._QUERIES
    assert (np.abs(out.astype(np.float64) - want) <= bound)[:, :first].all()
    assert np.isnan(out[:, first:].astype(np.float64)).all()


# Triton 3.9.0 spills 16 bytes where the last tile is not whole, 3.6.0 none.
@pytest.mark.parametrize(
    ("N", "spilled"), [(1024, 0), pytest.param(729, 16, marks=pytest.mark.slow)]
)
def test_registers_and_products_that_overlap(N, spilled):
    launch = launch_of(64, N, 16)
    code = launch.compiled(90)
    assert code.num_threads == 32 * gpu._WARPS
    # Two programs on a multiprocessor.
    assert 2 * code.registers * code.num_threads <= 65536
    assert 2 * (code.shared_bytes + 1024) <= 228 * 1024
    assert code.stack_bytes <= spilled and code.local_bytes == 0
    # ptxas lets products run while other work is done: it waits where the source does, not after
    # each product.
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", code.sass()))
    assert waits == len(re.findall(r"wgmma\.wait_group", code.ptx))


def test_what_is_not_served(monkeypatch):
    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    served = like(64, 1024, 16, C)
    assert package.unsupported(served) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "jax-triton is not installed" in package.unsupported(served)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
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


@pytest.mark.usefixtures("emulated")
def test_it_refuses_to_be_differentiated():
    q = jnp.zeros((1, 64, 1, C), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="computes no gradient"):
        jax.grad(lambda q: package.attention(q, q, q, scale=SCALE).astype(jnp.float32).sum())(q)
