"""Which rows of a batch each process loads."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.parallel.mesh import make_mesh
from storm_jax.parallel.rows import RowShare, row_share, share_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "held, shares",
    [
        ([{0, 1}, {2, 3}], [(0, 2), (1, 2)]),
        ([{2, 3}, {0, 1}], [(1, 2), (0, 2)]),  # devices in another order
        ([{0, 1, 2, 3}] * 2, [(0, 1)] * 2),  # a tensor axis through both hosts
        ([{0, 1}, {0, 1}, {2, 3}, {2, 3}], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([{0, 2}, {1, 3}], [(0, 2), (1, 2)]),
    ],
)
def test_processes_with_the_same_rows_have_the_same_share(held, shares):
    held = dict(enumerate(held))
    assert [share_of(held, p) for p in held] == [RowShare(*share) for share in shares]


@pytest.mark.parametrize("held", [[{0, 1}, {1, 2}], [{0, 1}, {2}], [{0, 1}, {0, 1, 2}]])
def test_rows_partly_in_common(held):
    with pytest.raises(ConfigError, match=r"process 1: \[.*choose config.mesh so that"):
        share_of(dict(enumerate(held)), 0)


def test_one_process_loads_every_row():
    for config in (MeshConfig(data=2, fsdp=-1), MeshConfig(data=1, fsdp=1, tensor=-1)):
        mesh = make_mesh(config)
        layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        assert row_share(layout, 8 * jax.device_count()) == RowShare(0, 1)


PROCESS = """
import json, os, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from storm_jax.config import MeshConfig
from storm_jax.parallel.mesh import make_mesh
from storm_jax.parallel.rows import row_share
found = {}
for name, config in {
    "fsdp": MeshConfig(data=1, fsdp=4),
    "tensor": MeshConfig(data=1, fsdp=1, tensor=4),
    "both": MeshConfig(data=1, fsdp=2, tensor=2),
}.items():
    mesh = make_mesh(config)
    layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    share = row_share(layout, 8)
    rows = np.arange(share.index, 8, share.count)  # as data.pipeline shares them
    array = jax.make_array_from_process_local_data(layout, rows, (8,))
    held = [shard.data.tolist() for shard in array.addressable_shards]
    with jax.set_mesh(mesh):
        total = jax.jit(lambda x: x.sum())(array)
    found[name] = [share.index, share.count, held, int(total)]
print("FOUND " + json.dumps(found), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_place_the_rows_that_they_load():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]  # Gloo prints as well
    first, second = (json.loads(re.findall("FOUND (.*)", text)[0]) for text in said)
    assert all(found[name][3] == sum(range(8)) for found in (first, second) for name in found)
    assert first["fsdp"][:3] == [0, 2, [[0, 2], [4, 6]]]
    assert second["fsdp"][:3] == [1, 2, [[1, 3], [5, 7]]]
    assert first["tensor"] == second["tensor"] == [0, 1, [list(range(8))] * 2, 28]
    assert first["both"][:3] == [0, 2, [[0, 2, 4, 6]] * 2]
    assert second["both"][:3] == [1, 2, [[1, 3, 5, 7]] * 2]
