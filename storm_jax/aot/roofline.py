"""The least time that a step can take, by each of the things that could bind it."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from storm_jax.aot.collectives import Collective
from storm_jax.aot.topology import Topology
from storm_jax.aot.work import DeviceWork


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step that each resource alone would need at its peak.

    Attributes:
      compute: matrix products at the chip's bfloat16 peak, recomputation included.
      hbm: memory traffic; an estimate from above.
      ici: links inside a slice, or NVLink inside a host.
      network: between slices or hosts.
    """

    compute: float
    hbm: float
    ici: float
    network: float

    @property
    def binds(self) -> str:
        times = self.by_resource()
        return max(times, key=lambda name: times[name])

    @property
    def fastest(self) -> float:
        """All four at the same time: nobody waits for anybody."""
        return max(self.by_resource().values())

    @property
    def slowest(self) -> float:
        """All four one after the other: nothing overlaps."""
        return sum(self.by_resource().values())

    def by_resource(self) -> dict[str, float]:
        return {
            "compute": self.compute,
            "hbm": self.hbm,
            "ici": self.ici,
            "network": self.network,
        }


def roofline(
    work: DeviceWork, collectives: Sequence[Collective], topology: Topology, mesh: jax.sharding.Mesh
) -> Roofline:
    """Times of one step from what it does and what the chip's data sheet says."""
    chip = topology.chip
    ici = network = 0.0
    for collective in collectives:
        inside, outside = exchange_seconds(collective, topology, mesh)
        ici += collective.times * inside
        network += collective.times * outside
    return Roofline(
        compute=work.flops / chip.peak_flops,
        hbm=work.hbm_bytes / chip.hbm_bandwidth,
        ici=ici,
        network=network,
    )


def exchange_seconds(
    collective: Collective, topology: Topology, mesh: jax.sharding.Mesh
) -> tuple[float, float]:
    """Seconds of one execution (inside slices, between slices) by bandwidth alone.

    Inside a slice a group uses the links of the torus axes along which it lies: two an axis where
    that is a ring, else one. An all-to-all's data passes through several links, a quarter of the
    longest ring (half of a line); a permute's as many as its pair is apart.
    """
    chip = topology.chip
    inside, outside = exchange_bytes(collective, topology, mesh)
    passed, links = 1.0, 1  # through how many links inside, and over how many at a time
    if inside and not chip.is_gpu:
        if collective.kind == "collective-permute":
            passed = max(_distance(a, b, topology) for a, b in _members(collective, mesh))
        else:
            group = _members(collective, mesh)[0]
            first = topology.slice_of(group[0])
            links, longest = _links([d for d in group if topology.slice_of(d) == first], topology)
            passed = longest if collective.kind == "all-to-all" else 1.0
    return passed * inside / (links * chip.link_bandwidth), outside / chip.network_bandwidth


def exchange_bytes(
    collective: Collective, topology: Topology, mesh: jax.sharding.Mesh
) -> tuple[float, float]:
    """Bytes that a device receives at one execution (inside slices, between slices).

    A group over s slices with n devices in each moves, for an operand V of each device,

        all-gather      V (s - 1) between slices, then V s (n - 1) inside
        reduce-scatter  V (n - 1) / n inside, then V / n (s - 1) / s between slices
        all-reduce      a reduce-scatter and an all-gather of what it leaves
        all-to-all      V (s - 1) / s between slices, V (n - 1) / (n s) inside
        permute         V, between slices if a pair is of two, inside otherwise

    The sum of both is `Collective.received_bytes`.
    """
    V, members = collective.operand_bytes, _members(collective, mesh)
    if not members:
        return 0.0, 0.0
    if collective.kind == "collective-permute":
        crosses = any(topology.slice_of(a) != topology.slice_of(b) for a, b in members)
        return (0.0, V) if crosses else (V, 0.0)
    s = len({topology.slice_of(device) for device in members[0]})
    n = len(members[0]) // s
    return {
        "all-gather": (V * s * (n - 1), V * (s - 1)),
        "reduce-scatter": (V * (n - 1) / n, V / n * (s - 1) / s),
        "all-reduce": (2 * V * (n - 1) / n, 2 * V / n * (s - 1) / s),
        "all-to-all": (V * (n - 1) / (n * s), V * (s - 1) / s),
    }[collective.kind]


def _members(collective: Collective, mesh: jax.sharding.Mesh) -> list[list]:
    devices = mesh.devices.reshape(-1)
    return [[devices[place] for place in group] for group in collective.groups]


def _links(group: list, topology: Topology) -> tuple[int, float]:
    """Links into a device that a group of one slice can use, and links that data passes through."""
    coords = np.array([device.coords[: len(topology.sizes)] for device in group])
    links, longest = 0, 1.0
    for axis, size in enumerate(topology.sizes):
        extent = len(set(coords[:, axis]))
        if extent == 1:
            continue
        ring = extent == size and _is_ring(size, topology)
        links += 2 if ring else 1
        longest = max(longest, extent / 4 if ring else extent / 2)
    return links, longest


def _is_ring(size: int, topology: Topology) -> bool:
    multiple = topology.chip.wrap_multiple
    return bool(multiple) and size % multiple == 0


def _distance(a, b, topology: Topology) -> int:
    hops = 0
    for axis, size in enumerate(topology.sizes):
        apart = abs(a.coords[axis] - b.coords[axis])
        hops += min(apart, size - apart) if _is_ring(size, topology) else apart
    return hops
