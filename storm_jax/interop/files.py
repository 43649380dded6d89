"""Folders of safetensors files: read tensor by tensor, and written so."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
_SPELLED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class WeightsError(ValueError):
    """Weights that cannot be found or do not fit; the message names them and the remedy."""


class Weights:
    """The tensors of a checkpoint folder: one file, or several and an index.

    Nothing is read before `tensor` is called, and nothing of it is kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
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


class WeightsWriter:
    """Writes a folder of safetensors files tensor by tensor; none is kept.

    The format is a header of lengths and places, then the tensors' bytes, so that a file can be
    written from front to back (safetensors' own `save_file` wants all its tensors at once).
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        max_shard_bytes: int,
    ):
        """Args:
        folder: exists.
        tensors: shape and dtype of every tensor, in the order in which they will be written.
        max_shard_bytes: of the tensors in a file; a larger tensor has a file of its own.
        """
        self.folder, self._tensors = folder, tensors
        shards: list[list[str]] = []
        room = 0
        for name in tensors:
            size = self._bytes(name)
            if not shards or size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(name)
            room -= size
        count = len(shards)
        if count == 1:
            self._files = {"model.safetensors": shards[0]}
        else:
            spelled = (f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
            self._files = dict(zip(spelled, shards, strict=True))
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._order = iter(tensors)
        self._opened: tuple[str, BinaryIO] | None = None

    def _bytes(self, name: str) -> int:
        shape, dtype = self._tensors[name]
        return math.prod(shape) * dtype.itemsize

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor, which is the next one of those announced."""
        shape, dtype = self._tensors[name]
        assert name == next(self._order), name
        assert tensor.shape == shape and tensor.dtype == dtype, (name, tensor.shape, tensor.dtype)
        file = self._file_of[name]
        if self._opened is None or self._opened[0] != file:
            self._close()
            self._opened = file, self._begin(file)
        flat = np.ascontiguousarray(tensor).reshape(-1)
        self._opened[1].write(flat.view(np.uint8).data)

    def _begin(self, file: str) -> BinaryIO:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self._files[file]:
            shape, dtype = self._tensors[name]
            start, end = end, end + self._bytes(name)
            header[name] = {
                "dtype": _SPELLED[dtype.name],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        opened = (self.folder / file).open("wb")
        opened.write(len(text).to_bytes(8, "little") + text)
        return opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def finish(self) -> int:
        """Ends the last file and writes the index, if there are several; returns their number."""
        self._close()
        assert next(self._order, None) is None, "not every tensor was written"
        if len(self._files) > 1:
            total = sum(self._bytes(name) for name in self._tensors)
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return len(self._files)


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
