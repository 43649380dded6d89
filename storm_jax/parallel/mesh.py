"""The device mesh of a run."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils

from storm_jax.config import ConfigError, MeshConfig

# From the axis that talks least to the one that talks most, since neighbours in the mesh are
# neighbours in the network: data sums gradients once a step, fsdp gathers each layer's parameters
# ahead of their use, seq exchanges activations in every layer, and tensor sums them twice a layer
# while nothing else can run.
AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `device_grid` over `devices` (default: all).

    Axes are of the Explicit kind: a layout that does not fit is an error when the step is traced.

    Raises:
      ConfigError: as `device_grid`.
    """
    grid = device_grid(config, jax.devices() if devices is None else devices)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def device_grid(config: MeshConfig, devices: list[jax.Device]) -> np.ndarray:
    """The devices by their places along `AXES`.

    On TPUs their order follows the torus. With `config.slices` the data axis goes over the slices
    first, so that only its sums cross the slower network between them. Where devices know no slices
    (CPUs) or every host is one (GPUs), a slice is a run of devices with consecutive ids.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or the slices are not those
        that the devices form.
    """
    sizes = _sizes(config, devices)
    slices = _slices(config, sizes, devices)
    if devices[0].platform == "tpu" and slices > 1:
        inside = [sizes[0] // slices, *sizes[1:]]
        return mesh_utils.create_hybrid_device_mesh(
            inside, [slices, 1, 1, 1], devices, allow_split_physical_axes=True
        )
    # An axis of 128 on a 16 x 16 torus is half of one side times the other: a split axis. Off TPUs
    # devices stay in the order of their ids, so that the outermost axis is over slices first.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _sizes(config: MeshConfig, devices: list[jax.Device]) -> list[int]:
    sizes = [getattr(config, axis) for axis in AXES]
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"mesh {asked}: sizes are positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {asked} needs {known}{' x n' if -1 in sizes else ''} devices, but there are"
            f" {len(devices)} ({devices[0].platform}); set config.mesh so that the product is"
            f" {len(devices)}"
        )
    return sizes


def _slices(config: MeshConfig, sizes: list[int], devices: list[jax.Device]) -> int:
    slices, data = config.slices, sizes[0]
    if slices < 1 or data % slices:
        raise ConfigError(
            f"mesh.slices={slices} does not divide mesh.data={data}, which is split over slices"
            " first; set mesh.data to a multiple of it"
        )
    if devices[0].platform == "tpu":
        found = len({getattr(d, "slice_index", 0) for d in devices})
        if found != slices:
            raise ConfigError(
                f"mesh.slices={slices}, but the {len(devices)} devices are of {found} slice(s);"
                f" set mesh.slices={found}"
            )
    return slices
