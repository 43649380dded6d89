"""Processes of a run, as far as one process can show it; several run in tests/commands."""

import dataclasses

import jax
import pytest

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.parallel import identity, processes, sharding
from storm_jax.parallel.mesh import make_mesh
from storm_jax.parallel.processes import Share, share_of
from tests.tiny import run_config


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    number: int


class Layout:
    """A layout over two processes: the rows of each device, in the order of processes."""

    def __init__(self, *rows: list[slice]):
        self._rows = rows

    def devices_indices_map(self, shape):
        return {
            Device(process, number): (held,)
            for process, devices in enumerate(self._rows)
            for number, held in enumerate(devices)
        }


def test_one_process_feeds_everything():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert share_of(sharding.named(("batch",), (8,), mesh), 8) == Share(0, 1, True)


def test_processes_share_the_batch(monkeypatch):
    layout = Layout([slice(4, 6), slice(6, 8)], [slice(0, 2), slice(2, 4)])
    assert share_of(layout, 8) == Share(1, 2, True)  # of process 0: by row, not by number
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert share_of(layout, 8) == Share(0, 2, True)


def test_an_axis_across_processes_feeds_rows_twice(monkeypatch):
    layout = Layout([slice(0, 4)], [slice(0, 4)], [slice(4, 8)], [slice(4, 8)])
    assert share_of(layout, 8) == Share(0, 2, True)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    assert share_of(layout, 8) == Share(1, 2, False)


@pytest.mark.parametrize(
    "rows", [([slice(0, 6)], [slice(6, 8)]), ([slice(0, 4), slice(4, 8)], [slice(0, 4)])]
)
def test_uneven_shares_are_refused(rows):
    with pytest.raises(ConfigError, match="of the 8 rows of a batch: choose config.mesh"):
        share_of(Layout(*rows), 8)


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv(processes.COORDINATOR, "localhost:1")
    monkeypatch.setenv(processes.COUNT, "2")
    with pytest.raises(ConfigError, match="STORM_COORDINATOR and STORM_PROCESSES set without"):
        processes.start()


def test_identity_tells_runs_apart():
    one = identity.identity(run_config(), "a")
    other = identity.identity(run_config(**{"train.batch": 16}), "b")
    assert {name for name in one if one[name] != other[name]} == {
        "config.train.batch", "--workdir",
    }  # fmt: skip
    assert one["package jax"] == jax.__version__ and one["package libtpu"]


def test_a_block_that_succeeds_or_fails_alone():
    with processes.together(ConfigError):
        pass
    with pytest.raises(ConfigError, match="mine"), processes.together(ConfigError):
        raise ConfigError("mine")
    assert processes.gathered("é") == ["é"]
