"""Token reduction between temporal encoder and decoder (paper section 3.3, eq. 6-8).

Which frames are averaged together and which are dropped is decided on the host, by
`config.ReductionConfig.frame_groups`; here it is carried out.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from storm_jax.config import VISUAL
from storm_jax.parallel import sharding
from storm_jax.parallel.sharding import reshape


def reduce_tokens(
    x_BFND: jax.Array, frame_groups_BF: jax.Array, groups: int, spatial_pool: int
) -> jax.Array:
    """Means over groups of frames and over windows of tokens.

    Args:
      x_BFND: tokens of every frame, N a square number, row by row.
      frame_groups_BF: int32, the group that a frame is averaged into; -1: none (dropped by temporal
        sampling, or padding). A group averages the frames that it has; a group with none is zero.
      groups: number of groups T of a row.
      spatial_pool: side of the window.

    Returns:
      [B, T * N / spatial_pool^2, D] in the dtype of x; sums are float32.
    """
    x_BFND = sharding.shard(_pool_cells(x_BFND, spatial_pool), "batch", None, None, None)
    B, _, N, D = x_BFND.shape
    mean = _means(x_BFND, frame_groups_BF, frame_groups_BF, jnp.arange(groups)[None])
    return reshape(mean.astype(x_BFND.dtype), B, groups * N, D)


def group_sums(
    x_BFND: jax.Array, frame_groups_BF: jax.Array, groups: int, spatial_pool: int
) -> jax.Array:
    """The sums whose means `reduce_tokens` returns, for groups whose frames come bit by bit.

    Args: as `reduce_tokens`.

    Returns:
      float32 [B, T, N / spatial_pool^2, D].
    """
    x_BFND = sharding.shard(_pool_cells(x_BFND, spatial_pool), "batch", None, None, None)
    return _sums(x_BFND, frame_groups_BF, jnp.arange(groups)[None])


def reduce_into(
    text_BSD: jax.Array,
    x_BFND: jax.Array,
    frame_groups_BF: jax.Array,
    tokens_BS: jax.Array,
    spatial_pool: int,
) -> jax.Array:
    """`reduce_tokens` put where the tokens are `VISUAL`, for frames and sequences that are split.

    Which device's frames a position needs depends on the data. So each stretch of the sequence
    travels around the devices, which add what their frames contribute to it: at no time does a
    device hold more than a stretch, and a group whose frames lie on several devices adds up by
    itself.

    Args:
      text_BSD: token embeddings, split over devices along S.
      x_BFND: tokens of every frame, split over the same devices along F.
      frame_groups_BF: as in `reduce_tokens`.
      tokens_BS: int32; the i-th VISUAL position of a row takes the row's i-th reduced token.
      spatial_pool: as in `reduce_tokens`.

    Returns:
      [B, S, D] in the dtype of text, split as it is.
    """
    x_BFND = _pool_cells(x_BFND, spatial_pool)
    axis_name = sharding.split_axis("length", text_BSD.shape[1])
    assert axis_name == sharding.split_axis("frames", x_BFND.shape[1]), "frames must be padded"
    length, whole = ("batch", "length", None), ("batch", None)
    frames = ("batch", "frames", None, None)
    local = partial(_reduce_into_stretch, axis_name)
    call = sharding.per_device(local, (length, frames, whole, whole), length)
    return call(text_BSD, x_BFND, frame_groups_BF, tokens_BS)


def _reduce_into_stretch(axis_name, text_BSD, x_BFND, all_groups_BF, all_tokens_BS):
    devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    (B, S, D), (F, N) = text_BSD.shape, x_BFND.shape[1:3]
    groups_BF = lax.dynamic_slice_in_dim(all_groups_BF, me * F, F, axis=1)
    visual_BS = all_tokens_BS == VISUAL
    index_BS = jnp.maximum(jnp.cumsum(visual_BS, axis=1) - 1, 0)
    # Of consecutive tokens the first may be the last of its group.
    window = (N + S - 2) // N + 1

    def contribution(stretch):
        index = lax.dynamic_slice_in_dim(index_BS, stretch * S, S, axis=1)
        first = index[:, :1] // N
        wanted = first + jnp.arange(window)
        mean = _means(x_BFND, groups_BF, all_groups_BF, wanted).reshape(B, window * N, D)
        return jnp.take_along_axis(mean, (index - first * N)[:, :, None], axis=1, mode="clip")

    # Stretch j sets out from device j + 1 and comes home to device j.
    total = contribution((me - 1) % devices)
    around = [(i, (i + 1) % devices) for i in range(devices)]

    def step(total, hop):
        total = lax.ppermute(total, axis_name, around)
        return total + contribution((me - 1 - hop) % devices), None

    total, _ = lax.scan(step, total, jnp.arange(1, devices))
    here = lax.dynamic_slice_in_dim(visual_BS, me * S, S, axis=1)
    return jnp.where(here[:, :, None], total.astype(text_BSD.dtype), text_BSD)


def _pool_cells(x_BFND: jax.Array, spatial_pool: int) -> jax.Array:
    """Means over windows of tokens, sums in float32."""
    if spatial_pool == 1:
        return x_BFND
    B, F, N, D = x_BFND.shape
    side = math.isqrt(N)
    cells = side // spatial_pool
    x = reshape(x_BFND, B, F, cells, spatial_pool, cells, spatial_pool, D)
    x = jnp.mean(x, axis=(3, 5), dtype=jnp.float32).astype(x_BFND.dtype)
    return reshape(x, B, F, cells * cells, D)


def _means(x_BFND, groups_BF, all_groups_BF, wanted_BT) -> jax.Array:
    """What these frames contribute to the means of the wanted groups, float32 [B, T, N, D].

    Args:
      groups_BF: of these frames.
      all_groups_BF: of the whole row: a mean is over all frames of a group.
      wanted_BT: int32, [1, T] where it is the same in all rows.
    """
    total = _sums(x_BFND, groups_BF, wanted_BT)
    count = jnp.sum(all_groups_BF[:, None] == wanted_BT[:, :, None], axis=-1)
    return total / jnp.maximum(count, 1)[:, :, None, None]


def _sums(x_BFND, groups_BF, wanted_BT) -> jax.Array:
    # A product with zeros and ones is exact in any dtype.
    members = groups_BF[:, None] == wanted_BT[:, :, None]
    return jnp.einsum(
        "BTF,BFND->BTND",
        members.astype(x_BFND.dtype),
        x_BFND,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
