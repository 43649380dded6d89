"""Attention of one token to its key-value cache on NVIDIA GPUs (flash-decoding), in Gluon kernels.

They also turn the token's queries and key by its rotary angles and write it to the cache.
`docs/kernels.md` describes and measures it.

Axis letters: B one row, T slots, K key-value heads, G query heads of each, H those, a key and a
value, C head dim, A half of it.
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


def unsupported(qkv_BKHC: jax.Array, k_BTKC: jax.Array) -> str | None:
    """Why the kernel does not serve such a token and keys here, or None if it does."""
    reason = _operands_unsupported(qkv_BKHC, k_BTKC)
    if reason is None and platform_of(qkv_BKHC) != "gpu":
        reason = "it needs an NVIDIA GPU"
    return reason or _device_unsupported()


def _operands_unsupported(qkv: jax.Array, k: jax.Array) -> str | None:
    B, _, H, C = qkv.shape
    if B != 1:
        return f"it takes one row, not {B}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {qkv.dtype}"
    if k.dtype != qkv.dtype:
        return f"it takes a cache in the dtype of the token, not {k.dtype}"
    if C not in CHANNELS:
        return f"it takes heads of {', '.join(map(str, CHANNELS))} channels, not {C}"
    if not 0 < H - 2 <= _MOST_HEADS:
        return f"it takes up to {_MOST_HEADS} query heads of a key-value head, not {H - 2}"
    # Offsets are of 32 bits.
    if not k.size or k.size >= 2**31:
        return f"keys of the shape {k.shape}"
    return None


def _device_unsupported() -> str | None:
    return device_unsupported(lambda capability: capability >= 8.0, "8.0 and later")


def token_attention(
    qkv_BKHC: jax.Array,
    cos_BA: jax.Array,
    sin_BA: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    position_B: jax.Array,
    held_B: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes a row's token to its slot, position mod T, and attends to it and those before it.

    The result is softmax(scale * q k^T) v over the first min(held, T) slots without what the slot
    of the token held, and over the token; slots behind them are not read. Queries and the token's
    key are turned as `storm_jax.models.layers.rotate` does: in float32, rounded to their dtype.
    Scores, softmax and sums are float32; weights of slots are rounded for their product.

    Args:
      qkv_BKHC: bfloat16 or float16 [1, K, G + 2, C], C 64, 128 or 256, G up to 16: queries, the
        key and the value; queries and key are not turned yet.
      cos_BA, sin_BA: float32 [1, C / 2], of the token's angles.
      k_BTKC, v_BTKC: the cache, [1, T, K, C] in the dtype of the token, written in place where XLA
        may overwrite it. The axis of the row is theirs since XLA may copy what is reshaped.
      position_B: int32 [1], not negative.
      held_B: int32 [1]: the tokens before it, which are as many as its position; 0: none is read.
      softcap: scores become softcap * tanh(score / softcap); 0: they are left alone.

    Returns:
      [1, K, G, C] in the dtype of the token, and the cache. They are not differentiable.

    Raises:
      ValueError: the kernel does not serve the operands, or shapes or dtypes do not match.
      NotImplementedError: on differentiating.
    """
    _check(qkv_BKHC, cos_BA, sin_BA, k_BTKC, v_BTKC, position_B, held_B, scale, softcap)
    reason = unsupported(qkv_BKHC, k_BTKC)
    if reason is not None:
        raise ValueError(
            f"this kernel does not serve this attention: {reason}."
            " jax.nn.dot_product_attention serves every call"
        )
    operands = (qkv_BKHC, cos_BA, sin_BA, position_B, held_B, k_BTKC, v_BTKC)
    return _launch(operands, float(scale), float(softcap))


def _check(qkv, cos, sin, k, v, position, held, scale, softcap) -> None:
    if not qkv.ndim == k.ndim == 4 or (*qkv.shape[:2], qkv.shape[3]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"qkv_BKHC is {qkv.shape} and k_BTKC {k.shape}: B, K and C must be equal")
    if (v.shape, v.dtype) != (k.shape, k.dtype):
        raise ValueError(
            f"v_BTKC is {v.dtype} {v.shape} and k_BTKC {k.dtype} {k.shape}: they must be alike"
        )
    B, _, _, C = qkv.shape
    for name, x, shape, dtype in (
        ("cos_BA", cos, (B, C // 2), jnp.float32),
        ("sin_BA", sin, (B, C // 2), jnp.float32),
        ("position_B", position, (B,), jnp.int32),
        ("held_B", held, (B,), jnp.int32),
    ):
        if (x.shape, x.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {x.dtype} {x.shape}, not {jnp.dtype(dtype)} {shape}")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, not finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, neither 0 nor positive and finite")


def _launch(operands, scale: float, softcap: float):
    from storm_kernels.token_attention import gluon_token_attention as kernels

    qkv, *_, slots = operands
    (_, K, H, C), T = qkv.shape, slots.shape[1]
    G = H - 2
    cut = _cut(C)
    splits = max(min(cut.programs // K, -(-T // cut.tile)), 1)

    @not_differentiable("storm_kernels.token_attention", "jax.nn.dot_product_attention")
    def run(*operands):
        found = jax.ShapeDtypeStruct((K, G, splits), jnp.float32)
        cache = jax.ShapeDtypeStruct(slots.shape, slots.dtype)
        *parts, k, v = launch(
            kernels.token_attention_parts,
            (K, splits),
            cut.warps,
            None,
            operands,
            (jax.ShapeDtypeStruct((K, G, splits, C), jnp.float32), found, found, cache, cache),
            dict(
                SCALE=scale, SOFTCAP=softcap, T=T, K=K, G=G, C=C, SPLITS=splits, STEP=_STEP,
                TILE=cut.tile, STAGES=cut.stages,
            ),
            aliases={5: 3, 6: 4},
        )  # fmt: skip
        (out,) = launch(
            kernels.token_attention_whole,
            (K * G, C // 32),
            4,
            None,
            parts,
            (jax.ShapeDtypeStruct((1, K, G, C), qkv.dtype),),
            dict(SPLITS=splits, C=C, CHANNELS=32, TILE=64),
        )
        return out, k, v

    return run(*operands)
