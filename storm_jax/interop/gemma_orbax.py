"""Google's own Gemma checkpoints, written by Orbax, in their four layouts.

These are the layouts of `gemma/gm/ckpts/_checkpoint.py` in github.com/google-deepmind/gemma:

  NESTED    layer_0/attn/q_einsum/w
  FLAT      "transformer/layer_0/attn/q_einsum" -> w: slashes inside the first key
  STACKED   "transformer/stacked_layers/attention_type_0/attn/q_einsum" -> w: layers 0, P, 2P, ...
            on the first axis, where P layers with different kinds of attention alternate
  KAULDRON  params -> NESTED, beside opt_state, step and collections

All of them are read under the names of NESTED (`gemma_names`). There is no config.json: sizes are
read from the shapes, and the rest comes from the run's configuration.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from storm_jax.config import ConfigError, DecoderConfig
from storm_jax.interop.architecture import no_contradiction, normal
from storm_jax.interop.files import WeightsError
from storm_jax.interop.gemma_names import Entry, entries
from storm_jax.interop.load import aligned

Layout = Literal["NESTED", "FLAT", "STACKED", "KAULDRON"]

# What has no counterpart in a decoder: the vision tower and what connects it.
SKIPPED = re.compile(r"vision_encoder/|SigLiPFromPatches_0/|embedder/mm_")
_STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/(.*)")
_LAYER = re.compile(r"layer_(\d+)/")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor stands in a checkpoint, and which layers it covers."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]  # of one layer
    dtype: np.dtype
    layers: tuple[int, ...] = ()  # on the first axis; (): none


def find(folder: Path) -> Path | None:
    """The Orbax checkpoint that a folder is, or that it holds as the only one; None: it has none.

    The archives that Google offers hold a tokenizer and one folder with the weights.
    """
    if (folder / "config.json").is_file():  # a folder of transformers
        return None
    marks = ("_METADATA", "_CHECKPOINT_METADATA")
    inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [path for path in inside if any((path / mark).is_file() for mark in marks)]
    if folder in found:
        return folder
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise WeightsError(f"{folder} holds several checkpoints: {names}; give the path of one")
    return found[0] if found else None


class GemmaCheckpoint:
    """The text decoder in one of Google's checkpoints; nothing is read before `read`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            tree = cast(dict[str, Any], ocp.metadata(str(folder.absolute())).metadata)
        except (ValueError, KeyError, OSError) as error:
            raise WeightsError(f"{folder} is no checkpoint that Orbax can read: {error}") from error
        flat = nnx.traversals.flatten_mapping(tree)
        self.layout = _layout(set(tree))
        if self.layout == "KAULDRON":
            flat = {keys: leaf for keys, leaf in flat.items() if keys[0] == "params"}
        self._stored: dict[str, list[_Stored]] = {}
        stacks = {int(found[1]) for keys in flat if (found := _STACKED.search(_plain(keys)))}
        self._period = max(stacks, default=-1) + 1
        for keys, leaf in flat.items():
            name, shape, layers = _plain(keys), tuple(leaf.shape), ()
            if found := _STACKED.fullmatch(name):
                layers = tuple(int(found[1]) + i * self._period for i in range(shape[0]))
                name, shape = "layer_{layer}/" + found[2], shape[1:]
            stored = _Stored(keys, shape, np.dtype(leaf.dtype), layers)
            self._stored.setdefault(name, []).append(stored)
        if "embedder/input_embedding" not in self._stored:
            raise WeightsError(
                f"{folder} is an Orbax checkpoint, but not one of Gemma: no"
                " embedder/input_embedding; training checkpoints of storm_jax need no import,"
                " --config.init_from takes them"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor under its name in NESTED, one layer at a time."""
        return {
            name.format(layer=layer): stored.shape
            for name, several in self._stored.items()
            for stored in several
            for layer in stored.layers or (None,)
        }

    def config(self, wanted: DecoderConfig) -> DecoderConfig:
        """The decoder that these shapes are.

        Args:
          wanted: what the run's configuration says, to be compared. It gives what shapes do not
            show: soft caps, rotary bases, windows and, but in STACKED, which layers are global.

        Raises:
          ConfigError: a contradiction; all of them are listed.
          WeightsError: a tensor is missing that shows a size.
        """
        shapes, first = self.shapes, "layer_0/"
        attention = "qkv_einsum" if f"{first}attn/qkv_einsum" in shapes else "q_einsum"
        needed = {
            "embedding": "embedder/input_embedding",
            "query": f"{first}attn/{attention}",
            "linear": f"{first}mlp/linear",
        }
        if attention == "q_einsum":
            needed["key"] = f"{first}attn/kv_einsum"
        missing = sorted(name for name in needed.values() if name not in shapes)
        if missing:
            raise WeightsError(f"{self.folder} lacks {', '.join(missing)}")
        heads, _, head_dim = shapes[needed["query"]][-3:]
        layers = {int(found[1]) for name in shapes if (found := _LAYER.match(name))}
        found = dataclasses.replace(
            wanted,
            vocab_size=shapes[needed["embedding"]][0],
            width=shapes[needed["embedding"]][1],
            layers=max(layers) + 1,
            heads=heads,
            kv_heads=shapes[needed["key"]][1] if "key" in needed else heads,
            head_dim=head_dim,
            mlp=shapes[needed["linear"]][0],
            post_norms=f"{first}post_attention_norm/scale" in shapes,
            qk_norm=f"{first}attn/_query_norm/scale" in shapes,
            # What all of these models have in common.
            activation="gelu_tanh",
            norm_eps=1e-6,
            norm_plus_one=True,
            qkv_bias=False,
            tied_embeddings=True,
            scale_embeddings=True,
            global_every=self._period or wanted.global_every,
        )
        no_contradiction("decoder", normal(found), normal(wanted), str(self.folder))
        return found

    def read(
        self, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The decoder's parameters one by one, each with its path, in the checkpoint's dtype.

        Memory holds one of our parameters (of all layers) and one of Google's tensors, which in
        STACKED may be as large. A tensor that holds two or three of our parameters is read for
        each of them: together, gate and up of all layers are most of a model.

        Args:
          config: from `config`.
          shapes: of the parameters, by their paths.

        Raises:
          WeightsError: tensors are missing, have no place or another shape; all are listed, before
            the first is read.
        """
        table = entries(config, transposed_gate=self._transposed_gate(config))
        here = {ours for entry in table for ours in entry.ours}
        if set(shapes) != here:
            raise WeightsError(f"the table of names and the model differ: {set(shapes) ^ here}")
        self._check(table, shapes, config.layers)
        return self._parameters(table, shapes, config.layers)

    def _parameters(
        self, table: list[Entry], shapes: Mapping[str, tuple[int, ...]], layers: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        for entry in table:
            sources = self._sources(entry, layers)
            for i, ours in enumerate(entry.ours):
                yield ours, self._filled(entry, i, shapes[ours], sources)

    def _filled(
        self,
        entry: Entry,
        which: int,
        shape: tuple[int, ...],
        sources: list[tuple[tuple[int, ...], _Stored]],
    ) -> np.ndarray:
        """One of the parameters that an entry's tensors hold, of all layers if it has them."""
        out = aligned(shape, sources[0][1].dtype)
        for layers, stored in sources:
            tensor = self._read(stored)
            for row, layer in enumerate(layers):
                one = entry.to_ours(tensor[row] if stored.layers else tensor)[which]
                (out[layer] if entry.stacked else out)[...] = one
            del tensor  # else it stays while the next one is read
        return out

    def _transposed_gate(self, config: DecoderConfig) -> bool:
        if config.mlp == config.width:
            raise ConfigError(
                f"decoder.mlp={config.mlp} equals decoder.width: the shape of gating_einsum does"
                " not tell its two orders apart, so this checkpoint cannot be imported"
            )
        return self.shapes.get("layer_0/mlp/gating_einsum") == (2, config.mlp, config.width)

    def _check(
        self, table: list[Entry], shapes: Mapping[str, tuple[int, ...]], layers: int
    ) -> None:
        needed = {}
        for entry in table:
            shape = shapes[entry.ours[0]]
            for layer in range(layers) if entry.stacked else (0,):
                one = shape[1:] if entry.stacked else shape
                needed[entry.google.format(layer=layer)] = entry.google_shape(one)
        have = {name: s for name, s in self.shapes.items() if not SKIPPED.match(name)}
        lines = [f"  missing: {name}" for name in sorted(set(needed) - set(have))]
        extra = sorted(set(have) - set(needed))
        lines += [f"  without a place in this model: {name}" for name in extra]
        lines += [
            f"  {name} has shape {have[name]}, this model needs {shape}"
            for name, shape in sorted(needed.items())
            if name in have and have[name] != shape
        ]
        if lines:
            raise WeightsError(f"{self.folder} does not fit this model:\n" + "\n".join(lines))

    def _sources(self, entry: Entry, layers: int) -> list[tuple[tuple[int, ...], _Stored]]:
        """(layers, tensor that holds them) of an entry, in order."""
        if entry.google in self._stored:  # STACKED, or no layers at all
            return [(s.layers or (0,), s) for s in self._stored[entry.google]]
        names = [(i, entry.google.format(layer=i)) for i in range(layers)]
        return [((i,), self._stored[name][0]) for i, name in names]

    def _read(self, stored: _Stored) -> np.ndarray:
        """One tensor as it is stored, in host memory."""
        shape = (len(stored.layers), *stored.shape) if stored.layers else stored.shape
        # It says what is wanted; its memory is not touched.
        wanted = nnx.traversals.unflatten_mapping({stored.keys: np.empty(shape, stored.dtype)})
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            # Orbax's own type of trees does not admit a dict of arrays.
            # pyrefly: ignore[bad-argument-type]
            found: Any = ocp.load(str(self.folder.absolute()), wanted)
        return nnx.traversals.flatten_mapping(found)[stored.keys]


def _layout(top: set[str]) -> Layout:
    if any(key.startswith("transformer/stacked_layers") for key in top):
        return "STACKED"
    if any(key.startswith("transformer/") for key in top):
        return "FLAT"
    return "KAULDRON" if {"params", "step"} <= top else "NESTED"


def _plain(keys: tuple[str, ...]) -> str:
    """A tensor's name in NESTED, without the "w" of an einsum."""
    name = "/".join(keys).removeprefix("params/").removeprefix("transformer/")
    return name.removesuffix("/w")
