"""What devices send each other in a step: every collective, by kind and mesh axes."""

import re
from dataclasses import dataclass

import jax
import numpy as np

from storm_jax.aot.between_slices import transfer
from storm_jax.aot.hlo import Computation, Instruction, Program
from storm_jax.aot.replica_groups import replica_groups
from storm_jax.config import ConfigError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      name: of the instruction.
      kind: one of `KINDS`. A sum of which each device keeps a part is a reduce-scatter also where
        the compiler writes it as an all-reduce inside a fusion.
      axes: mesh axes along which its devices differ; empty: each device is alone.
      groups: int [groups, size], positions in the flattened mesh that exchange; for a permute
        [pairs, 2], source and target. Where slices have one program, those of the first slice
        stand for all.
      operand_bytes: what one device puts in.
      times: executions a step.
      source: the JAX operation that it comes from, as far as the compiler says.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    groups: np.ndarray
    operand_bytes: int
    times: float
    source: str

    @property
    def size(self) -> int:
        """Devices of a group."""
        return self.groups.shape[1]

    @property
    def received_bytes(self) -> float:
        """What one device receives from others at each execution, by the best algorithm.

        V is the operand: an all-gather receives V (n - 1), a reduce-scatter and an all-to-all
        V (n - 1) / n, an all-reduce the two of them one after the other, a permute V.
        """
        V, n = self.operand_bytes, self.size
        return {
            "all-gather": V * (n - 1),
            "all-reduce": 2 * V * (n - 1) / n,
            "reduce-scatter": V * (n - 1) / n,
            "all-to-all": V * (n - 1) / n,
            "collective-permute": V if len(self.groups) else 0,
        }[self.kind]


def collectives(program: Program, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives that `program`, compiled for `mesh`, executes.

    Args:
      mesh: its outermost axis goes over TPU slices first, where there are several
        (`storm_jax.parallel.mesh`).
    """
    found: dict[str, Collective] = {}
    # A program for several slices numbers the devices of its own, in the order of the mesh.
    numbered = program.partitions or mesh.size
    for computation, instruction, times in program.executed():
        if (sent := transfer(instruction)) is not None:
            kind, groups = sent[0], _positions(sent[1], mesh)
        else:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or instruction.opcode.endswith("-done"):
                continue
            groups = _groups(kind, instruction, numbered)
        if kind == "all-reduce" and _scatters(program, computation):
            kind = "reduce-scatter"
        moved = sum(operand.bytes for operand in computation.operands(instruction))
        if instruction.opcode == "all-reduce":  # on TPUs it may round what it takes
            moved = min(moved, instruction.bytes)
        collective = Collective(
            name=instruction.name,
            kind=kind,
            axes=_axes(groups, mesh),
            groups=groups,
            operand_bytes=moved,
            times=times,
            source=instruction.source,
        )
        found.setdefault(_identity(instruction), collective)
    return [collective for collective in found.values() if collective.axes]


def table(found: list[Collective]) -> dict[tuple[str, str], tuple[float, float]]:
    """(axes joined by "+", kind) -> (executions, bytes that a device receives) a step."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for c in found:
        key = ("+".join(c.axes), c.kind)
        times, received = sums.get(key, (0.0, 0.0))
        sums[key] = (times + c.times, received + c.times * c.received_bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def _identity(instruction: Instruction) -> str:
    """What instructions have in common that are parts of one collective.

    The TPU compiler writes one that overlaps with products again in every fusion during which it
    goes on, and gives these the same chain and channel.
    """
    chain = re.search(r'chain_id="?(\d+)', instruction.text)
    channel = re.search(r"channel_id=(\d+)", instruction.text)
    return f"{chain[1]}/{channel[1]}" if chain and channel else instruction.name


def _scatters(program: Program, computation: Computation) -> bool:
    # The TPU compiler's form: a fusion of the sum and of the slice that the device keeps.
    fused = computation.name not in program.top_level
    return fused and any(i.opcode == "dynamic-slice" for i in computation.instructions.values())


# ------------------------------------------------------------------------------------ who with whom


def _groups(kind: str, instruction: Instruction, devices: int) -> np.ndarray:
    text = instruction.text
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])] if pairs else []
        pairs = np.array(numbers, int).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]]
    return replica_groups(text, devices)


def _positions(ids: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    places = {device.id: place for place, device in enumerate(mesh.devices.flat)}
    try:
        return np.vectorize(places.__getitem__, otypes=[int])(ids)
    except KeyError as error:
        raise ConfigError(
            f"a transfer between slices names device {error}, not of the mesh"
        ) from error


def _axes(groups: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Mesh axes along which members of a group differ."""
    if groups.size == 0:
        return ()
    where = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))  # [axes, groups, size]
    differ = (where != where[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)
