"""What an answer depends on: written into every result, and compared before results are mixed."""

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

import storm_jax
from storm_jax import checkpoint
from storm_jax.config import RunConfig
from storm_jax.evaluation.items import Item
from storm_jax.inference.options import Options
from storm_jax.inference.sampling import Sampling

# Where things lie changes no answer.
_NOT_COMPARED = ("checkpoint.path", "data")
_WHOLE = 1 << 20  # bytes of a file that is hashed as a whole
_PIECE = 1 << 16
_PACKAGES = ("jax", "jaxlib", "av", "tokenizers", "transformers")


def recipe(
    *,
    path: str,
    config: RunConfig,
    options: Options,
    sampling: Sampling,
    stop: Sequence[str],
    max_new_tokens: int,
    quantization: str,
    slots: int,
    devices: Sequence[jax.Device],
) -> dict[str, Any]:
    """The part of the recipe that all tasks share.

    Args:
      path: of the checkpoint.
      config: of the checkpoint with the options applied.
      stop: that ends an answer besides what the prompts have.
      max_new_tokens: 0: as each prompt has it.
      slots: answers that are made together: the last digits of a product depend on its size.
      devices: of one engine.
    """
    model, frames = config.model, config.data.frames
    rule = f"{frames.fps:g} a second" if frames.fps else "evenly from the first to the last"
    return {
        "checkpoint": {"path": str(path), **fingerprint_of_checkpoint(path)},
        "frames": {
            **dataclasses.asdict(frames),
            "rule": f"{rule}, {frames.max_frames} at most",
            "duplicate_threshold": options.duplicate_threshold,
        },
        "reduction": {
            **dataclasses.asdict(model.reduction),
            "keep_tokens": options.keep_tokens,
        },
        "image_size": model.vit.image_size,
        "chat_template": config.data.chat_template,
        "dtype": model.dtype,
        "quantization": quantization or "none",
        "decode_timeout": config.data.decode_timeout,
        "decoding": {
            "greedy": sampling.temperature == 0,
            **{
                name: value
                for name, value in dataclasses.asdict(sampling).items()
                if name not in ("stop_tokens", "max_new_tokens")
            },
            "max_new_tokens": max_new_tokens or "as the prompt has it",
            "stop": list(stop),
        },
        "engine": {
            "slots": slots,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        },
        "versions": {
            "storm_jax": storm_jax.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "git": git_revision(),
    }


def fingerprint_of_items(items: Sequence[Item]) -> str:
    """Of everything that the annotations say; where the videos lie does not count."""
    digest = hashlib.sha256()
    for item in items:
        about: dict[str, Any] = {**vars(item), "categories": dict(item.categories)}
        about["video"] = Path(item.video).name
        about["subtitles"] = Path(item.subtitles).name if item.subtitles else None
        digest.update(json.dumps(about, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def fingerprint_of_checkpoint(path: str) -> dict[str, Any]:
    """Step and fingerprint: names, sizes and contents of its files.

    Of files above 1 MiB the first and the last 64 KiB are read.
    """
    folder, step = checkpoint.find(path)
    where = folder / str(step)
    digest = hashlib.sha256()
    for file in _files(where):
        size = file.stat().length
        digest.update(f"{file.relative_to(where)}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= _WHOLE:
                digest.update(content.read())
            else:
                digest.update(content.read(_PIECE))
                content.seek(size - _PIECE)
                digest.update(content.read())
    return {"step": step, "fingerprint": digest.hexdigest()[:16]}


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below, sorted; a bucket knows no recursive pattern."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def git_revision() -> str | None:
    """Of the working tree that this package lies in, with "+changes" where it has some."""
    here = Path(storm_jax.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside of somebody else's repository.
        if not git("ls-files", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The fields in which two recipes differ, "frames.max_frames: 8 there, 16 asked for"."""
    old, new = _flat(there), _flat(asked)
    return [
        f"{name}: {_shown(old, name)} there, {_shown(new, name)} asked for"
        for name in sorted(old.keys() | new.keys())
        if name not in _NOT_COMPARED and old.get(name) != new.get(name)
    ]


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "none"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
