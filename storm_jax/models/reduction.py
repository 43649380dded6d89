"""Token reduction between temporal encoder and decoder (paper section 3.3, eq. 6-8).

Which frames are averaged together and which are dropped is decided on the host, by
`config.ReductionConfig.frame_groups`; here it is carried out.
"""

import math

import jax
import jax.numpy as jnp

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
    B, F, N, D = x_BFND.shape
    if spatial_pool > 1:
        side = math.isqrt(N)
        cells = side // spatial_pool
        x = reshape(x_BFND, B, F, cells, spatial_pool, cells, spatial_pool, D)
        x_BFND = jnp.mean(x, axis=(3, 5), dtype=jnp.float32).astype(x_BFND.dtype)
        N = cells * cells
        x_BFND = reshape(x_BFND, B, F, N, D)
    # A product with zeros and ones is exact in any dtype; it also adds groups across devices.
    members = frame_groups_BF[:, None] == jnp.arange(groups)[None, :, None]
    total = jnp.einsum(
        "BTF,BFND->BTND",
        members.astype(x_BFND.dtype),
        x_BFND,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
    count = jnp.maximum(members.sum(axis=-1), 1)
    mean = total / count[:, :, None, None]
    return reshape(mean.astype(x_BFND.dtype), B, groups * N, D)
