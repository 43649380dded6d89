"""One grid point from random parameters to its result, all seeds at once."""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import storm_jax
from storm_jax.config import ModelConfig
from storm_jax.data.text import load_tokenizer, vocabulary_needed
from storm_jax.evidence_grid import clips, rows, seeds
from storm_jax.evidence_grid.answers import Answers
from storm_jax.evidence_grid.clips import Clips
from storm_jax.evidence_grid.recipe import (
    SAMPLING,
    SPLITS,
    EvidenceError,
    Recipe,
    answers_name,
    described,
    model_config,
    train_config,
)
from storm_jax.evidence_grid.rows import Rows
from storm_jax.evidence_grid.turns import Turns
from storm_jax.frames import ReductionConfig
from storm_jax.models.storm import Params, StormModel, count_parameters

CHUNK = 50  # steps of one program
_SCORED = 40  # clips that are scored at once
_REPEATS = 3  # of a measurement
_SAID = 10  # lines of progress a stage
Say = Callable[[str], None]


class Trained(NamedTuple):
    """What the stages so far leave behind."""

    params: Params
    curves: list[dict[str, Any]]


class PointRun:
    """A grid point with its data and model."""

    def __init__(self, recipe: Recipe, data: str, work: str, say: Say):
        """
        Args:
          data: folder that `clips.prepare` filled.
          work: folder for what points share: locks, and parameters behind shared stages.
          say: is told the progress.
        """
        self.recipe = recipe
        self._work = work
        self._turns = Turns(work)
        self._say = say
        folders = list(clips.folders(data, recipe.videos))
        self._short = folders[: len(recipe.videos.short_scales)]
        self._long = folders[len(self._short) :]
        clips.load(folders[0], "train")  # waits until there is a tokenizer
        self.tokenizer = load_tokenizer(os.path.join(folders[0], "tokenizer"))
        self.config = model_config(
            recipe.point,
            recipe.sizes,
            recipe.videos.size,
            vocabulary_needed(self.tokenizer, "gemma"),
        )
        self.model = StormModel(self.config)

    # ---------------------------------------------------------------------------------------- data

    def short(self, split: str) -> Clips:
        """Clips of the first two stages, "train" or "test_seen"."""
        parts = [clips.load(folder, split) for folder in self._short]
        return clips.joined(parts, self.recipe.videos.short_frames)

    def long(self, split: str) -> Clips:
        """Clips of all scales, with as many frames of each as the model sees."""
        parts = [clips.load(folder, split) for folder in self._long]
        return clips.joined(parts, self.recipe.point.frames)

    def rows(self, part: Clips, config: ModelConfig, length: int, frames: Any = None) -> Rows:
        """A split on the device, as a model of this configuration reads it.

        Args:
          length: tokens of a row.
          frames: of the clips, where they lie on the device already.
        """
        if frames is None:
            frames = jax.device_put(part.frames)
        return rows.on_device(frames, rows.layout(part, config, self.tokenizer, length))

    def length(self, *parts: Clips, config: ModelConfig | None = None) -> int:
        """Tokens of the longest row."""
        return rows.row_length(parts, config or self.config, self.tokenizer)

    def order(self, stage: int, count: int) -> np.ndarray:
        """Which of `count` clips each seed sees in each step, int32 [steps, seeds, batch]."""
        plan = self.recipe.stages()[stage]
        orders = [
            seeds.order(count, stage, seed, plan.steps, plan.batch)
            for seed in range(self.recipe.seeds)
        ]
        return np.stack(orders, axis=1)

    # ---------------------------------------------------------------------------- train, then score

    def shared(self, stage: int) -> Trained:
        """Behind stage 0 or 1 on short clips: trained by whoever comes first, then read."""
        if self.recipe.stages()[stage].steps == 0:
            before = self._start() if stage == 0 else self.shared(stage - 1)
            return Trained(before.params, [*before.curves, {}])
        path = os.path.join(self._work, f"{self.recipe.shared(stage)}.npz")
        leaves, tree = jax.tree.flatten(self.model.abstract())
        with open(path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(path):
                with np.load(path) as file:
                    params = [jax.numpy.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
                    curves = json.loads(str(file["curves"]))
                return Trained(jax.tree.unflatten(tree, params), curves)
            before = self._start() if stage == 0 else self.shared(stage - 1)
            params, curve, _ = self._train(stage, self.short("train"), before.params)
            curve["held_out"] = self._short_accuracy(stage, params)
            found = Trained(params, [*before.curves, curve])
            arrays = [np.asarray(x) for x in jax.tree.leaves(params)]
            with open(path + ".part", "wb") as file:
                np.savez(file, *arrays, curves=np.array(json.dumps(found.curves)))
            os.replace(path + ".part", path)
            return found

    def _start(self) -> Trained:
        return Trained(seeds.init_params(self.model, self.recipe.seeds), [])

    def result(self) -> dict[str, object]:
        """Trains on long clips and scores; returns what the point's file holds."""
        before = self.shared(1)
        params, curve, step_ms = self._train(2, self.long("train"), before.params)
        answers, answer_ms = self._score(params)
        temporal = self.model.abstract().get("temporal", {})
        return {
            "name": self.recipe.point.name,
            "recipe": described(self.recipe),
            "parameters": count_parameters(self.model.abstract()),
            "temporal_parameters": count_parameters(temporal),
            "train_step_ms": step_ms,
            "answer_ms": answer_ms,
            "answers": answers,
            "curves": [*before.curves, curve],
            "device": jax.devices()[0].device_kind,
            "versions": {"storm_jax": storm_jax.__version__, "jax": jax.__version__},
        }

    def _model(self, stage: int) -> StormModel:
        """The first stage reduces nothing."""
        reduction = ReductionConfig() if stage == 0 else self.config.reduction
        return StormModel(dataclasses.replace(self.config, reduction=reduction))

    def _short_accuracy(self, stage: int, params: Params) -> dict[str, list[float]]:
        """Accuracy of each seed on short clips that are not trained on, percent, by task."""
        part, model = self.short(SPLITS[0]), self._model(stage)
        on_device = self.rows(part, model.config, self.length(part, config=model.config))
        with self._turns.together():
            right = seeds.scored(seeds.make_score(model), params, on_device, _SCORED)
        found = Answers(right, part.tasks, 1 / part.options, 0).of_task()
        of_task = {task: np.round(values, 1).tolist() for task, values in found.items()}
        self._say(f"stage {stage + 1}, held out: {of_task}")
        return of_task

    def _train(self, number: int, part: Clips, params: Params):
        """Parameters, curve, and behind the last stage milliseconds of a step of one seed."""
        stage = self.recipe.stages()[number]
        config = train_config(stage, 0)
        model = self._model(number)
        length = self.length(part, config=model.config)
        on_device = self.rows(part, model.config, length)
        state = [seeds.start(config, params)]
        chunk = seeds.make_train_chunk(model, config)
        index = self.order(number, len(part.tasks))
        size = min(CHUNK, stage.steps)
        curve: dict[str, Any] = {"step": [], "loss": [], "accuracy": []}
        began = 0.0
        for at in range(0, stage.steps, size):
            with self._turns.together():
                state[0], metrics = chunk(state[0], on_device, index[at : at + size])
                loss, accuracy = (np.asarray(metrics[name]) for name in ("loss", "accuracy"))
            done = at + len(loss)
            if not np.isfinite(loss).all():
                raise EvidenceError(
                    f"{self.recipe.point.name}: the loss is not finite before step {done} of stage"
                    f" {number + 1}; lower its rate, {stage.rate:g}"
                )
            now = time.time()
            if done == stage.steps or done // size % max(1, stage.steps // size // _SAID) == 0:
                curve["step"].append(done)
                curve["loss"].append(np.round(loss.mean(0), 4).tolist())
                curve["accuracy"].append(np.round(accuracy.mean(0), 4).tolist())
                left = ""
                if began:  # behind the compiler and the first chunk
                    seconds = (stage.steps - done) * (now - began) / (done - size)
                    left = f", {seconds:.0f} s left of the stage"
                self._say(
                    f"stage {number + 1}, step {done} of {stage.steps}: loss {loss.mean():.3f},"
                    f" answer tokens {accuracy.mean():.1%}{left}"
                )
            began = began or now
        params = jax.tree.map(jax.numpy.copy, state[0].params)

        def again():
            state[0], metrics = chunk(state[0], on_device, index[:size])
            jax.block_until_ready(metrics)

        return params, curve, self._timed(again, size * self.recipe.seeds) if number == 2 else None

    def _score(self, params: Params) -> tuple[dict[str, object], dict[str, object]]:
        """Answers, and milliseconds of one of them, by `answers_name`."""
        found: dict[str, object] = {}
        times: dict[str, object] = {}
        parts = {split: self.long(split) for split in SPLITS}
        frames = {split: jax.device_put(part.frames) for split, part in parts.items()}
        for sampling in (1, SAMPLING):
            config = sampled(self.config, sampling)
            score = seeds.make_score(StormModel(config))
            length = self.length(*parts.values(), config=config)
            for split, part in parts.items():
                on_device = self.rows(part, config, length, frames[split])
                with self._turns.together():
                    right = seeds.scored(score, params, on_device, _SCORED)
                tokens = config.visual_tokens(self.recipe.point.frames)
                answers = Answers(right, part.tasks, 1 / part.options, tokens)
                name = answers_name(split, sampling)
                found[name] = answers.to_json()
                self._say(f"{name}: {answers.averages().mean():.1f} %")
                if split == SPLITS[0]:

                    def again(score=score, on_device=on_device):
                        seeds.scored(score, params, on_device, _SCORED)

                    times[name] = self._timed(again, right.size)
        return found, times

    def _timed(self, call: Callable[[], None], parts: int) -> dict[str, float]:
        """Milliseconds of one of the `parts` of a call, alone on the device.

        The median of `_REPEATS` calls, the smallest and the largest. The program has run before.
        """
        times = []
        with self._turns.alone():
            for _ in range(_REPEATS):
                began = time.perf_counter()
                call()
                times.append(1000 * (time.perf_counter() - began) / parts)
        return {
            "ms": round(float(np.median(times)), 5),
            "low": round(min(times), 5),
            "high": round(max(times), 5),
        }


def sampled(config: ModelConfig, every: int) -> ModelConfig:
    """The model with temporal sampling at test time."""
    reduction = dataclasses.replace(config.reduction, temporal_sampling=every)
    return dataclasses.replace(config, reduction=reduction)
