"""Meshes from their configuration."""

import jax
import numpy as np
import pytest

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.parallel.mesh import AXES, device_grid, make_mesh


@pytest.mark.parametrize(
    "config,shape",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=1), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=2, tensor=4), (1, 2, 1, 4)),
        (MeshConfig(data=1, fsdp=1, tensor=8), (1, 1, 1, 8)),
        (MeshConfig(data=1, tensor=2, seq=-1), (1, 1, 4, 2)),
        (MeshConfig(data=4, fsdp=2, slices=2), (4, 2, 1, 1)),
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
    assert mesh.devices.shape == (2, 2, 1, 1)
    assert set(mesh.devices.flat) == set(devices)
    assert np.size(make_mesh(MeshConfig(), jax.devices()[:1]).devices) == 1


@pytest.mark.parametrize(
    "config,message",
    [
        # Too few devices: what was asked, how many it needs, how many there are.
        (
            MeshConfig(4, 4, 1),
            r"data=4 x fsdp=4 x seq=1 x tensor=1 needs 16 devices, but there are 8 \(cpu",
        ),
        (MeshConfig(2, 1, 1), r"needs 2 devices, but there are 8"),
        (
            MeshConfig(-1, 3, 1),
            r"data=-1 x fsdp=3 x seq=1 x tensor=1 needs 3 x n devices, .* are 8",
        ),
        (MeshConfig(-1, 16, 1), r"needs 16 x n devices, .* are 8"),
        (MeshConfig(-1, -1, 1), "at most one may be -1"),
        (MeshConfig(8, 0, 1), "fsdp=0.*sizes are positive"),
        (MeshConfig(8, -2, 1), "fsdp=-2.*sizes are positive"),
        (
            MeshConfig(data=2, fsdp=4, slices=4),
            "mesh.slices=4 does not divide mesh.data=2.*multiple",
        ),
        (MeshConfig(slices=0), "mesh.slices=0"),
    ],
)
def test_a_mesh_that_cannot_be_is_explained(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


class Chip:
    """As much of a TPU as the order of devices looks at: one of a 4 x 4 slice."""

    platform = "tpu"
    device_kind = "TPU v5e"
    core_on_chip = 0
    process_index = 0

    def __init__(self, slice_index: int, x: int, y: int):
        self.slice_index = slice_index
        self.coords = (x, y, 0)
        self.id = 16 * slice_index + 4 * y + x


POD = [Chip(index, x, y) for index in range(2) for y in range(4) for x in range(4)]


def test_only_the_data_axis_crosses_slices():
    chips = device_grid(MeshConfig(data=4, fsdp=2, seq=2, tensor=2, slices=2), POD)
    assert chips.shape == (4, 2, 2, 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(chips)
    assert [set(part.flat) for part in slices] == [{0}, {0}, {1}, {1}]
    assert sorted(chip.id for chip in chips.flat) == list(range(32))


def test_neighbours_on_the_innermost_axes_are_neighbours_on_the_torus():
    chips = device_grid(MeshConfig(data=2, fsdp=2, seq=2, tensor=4, slices=2), POD)
    for row in chips.reshape(-1, 4):  # tensor: one line of the torus
        assert {chip.coords[0] for chip in row} == {row[0].coords[0]} or (
            {chip.coords[1] for chip in row} == {row[0].coords[1]}
        )


@pytest.mark.parametrize("slices", [1, 4])
def test_slices_that_the_devices_do_not_form(slices):
    with pytest.raises(ConfigError, match=f"mesh.slices={slices}, .* of 2 slice.*mesh.slices=2"):
        device_grid(MeshConfig(data=4, fsdp=8, slices=slices), POD)


def test_slices_of_devices_that_know_none_are_runs_of_ids():
    ids = np.vectorize(lambda d: d.id)(make_mesh(MeshConfig(4, 2, slices=2)).devices)
    assert ids.reshape(2, -1).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
