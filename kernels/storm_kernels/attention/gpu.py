"""Attention without a mask for heads of 72 channels on Hopper GPUs, in Gluon kernels.

SigLIP-So400m has such heads. cuDNN computes 128 channels for them; these kernels compute 80, as 64
and 16. `docs/kernels.md` describes and measures it.

Axis letters: B batch, N tokens, H heads, C head dim.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_kernels.once import not_differentiable
from storm_kernels.platforms import platform_of
from storm_kernels.triton_launch import device_unsupported, launch

CHANNELS = 72
_STAGES = 3  # tiles in shared memory
_LOG2_E = math.log2(math.e)


class _Cut(NamedTuple):
    """Of a kernel's work into programs and tiles; chosen by measurement, see `docs/kernels.md`."""

    rows: int  # that a program holds
    tile: int  # rows that it goes over at a time
    warps: int
    registers: int  # of a thread, at most


_FORWARD = _Cut(rows=128, tile=64, warps=8, registers=128)
_KEYS = _Cut(rows=64, tile=64, warps=4, registers=255)
_QUERIES = _Cut(rows=128, tile=32, warps=8, registers=128)


def unsupported(q_BNHC: jax.Array) -> str | None:
    """Why the kernel does not serve such queries here, or None if it does."""
    reason = _shape_unsupported(q_BNHC)
    if reason is None and platform_of(q_BNHC) != "gpu":
        reason = "it needs an NVIDIA GPU"
    return reason or _device_unsupported()


def _shape_unsupported(q_BNHC: jax.Array) -> str | None:
    B, N, H, C = q_BNHC.shape
    if C != CHANNELS:
        return f"its heads have {CHANNELS} channels, not {C}"
    if q_BNHC.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {q_BNHC.dtype}"
    # CUDA's limits of a grid; offsets within a row of the batch are of 32 bits.
    if B > 65535 or H > 65535 or N * H * C >= 2**31 or not B * N * H:
        return f"queries of the shape {q_BNHC.shape}"
    return None


def _device_unsupported() -> str | None:
    return device_unsupported(lambda capability: capability == 9.0, "9.0")


def attention(q_BNHC: jax.Array, k_BNHC: jax.Array, v_BNHC: jax.Array, *, scale: float):
    """softmax(scale * q k^T) v within a row, every query seeing every key.

    Scores, softmax and sums are float32; weights, and in the backward pass the gradients of the
    scores, are rounded to bfloat16 for their products, as in cuDNN. Gradients are the same bits
    from run to run. Kept for the backward pass: the operands, the result and a float32 a query and
    head.

    Args:
      q_BNHC, k_BNHC, v_BNHC: bfloat16 [B, N, H, 72], contiguous, of one shape.
      scale: positive and finite.

    Returns:
      bfloat16 [B, N, H, 72]. It is differentiable once, in reverse mode.

    Raises:
      ValueError: the operands' shapes or dtypes differ, or the kernel does not serve them.
      NotImplementedError: on differentiating twice.
    """
    for name, x in (("k", k_BNHC), ("v", v_BNHC)):
        if (x.shape, x.dtype) != (q_BNHC.shape, q_BNHC.dtype):
            raise ValueError(
                f"{name} is {x.dtype} {x.shape} and q {q_BNHC.dtype} {q_BNHC.shape}: queries, keys"
                " and values must be of one shape and dtype"
            )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, not positive and finite")
    reason = unsupported(q_BNHC)
    if reason is not None:
        raise ValueError(
            f"this attention kernel does not serve this call: {reason}."
            " jax.nn.dot_product_attention serves every call"
        )
    return _attention(float(scale), q_BNHC, k_BNHC, v_BNHC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale: float, q, k, v):
    return _launch_forward(scale, q, k, v)[0]


def _attention_forward(scale: float, q, k, v):
    # Where a loop keeps the result, XLA would run the kernel once more to write it there.
    out, lse_BHN = jax.lax.optimization_barrier(_launch_forward(scale, q, k, v))
    return out, (q, k, v, out, lse_BHN)


def _attention_backward(scale: float, kept, dy):
    q, k, v, out, lse_BHN = kept
    products = jnp.sum(out.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    q_pads = _in_three(jnp.swapaxes(lse_BHN, 1, 2) * (-1 / (scale * _LOG2_E)))
    return _launch_backward(scale, q, k, v, dy.astype(q.dtype), q_pads, _in_three(-products))


_attention.defvjp(_attention_forward, _attention_backward)


def _in_three(x_BNH: jax.Array) -> jax.Array:
    """bfloat16 [B, N, H, 8] whose first three add up to the float32 argument; the rest is zero."""
    parts = []
    for _ in range(3):
        # Not `astype` there and back, which XLA may leave out.
        part = jax.lax.reduce_precision(x_BNH, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x_BNH = x_BNH - part
    return jnp.stack([*parts, *[jnp.zeros_like(parts[0])] * 5], axis=-1)


def _launch_forward(scale: float, q, k, v):
    from storm_kernels.attention.gluon_attention import attention_forward

    B, N, H, C = q.shape
    cut = _FORWARD

    @not_differentiable("storm_kernels.attention", "jax.nn.dot_product_attention")
    def run(q, k, v):
        return launch(
            attention_forward,
            (-(-N // cut.rows), H, B),
            cut.warps,
            cut.registers,
            (q, k, v),
            (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, N), jnp.float32)),
            dict(
                SCALE=scale * _LOG2_E, N=N, H=H, C=C, QUERIES=cut.rows, KEYS=cut.tile,
                STAGES=_STAGES,
            ),
        )  # fmt: skip

    return run(q, k, v)


def _launch_backward(scale: float, q, k, v, dy, q_pads, dy_pads):
    from storm_kernels.attention import gluon_gradients as kernels

    B, N, H, C = q.shape
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)

    @not_differentiable("storm_kernels.attention", "jax.nn.dot_product_attention")
    def run(*operands):
        def start(kernel, cut, results):
            return launch(
                kernel,
                (-(-N // cut.rows), H, B),
                cut.warps,
                cut.registers,
                operands,
                (like,) * results,
                dict(
                    SCALE=scale * _LOG2_E, N=N, H=H, C=C, ROWS=cut.rows, TILE=cut.tile,
                    STAGES=_STAGES,
                ),
            )  # fmt: skip

        dk, dv = start(kernels.attention_backward_keys, _KEYS, 2)
        (dq,) = start(kernels.attention_backward_queries, _QUERIES, 1)
        return dq, dk, dv

    return run(q, k, v, dy, q_pads, dy_pads)
