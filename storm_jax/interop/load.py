"""Reads a part of the model from a folder of weights, parameter by parameter."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from flax import nnx

from storm_jax.interop.files import Weights, WeightsError
from storm_jax.interop.names import Name
from storm_jax.models.storm import Params

# Where towers stand in published files and in those that transformers 4 and 5 write.
VIT_PREFIXES = (
    "",
    "vision_model.",
    "vision_tower.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
)
# (prefix of the names, what "model." becomes there)
DECODER_PREFIXES = (
    ("", "model."),
    ("language_model.", "model."),
    ("", "model.language_model."),
    ("model.", "language_model."),
)
# What has no counterpart: SigLIP's pooling head, and buffers that old files hold.
SKIPPED = re.compile(r"head\.|embeddings\.position_ids$|.*rotary_emb\.inv_freq$")


def vit_spelling(weights: Weights) -> Callable[[str], str]:
    """How this folder spells the names of `vit_names`.

    Raises:
      WeightsError: it holds no SigLIP vision tower.
    """
    mark = "embeddings.patch_embedding.weight"
    for prefix in VIT_PREFIXES:
        if prefix + mark in weights:
            return lambda name: prefix + name
    raise WeightsError(f"{weights.folder} holds no SigLIP vision tower: no tensor ...{mark}")


def decoder_spelling(weights: Weights) -> Callable[[str], str]:
    """How this folder spells the names of `decoder_names`.

    Raises:
      WeightsError: it holds no decoder.
    """
    for prefix, inner in DECODER_PREFIXES:
        if f"{prefix}{inner}embed_tokens.weight" in weights:

            def spell(name: str, prefix=prefix, inner=inner) -> str:
                if name.startswith("model."):
                    return prefix + inner + name.removeprefix("model.")
                return prefix + name if prefix + name in weights else name

            return spell
    raise WeightsError(f"{weights.folder} holds no decoder: no tensor ...embed_tokens.weight")


def check_names(
    weights: Weights, names: list[Name], spell: Callable[[str], str], layers: int
) -> None:
    """Compares the table's names with those in the folder, of the same tower.

    Args:
      layers: that the checkpoint has, of which the model may use fewer.

    Raises:
      WeightsError: lists every name that is missing and every one that has no place.
    """
    asked = {spell(n) for name in names for n in _layers(name.hf, layers)}
    towers = {spell(name.hf.split(".")[0] + "."): name.hf.split(".")[0] + "." for name in names}
    extra = []
    for name in weights.names:
        for tower, plain in towers.items():
            inside = name.startswith(tower) and name not in asked
            if inside and not SKIPPED.match(plain + name.removeprefix(tower)):
                extra.append(name)
    refuse(weights, [name for name in asked if name not in weights], extra)


def refuse(weights: Weights, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Raises a WeightsError that lists these names, if there are any."""
    missing, extra = sorted(missing), sorted(extra)
    if missing or extra:
        lines = [f"  missing: {name}" for name in missing]
        lines += [f"  without a place in this model: {name}" for name in extra]
        raise WeightsError(f"{weights.folder} does not fit this model:\n" + "\n".join(lines))


def _layers(pattern: str, layers: int) -> list[str]:
    if "{layer}" not in pattern:
        return [pattern]
    return [pattern.format(layer=i) for i in range(layers)]


def read_part(
    weights: Weights,
    names: list[Name],
    spell: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    change: Callable[[Name, np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a part one by one, each with its path, in the dtype of the files.

    Every tensor is read once, when its parameter's turn comes. Memory holds one parameter (of all
    layers) and one tensor.

    Args:
      weights: where they are read.
      names: the part's table.
      spell: from the table's names to the folder's.
      shapes: of the parameters, by their paths; those of the table exactly.
      change: applied to a tensor before it is brought into our shape.

    Raises:
      WeightsError: a tensor has another shape than the model needs.
    """
    table = {name.ours: name for name in names}
    if set(shapes) != set(table):
        raise WeightsError(f"the table of names and the model differ: {set(shapes) ^ set(table)}")

    def one(name: Name, layer: int) -> np.ndarray:
        shape = shapes[name.ours][1:] if name.stacked else shapes[name.ours]
        hf = spell(name.hf.format(layer=layer))
        tensor = weights.tensor(hf)
        if change is not None:
            tensor = change(name, tensor)
        try:
            return name.to_ours(tensor, shape)
        except ValueError as error:
            raise WeightsError(f"{weights.folder}: {hf} {error}") from error

    for ours, shape in shapes.items():
        name = table[ours]
        yield ours, filled(shape, functools.partial(one, name), stacked=name.stacked)


def filled(
    shape: tuple[int, ...], part: Callable[[int], np.ndarray], *, stacked: bool
) -> np.ndarray:
    """A parameter of `shape` from `part(0)`, or [layers, ...] from one array a layer.

    One of them exists at a time. The memory begins where JAX takes it over without a copy.
    """
    first = part(0)
    out = aligned(shape, first.dtype)
    if not stacked:
        out[...] = first
        return out
    out[0] = first
    del first
    for layer in range(1, shape[0]):
        out[layer] = part(layer)
    return out


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that is not filled, at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def shapes_of(part: Params) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a part, by its path, from `StormModel.abstract`."""
    return {k: v.shape for k, v in nnx.traversals.flatten_mapping(part, sep="/").items()}
