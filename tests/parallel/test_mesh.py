"""Meshes from their configuration."""

import jax
import numpy as np
import pytest

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.parallel.mesh import AXES, make_mesh


@pytest.mark.parametrize(
    "config,shape",
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=-1, fsdp=2, tensor=4), (1, 2, 4)),
        (MeshConfig(data=1, fsdp=1, tensor=8), (1, 1, 8)),
    ],
)
def test_axes_and_sizes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ("data", "fsdp", "seq", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_only_the_given_devices_are_used():
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=1), devices)
    assert mesh.devices.shape == (2, 2, 1)
    assert set(mesh.devices.flat) == set(devices)
    assert np.size(make_mesh(MeshConfig(), jax.devices()[:1]).devices) == 1


@pytest.mark.parametrize(
    "config,message",
    [
        # Too few devices: what was asked, how many it needs, how many there are.
        (
            MeshConfig(4, 4, 1),
            r"data=4 x fsdp=4 x tensor=1 needs 16 devices, but there are 8 \(cpu",
        ),
        (MeshConfig(2, 1, 1), r"needs 2 devices, but there are 8"),
        (MeshConfig(-1, 3, 1), r"data=-1 x fsdp=3 x tensor=1 needs 3 x n devices, .* are 8"),
        (MeshConfig(-1, 16, 1), r"needs 16 x n devices, .* are 8"),
        (MeshConfig(-1, -1, 1), "at most one may be -1"),
        (MeshConfig(8, 0, 1), "fsdp=0.*sizes are positive"),
        (MeshConfig(8, -2, 1), "fsdp=-2.*sizes are positive"),
    ],
)
def test_a_mesh_that_cannot_be_is_explained(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)
