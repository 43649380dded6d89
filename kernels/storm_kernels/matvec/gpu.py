"""Products of a matrix and one vector on NVIDIA GPUs, with what stands around them in a decoder.

Axis letters: R rows of the matrix, which are outputs, C columns, which are inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_kernels.once import not_differentiable
from storm_kernels.platforms import platform_of
from storm_kernels.triton_launch import device_unsupported, launch

ACTIVATIONS = ("silu", "gelu_tanh")
_VECTOR = 16  # bytes of the matrix that a lane reads at a time
_MOST_COLUMNS = 24576  # that a program has registers for
_PROGRAMS = 528  # four for each multiprocessor of an H100


class Norm(NamedTuple):
    """An RMSNorm: x / rms(x) * weight."""

    weight: jax.Array  # [C]
    eps: float
    plus_one: bool = False  # 1 + weight instead of weight


class _Cut(NamedTuple):
    """Of a product into programs; chosen by measurement, see `docs/kernels.md`."""

    rows: int  # of the matrix, that a program takes at a time
    warps: int
    blocks: int  # of so many rows


def _cut(rows: int, words: int, gated: bool) -> _Cut:
    """For a matrix of so many rows of so many words of 32 bits."""
    warps = 4 if words <= 2048 else 8 if words <= 5120 else 16
    tiles = -(-words // (128 * warps))  # of 16 bytes a thread
    # So many of them on their way in a thread, and as many that are added.
    together = max((8 if warps < 16 else 10) // tiles // (2 if gated else 1), 1)
    together = 1 << (together.bit_length() - 1)
    return _Cut(together, warps, min(max(rows // (together * _PROGRAMS), 1), 16))


def unsupported(x_C: jax.Array, w_RC: jax.Array) -> str | None:
    """Why the kernel does not serve such a product here, or None if it does."""
    reason = _operands_unsupported(x_C, w_RC)
    if reason is None and platform_of(x_C) != "gpu":
        reason = "it needs an NVIDIA GPU"
    return reason or _device_unsupported(w_RC.dtype == jnp.float8_e4m3fn)


def _operands_unsupported(x_C: jax.Array, w_RC: jax.Array) -> str | None:
    if x_C.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes a vector in bfloat16 or float16, not {x_C.dtype}"
    if w_RC.dtype not in (x_C.dtype, jnp.int8, jnp.float8_e4m3fn):
        return f"it takes a matrix in {x_C.dtype}, int8 or float8_e4m3fn, not {w_RC.dtype}"
    columns, rows = x_C.size, w_RC.size // max(x_C.size, 1)
    if not rows or rows >= 2**31 or columns * w_RC.dtype.itemsize % _VECTOR:
        return f"a matrix of the shape {w_RC.shape} in {w_RC.dtype}"
    if columns > _MOST_COLUMNS:
        return f"it takes vectors of up to {_MOST_COLUMNS}, not {columns}"
    return None


def _device_unsupported(float8: bool) -> str | None:
    least = 8.9 if float8 else 8.0
    return device_unsupported(lambda capability: capability >= least, f"{least} and later")


def matvec(
    x_C: jax.Array,
    w_RC: jax.Array,
    *,
    scale_R: jax.Array | None = None,
    norm: Norm | None = None,
    bias_R: jax.Array | None = None,
    activation: str = "",
    residual_R: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """residual + activation(scale * (W norm(x)) + bias), reading W once.

    Norm, products and sums are float32. What product, bias, gate and residual give is rounded to
    the dtype of x, as a model rounds that computes one after the other.

    Args:
      x_C: bfloat16 or float16 [C].
      w_RC: [R, C] in the dtype of x, int8 or float8_e4m3fn; [2, R, C] with an activation.
      scale_R: float32 [R], of each output channel; [2, R] with an activation.
      norm: that x goes through first; weight [C].
      bias_R: [R]; not with an activation.
      activation: "", or of `ACTIVATIONS`: the result is activation(W[0] x) * (W[1] x).
      residual_R: [R] in the dtype of x, added to the result.
      dtype: of the result; None: that of x. With "activation" or a residual they must be equal.

    Returns:
      [R]. It is not differentiable.

    Raises:
      ValueError: the kernel does not serve the operands, or shapes or dtypes do not match.
      NotImplementedError: on differentiating.
    """
    reason = unsupported(x_C, w_RC)
    if reason is not None:
        raise ValueError(
            f"this kernel does not serve this product: {reason}. jax.numpy serves every call"
        )
    dtype = jnp.dtype(dtype or x_C.dtype)
    _check(x_C, w_RC, scale_R, norm, bias_R, activation, residual_R, dtype)
    return _launch(x_C, w_RC, scale_R, norm, bias_R, activation, residual_R, dtype)


def _check(x, w, scale, norm, bias, activation, residual, dtype) -> None:
    if activation and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    lead = (2,) if activation else ()
    if w.shape != (*lead, *w.shape[-2:-1], *x.shape) or x.ndim != 1:
        raise ValueError(
            f"w_RC is {w.shape} and x_C {x.shape}: w_RC must be {(*lead, 'R', *x.shape)}"
        )
    outputs = w.shape[:-1]
    if activation and bias is not None:
        raise ValueError("bias_R is given, which an activation does not go with")
    if (activation or residual is not None) and dtype != x.dtype:
        raise ValueError(f"dtype is {dtype}: with an activation or a residual it is {x.dtype}")
    for name, given, shape, wanted in (
        ("scale_R", scale, outputs, jnp.float32),
        ("bias_R", bias, outputs, None),
        ("residual_R", residual, outputs[-1:], x.dtype),
        ("norm.weight", None if norm is None else norm.weight, x.shape, None),
    ):
        if given is None:
            continue
        if given.shape != shape or wanted not in (None, given.dtype):
            raise ValueError(
                f"{name} is {given.dtype} {given.shape}, not {jnp.dtype(wanted or given.dtype)}"
                f" {shape}"
            )


def _launch(x, w, scale, norm, bias, activation, residual, dtype) -> jax.Array:
    from storm_kernels.matvec.gluon_matvec import matvec_kernel

    R, C = w.shape[-2:]
    cut = _cut(R, C * w.dtype.itemsize // 4, bool(activation))
    weight = None if norm is None else norm.weight

    @not_differentiable("storm_kernels.matvec", "jax.numpy's products")
    def run(*operands):
        return launch(
            matvec_kernel,
            (-(-R // (cut.rows * cut.blocks)),),
            cut.warps,
            None,
            operands,
            (jax.ShapeDtypeStruct((R,), dtype),),
            dict(
                HAS_SCALE=scale is not None, HAS_NORM=norm is not None, HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None, EPS=0.0 if norm is None else norm.eps,
                PLUS_ONE=norm is not None and norm.plus_one, ACTIVATION=activation, R=R, C=C,
                ROWS=cut.rows, BLOCKS=cut.blocks,
            ),
        )[0]  # fmt: skip

    return run(x, w, *(x if given is None else given for given in (scale, weight, bias, residual)))
