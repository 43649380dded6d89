"""Attention without a mask for heads of 72 channels on Hopper GPUs: a Gluon kernel, forward only.

SigLIP-So400m has such heads. cuDNN computes 128 channels for them; this kernel computes 80, as 64
and 16. `docs/kernels.md` describes and measures it.

Axis letters: B batch, N tokens, H heads, C head dim.
"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp

from storm_kernels.selective_scan.platforms import platform_of
from storm_kernels.triton_launch import launch

CHANNELS = 72
_QUERIES, _WARPS, _REGISTERS = 128, 8, 128  # of a program
_KEYS, _STAGES = 64, 3  # of a tile, tiles in shared memory


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
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed (pip install 'storm_jax[cuda]', Python 3.12 or newer)"
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return "this process has no GPU"
    capability = device.compute_capability
    return None if capability == "9.0" else f"it is for compute capability 9.0, not {capability}"


def attention(q_BNHC: jax.Array, k_BNHC: jax.Array, v_BNHC: jax.Array, *, scale: float):
    """softmax(scale * q k^T) v within a row, every query seeing every key.

    Scores, softmax and sums are float32; weights are rounded to bfloat16 for their product with
    the values, as in cuDNN.

    Args:
      q_BNHC, k_BNHC, v_BNHC: bfloat16 [B, N, H, 72], contiguous, of one shape.
      scale: positive and finite.

    Returns:
      bfloat16 [B, N, H, 72]. It has no derivative.

    Raises:
      ValueError: the operands' shapes or dtypes differ, or the kernel does not serve them.
      NotImplementedError: on differentiating.
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(scale: float, q, k, v):
    from storm_kernels.attention.gluon_attention import attention_forward

    B, N, H, C = q.shape
    (out,) = launch(
        attention_forward,
        (-(-N // _QUERIES), H, B),
        _WARPS,
        _REGISTERS,
        (q, k, v),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        dict(
            SCALE=scale * math.log2(math.e), N=N, H=H, C=C, QUERIES=_QUERIES, KEYS=_KEYS,
            STAGES=_STAGES,
        ),
    )  # fmt: skip
    return out


@_attention.defjvp
def _refuse(scale, primals, tangents):
    raise NotImplementedError(
        "this attention kernel computes no gradient: take jax.nn.dot_product_attention for it"
    )
