"""Brings published weights in, and shows what a checkpoint holds.

python -m storm_jax.convert import --vit=DIR|HUB_ID --decoder=DIR|HUB_ID --config=configs/align.py
    --out=CKPT
python -m storm_jax.convert inspect CKPT|DIR
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax import checkpoint
from storm_jax.checkpoint import CheckpointError
from storm_jax.config import ConfigError, RunConfig, from_mapping, to_json
from storm_jax.data import text
from storm_jax.interop import architecture, gemma_orbax, load, names
from storm_jax.interop.files import Weights, WeightsError, part_of, resolve
from storm_jax.models.storm import Params, StormModel, count_parameters
from storm_jax.models.vit import resize_positions
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_VIT = flags.DEFINE_string("vit", None, "SigLIP: a transformers folder or a Hugging Face id.")
_DECODER = flags.DEFINE_string("decoder", None, "Gemma or Qwen2, likewise.")
_OUT = flags.DEFINE_string("out", None, "A new folder for the checkpoint.")

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def import_weights(
    config: RunConfig, out: str, *, vit: str | None = None, decoder: str | None = None
) -> Path:
    """Writes a checkpoint with the ViT, the decoder, or both, from published weights.

    Parameters keep the dtype of the files. `--config.init_from.vit=OUT` and `.decoder=OUT` of a
    training run take them.

    Args:
      config: of the run that will start from it; compared with the weights' own config.json.
      out: a new folder.
      vit, decoder: folders as transformers writes them, or Hugging Face repository ids.

    Returns:
      The folder of the checkpoint.

    Raises:
      ConfigError: the weights are of an architecture that is not offered or not that of `config`.
      WeightsError: weights are missing or have no place; all of them are listed.
      CheckpointError: `out` holds checkpoints already.
    """
    if not (vit or decoder):
        raise WeightsError("nothing to import: give --vit, --decoder or both")
    if (Path(out) / "checkpoints").exists():
        raise CheckpointError(f"{Path(out) / 'checkpoints'} exists; give a new folder as --out")
    abstract = abstract_params(StormModel(config.model), make_mesh(config.mesh))
    params: Params = {}
    if vit:
        folder = part_of(resolve(vit), "vision_tower")
        params["vit"] = _import_vit(config, folder, abstract["vit"])
    if decoder:
        folder = part_of(resolve(decoder), "llm")
        params["decoder"] = _import_decoder(config, folder, abstract["decoder"])
        _copy_tokenizer(folder, Path(out))
    written = checkpoint.save_params(out, params, config)
    _say(f"wrote {written}: {', '.join(params)}")
    return written


def _import_vit(config: RunConfig, folder: Path, abstract: Params) -> Params:
    hf = architecture.read(folder)
    wanted = config.model.vit
    architecture.vit_config(hf, wanted)
    stored, side = architecture.stored_positions(hf), wanted.position_grid
    if stored != side:
        _say(f"position embeddings are resized from {stored} x {stored} to {side} x {side}")

    def resized(name: names.Name, tensor: np.ndarray) -> np.ndarray:
        if name.ours != "positions" or stored == side:
            return tensor
        table = jnp.asarray(tensor.astype(np.float32))
        return np.asarray(resize_positions(table, side)).astype(tensor.dtype)

    weights = Weights(folder)
    table, spell = names.vit_names(wanted), load.vit_spelling(weights)
    load.check_names(weights, table, spell, wanted.layers)
    params = load.load_part(weights, table, spell, abstract, resized)
    _say(f"vit: {count_parameters(params):,} parameters from {folder}")
    return params


def _import_decoder(config: RunConfig, folder: Path, abstract: Params) -> Params:
    wanted = config.model.decoder
    if (orbax := gemma_orbax.find(folder)) is not None:
        source = gemma_orbax.GemmaCheckpoint(orbax)
        params = source.load(source.config(wanted), abstract)
        _say(f"decoder: {count_parameters(params):,} parameters from {orbax} ({source.layout})")
        return params
    architecture.decoder_config(architecture.read(folder), wanted)
    weights = Weights(folder)
    table, spell = names.decoder_names(wanted), load.decoder_spelling(weights)
    load.check_names(weights, table, spell, wanted.layers)
    params = load.load_part(weights, table, spell, abstract)
    _say(f"decoder: {count_parameters(params):,} parameters from {folder}")
    return params


def _copy_tokenizer(folder: Path, out: Path) -> None:
    """The decoder's tokenizer and chat template, beside the checkpoints."""
    if not (folder / "tokenizer.json").is_file():
        _say(f"{folder} has no tokenizer.json: set data.tokenizer of the run")
        return
    text.load_tokenizer(str(folder)).save_pretrained(out / "tokenizer")
    _say(f"its tokenizer: --config.data.tokenizer={out / 'tokenizer'}")


def inspect(path: str) -> str:
    """Names, shapes, dtypes and bytes of a checkpoint or of a folder of safetensors files.

    Raises:
      CheckpointError, WeightsError: it is neither.
    """
    try:
        config, tensors = checkpoint.describe(path)
    except CheckpointError:
        if not any(Path(path).glob("*.safetensors")):
            raise
        weights = Weights(path)
        tensors = {name: weights.describe(name) for name in weights.names}
        config = None
    lines, total = [], 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * _item_size(dtype)
        total += size
        lines.append(f"{name:<60} {dtype:<9} {size:>15,} {'x'.join(map(str, shape))}")
    numbers = sum(math.prod(shape) for shape, _ in tensors.values())
    lines.append(f"{len(tensors)} tensors, {numbers:,} numbers, {total:,} bytes")
    if config is not None:
        lines.append(to_json(config))
    return "\n".join(lines)


def _item_size(dtype: str) -> int:
    if dtype in _BYTES:
        return _BYTES[dtype]
    if re.fullmatch(r"F8_\w+", dtype):
        return 1
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    command, *rest = argv[1:] or [""]
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    try:
        if command == "import" and not rest:
            if _CONFIG.value is None or _OUT.value is None:
                raise app.UsageError("import needs --config and --out")
            config = from_mapping(RunConfig, json.loads(_CONFIG.value.to_json_best_effort()))
            import_weights(config, _OUT.value, vit=_VIT.value, decoder=_DECODER.value)
        elif command == "inspect" and len(rest) == 1:
            print(inspect(rest[0]))
        else:
            raise app.UsageError(f"unknown command: {' '.join(argv[1:]) or 'none'}\n{__doc__}")
    except (CheckpointError, ConfigError, WeightsError, text.TokenizerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    app.run(main)
