"""The one table from logical axes, which models name, to mesh axes.

Model code calls `shard(x, "batch", None, "heads", None)` and never names a mesh axis. Without a
mesh (`jax.set_mesh`) every function here leaves its argument alone, so models also run on one
device with no ceremony.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Logical axis -> mesh axes; None stays on every device.
RULES: dict[str, tuple[str, ...]] = {
    # Activations. "length" is that of any sequence: temporal tokens, or text and visual tokens.
    "batch": ("data", "fsdp"),
    "frames": ("seq",),
    "length": ("seq",),
    # Parameters, and the activations that they make.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "inner": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    # Parameters alone: stored split, made whole where they are used.
    "embed": ("fsdp", "seq"),
    "vit_heads": ("tensor",),
    "vit_mlp": ("tensor",),
}
STORED = ("embed", "vit_heads", "vit_mlp")

Axes = tuple[str | None, ...]


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in force, or None: no mesh is set, or the code runs inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def spec(axes: Axes, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """Partition of an array of `shape` with logical `axes` on `mesh`.

    An axis that the mesh does not divide (one key-value head on two devices) stays whole;
    `parallel.checks` says which of those a training run does not accept. Mesh axes of one device
    are left out, so that one layout has one spec.
    """
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in (RULES[axis] if axis else ()) if mesh.shape[name] > 1)
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append(names if fits else None)
    return PartitionSpec(*entries)


def named(axes: Axes, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`spec` with its mesh, for placing arrays and for `jit`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def of_batch(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where the array `name` of a packed batch (`data.packing`) lies.

    Rows are split, and the pixels of a row; numbers of frames and tokens are small.
    """
    second = "frames" if name == "frames" else None
    return named(("batch", second, *[None] * (len(shape) - 2)), shape, mesh)


def partition(x: jax.Array) -> tuple[tuple[str, ...], ...]:
    """The mesh axes over which each axis of x is split, () for one that is whole."""
    entries = jax.typeof(x).sharding.spec
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


def parts(axis: str) -> int:
    """The number of devices along a logical axis, 1 without a mesh."""
    mesh = active_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES[axis])


def split_axis(axis: str, size: int) -> str | None:
    """The mesh axis over which a logical axis of `size` is split; None: it is whole.

    For code inside `per_device` that talks to other devices.
    """
    (name,) = RULES[axis]
    count = parts(axis)
    return name if count > 1 and size % count == 0 else None


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays `x` out by its logical axes, one a dimension."""
    mesh = active_mesh()
    return x if mesh is None else jax.reshard(x, spec(axes, x.shape, mesh))


def gathered(weight: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as it is used: whole along the `STORED` axes, still split along the others."""
    return shard(weight, *(None if axis in STORED else axis for axis in axes))


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """`x.reshape(shape)`; a split axis stays split and may be merged with those behind it.

    It becomes the axis of the result that begins with it, which each device must hold in equal
    parts: [B, F, N, D] split over F becomes [B, F * N, D] split over the second axis.
    """
    if active_mesh() is None:
        return x.reshape(shape)
    mesh = jax.sharding.get_abstract_mesh()
    split = {
        math.prod(x.shape[:i]): names for i, names in enumerate(partition(x)) if names
    }  # by the number of blocks in front of the axis
    entries: list[tuple[str, ...] | None] = []
    for i, size in enumerate(shape):
        names = split.get(math.prod(shape[:i]), ())
        parts = math.prod(mesh.shape[name] for name in names)
        fits = names and size % parts == 0
        entries.append(names if fits else None)
        if fits:
            del split[math.prod(shape[:i])]
    assert not split, (x.shape, shape, split)
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(*entries))


def stretches(x: jax.Array) -> jax.Array:
    """[B, S, ...] as [B, n, S / n, ...], n the number of devices over which S is split.

    What is cut along the third axis stays on its device.
    """
    B, S = x.shape[:2]
    n = parts("length") if split_axis("length", S) else 1
    return reshape(x, B, n, S // n, *x.shape[2:])


def per_device(
    f, in_axes: tuple[Axes, ...], out_axes: Axes | tuple[Axes, ...], *, checked: bool = True
):
    """`f` on each device's part of its arguments, through `jax.shard_map`.

    Args:
      f: a function of arrays with one array, or a tuple of them, as result; it sees local shapes.
      in_axes, out_axes: logical axes of the arguments and of the result (a tuple of them for a
        tuple), whose sharded axes have the sizes of the arguments' axes of the same name.
      checked: JAX follows over which mesh axes values vary; not through a Pallas kernel that does
        not say it of its results.
    """

    def call(*args):
        mesh = active_mesh()
        if mesh is None:
            return f(*args)
        in_specs = tuple(spec(axes, x.shape, mesh) for axes, x in zip(in_axes, args, strict=True))
        split = {}
        for axes, partition in zip(in_axes, in_specs, strict=True):
            split.update({a: p for a, p in zip(axes, partition, strict=True) if a})

        def spec_of(axes):
            return PartitionSpec(*(split.get(axis) if axis else None for axis in axes))

        several = isinstance(out_axes[0], tuple)
        out_specs = tuple(map(spec_of, out_axes)) if several else spec_of(out_axes)
        args = [jax.reshard(x, s) for x, s in zip(args, in_specs, strict=True)]
        call = jax.shard_map(
            f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=checked
        )
        return call(*args)

    return call
