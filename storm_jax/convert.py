"""Brings published weights in, takes models out to PyTorch, and shows what a checkpoint holds.

python -m storm_jax.convert import --vit=DIR|HUB_ID --decoder=DIR|HUB_ID --config=configs/align.py
    --out=CKPT
python -m storm_jax.convert import --storm=HF_DIR --out=CKPT
python -m storm_jax.convert export --checkpoint=CKPT --out=HF_DIR [--dtype=bfloat16]
    [--max-shard-size=5GB]
python -m storm_jax.convert check --checkpoint=CKPT --hf=HF_DIR [--limit=1e-4]
python -m storm_jax.convert inspect CKPT|DIR
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax import checkpoint
from storm_jax.checkpoint import CheckpointError
from storm_jax.config import ConfigError, MeshConfig, RunConfig, from_mapping, to_json
from storm_jax.config_arguments import spelled_out
from storm_jax.data import text
from storm_jax.disk import NotOnDiskError, on_disk
from storm_jax.interop import architecture, check, gemma_orbax, load, names, settings, torch_export
from storm_jax.interop.files import Weights, WeightsError, part_of, resolve
from storm_jax.interop.processor_export import write_processor
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.models.storm import Params, StormModel
from storm_jax.models.vit import resize_positions
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_VIT = flags.DEFINE_string("vit", None, "SigLIP: a transformers folder or a Hugging Face id.")
_DECODER = flags.DEFINE_string("decoder", None, "Gemma or Qwen2, likewise.")
_STORM = flags.DEFINE_string("storm", None, "What export wrote: a folder or a Hugging Face id.")
_OUT = flags.DEFINE_string("out", None, "A new folder for the result.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, or one checkpoint.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the weights exported; default: as they are."
)
_SHARD = flags.DEFINE_string("max-shard-size", "5GB", "Of an exported file: 5GB, 500MB.")
_HF = flags.DEFINE_string("hf", None, "The export to be compared with --checkpoint.")
_LIMIT = flags.DEFINE_float("limit", 1e-4, "Largest error, as a share of a stage's values.", 0.0)

Parameters = Iterator[tuple[str, np.ndarray]]  # of a part, one by one, each with its path

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
    _refuse_checkpoints(out)
    abstract = StormModel(config.model).abstract()
    parts = {}
    # What does not fit is found before anything is written.
    if vit:
        folder = part_of(resolve(vit), "vision_tower")
        parts["vit"] = folder, _read_vit(config, folder, abstract["vit"])
    if decoder:
        folder = part_of(resolve(decoder), "llm")
        parts["decoder"] = folder, _read_decoder(config, folder, abstract["decoder"])

    def parameters():
        for part, (folder, read) in parts.items():
            count = 0
            for path, value in read:
                count += value.size
                yield f"{part}/{path}", value
                del value  # else it stays while the next one is read
            _say(f"{part}: {count:,} parameters from {folder}")

    _say("this machine's CPU reads and writes; the mesh of --config is for the training")
    written = checkpoint.save_parameters(out, parameters(), config)
    if decoder:
        _copy_tokenizer(parts["decoder"][0], Path(out))
    _say(f"wrote {written}: {', '.join(parts)}")
    return written


def _read_vit(config: RunConfig, folder: Path, abstract: Params) -> Parameters:
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
    return load.read_part(weights, table, spell, load.shapes_of(abstract), resized)


def _read_decoder(config: RunConfig, folder: Path, abstract: Params) -> Parameters:
    wanted, shapes = config.model.decoder, load.shapes_of(abstract)
    if (orbax := gemma_orbax.find(folder)) is not None:
        source = gemma_orbax.GemmaCheckpoint(orbax)
        _say(f"decoder: Google's Gemma in {orbax} ({source.layout})")
        return source.read(source.config(wanted), shapes)
    architecture.decoder_config(architecture.read(folder), wanted)
    weights = Weights(folder)
    table, spell = names.decoder_names(wanted), load.decoder_spelling(weights)
    load.check_names(weights, table, spell, wanted.layers)
    return load.read_part(weights, table, spell, shapes)


def import_export(folder: Path, out: str, config: RunConfig | None = None) -> Path:
    """Writes a checkpoint from a folder that `export_weights` or, later, transformers wrote.

    Args:
      folder: the export.
      out: a new folder.
      config: of the run that will start from it; None: that of the run which was exported.

    Raises:
      ConfigError: it is no export, or of another model than `config`.
      WeightsError: tensors are missing or have no place; all of them are listed.
      CheckpointError: `out` holds checkpoints already.
    """
    _refuse_checkpoints(out)
    run = torch_export.read_run(folder, config)
    written = checkpoint.save_parameters(out, torch_export.read_params(folder, run.model), run)
    _copy_tokenizer(folder, Path(out))
    _say(f"wrote {written}")
    return written


def export_weights(
    path: str, out: Path, *, dtype: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a checkpoint as a folder for transformers, with processor and code.

    Args:
      path: a training workdir (its newest checkpoint) or one checkpoint.
      out: a new or empty folder.
      dtype: of the weights; None: as they are stored.
      max_shard_bytes: of a file.

    Raises:
      CheckpointError: there is no checkpoint, or `out` holds something.
      ConfigError: transformers has no decoder like this one.
      WeightsError: the checkpoint holds some parts alone.
      TokenizerError: there is no tokenizer, or it does not fit the chat template.
    """
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; give a new folder as --out")
    run, tensors = checkpoint.describe(path)
    settings.model_settings(run.model)  # refuses before anything is written
    saved = checkpoint.find(path)[0].parent / "tokenizer"
    tokenizer_name = str(saved) if saved.is_dir() else run.data.tokenizer
    tokenizer = text.load_tokenizer(tokenizer_name)
    stop = text.stop_tokens(tokenizer, run.data.chat_template)
    pad = stop[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out.mkdir(parents=True, exist_ok=True)
    files = torch_export.write(
        run,
        {name: (shape, _dtype(spelled)) for name, (shape, spelled) in tensors.items()},
        functools.partial(checkpoint.parameters, path),
        out,
        dtype=None if dtype is None else _dtype(dtype),
        max_shard_bytes=max_shard_bytes,
        video_token_id=write_processor(run, tokenizer_name, out),
        generation={
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": list(stop),
            "pad_token_id": pad,
        },
    )
    _say(f"wrote {out}: {files} {'file' if files == 1 else 'files'} of weights")


def check_export(path: str, folder: Path, limit: float) -> list[check.StageError]:
    """Sends the same input through a checkpoint and its export, and prints each stage's error.

    Both compute in float32, with the weights rounded as they were for the export.

    Args:
      path: a training workdir (its newest checkpoint) or one checkpoint.
      folder: of the export, whose code is run.
      limit: of the error as a share of the stage's largest value, where that is above 1.

    Returns:
      The stages above the limit, the first one first.

    Raises:
      CheckpointError: there is no checkpoint, or not of the whole model.
      ConfigError: `folder` is no export.
      WeightsError: PyTorch is not installed, or the export is of another model.
    """
    dtype = torch_export.weights_dtype(folder)
    run = checkpoint.read_config(path)
    # One device, as in PyTorch: on several, each would note its share of the frames, padded.
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    abstract = abstract_params(StormModel(run.model), mesh, jnp.dtype("float32"))
    params = checkpoint.load_params(path, abstract)
    params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
    sent = check.probe(run.model)
    with jax.set_mesh(mesh):
        ours = check.run_ours(run.model, params, sent)
    del params  # two models of full size need not be in memory together
    errors = check.compare(ours, check.run_theirs(folder, sent))
    _say(f"both in float32, with weights rounded to {dtype.name}")
    print(f"{'stage':<20} {'largest error':>14} {'largest value':>14} {'share':>10}")
    for e in errors:
        print(f"{e.stage:<20} {e.error:>14.3e} {e.size:>14.3e} {e.share:>10.1e}")
    return check.above(errors, limit)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _size(text: str) -> int:
    """Bytes that "5GB" or "500MB" are."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])B", text)
    if not found:
        raise app.UsageError(f"--max-shard-size={text} is no size: write 5GB or 500MB")
    return int(float(found[1]) * 1000 ** ("KMG".index(found[2]) + 1))


def _refuse_checkpoints(out: str) -> None:
    if (Path(out) / "checkpoints").exists():
        raise CheckpointError(f"{Path(out) / 'checkpoints'} exists; give a new folder as --out")


def _copy_tokenizer(folder: Path, out: Path) -> None:
    """The decoder's tokenizer, chat template and generation config, beside the checkpoints."""
    if not (folder / "tokenizer.json").is_file():
        _say(f"{folder} has no tokenizer.json: set data.tokenizer of the run")
        return
    save_tokenizer(text.load_tokenizer(str(folder)), out / "tokenizer")
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
    return _dtype(dtype).itemsize


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    command, *rest = argv[1:] or [""]
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if command != "check":
        # Nothing else computes: no accelerator is needed, nor held for others.
        jax.config.update("jax_platforms", "cpu")
    try:
        if _OUT.value is not None:
            on_disk("--out", _OUT.value, "give a folder on a disk and copy it up afterwards")
        if command == "import" and not rest:
            config = None
            if _CONFIG.value is not None:
                config = from_mapping(RunConfig, json.loads(_CONFIG.value.to_json_best_effort()))
            if _OUT.value is None:
                raise app.UsageError("import needs --out")
            if _STORM.value is not None:
                if _VIT.value or _DECODER.value:
                    raise app.UsageError("--storm brings all parts; --vit and --decoder go alone")
                import_export(resolve(_STORM.value), _OUT.value, config)
            elif config is None:
                raise app.UsageError("import of --vit and --decoder needs --config")
            else:
                import_weights(config, _OUT.value, vit=_VIT.value, decoder=_DECODER.value)
        elif command == "export" and not rest:
            if _CHECKPOINT.value is None or _OUT.value is None:
                raise app.UsageError("export needs --checkpoint and --out")
            export_weights(
                _CHECKPOINT.value,
                Path(_OUT.value),
                dtype=_DTYPE.value,
                max_shard_bytes=_size(_SHARD.value),
            )
        elif command == "check" and not rest:
            if _CHECKPOINT.value is None or _HF.value is None:
                raise app.UsageError("check needs --checkpoint and --hf")
            wrong = check_export(_CHECKPOINT.value, Path(_HF.value), _LIMIT.value)
            if wrong:
                sys.exit(
                    f"error: {wrong[0].stage} is the first stage above --limit={_LIMIT.value}:"
                    f" {wrong[0].share:.1e} of its values"
                )
        elif command == "inspect" and len(rest) == 1:
            print(inspect(rest[0]))
        else:
            raise app.UsageError(f"unknown command: {' '.join(argv[1:]) or 'none'}\n{__doc__}")
    except (
        CheckpointError, ConfigError, NotOnDiskError, WeightsError, text.TokenizerError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    sys.argv[:] = spelled_out(sys.argv)
    app.run(main)
