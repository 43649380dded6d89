"""Times by hand, on the devices of real topologies."""

import importlib.util

import jax
import numpy as np
import pytest

from storm_jax.aot.analyse import speed
from storm_jax.aot.collectives import KINDS, Collective
from storm_jax.aot.roofline import Roofline, exchange_bytes, exchange_seconds, roofline
from storm_jax.aot.topology import describe
from storm_jax.aot.work import DeviceWork
from storm_jax.chips import CHIPS, chip_named, chip_of_kind
from storm_jax.flops import Work

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
V = 1_000_000


def exchange(kind: str, groups, V=V) -> Collective:
    return Collective("c", kind, ("x",), np.array(groups), V, times=1, source="")


def in_order(topology) -> jax.sharding.Mesh:
    """A mesh of one axis: slice by slice, and in it the first coordinate fastest."""

    def place(device):
        return topology.slice_of(device), *getattr(device, "coords", [device.id])[::-1]

    return jax.sharding.Mesh(np.array(sorted(topology.devices, key=place)), ("x",))


def seconds(topology, kind, groups):
    return exchange_seconds(exchange(kind, groups), topology, in_order(topology))


@needs_libtpu
def test_rings_of_a_torus():
    pod = describe("v5p:4x4x8")  # closed in all three dimensions
    link = 100e9
    everyone = [range(128)]
    assert seconds(pod, "all-gather", everyone) == (V * 127 / (6 * link), 0)
    assert seconds(pod, "reduce-scatter", everyone) == (V * 127 / 128 / (6 * link), 0)
    assert seconds(pod, "all-reduce", everyone) == (2 * V * 127 / 128 / (6 * link), 0)
    # Four neighbours along the first dimension: a ring of its own.
    first = in_order(pod).devices[:4]
    assert [tuple(d.coords) for d in first] == [(x, 0, 0) for x in range(4)]
    assert seconds(pod, "all-gather", [range(4)]) == (V * 3 / (2 * link), 0)
    # Two of them are no ring.
    assert seconds(pod, "all-gather", [range(2)]) == (V / link, 0)
    # An all-to-all on a ring of four: on average one link.
    assert seconds(pod, "all-to-all", [range(4)]) == (V * 3 / 4 / (2 * link), 0)
    # A permute around the ring: the last is the first's neighbour.
    assert seconds(pod, "collective-permute", [(0, 1), (1, 2), (3, 0)]) == (V / link, 0)
    assert seconds(pod, "collective-permute", [(0, 2)]) == (2 * V / link, 0)


@needs_libtpu
def test_part_of_a_pod_has_no_rings():
    part = describe("v5e:4x4")  # rings close at 16
    assert seconds(part, "all-gather", [range(16)]) == (V * 15 / (2 * 50e9), 0)
    assert seconds(part, "collective-permute", [(0, 3)]) == (3 * V / 50e9, 0)


@needs_libtpu
def test_slices_are_joined_by_the_network():
    pod = describe("v5e:2x4", slices=2)
    assert len(pod.devices) == 16
    network = 25e9 / 8
    inside, outside = seconds(pod, "all-reduce", [range(16)])
    # Sums inside of eight, then an eighth of it between the two.
    assert inside == 2 * V * 7 / 8 / (2 * 50e9)
    assert outside == 2 * V / 8 / 2 / network
    assert seconds(pod, "all-gather", [(0, 8)]) == (0, V / network)
    assert seconds(pod, "collective-permute", [(0, 8)]) == (0, V / network)


@needs_libtpu
@pytest.mark.parametrize("groups", [[range(16)], [(0, 8)], [range(8)], [(0, 1, 8, 9)]])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_what_is_received_comes_from_inside_or_from_another_slice(kind, groups):
    pod = describe("v5e:2x4", slices=2)
    found = exchange(kind, groups)
    inside, between = exchange_bytes(found, pod, in_order(pod))
    assert inside + between == pytest.approx(found.received_bytes, rel=1e-12)
    assert (between > 0) == (max(groups[0]) >= 8) and (inside > 0) == (1 in groups[0])


def test_gpus_of_a_host_have_all_their_links():
    hosts = describe("h100:4x2")
    assert seconds(hosts, "all-gather", [range(4)]) == (V * 3 / 450e9, 0)
    inside, outside = seconds(hosts, "all-reduce", [range(8)])
    assert inside == 2 * V * 3 / 4 / 450e9
    assert outside == 2 * V / 4 / 2 / 50e9


def test_what_binds_and_both_bounds():
    hosts = describe("h100:8")
    work = DeviceWork(flops=989e12 * 0.25, hbm_bytes=3350e9 * 0.5, silent_kernels={})
    gathers = Collective("c", "all-gather", ("x",), np.arange(8)[None], int(450e9 / 7), 2.0, "")
    times = roofline(work, [gathers], hosts, in_order(hosts))
    assert times.compute == 0.25 and times.hbm == 0.5 and times.network == 0
    np.testing.assert_allclose(times.ici, 2.0, rtol=1e-6)
    assert times.binds == "ici"
    reached = speed(
        Roofline(0.25, 0.5, 2.0, 0.25), Work(100, 3000, 0, 0, 0), model_flops=1e12, peak=10e12
    )
    assert reached.step_seconds == (2.0, 3.0)
    assert reached.tokens_per_second == (1500, 1000)
    assert reached.frames_per_second == (50, 100 / 3)
    assert reached.mfu == (0.05, 1 / 30)


def test_the_chip_table():
    for chip in CHIPS:
        assert chip_named(chip.name) is chip
        assert all(chip_of_kind(kind) is chip for kind in chip.device_kinds)
    assert chip_of_kind("TPU v5 lite").name == "v5e" and chip_of_kind("TPU v5").name == "v5p"
    assert chip_of_kind("cpu") is None and chip_named("v9") is None
