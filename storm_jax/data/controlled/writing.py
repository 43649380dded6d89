"""Data sets on disk: mp4 files, records, a tokenizer, and dataset.json with all parameters."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import av
import numpy as np
from tqdm import tqdm

import storm_jax
from storm_jax.data.controlled.backgrounds import Background, Clips, Still, Texture
from storm_jax.data.controlled.clip import make_clip, pose
from storm_jax.data.controlled.families import FAMILIES, Family
from storm_jax.data.controlled.layout import Layout
from storm_jax.data.drawing import write_video
from storm_jax.data.text import train_tokenizer

VERSION = 1  # of the generator: other clips for the same parameters need another number
VOCABULARY = 512  # ids of the tokenizer: 256 bytes, 8 special tokens, the words

STILL = "still"  # as `backgrounds`
_CHUNK = 32  # clips that a worker makes before it reports
_SPLITS = ("train", "test", "test_seen")


class DataSetError(ValueError):
    """Parameters that make no data set, or a folder that holds another one."""


@dataclass(frozen=True)
class Parameters:
    """All that the contents of a data set depend on.

    Attributes:
      families: their names; clips take turns.
      train, test, test_seen: records of the splits. `test` shows colours of shapes and digits,
        positions and parts of background videos that training never shows; `test_seen` is drawn
        like `train`.
      frames, size, group: see `Layout`.
      seed: of everything random.
      backgrounds: folder of videos; "": procedural moving textures; "still": one calm picture.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    train: int = 8640
    test: int = 1440
    test_seen: int = 1440
    frames: int = 8
    size: int = 48
    group: int = 4
    seed: int = 0
    backgrounds: str = ""

    def __post_init__(self):
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families or len(set(self.families)) < len(self.families):
            raise DataSetError(
                f"families={','.join(self.families)!r}: name some of {', '.join(FAMILIES)},"
                " each once"
            )
        for name in _SPLITS:
            if getattr(self, name) < 0:
                raise DataSetError(f"{name}={getattr(self, name)} must not be negative")
        try:
            self.layout("train")
        except ValueError as error:
            raise DataSetError(str(error)) from None

    def layout(self, split: str) -> Layout:
        return Layout(self.frames, self.size, self.group, held_out=split == "test")

    def family(self, index: int) -> tuple[Family, int]:
        """Family of record number `index` of a split, and the record's number within it."""
        item, turn = divmod(index, len(self.families))
        return FAMILIES[self.families[turn]], item


def write_data_set(out: str, parameters: Parameters, workers: int = 0) -> str:
    """Writes OUT/{train,test,test_seen}.jsonl, OUT/videos, OUT/tokenizer and OUT/dataset.json.

    A folder that holds the finished data set is left as it is, one that was interrupted is
    completed. The files depend on `parameters` only.

    Args:
      workers: processes; 0: as many as this process may use cores.

    Returns:
      The path of dataset.json.

    Raises:
      DataSetError: the folder holds something else, or backgrounds cannot be used.
    """
    if workers < 0:
        raise DataSetError(f"workers={workers} must not be negative")
    try:
        background = _background(parameters)
    except ValueError as error:
        raise DataSetError(str(error)) from error
    description = _description(parameters, background)
    path = os.path.join(out, "dataset.json")
    if _begun(out, path, description):
        return path
    os.makedirs(os.path.join(out, "videos"), exist_ok=True)
    _write_json(path, {**description, "complete": False})
    counts = {split: _write_split(out, split, parameters, workers) for split in _SPLITS}
    _tokenizer().save_pretrained(os.path.join(out, "tokenizer"))
    _write_json(path, {**description, "complete": True, "counts": counts})
    return path


def _background(parameters: Parameters) -> Background:
    if parameters.backgrounds == STILL:
        return Still()
    if parameters.backgrounds:
        return Clips(parameters.backgrounds, parameters.size)
    return Texture()


