"""Other ways to lay out the same run: meshes, recomputation, microbatches."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from storm_jax.config import Remat, RematConfig, RunConfig
from storm_jax.parallel.mesh import AXES
from storm_jax.parallel.sharding import RULES

BATCH_AXES = RULES["batch"]
SPLIT_AXES = tuple(axis for axis in AXES if axis not in BATCH_AXES)
"""Mesh axes that share one row's work."""

REMAT = typing.get_args(typing.get_type_hints(Remat)["policy"])
"""The names of the recomputation policies."""

REMAT_PARTS = tuple(
    name for name, hint in typing.get_type_hints(RematConfig).items() if hint is Remat
)
"""The fields of train.remat that take one."""


@dataclass(frozen=True)
class Variant:
    """Changes to a config: dotted field and value."""

    changes: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """As it is written on the command line, `--config.` left out."""
        return " ".join(f"{field}={value}" for field, value in self.changes) or "as it is"

    def apply(self, config: RunConfig) -> RunConfig:
        """The config with the changes."""
        for field, value in self.changes:
            config = _replaced(config, field.split("."), value)
        return config


def mesh_variants(
    config: RunConfig, devices: int, slices: int = 1, most: int = 16
) -> list[Variant]:
    """Meshes of `devices` devices that divide the microbatch, those that split rows least first.

    Args:
      slices: TPU slices, over which the data axis goes first.
      most: devices that share one row, along all of `SPLIT_AXES` together.
    """
    rows = config.train.batch // config.train.accumulation
    found = []
    for sizes in _products(devices, len(AXES)):
        mesh = dict(zip(AXES, sizes, strict=True))
        shares, sharers = (_size(mesh, axes) for axes in (BATCH_AXES, SPLIT_AXES))
        if rows % shares == 0 and mesh["data"] % slices == 0 and sharers <= most:
            found.append((sharers, mesh["data"], mesh))
    found.sort(key=lambda item: (item[:2], tuple(item[2].values())))
    return [_mesh(mesh) for *_, mesh in found]


def remat_variants(config: RunConfig) -> list[Variant]:
    """The other recomputation policies, each for all parts, and the ViT's calls the other way."""
    remat = config.train.remat
    found = [Variant((("train.remat.vit_calls", not remat.vit_calls),))]
    for policy in REMAT:
        changes = [
            (f"train.remat.{part}.policy", policy)
            for part in REMAT_PARTS
            if getattr(remat, part).policy != policy
        ]
        if changes:
            found.append(Variant(tuple(changes)))
    return found


def smaller_variants(config: RunConfig, mesh: dict[str, int]) -> Iterator[Variant]:
    """Changes that may need less memory: other recomputation, smaller microbatches, shared rows.

    Args:
      mesh: axes and sizes as they are now.
    """
    yield from remat_variants(config)
    rows = config.train.batch // config.train.accumulation
    shares = _size(mesh, BATCH_AXES)
    if rows % (2 * shares) == 0:
        most = rows // shares
        for times in sorted({2, most}):
            yield Variant((("train.accumulation", config.train.accumulation * times),))
    for axis in SPLIT_AXES:
        for times in (2, 4, 8):
            if mesh["fsdp"] % times:
                continue
            # As many rows a device as before: more microbatches.
            less = {**mesh, "fsdp": mesh["fsdp"] // times, axis: mesh[axis] * times}
            accumulation = config.train.accumulation * times
            if config.train.batch % (accumulation * _size(less, BATCH_AXES)) == 0:
                more = (("train.accumulation", accumulation),)
                yield Variant(_mesh(less).changes + more)


def _mesh(mesh: dict[str, int]) -> Variant:
    return Variant(tuple((f"mesh.{axis}", size) for axis, size in mesh.items()))


def _size(mesh: dict[str, int], axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh[axis]
    return size


def _products(total: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in range(1, total + 1):
        if total % first == 0:
            for rest in _products(total // first, count - 1):
                yield (first, *rest)


def _replaced(group: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = _replaced(getattr(group, name), rest, value) if rest else value
    return dataclasses.replace(group, **{name: inner})
