"""Folders of safetensors files: which tensors they hold, and each of them when it is asked for."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open


class WeightsError(ValueError):
    """Weights that cannot be found or do not fit; the message names them and the remedy."""


class Weights:
    """The tensors of a checkpoint folder: one file, or several and an index.

    Nothing is read before `tensor` is called, and nothing of it is kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if not files:
                raise WeightsError(
                    f"no *.safetensors in {self.folder}; save the model with save_pretrained of"
                    " transformers, which writes them"
                )
            self._file_of = {}
            for file in files:
                with safe_open(self.folder / file, framework="np") as opened:
                    self._file_of.update(dict.fromkeys(opened.keys(), file))
        missing = sorted({f for f in self._file_of.values() if not (self.folder / f).is_file()})
        if missing:
            raise WeightsError(f"{index} names files that are not there: {', '.join(missing)}")

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in its own dtype; bfloat16 is `ml_dtypes.bfloat16`."""
        with safe_open(self.folder / self._file_of[name], framework="np") as opened:
            return opened.get_tensor(name)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ("BF16", "F32") of a tensor, without reading it."""
        with safe_open(self.folder / self._file_of[name], framework="np") as opened:
            piece = opened.get_slice(name)
            return tuple(piece.get_shape()), piece.get_dtype()


def resolve(name: str) -> Path:
    """A local folder, or the folder into which a Hugging Face repository was downloaded.

    Raises:
      WeightsError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, network errors, malformed ids
        raise WeightsError(
            f"{name} is no folder here and could not be had from the Hugging Face hub"
            f" ({type(error).__name__}: {error}); give the path of a local folder with config.json"
            f" and *.safetensors, which `hf download {name} --local-dir DIR` makes where there is a"
            " network"
        ) from error


def part_of(folder: Path, name: str) -> Path:
    """A part's own folder in a model that keeps one for each part, as VILA does; else `folder`."""
    return folder / name if (folder / name / "config.json").is_file() else folder
