"""Runs tasks: what is missing and what is too long is told first, then all is asked and scored."""

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from storm_jax.config import RunConfig
from storm_jax.evaluation import plan, report
from storm_jax.evaluation.answering import Answering, Outcome
from storm_jax.evaluation.items import Family
from storm_jax.evaluation.plan import Asking, Planned
from storm_jax.evaluation.recipe import fingerprint_of_items
from storm_jax.evaluation.results import Samples, read_result, write_result
from storm_jax.evaluation.task import Task, without_subtitles
from storm_jax.inference.engine import Engine
from storm_jax.inference.load import load, replicas
from storm_jax.inference.media import Decoders
from storm_jax.inference.weights import Quantization


class MissingError(ValueError):
    """Videos that are not there; the message lists all of them."""


class TooLongError(ValueError):
    """Prompts that the context or the memory does not hold; the message says what is needed."""


@dataclass(frozen=True)
class Place:
    """Where an evaluation reads and writes, and which part of it this process does."""

    data: Path
    out: Path
    process: int = 0
    processes: int = 1


class TaskRun:
    """One task on its way from annotations to a result.

    Attributes:
      items: that are asked, by all processes; those of missing videos are not among them.
      gone: missing videos.
    """

    def __init__(
        self,
        task: Task,
        family: Family,
        place: Place,
        shared: Mapping[str, Any],
        limit: int,
        retry: bool,
    ):
        """Reads annotations and what has been answered.

        Args:
          shared: the recipe that all tasks share.
          limit: first items of the annotations that are asked; 0: all.
          retry: asks again what failed.
        """
        self.task, self.family, self._place = task, family, place
        items = task.load(place.data)
        self.recipe = {
            **shared,
            "task": task.name,
            "prompts": family,
            "annotations": fingerprint_of_items(items),
            "limit": limit or "none",
        }
        self.items = items[:limit] if limit else items
        self.samples = Samples(place.out / task.name, self.recipe, place.process)
        if retry:
            failed = [id_ for id_, r in self.samples.answered.items() if r["error"]]
            self.samples.forget(failed)
        own = plan.share(self.items, place.process, place.processes)
        self._own = len(own)
        self._left = [item for item in own if item.id not in self.samples.answered]
        gone = set(self.gone)
        self.planned: list[Planned] = []
        self._left = [item for item in self._left if item.video not in gone]

    @property
    def gone(self) -> list[str]:
        """Missing videos of items that nobody has answered."""
        return plan.missing([i for i in self.items if i.id not in self.samples.answered])

    def prepare(self, asking: Asking, decoders: Decoders) -> None:
        """Writes the prompts, see `plan.plan`."""
        self.planned = plan.plan(self.task, self._left, self.family, asking, decoders)

    def answer(self, answering: Answering | None) -> dict[str, float]:
        """Asks what is left; `answering` may be None where no video can be read."""
        by_id = {planned.item.id: planned for planned in self.planned}
        right = [r["credit"] for r in self.samples.answered.values() if r["credit"] is not None]
        began, first = time.perf_counter(), answering.work.frames if answering else 0
        with tqdm(
            total=self._own,
            initial=self._own - len(self._left),
            desc=self.task.name,
            unit=" items",
        ) as bar:

            def wrote(planned: Planned, outcome: Outcome) -> None:
                line = report.record(
                    self.task, planned.item, self.family, outcome, self._place.data
                )
                self.samples.append(line)
                if line["credit"] is not None:
                    right.append(line["credit"])
                shown = {"accuracy": f"{100 * np.mean(right):.1f} %"} if right else {}
                if answering:
                    seconds = time.perf_counter() - began
                    shown["frames/s"] = f"{(answering.work.frames - first) / seconds:.1f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()

            for planned in self.planned:
                if planned.request is None:
                    wrote(planned, Outcome(None, error=planned.error))
            requests = [p.request for p in self.planned if p.request is not None]
            if answering and requests:
                for outcome in answering.run(requests):
                    assert outcome.request is not None
                    wrote(by_id[str(outcome.request.key)], outcome)
        frames = answering.work.frames - first if answering else 0
        return {
            "items": len(self.planned),
            "frames": frames,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def finish(self, run: Mapping[str, Any], asking: Asking) -> dict[str, Any] | None:
        """Merges the answers and writes the result; None: other processes are not done."""
        gone = self.gone
        asked = [i for i in self.items if i.video not in gone or i.id in self.samples.answered]
        with self.samples.alone():
            records = self.samples.merged([item.id for item in asked])
            self.samples.close()
            if records is None:
                return None
            before = read_result(self.samples.folder)
            if before is not None and not run["items"]:
                run = before["run"]  # nothing new was measured
            about = {
                "missing_videos": gone,
                "items_left_out": len(self.items) - len(asked),
                "without_subtitles": len(without_subtitles(asked)) if asking.subtitles else None,
                "recipe": self.recipe,
                "run": run,
            }
            found, files = report.result(self.task, asked, records, about)
            write_result(self.samples.folder, found, files)
        return found


def check_missing(runs: Sequence[TaskRun], allowed: bool) -> None:
    """All missing videos of all tasks at once.

    Raises:
      MissingError: there are some, and they are not allowed.
    """
    gone = [(run.task.name, video) for run in runs for video in run.gone]
    if gone and not allowed:
        raise MissingError(
            f"{len(gone)} videos are missing; get them, or leave their items out with"
            " --allow_missing:\n" + "\n".join(f"  {name}: {video}" for name, video in gone)
        )


def context_for(runs: Sequence[TaskRun], given: int) -> int:
    """Tokens of the engines' context.

    Args:
      given: 0: as the longest prompt and its answer need.

    Raises:
      TooLongError: `given` is too small.
    """
    planned = [(p.needed, run.task.name, p.item.id) for run in runs for p in run.planned]
    longest, task, item = max(planned, default=(1, "", ""))
    if given and longest > given:
        many = sum(needed > given for needed, _, _ in planned)
        raise TooLongError(
            f"{many} of {len(planned)} prompts with the longest answer do not fit"
            f" --context={given}: {task}, item {item} needs {longest} tokens; take fewer --frames,"
            f" more --temporal_sampling, or --context={longest}"
        )
    return given or rounded(longest)


def rounded(tokens: int) -> int:
    """A context that holds them; few different ones, since programs are compiled for each."""
    return -(-tokens // 64) * 64


def engines_for(
    checkpoint: str,
    *,
    quantization: Quantization,
    slots: int,
    context: int,
    per_engine: int,
    most: int,
) -> list[Engine]:
    """An engine on each group of this process's devices.

    Args:
      per_engine: devices over which one engine splits the model.
      most: engines that are of use.

    Raises:
      ValueError: the devices cannot be divided so.
      TooLongError: the cache of such a context does not fit the devices' memory.
    """
    groups = device_groups(per_engine)[: max(most, 1)]
    loaded = load(checkpoint, quantization=quantization, devices=groups[0])
    _check_memory(loaded.config.model.decoder, loaded.config.model.dtype, slots, context, groups[0])
    models = [loaded, *replicas(loaded, groups[1:])]
    return [Engine(model, slots=slots, context=context) for model in models]


def device_groups(per_engine: int) -> list[list[jax.Device]]:
    """This process's devices, `per_engine` each."""
    devices = jax.local_devices()
    if len(devices) % per_engine:
        raise ValueError(
            f"devices_per_engine={per_engine} does not divide the {len(devices)} devices here"
        )
    return [devices[i : i + per_engine] for i in range(0, len(devices), per_engine)]


def _check_memory(decoder, dtype: str, slots: int, context: int, devices: list) -> None:
    stats = devices[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return  # a CPU
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    shared = min(len(devices), decoder.kv_heads)
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * jnp.dtype(dtype).itemsize
    fits = int(free * shared / (token * slots))
    if context > fits:
        needed, left = (n * token * slots / 2**30 for n in (context, fits))
        raise TooLongError(
            f"{slots} slots of {context} tokens need {needed:.1f} GiB of cache, {left:.1f} GiB are"
            f" free: take --slots={slots * fits // context} or fewer, or fewer --frames"
        )


def measured(engines: Sequence[Engine], took: Mapping[str, float], place: Place) -> dict[str, Any]:
    """What a result says about its run; no answer depends on it."""
    seconds, items = took["seconds"], took["items"]
    return {
        **took,
        "seconds_per_item": round(seconds / items, 4) if items else None,
        "frames_per_second": round(took["frames"] / seconds, 2) if items else None,
        "engines": len(engines),
        "context": engines[0].context if engines else None,
        "processes": place.processes,
        "data": str(place.data),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def with_decoding(config: RunConfig, *, fps: float | None, timeout: float) -> RunConfig:
    """A configuration with another way of decoding.

    Args:
      fps: frames a second; None: as it is.
      timeout: seconds of decoding that a video may take; 0: as it is.
    """
    frames = config.data.frames
    if fps is not None:
        frames = replace(frames, fps=fps)
    limit = timeout or config.data.decode_timeout
    return replace(config, data=replace(config.data, frames=frames, decode_timeout=limit))