def _description(parameters: Parameters, background: Background) -> dict[str, object]:
    """What dataset.json says before anything is written."""
    used = [FAMILIES[name] for name in parameters.families]
    return {
        "generator": "storm_jax.data.controlled",
        "version": VERSION,
        "parameters": {
            field.name: getattr(parameters, field.name)
            for field in dataclasses.fields(parameters)
            if field.name != "backgrounds"  # its files count, not where they lie
        },
        "background": background.description,
        "claims": {
            family.name: {
                "needs_time": family.needs_time,
                "needs_mixing": family.needs_mixing,
                "needs_coverage": family.needs_coverage,
            }
            for family in used
        },
        "versions": {
            "storm_jax": storm_jax.__version__,
            "numpy": np.__version__,
            "av": av.__version__,
        },
    }


def _begun(out: str, path: str, description: dict[str, object]) -> bool:
    """Whether the folder holds this data set complete; raises if it holds anything else."""
    if not os.path.isfile(path):
        if os.path.isdir(out) and os.listdir(out):
            raise DataSetError(f"{out} is not empty and has no dataset.json; name another folder")
        return False
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    ours = json.loads(json.dumps(description))
    for key in ("generator", "version", "parameters", "background"):
        if found.get(key) != ours[key]:
            raise DataSetError(
                f"{path} is of another data set: {_difference(found.get(key), ours[key], key)}."
                " Name another folder, or remove this one"
            )
    return bool(found["complete"])


def _difference(found: object, ours: object, key: str) -> str:
    if isinstance(found, dict) and isinstance(ours, dict):
        for name in [*ours, *found]:
            if found.get(name) != ours.get(name):
                return f"{name} is {found.get(name)!r} there and {ours.get(name)!r} here"
    return f"{key} is {found!r} there and {ours!r} here"


# ------------------------------------------------------------------------------------------ splits


def _write_split(out: str, split: str, parameters: Parameters, workers: int) -> int:
    """Writes the videos, then the records; returns the number of these."""
    count = getattr(parameters, split)
    chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    path = os.path.join(out, f"{split}.jsonl")
    with open(path + ".part", "w", encoding="utf-8") as file:
        with tqdm(total=count, desc=split, unit="clip", disable=None) as bar:
            for lines in _in_processes(chunks, (out, split, parameters), workers):
                file.writelines(lines)
                bar.update(len(lines))
    os.replace(path + ".part", path)
    return count


def _in_processes(
    chunks: Sequence[range], job: tuple[str, str, Parameters], workers: int
) -> Iterator[list[str]]:
    """The records of each chunk, in order, after their videos are written."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    if workers <= 1:
        _start(*job)
        yield from map(_write_chunk, chunks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, job) as pool:
        yield from pool.map(_write_chunk, chunks)


_job: tuple[str, str, Parameters, Background]  # of this process


def _start(out: str, split: str, parameters: Parameters) -> None:
    global _job
    _job = (out, split, parameters, _background(parameters))


def _write_chunk(numbers: range) -> list[str]:
    out, split, parameters, background = _job
    layout, lines = parameters.layout(split), []
    for i in numbers:
        name = f"{split}_{i:06d}"
        family, item = parameters.family(i)
        path = os.path.join(out, "videos", f"{name}.mp4")
        question, answer = pose(family, item, parameters.seed, split, layout)
        if not os.path.exists(path):
            clip = make_clip(family, item, parameters.seed, split, layout, background)
            write_video(path + ".part", clip.frames)
            os.replace(path + ".part", path)
        record = {
            "id": name,
            "task": family.name,
            "media": [{"type": "video", "path": f"videos/{name}.mp4"}],
            "conversations": [
                {"from": "human", "value": f"<video>\n{question.text}"},
                {"from": "gpt", "value": question.options[answer]},
            ],
            "options": question.options,
            "answer": answer,
        }
        if family.needs_mixing:
            record["group"] = parameters.group
        lines.append(json.dumps(record) + "\n")
    return lines


def _tokenizer():
    """A byte-level BPE of the questions of all families: the same one for every data set."""
    texts = ["user\n", "model\n", "assistant\n"] * 2000  # headers of the chat templates
    for family in FAMILIES.values():
        for item in range(400):
            question, answer = pose(
                family, item, 0, "tokenizer", Layout(frames=8 * 2 ** (item % 7))
            )
            texts += [f"<video>\n{question.text}", question.options[answer]]
    return train_tokenizer(texts, VOCABULARY)


def _write_json(path: str, contents: dict[str, object]) -> None:
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=2)
        file.write("\n")
    os.replace(path + ".part", path)
