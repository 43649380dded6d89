"""What is to be asked: items as requests, with their prompts written before a frame is decoded."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tqdm import tqdm

from storm_jax.config import RunConfig
from storm_jax.data import subtitles
from storm_jax.data.conversation import Media, Turn
from storm_jax.data.text import PLACEHOLDER
from storm_jax.data.video import MediaError
from storm_jax.evaluation.answering import Request
from storm_jax.evaluation.items import Family, Item, TaskError
from storm_jax.evaluation.task import Task
from storm_jax.inference.media import Clip, Decoders
from storm_jax.inference.options import Options
from storm_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class Asking:
    """How items are asked.

    Attributes:
      config: of the checkpoint, with the options applied.
      sampling: with the template's stop tokens.
      stop: besides what the prompts have.
      max_new_tokens: 0: as the prompts have it.
      subtitles: whether they are shown.
    """

    config: RunConfig
    options: Options
    tokenizer: object
    sampling: Sampling
    stop: tuple[str, ...]
    max_new_tokens: int
    subtitles: bool


@dataclass(frozen=True)
class Planned:
    """An item that is to be asked.

    Attributes:
      request: None where the video cannot be read.
      needed: tokens of the prompt and of the longest answer.
      error: why it cannot be asked.
    """

    item: Item
    request: Request | None
    needed: int = 0
    error: str = ""


def medium(item: Item) -> Media:
    """The segment of the video that an item asks about; equal ones are encoded once."""
    return Media("video", item.video, item.start, item.end)


def by_medium(items: Sequence[Item]) -> list[Item]:
    """The items, those about the same segment behind one another, else in their order."""
    groups: dict[Media, list[Item]] = {}
    for item in items:
        groups.setdefault(medium(item), []).append(item)
    return [item for group in groups.values() for item in group]


def share(items: Sequence[Item], process: int, processes: int) -> list[Item]:
    """The items of one of several processes: whole videos, dealt in turn."""
    videos = {item.video: None for item in items}
    own = {video for i, video in enumerate(videos) if i % processes == process}
    return [item for item in items if item.video in own]


def missing(items: Sequence[Item]) -> list[str]:
    """Videos that are not there, in order, each once."""
    return [v for v in {item.video: None for item in items} if not os.path.exists(v)]


def plan(
    task: Task, items: Sequence[Item], family: Family, asking: Asking, decoders: Decoders
) -> list[Planned]:
    """Opens every video and writes every prompt.

    Returns:
      An entry for each item, those about the same segment behind one another.

    Raises:
      TaskError: items that cannot be asked in this way, or subtitles that cannot be read; all
        faulty subtitle files are named.
    """
    items = by_medium(items)
    config = asking.config
    size, limit = config.model.vit.image_size, config.data.decode_timeout
    cues = _subtitles(items, asking.subtitles)
    # A bounded number is opened ahead: futures hold the times.
    clips: dict[Media, Future[Clip]] = {}
    for item in items:
        media = medium(item)
        if media not in clips:
            clips[media] = decoders.clip(media, config.data.frames, size, limit)
    planned = []
    for item in tqdm(items, f"{task.name}: opening videos", delay=2, unit=" items"):
        try:
            clip = clips[medium(item)].result()
        except MediaError as error:
            planned.append(Planned(item, None, error=str(error)))
            continue
        planned.append(_planned(task, item, family, asking, cues(item), clip))
    return planned


def _subtitles(items: Sequence[Item], shown: bool) -> Callable[[Item], list[subtitles.Cue] | None]:
    """The cues of an item; None where questions are asked without."""
    if not shown:
        return lambda item: None
    files: Mapping[str, None] = {item.subtitles: None for item in items if item.subtitles}
    read, faults = {}, []
    for file in files:
        try:
            read[file] = subtitles.read(file)
        except subtitles.SubtitleError as error:
            faults.append(str(error))
    if faults:
        raise TaskError("subtitles that cannot be read:\n" + "\n".join(faults))
    return lambda item: read[item.subtitles] if item.subtitles else []


def _planned(
    task: Task,
    item: Item,
    family: Family,
    asking: Asking,
    cues: list[subtitles.Cue] | None,
    clip: Clip,
) -> Planned:
    model, options = asking.config.model, asking.options
    frames = len(clip.times)
    frame_groups = model.reduction.frame_groups(frames).tolist()
    prompt = task.prompt(item, family, cues, clip.times.tolist(), clip.duration, frame_groups)
    groups = prompt.groups if len(prompt.groups) > 1 else ()
    where = f"{task.name}: item {item.id}"
    marks = len(PLACEHOLDER.findall(prompt.text + prompt.system))
    if marks != max(len(groups), 1):
        raise TaskError(
            f"{where}: its texts hold {marks} of <video> and <image>, expected"
            f" {max(len(groups), 1)}; write these words differently in the annotations"
        )
    if groups and (options.duplicate_threshold or options.keep_tokens < 1):
        raise TaskError(
            f"{where} has subtitles between its frames, which needs all visual tokens: leave out"
            " --duplicate_threshold and --keep_tokens, or --subtitles"
        )
    longest = asking.max_new_tokens or prompt.max_new_tokens
    turns = (Turn("user", prompt.text),)
    if prompt.system:
        turns = (Turn("system", prompt.system), *turns)
    request = Request(
        item.id,
        (medium(item),),
        turns,
        dataclasses.replace(asking.sampling, max_new_tokens=longest),
        (*prompt.stop, *asking.stop),
        prompt.answer_prefix,
        groups,
    )
    visual = options.tokens_kept(model, frames, frames).pruned
    tokens = request.tokens(asking.tokenizer, asking.config, [visual])
    return Planned(item, request, len(tokens) + longest)
