"""Memory of one device, by what lies in it."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from storm_jax.aot.program import Compiled, OutOfMemory, Step
from storm_jax.training.optim import split_parts


@dataclass(frozen=True)
class Whole:
    """A parameter that every device of some mesh axes holds a copy of.

    Attributes:
      path: "vit/blocks/layers/up/weight".
      bytes: of a device; gradient and optimizer state come on top.
      axes: the mesh axes that split other parameters and not this one.
    """

    path: str
    bytes: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device; parts of the model at the first level of the dictionaries.

    Attributes:
      parameters, gradients, optimizer: from shapes and shardings. Gradients are temporaries; they
        are counted as if all were there at once.
      batch: of a step.
      padding: what the compiler adds to arguments for the layouts that it wants.
      temporaries: activations kept for the backward pass, gradients, buffers of collectives.
      outputs: results that take no argument's place.
      code: the program itself.
      total: what the device must hold.
      available: what it has for a program.
      estimated: the compiler refused and gave the temporaries alone; `total` is this sum.
    """

    parameters: dict[str, int]
    gradients: dict[str, int]
    optimizer: dict[str, int]
    batch: int
    padding: int
    temporaries: int
    outputs: int
    code: int
    total: int
    available: int
    estimated: bool

    @property
    def fits(self) -> bool:
        return self.total <= self.available and not self.estimated


def memory_of(step: Step, result: Compiled | OutOfMemory, available: int) -> Memory:
    """Divides the memory of a device that `step` needs."""
    trained, _ = split_parts(step.state.params, step.parts)
    parameters = {part: local_bytes(tree) for part, tree in step.state.params.items()}
    gradients = {part: local_bytes(tree) for part, tree in trained.items()}
    optimizer = _optimizer(step)
    batch = local_bytes(step.batch)
    arguments = sum(parameters.values()) + sum(optimizer.values()) + batch
    if isinstance(result, OutOfMemory):
        everything = result.counted == "everything"
        temporaries = max(0, result.needed_bytes - (arguments if everything else 0))
        padding = outputs = code = 0
        total = arguments + temporaries
    else:
        padding = max(0, result.argument_bytes - arguments)
        temporaries, code = result.temporary_bytes, result.code_bytes
        outputs = result.output_bytes - result.alias_bytes
        total = result.total_bytes
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        batch=batch,
        padding=padding,
        temporaries=temporaries,
        outputs=outputs,
        code=code,
        total=total,
        available=available,
        estimated=isinstance(result, OutOfMemory),
    )


def local_bytes(tree: Any) -> int:
    """Bytes of one device for a tree of shapes with shardings."""
    return sum(_local(x) for x in jax.tree.leaves(tree))


def whole_parameters(step: Step) -> list[Whole]:
    """Parameters that the mesh leaves whole along an axis made to split them, large ones first."""
    leaves = jax.tree_util.tree_leaves_with_path(step.state.params)
    used = {path: _axes_used(x) for path, x in leaves}
    splitting = set().union(*used.values())
    found = []
    for path, x in leaves:
        left = tuple(axis for axis in step.mesh.axis_names if axis in splitting - used[path])
        if left:
            found.append(Whole("/".join(str(key.key) for key in path), _local(x), left))
    return sorted(found, key=lambda whole: -whole.bytes)


def _axes_used(x: jax.ShapeDtypeStruct) -> set[str]:
    assert x.sharding is not None, x
    names = {name for entry in x.sharding.spec for name in _names(entry)}
    return {name for name in names if x.sharding.mesh.shape[name] > 1}


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _local(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None, x
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _optimizer(step: Step) -> dict[str, int]:
    """Bytes of the optimizer's state by part of the model; "other": counters, step."""
    sums: dict[str, int] = {}
    tree = (step.state.step, step.state.opt_state)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        part = next((str(key) for key in keys if key in step.state.params), "other")
        sums[part] = sums.get(part, 0) + _local(x)
    return sums
