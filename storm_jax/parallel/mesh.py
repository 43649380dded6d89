"""The device mesh of a run."""

import math

import jax
import numpy as np

from storm_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp and tensor, in this order, over `devices` (default: all).

    Axes are of the Explicit kind: a layout that does not fit is an error when the step is traced.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
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
    return jax.make_mesh(
        tuple(sizes),
        AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES),
        devices=np.asarray(devices).tolist(),
    )
