"""One grid point from random parameters to its result, all seeds at once."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

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
    Stage,
    answers_name,
    described,
    model_config,
    train_config,
)
from storm_jax.evidence_grid.rows import Rows
from storm_jax.models.storm import Params, StormModel, count_parameters

_CHUNK = 100  # steps of one program
_SCORED = 32  # clips that are scored at once
Say = Callable[[str], None]


class PointRun:
    """A grid point with its data and model."""

    def __init__(self, recipe: Recipe, data: str, say: Say):
        """Args:
        data: folder that `clips.prepare` filled.
        say: is told the progress.
        """
        self.recipe = recipe
        self.say = say
        self._folders = list(clips.folders(data, recipe.videos))
        self.tokenizer = load_tokenizer(os.path.join(self._folders[0], "tokenizer"))
        self.config = model_config(
            recipe.point,
            recipe.sizes,
            recipe.videos.size,
            vocabulary_needed(self.tokenizer, "gemma"),
        )
        self.model = StormModel(self.config)

    # ---------------------------------------------------------------------------------------- data

    def short(self) -> Clips:
        """Training clips of the first stage."""
        return clips.load(self._folders[0], "train")

    def long(self, split: str) -> Clips:
        """Clips of all scales, with as many frames of each as the model sees."""
        parts = [clips.load(folder, split) for folder in self._folders[1:]]
        return clips.joined(parts, self.recipe.point.frames)

    def stages(self) -> Iterator[tuple[Stage, Clips]]:
        """The stages of training in order, with their clips."""
        yield self.recipe.short, self.short()
        yield self.recipe.long, self.long("train")

    def row_length(self, part: Clips) -> int:
        """Tokens of the longest row of a split."""
        return rows.row_length([part], self.config, self.tokenizer)

    def rows(self, part: Clips, config: ModelConfig, frames: jax.Array | None = None) -> Rows:
        """A split on the device, as a model of this configuration reads it."""
        if frames is None:
            frames = jax.device_put(np.asarray(part.frames))
        length = rows.row_length([part], config, self.tokenizer)
        return rows.on_device(frames, rows.layout(part, config, self.tokenizer, length))

    def order(self, stage: int, clips_: int) -> np.ndarray:
        """Which clips each seed sees in each step of a stage, int32 [steps, seeds, batch]."""
        plan = (self.recipe.short, self.recipe.long)[stage]
        orders = [
            seeds.order(clips_, stage, seed, plan.steps, plan.batch)
            for seed in range(self.recipe.seeds)
        ]
        return np.stack(orders, axis=1)

    # ---------------------------------------------------------------------------- train, then score

    def result(self) -> dict[str, object]:
        """Trains and scores; returns what the point's file holds."""
        began = time.time()
        params = seeds.init_params(self.model, self.recipe.seeds)
        curves = []
        for number, (stage, part) in enumerate(self.stages()):
            params, curve = self._train(number, stage, part, params)
            curves.append(curve)
        answers: dict[str, object] = {}
        for split in SPLITS:
            answers |= self._score(split, params)
        temporal = self.model.abstract().get("temporal", {})
        return {
            "name": self.recipe.point.name,
            "recipe": described(self.recipe),
            "parameters": count_parameters(self.model.abstract()),
            "temporal_parameters": count_parameters(temporal),
            "answers": answers,
            "curves": curves,
            "seconds": round(time.time() - began, 1),
            "device": jax.devices()[0].device_kind,
            "versions": {"storm_jax": storm_jax.__version__, "jax": jax.__version__},
        }

    def _train(self, number: int, stage: Stage, part: Clips, params: Params):
        config = train_config(stage, 0)
        on_device = self.rows(part, self.config)
        state = seeds.start(config, params)
        chunk = seeds.make_train_chunk(self.model, config)
        index = self.order(number, len(part.tasks))
        curve: dict[str, list] = {"step": [], "loss": [], "accuracy": []}
        began = 0.0
        for at in range(0, stage.steps, _CHUNK):
            state, metrics = chunk(state, on_device, index[at : at + _CHUNK])
            done = min(at + _CHUNK, stage.steps)
            loss, accuracy = (np.asarray(metrics[name]) for name in ("loss", "accuracy"))
            if not np.isfinite(loss).all():
                raise EvidenceError(
                    f"{self.recipe.point.name}: the loss is not finite before step {done} of stage"
                    f" {number + 1}; lower its rate, {stage.rate:g}"
                )
            curve["step"].append(done)
            curve["loss"].append(np.round(loss.mean(0), 4).tolist())
            curve["accuracy"].append(np.round(accuracy.mean(0), 4).tolist())
            now = time.time()
            left = ""
            if began:  # behind the compiler and the first chunk
                seconds = (stage.steps - done) * (now - began) / (done - _CHUNK)
                left = f", {seconds:.0f} s left of the stage"
            began = began or now
            self.say(
                f"stage {number + 1}, step {done} of {stage.steps}: loss {loss.mean():.3f},"
                f" answer tokens {accuracy.mean():.1%}{left}"
            )
        return state.params, curve

    def _score(self, split: str, params: Params) -> dict[str, object]:
        part = self.long(split)
        frames = jax.device_put(np.asarray(part.frames))
        found = {}
        for sampling in (1, SAMPLING):
            config = sampled(self.config, sampling)
            on_device = self.rows(part, config, frames)
            right = seeds.scored(seeds.make_score(StormModel(config)), params, on_device, _SCORED)
            chance = 1 / part.options
            tokens = config.visual_tokens(self.recipe.point.frames)
            answers = Answers(right, part.tasks, chance, tokens)
            name = answers_name(split, sampling)
            found[name] = answers.to_json()
            self.say(f"scored {name}: {answers.mean():.1%}")
        return found


def sampled(config: ModelConfig, every: int) -> ModelConfig:
    """The model with temporal sampling at test time."""
    reduction = dataclasses.replace(config.reduction, temporal_sampling=every)
    return dataclasses.replace(config, reduction=reduction)
