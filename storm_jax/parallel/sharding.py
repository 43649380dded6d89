"""The one table from logical axes, which models name, to mesh axes.

Model code calls `shard(x, "batch", None, "heads", None)` and never names a mesh axis. Without a
mesh (`jax.set_mesh`) every function here leaves its argument alone, so models also run on one
device with no ceremony.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Logical axis -> mesh axes. Parameters are sharded along "embed" by fsdp and are made whole where
# they are used; None stays on every device.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "inner": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
}

Axes = tuple[str | None, ...]


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in force, or None: no mesh is set, or the code runs inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def spec(axes: Axes, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """Partition of an array of `shape` with logical `axes` on `mesh`.

    An axis that the mesh does not divide (one key-value head on two devices) stays whole.
    """
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = RULES[axis] if axis else ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        entries.append(names if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*entries)


def named(axes: Axes, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`spec` with its mesh, for placing arrays and for `jit`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays `x` out by its logical axes, one a dimension."""
    mesh = active_mesh()
    return x if mesh is None else jax.reshard(x, spec(axes, x.shape, mesh))


def gathered(weight: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as it is used: whole along "embed", still split along the tensor axis."""
    return shard(weight, *(None if axis == "embed" else axis for axis in axes))


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """`x.reshape(shape)` where at most the leading axis is split; it stays so."""
    if active_mesh() is None:
        return x.reshape(shape)
    lead, *rest = jax.typeof(x).sharding.spec
    assert not any(rest), (x.shape, rest)
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(lead, *[None] * (len(shape) - 1)))


def per_device(f, in_axes: tuple[Axes, ...], out_axes: Axes):
    """`f` on each device's part of its arguments, through `jax.shard_map`.

    Args:
      f: a function of arrays with one array as result; it sees local shapes.
      in_axes, out_axes: logical axes of the arguments and of the result, whose sharded axes have
        the sizes of the arguments' axes of the same name.
    """

    def call(*args):
        mesh = active_mesh()
        if mesh is None:
            return f(*args)
        in_specs = tuple(spec(axes, x.shape, mesh) for axes, x in zip(in_axes, args, strict=True))
        split = {}
        for axes, partition in zip(in_axes, in_specs, strict=True):
            split.update({a: p for a, p in zip(axes, partition, strict=True) if a})
        out_spec = PartitionSpec(*(split.get(axis) if axis else None for axis in out_axes))
        args = [jax.reshard(x, s) for x, s in zip(args, in_specs, strict=True)]
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_spec)(*args)

    return call
