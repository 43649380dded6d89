"""Attention of one token to its key-value cache on NVIDIA GPUs (flash-decoding), in Gluon kernels.

`docs/kernels.md` describes and measures it.

Axis letters: T slots, K key-value heads, G query heads of each, C head dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_kernels.once import not_differentiable
from storm_kernels.platforms import platform_of
from storm_kernels.triton_launch import device_unsupported, launch

CHANNELS = (64, 128, 256)
_MOST_HEADS = 16  # query heads of a key-value head: rows of a tensor core's product
_STEP = 16  # slots that a program's stretch is a multiple of
_PROGRAMS = 264  # two for each multiprocessor of an H100


class _Cut(NamedTuple):
    """Of the slots into programs and tiles."""

    programs: int  # of all heads together, about
    tile: int  # slots that a program takes at a time
    stages: int  # tiles in shared memory
    warps: int


def _cut(channels: int) -> _Cut:
    """Two programs fit a multiprocessor of compute capability 9.0, and one any from 8.0 on."""
    return _Cut(_PROGRAMS, 32 if channels == 256 else 64, 3, 4)


def unsupported(q_KGC: jax.Array, k_TKC: jax.Array) -> str | None:
    """Why the kernel does not serve such queries and keys here, or None if it does."""
    reason = _operands_unsupported(q_KGC, k_TKC)
    if reason is None and platform_of(q_KGC) != "gpu":
        reason = "it needs an NVIDIA GPU"
    return reason or _device_unsupported()


def _operands_unsupported(q_KGC: jax.Array, k_TKC: jax.Array) -> str | None:
    K, G, C = q_KGC.shape
    if q_KGC.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q_KGC.dtype}"
    if k_TKC.dtype != q_KGC.dtype:
        return f"it takes keys and values in the dtype of the queries, not {k_TKC.dtype}"
    if C not in CHANNELS:
        return f"it takes heads of {', '.join(map(str, CHANNELS))} channels, not {C}"
    if not 0 < G <= _MOST_HEADS:
        return f"it takes up to {_MOST_HEADS} query heads of a key-value head, not {G}"
    # Offsets are of 32 bits.
    if not k_TKC.size or k_TKC.size >= 2**31:
        return f"keys of the shape {k_TKC.shape}"
    return None


def _device_unsupported() -> str | None:
    return device_unsupported(lambda capability: capability >= 8.0, "8.0 and later")


def token_attention(
    q_KGC: jax.Array,
    k_TKC: jax.Array,
    v_TKC: jax.Array,
    valid: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(scale * q k^T) v over the first `valid` slots; those behind them are not read.

    Scores, softmax and sums are float32; weights are rounded to the dtype of v for their product.

    Args:
      q_KGC: bfloat16 or float16 [K, G, C], C 64, 128 or 256, G up to 16.
      k_TKC, v_TKC: [T, K, C] in the dtype of q.
      valid: int32, a scalar or [1]; from 1 to T.
      softcap: scores become softcap * tanh(score / softcap); 0: they are left alone.

    Returns:
      [K, G, C] in the dtype of q. It is not differentiable.

    Raises:
      ValueError: the kernel does not serve the operands, or shapes or dtypes do not match.
      NotImplementedError: on differentiating.
    """
    _check(q_KGC, k_TKC, v_TKC, valid, scale, softcap)
    reason = unsupported(q_KGC, k_TKC)
    if reason is not None:
        raise ValueError(
            f"this kernel does not serve this attention: {reason}."
            " jax.nn.dot_product_attention serves every call"
        )
    return _launch(q_KGC, k_TKC, v_TKC, valid.reshape(1), float(scale), float(softcap))


def _check(q, k, v, valid, scale, softcap) -> None:
    if q.ndim != 3 or k.ndim != 3 or (q.shape[0], q.shape[2]) != k.shape[1:]:
        raise ValueError(f"q_KGC is {q.shape} and k_TKC {k.shape}: K and C must be the same")
    if (v.shape, v.dtype) != (k.shape, k.dtype):
        raise ValueError(
            f"v_TKC is {v.dtype} {v.shape} and k_TKC {k.dtype} {k.shape}: they must be alike"
        )
    if valid.size != 1 or valid.dtype != jnp.int32:
        raise ValueError(f"valid is {valid.dtype} {valid.shape}, not one int32")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, not finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, neither 0 nor positive and finite")


def _launch(q, k, v, valid, scale: float, softcap: float) -> jax.Array:
    from storm_kernels.token_attention import gluon_token_attention as kernels

    K, G, C = q.shape
    T = k.shape[0]
    cut = _cut(C)
    splits = max(min(cut.programs // K, -(-T // cut.tile)), 1)

    @not_differentiable("storm_kernels.token_attention", "jax.nn.dot_product_attention")
    def run(q, k, v, valid):
        found = jax.ShapeDtypeStruct((K, G, splits), jnp.float32)
        parts = launch(
            kernels.token_attention_parts,
            (K, splits),
            cut.warps,
            None,
            (q, k, v, valid),
            (jax.ShapeDtypeStruct((K, G, splits, C), jnp.float32), found, found),
            dict(
                SCALE=scale, SOFTCAP=softcap, T=T, K=K, G=G, C=C, SPLITS=splits, STEP=_STEP,
                TILE=cut.tile, STAGES=cut.stages,
            ),
        )  # fmt: skip
        return launch(
            kernels.token_attention_whole,
            (K * G, C // 32),
            4,
            None,
            parts,
            (jax.ShapeDtypeStruct((K, G, C), q.dtype),),
            dict(SPLITS=splits, C=C, CHANNELS=32, TILE=64),
        )[0]

    return run(q, k, v, valid)
