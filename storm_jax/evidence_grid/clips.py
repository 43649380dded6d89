"""The videos of a grid: written once, decoded once by the project's own reader, kept as arrays."""

import dataclasses
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from storm_jax.config import SourceConfig
from storm_jax.data import video
from storm_jax.data.controlled.writing import DataSetError, Parameters, write_data_set
from storm_jax.data.conversation import Media, Turn
from storm_jax.data.open_records import open_records
from storm_jax.evidence_grid.recipe import SPLITS, EvidenceError, Videos, difference
from storm_jax.frames import FrameConfig

_TIMEOUT = 30.0  # seconds a file
_FAILED = "failed"  # the file that says that no more videos will come
_POLL = 0.3  # seconds
_AT_ONCE = 32  # clips that a process decodes before it is given more


@dataclass(frozen=True)
class Clips:
    """One split of one data set.

    Attributes:
      frames: uint8 [N, F, H, W, 3], every frame of every clip; memory-mapped.
      turns: the conversation about each clip.
      tasks: family and scale of each clip, "direction/4".
      options: how many each question has.
    """

    frames: np.ndarray
    turns: tuple[tuple[Turn, ...], ...]
    tasks: tuple[str, ...]
    options: np.ndarray


def folders(data: str, videos: Videos) -> dict[str, Parameters]:
    """The data sets of a grid: folder -> parameters."""
    of_all = dict(
        families=videos.families,
        size=videos.size,
        seed=videos.seed,
        backgrounds=videos.backgrounds,
    )
    found = {}
    for scale in videos.short_scales:
        found[os.path.join(data, f"short_{scale}")] = Parameters(
            train=videos.short_train,
            test=0,
            test_seen=videos.test,
            frames=videos.short_frames,
            group=scale,
            **of_all,
        )
    for scale in videos.scales:
        found[os.path.join(data, f"long_{scale}")] = Parameters(
            train=videos.train,
            test=videos.test,
            test_seen=videos.test,
            frames=videos.frames,
            group=scale,
            **of_all,
        )
    return found


def check(data: str, videos: Videos) -> None:
    """Raises EvidenceError if a folder holds, or has begun to hold, another data set."""
    for folder, parameters in folders(data, videos).items():
        path = os.path.join(folder, "dataset.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file).get("parameters")
            wanted = json.loads(json.dumps(dataclasses.asdict(parameters)))
            del wanted["backgrounds"]  # the generator compares what they show
            if found != wanted:
                raise EvidenceError(
                    f"{path} is of another data set: {difference(found, wanted)}. Name another"
                    " --data, or remove it"
                )


def prepare(data: str, videos: Videos, workers: int = 0) -> None:
    """Writes the videos and their decoded frames, or leaves what is there; short clips first.

    Raises:
      EvidenceError: a folder holds another data set, or a video cannot be read.
    """
    os.makedirs(data, exist_ok=True)
    failed = os.path.join(data, _FAILED)
    if os.path.exists(failed):
        os.remove(failed)
    todo = folders(data, videos)
    cores = workers or len(os.sched_getaffinity(0))

    def make(folder: str, processes: int) -> None:
        try:
            write_data_set(folder, todo[folder], processes)
        except DataSetError as error:
            raise EvidenceError(str(error)) from error
        for split in ("train", *SPLITS):
            if getattr(todo[folder], split):
                _decode(folder, split, todo[folder], processes)

    short = list(todo)[: len(videos.short_scales)]
    try:
        for group in (short, [folder for folder in todo if folder not in short]):
            each = max(1, round(2 * cores / max(1, len(group))))  # one waits while another is busy
            with ThreadPoolExecutor(max(1, len(group))) as threads:
                list(threads.map(make, group, [each] * len(group)))
    except BaseException as error:
        with open(failed, "w", encoding="utf-8") as file:  # for those who wait in `load`
            file.write(str(error))
        raise


def load(folder: str, split: str) -> Clips:
    """A split that `prepare` made, or makes now in another process: then this waits.

    Raises:
      EvidenceError: the other process failed.
    """
    failed = os.path.join(os.path.dirname(folder), _FAILED)
    while not os.path.exists(_array(folder, split)):
        if os.path.exists(failed):
            raise EvidenceError(f"the videos in {os.path.dirname(folder)} were not made")
        time.sleep(_POLL)
    records = _records(folder, split)
    with open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8") as file:
        options = [len(json.loads(line)["options"]) for line in file]
    scale = folder.rsplit("_", 1)[1]
    return Clips(
        np.load(_array(folder, split), mmap_mode="r"),
        tuple(record.turns for record in records),
        tuple(f"{record.task}/{scale}" for record in records),
        np.array(options),
    )


def joined(parts: list[Clips], frames: int) -> Clips:
    """Several splits as one, with `frames` frames of each clip by the project's sampling rule."""
    picks = video.spread(parts[0].frames.shape[1], frames)
    shape = (sum(len(part.frames) for part in parts), frames, *parts[0].frames.shape[2:])
    every = np.empty(shape, np.uint8)
    at = 0
    for part in parts:
        np.take(part.frames, picks, axis=1, out=every[at : at + len(part.frames)], mode="clip")
        at += len(part.frames)
    return Clips(
        every,
        tuple(turns for part in parts for turns in part.turns),
        tuple(task for part in parts for task in part.tasks),
        np.concatenate([part.options for part in parts]),
    )


def _records(folder: str, split: str):
    (part,) = open_records(SourceConfig(os.path.join(folder, f"{split}.jsonl")))
    return [part.records[int(i)] for i in part.chosen]


def _array(folder: str, split: str) -> str:
    return os.path.join(folder, f"{split}.npy")


def _decode(folder: str, split: str, parameters: Parameters, workers: int) -> None:
    path = _array(folder, split)
    if os.path.exists(path):
        return
    media = [record.media[0] for record in _records(folder, split)]
    shape = (len(media), parameters.frames, parameters.size, parameters.size, 3)
    array = np.lib.format.open_memmap(path + ".part", "w+", np.uint8, shape)
    array.flush()
    jobs = [
        (path + ".part", first, media[first : first + _AT_ONCE], parameters)
        for first in range(0, len(media), _AT_ONCE)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_store, jobs))
    os.replace(path + ".part", path)


def _store(job: tuple[str, int, list[Media], Parameters]) -> None:
    """Decodes some clips into their places of the array."""
    path, first, media, parameters = job
    array = np.lib.format.open_memmap(path, "r+")
    for i, medium in enumerate(media, first):
        frames, _ = video.sample(medium, FrameConfig(parameters.frames), parameters.size, _TIMEOUT)
        if len(frames) != parameters.frames:
            raise EvidenceError(
                f"{medium.path} has {len(frames)} frames, not {parameters.frames}; remove its"
                " folder and run again"
            )
        array[i] = frames
    array.flush()
