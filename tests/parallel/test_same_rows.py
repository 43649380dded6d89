"""Rows that differ between the devices that share them are counted."""

import jax
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.parallel import sharding
from storm_jax.parallel.mesh import make_mesh
from storm_jax.parallel.same_rows import SameRows

BATCH = 4
MESHES = [
    MeshConfig(data=2, fsdp=1, seq=4),
    MeshConfig(data=1, fsdp=2, seq=2, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=1, seq=8),
]


def placed(layout: jax.NamedSharding, different: dict[int, int]) -> jax.Array:
    """Row r has the mark r, but for device d, where row different[d] is marked 99."""
    parts = []
    for device, (rows,) in layout.devices_indices_map((BATCH,)).items():
        marks = np.arange(BATCH, dtype=np.int32)
        if device.id in different:
            marks[different[device.id]] = 99
        parts.append(jax.device_put(marks[rows], device))
    return jax.make_array_from_single_device_arrays((BATCH,), layout, parts)


@pytest.mark.parametrize("config", MESHES)
def test_rows_that_differ_on_any_device(config):
    mesh = make_mesh(config)
    layout = sharding.named(("batch",), (BATCH,), mesh)
    same = SameRows(layout, BATCH)
    assert int(same.count(placed(layout, {}))) == 0
    held = {
        d.id: range(*i.indices(BATCH)) for d, (i,) in layout.devices_indices_map((BATCH,)).items()
    }
    for device, rows in held.items():
        assert int(same.count(placed(layout, {device: rows[0]}))) == 1
    first, last = mesh.devices.flat[0].id, mesh.devices.flat[-1].id
    two = {first: held[first][0], last: held[last][-1]}
    assert int(same.count(placed(layout, two))) == len({held[first][0], held[last][-1]})
    # The same on all devices of a row is the same, whatever it is.
    everyone = {device: rows[0] for device, rows in held.items()}
    assert int(same.count(placed(layout, everyone))) == 0


def test_the_rows_of_a_process_that_has_them_alone():
    layout = sharding.named(("batch",), (BATCH,), make_mesh(MESHES[0]))
    rows = [["a", "b"], [], ["c"], ["a"]]
    assert int(SameRows(layout, BATCH).differing(rows)) == 0
