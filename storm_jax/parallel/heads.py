"""Attention's layout: every device has whole sequences, for its share of the heads.

A sequence that is split over devices comes in and goes out by all-to-all: a device trades its
stretch of all heads for all stretches of its heads. The attention of one device stays what it is
without a mesh, and causal work is the same on all devices.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from storm_jax.parallel import sharding

# Within the heads of a tensor device, those of its seq devices.
HEAD_AXES = ("tensor", "seq")


def by_heads(
    attend: Callable[..., jax.Array],
    q_BSHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *rows: jax.Array,
) -> jax.Array:
    """`attend(q, k, v, *rows)` on each device's rows and heads.

    Heads are split over the mesh axes of `HEAD_AXES` that do not split rows. Where these have more
    devices than there are key-value heads, key-value heads are repeated; where they do not divide
    the query heads, each group of queries that shares a key gets further ones of zeros.

    Args:
      attend: attention with H' query heads and K' key-value heads, H' / K' queries a key.
      q_BSHC, k_BTKC, v_BTKC: K divides H. S and T may be split, and H and K over "tensor".
      rows: arrays [B, ...] that every device needs for its rows: positions, segments, masks.

    Returns:
      [B, S, H, C], laid out as q.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return attend(q_BSHC, k_BTKC, v_BTKC, *rows)
    B, S, H, C = q_BSHC.shape
    K = k_BTKC.shape[2]
    batch, length, heads, _ = sharding.partition(q_BSHC)
    axes = tuple(a for a in HEAD_AXES if mesh.shape[a] > 1 and a not in batch)
    devices = math.prod(mesh.shape[a] for a in axes)

    # Keys as often as the split of the heads that q comes with needs, then as all devices need.
    first = _repeats(K, math.prod(mesh.shape[a] for a in heads))
    K1 = K * first
    second = _repeats(K1, devices)
    group, padded = H // K1, _multiple(H // K1, second)
    k_BTKC, v_BTKC = (_repeated(_repeated(x, first), second) for x in (k_BTKC, v_BTKC))
    if padded > group:
        q = sharding.reshape(q_BSHC, B, S, K1, group, C)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padded - group), (0, 0)))
        q_BSHC = sharding.reshape(q, B, S, K1 * padded, C)

    # In two steps, as the layouts differ in two ways: heads that are repeated are still whole.
    made = PartitionSpec(batch or None, length or None, heads or None, None)
    q_BSHC, k_BTKC, v_BTKC = (jax.reshard(x, made) for x in (q_BSHC, k_BTKC, v_BTKC))
    by_head = PartitionSpec(batch or None, None, axes or None, None)
    by_row = [PartitionSpec(batch or None, *[None] * (x.ndim - 1)) for x in rows]
    specs = (by_head, by_head, by_head, *by_row)
    args = [jax.reshard(x, s) for x, s in zip((q_BSHC, k_BTKC, v_BTKC, *rows), specs, strict=True)]
    # Unchecked: JAX's TPU kernel does not say over which axes its result varies.
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    out = attend(*args)
    out = jax.reshard(out, made)

    if padded > group:
        out = sharding.reshape(out, B, S, K1, padded, C)[:, :, :, :group]
        out = sharding.reshape(out, B, S, H, C)
    return out


def padded_heads(heads: int, kv_heads: int, tensor: int, seq: int) -> int:
    """Query heads that are computed where `tensor` divides `heads`, zeros included."""
    kv_heads *= _repeats(kv_heads, tensor)
    return kv_heads * _multiple(heads // kv_heads, _repeats(kv_heads, tensor * seq))


def _multiple(size: int, of: int) -> int:
    return math.ceil(size / of) * of


def _repeats(kv_heads: int, devices: int) -> int:
    """How often a key-value head is repeated so that `devices` divides their number."""
    return devices // math.gcd(devices, kv_heads)


def _repeated(x_BTKC: jax.Array, times: int) -> jax.Array:
    """[B, T, K, C] -> [B, T, K * times, C], the copies of a head side by side."""
    if times == 1:
        return x_BTKC
    B, T, K, C = x_BTKC.shape
    return sharding.reshape(jnp.stack([x_BTKC] * times, axis=3), B, T, K * times, C)
