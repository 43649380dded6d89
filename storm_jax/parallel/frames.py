"""Frames over all devices, for what treats every frame alone: the ViT and the projector."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from storm_jax.parallel import sharding


def spread(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Gives every device an equal share of the frames, whatever the mesh axes.

    Rows and frames stay split as "batch" and "frames" are, and each of these shares is cut further
    over the mesh axes that are left. A share that cannot be cut evenly is padded with zeros.

    Args:
      x: [B, F, ...], whole along all axes but the first two.

    Returns:
      The spread array [B, F', ...], and a function that brings an array [B, F', ...] of this layout
      back to [B, F, ...], split as "batch" and "frames" are.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return x, lambda y: y
    B, F = x.shape[:2]
    x = sharding.shard(x, "batch", "frames", *[None] * (x.ndim - 2))
    rows, frames = sharding.partition(x)[:2]
    others = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in rows + frames)
    shares = math.prod(mesh.shape[a] for a in frames)
    share = F // shares
    cut = math.prod(mesh.shape[a] for a in others)
    padded = math.ceil(share / cut) * cut

    def layout(y, *behind):
        return PartitionSpec(rows or None, *behind, *[None] * (y.ndim - 1 - len(behind)))

    x = sharding.reshape(x, B, shares, share, *x.shape[2:])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - share), *[(0, 0)] * (x.ndim - 3)))
    x = jax.reshard(x, layout(x, frames or None, others or None))
    merged = (B, shares * padded, *x.shape[3:])
    cut_over = PartitionSpec(rows or None, frames + others or None, *[None] * (x.ndim - 3))
    x = jax.lax.reshape(x, merged, out_sharding=cut_over)

    def collect(y: jax.Array) -> jax.Array:
        y = jax.reshard(y, layout(y, frames or None))
        y = sharding.reshape(y, B, shares, padded, *y.shape[2:])[:, :, :share]
        return sharding.reshape(y, B, F, *y.shape[3:])

    return x, collect


def batches(x: jax.Array, size: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Cuts each device's frames into equal batches; none changes its device.

    Args:
      x: [B, F, ...], whole along all axes but the first two.
      size: frames in a device's batch at most; 0: all of them.

    Returns:
      [batches, X, ...], X frames in an order of no meaning, padded with zeros and split over all
      devices that split B or F; and a function that brings [batches, X, ...] back to [B, F, ...].
    """
    mesh = sharding.active_mesh()
    rows, frames = ((), ()) if mesh is None else sharding.partition(x)[:2]
    B, F = x.shape[:2]
    if mesh is not None:
        B //= math.prod(mesh.shape[a] for a in rows)
        F //= math.prod(mesh.shape[a] for a in frames)
    count = math.ceil(B * F / size) if size else 1
    share = math.ceil(B * F / count)  # equal shares waste the fewest padding frames

    def cut(x):
        x = x.reshape(B * F, *x.shape[2:])
        x = jnp.pad(x, ((0, count * share - B * F), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(count, share, *x.shape[1:])

    def restore(y):
        return y.reshape(count * share, *y.shape[2:])[: B * F].reshape(B, F, *y.shape[2:])

    if mesh is None:
        return cut(x), restore
    by_frame = PartitionSpec(rows or None, frames or None)
    by_batch = PartitionSpec(None, rows + frames or None)
    cut = jax.shard_map(cut, mesh=mesh, in_specs=by_frame, out_specs=by_batch)
    return cut(x), jax.shard_map(restore, mesh=mesh, in_specs=by_batch, out_specs=by_frame)
