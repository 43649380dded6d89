"""Reads a part of the model from a folder of weights, layer by layer, to where it belongs."""

import re
from collections.abc import Callable, Iterable

import jax
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


def load_part(
    weights: Weights,
    names: list[Name],
    spell: Callable[[str], str],
    abstract: Params,
    change: Callable[[Name, np.ndarray], np.ndarray] | None = None,
) -> Params:
    """The parameters of a part, in the dtype of the files, each laid out as `abstract` says.

    Every tensor is read once. Host memory holds one parameter (of all layers, this process's
    shards of it) and one tensor at a time besides what is placed.

    Args:
      weights: where they are read.
      names: the part's table; covers `abstract` exactly.
      spell: from the table's names to the folder's.
      abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
      change: applied to a tensor before it is brought into our shape.

    Raises:
      WeightsError: a tensor has another shape than the model needs.
    """
    wanted = nnx.traversals.flatten_mapping(abstract, sep="/")
    table = {name.ours: name for name in names}
    if set(wanted) != set(table):
        raise WeightsError(f"the table of names and the model differ: {set(wanted) ^ set(table)}")
    out = {}
    for ours, leaf in wanted.items():
        name = table[ours]
        shape = leaf.shape[1:] if name.stacked else leaf.shape

        def fetch(layer: int, name=name, shape=shape) -> np.ndarray:
            hf = spell(name.hf.format(layer=layer))
            tensor = weights.tensor(hf)
            if change is not None:
                tensor = change(name, tensor)
            try:
                return name.to_ours(tensor, shape)
            except ValueError as error:
                raise WeightsError(f"{weights.folder}: {hf} {error}") from error

        filling = Filling(leaf, name.stacked)
        for layer in range(leaf.shape[0] if name.stacked else 1):
            filling.put(layer, fetch(layer))
        out[ours] = filling.array()
    return nnx.traversals.unflatten_mapping(out, sep="/")


class Filling:
    """A parameter that is put together from one tensor, or from one of each layer.

    The host holds the shards that belong to this process's devices, and no more.

    Args:
      leaf: `jax.ShapeDtypeStruct` with a sharding.
      stacked: the first axis is that of layers.
    """

    def __init__(self, leaf, stacked: bool):
        self._shape, self._sharding, self._stacked = leaf.shape, leaf.sharding, stacked
        # Slices cannot be keys before Python 3.12; replicas share a shard.
        where = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        self._indices = {self._key(index) for index in where}
        self._shards: dict[tuple, np.ndarray] = {}

    def _key(self, index) -> tuple[tuple[int, int, int], ...]:
        return tuple(s.indices(n) for s, n in zip(index, self._shape, strict=True))

    def put(self, layer: int, tensor: np.ndarray) -> None:
        """Takes a layer's tensor, in our shape; the only one (layer 0) if there is no such axis."""
        for index in self._indices:
            if not self._stacked:
                self._shards[index] = tensor[tuple(slice(*s) for s in index)]
                continue
            first, last, _ = index[0]
            if first <= layer < last:
                if index not in self._shards:
                    sizes = tuple(stop - start for start, stop, _ in index)
                    self._shards[index] = np.empty(sizes, tensor.dtype)
                rest = tuple(slice(*s) for s in index[1:])
                self._shards[index][layer - first] = tensor[rest]

    def array(self) -> jax.Array:
        """The parameter where it belongs, once all tensors are put."""
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._shards[self._key(index)]
        )
