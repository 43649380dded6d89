"""Writes a model as a folder that transformers loads, with the model's code in it.

Needs no PyTorch, and holds one parameter (of all layers) at a time.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from storm_jax.config import ConfigError, InitConfig, ModelConfig, RunConfig, from_mapping
from storm_jax.interop import load, names
from storm_jax.interop.files import Weights, WeightsError, WeightsWriter
from storm_jax.interop.settings import model_settings
from storm_jax.models.storm import StormModel

TWIN = Path(__file__).parent / "twin"
SOURCES = ("configuration_storm.py", "temporal_storm.py", "modeling_storm.py")
ARCHITECTURE = "StormForConditionalGeneration"
# transformers' auto classes -> where the class stands in the folder.
AUTO_MAP = {
    "AutoConfig": "configuration_storm.StormConfig",
    "AutoProcessor": "processing_storm.StormProcessor",
    **dict.fromkeys(
        (
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForImageTextToText",
            "AutoModelForMultimodalLM",
        ),
        f"modeling_storm.{ARCHITECTURE}",
    ),
}


def write(
    run: RunConfig,
    stored: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[Iterable[str]], Iterator[np.ndarray]],
    out: Path,
    *,
    dtype: np.dtype | None,
    max_shard_bytes: int,
    video_token_id: int,
    generation: Mapping[str, Any],
) -> int:
    """Writes code, weights and configurations into a folder.

    config.json comes last: a folder without it is one whose writing was broken off.

    Args:
      run: the model and how it was trained; goes along, for the way back.
      stored: shape and dtype of every parameter, by its path ("vit/patch/weight").
      read: gives parameters, one after another, by their paths.
      out: an existing folder.
      dtype: of the weights written; None: as they are stored.
      max_shard_bytes: of a file.
      video_token_id: id that the processor puts where a visual token stands.
      generation: what generation_config.json says.

    Returns:
      The number of weight files.

    Raises:
      ConfigError: transformers has no such decoder.
      WeightsError: parameters are missing or have no name there; all are listed.
    """
    settings = model_settings(run.model)
    table = {name.ours: name for name in names.storm_names(run.model)}
    if set(table) != set(stored):
        lines = [f"  missing: {name}" for name in sorted(set(table) - set(stored))]
        lines += [f"  without a name there: {name}" for name in sorted(set(stored) - set(table))]
        raise WeightsError("the checkpoint does not hold a whole model:\n" + "\n".join(lines))

    announced = {}
    for ours, name in table.items():
        shape, own = stored[ours]
        for layer in range(shape[0] if name.stacked else 1):
            hf_shape = name.hf_shape(shape[1:] if name.stacked else shape)
            announced[name.hf.format(layer=layer)] = hf_shape, dtype or own
    for source in SOURCES:
        (out / source).write_text((TWIN / source).read_text())
    writer = WeightsWriter(out, announced, max_shard_bytes)
    parameters = read(table)
    for name in table.values():
        parameter = next(parameters)
        for layer in range(len(parameter) if name.stacked else 1):
            tensor = parameter[layer] if name.stacked else parameter
            writer.write(
                name.hf.format(layer=layer),
                name.to_hf(tensor).astype(dtype or tensor.dtype, copy=False),
            )
        parameter = tensor = None  # else they stay while the next one is read
    files = writer.finish()

    dtypes = {own.name for _, own in announced.values()}
    config = {
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": "storm",
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        "video_token_id": video_token_id,
        **settings,
        "storm_jax": {"run": dataclasses.asdict(_without_paths(run))},
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return files


def _without_paths(run: RunConfig) -> RunConfig:
    """The run without what means something on the machine of the training alone."""
    data = dataclasses.replace(run.data, train=(), eval=())
    return dataclasses.replace(run, data=data, init_from=InitConfig())


def read_run(folder: Path, wanted: RunConfig | None = None) -> RunConfig:
    """The run that an export came from, or `wanted` if the exported model is that of it.

    Args:
      folder: an export, or what transformers saved after loading one.

    Raises:
      ConfigError: it is no export, or config.json contradicts the run; all fields are listed.
    """
    found = _read_config(folder)
    run = wanted or from_mapping(RunConfig, found["storm_jax"]["run"])
    lines = _contradictions(model_settings(run.model), found)
    if lines:
        where = "--config" if wanted else "the run that it names (give the right one as --config)"
        raise ConfigError(
            f"{folder}/config.json and {where} are of different models:\n" + "\n".join(lines)
        )
    return run


def weights_dtype(folder: Path) -> np.dtype:
    """The dtype that the weights of an export have, float32 where they differ.

    Raises:
      ConfigError: it is no export.
    """
    name = _read_config(folder)["dtype"]
    return np.dtype(getattr(ml_dtypes, name, name))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("model_type") != "storm" or not found.get("storm_jax"):
        raise ConfigError(f"{folder} is no export of storm_jax: its config.json does not say so")
    return found


def _contradictions(wanted: Mapping[str, Any], found: Mapping[str, Any], at: str = "") -> list[str]:
    lines = []
    for key, value in wanted.items():
        have = found.get(key)
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            lines += _contradictions(value, have, f"{at}{key}.")
        elif have != value:
            lines.append(f"  {at}{key}: {have} in config.json, {value} there")
    return lines


def read_params(folder: Path, model: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of an export one by one, each with its path, in the dtype of the files.

    Raises:
      WeightsError: tensors are missing, have no place or another shape; names are listed.
    """
    weights, table = Weights(folder), names.storm_names(model)
    shapes = load.shapes_of(StormModel(model).abstract())
    layers = {name.hf: shapes[name.ours][0] if name.stacked else 1 for name in table}
    asked = {hf.format(layer=i) for hf, count in layers.items() for i in range(count)}
    load.refuse(weights, asked - set(weights.names), set(weights.names) - asked)
    return load.read_part(weights, table, str, shapes)
