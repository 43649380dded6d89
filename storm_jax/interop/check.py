"""The same input through a model here and through its export in PyTorch, compared stage by stage.

PyTorch is imported when it is needed, and nowhere else in storm_jax.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import VISUAL, ModelConfig, Remat
from storm_jax.interop.files import WeightsError
from storm_jax.models.layers import KEEP_ALL, Stack
from storm_jax.models.storm import Params, StormModel
from storm_jax.models.vit import normalise

FRAMES = 5  # of the video that is sent through: the last pool of 2 or 4 frames is not full
WORDS = 12  # of text on either side of it

Stages = dict[str, np.ndarray]  # what comes out of each stage, in order, float32


class StageError(NamedTuple):
    """How far apart a stage's results are."""

    stage: str
    error: float  # largest difference
    size: float  # largest value that storm_jax has there

    @property
    def share(self) -> float:
        """The error as a share of the stage's values, where these are above 1."""
        return self.error / max(self.size, 1.0)


class Probe(NamedTuple):
    """What is sent through both: a random video between random words."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    tokens: np.ndarray  # int32 [S], VISUAL where a visual token stands


def probe(config: ModelConfig, seed: int = 0) -> Probe:
    """Frames and words for a model, always the same ones for a seed."""
    rng = np.random.default_rng(seed)
    side = config.vit.image_size
    words = rng.integers(0, config.decoder.vocab_size, 2 * WORDS).astype(np.int32)
    visual = np.full(config.visual_tokens(FRAMES), VISUAL, np.int32)
    frames = rng.integers(0, 256, (FRAMES, side, side, 3), np.uint8)
    return Probe(frames, np.concatenate([words[:WORDS], visual, words[WORDS:]]))


def compare(ours: Stages, theirs: Stages) -> list[StageError]:
    """The largest difference after each stage.

    Raises:
      WeightsError: the two have other stages, or one of another size.
    """
    other = [
        stage for stage in ours if stage not in theirs or ours[stage].size != theirs[stage].size
    ]
    other += [stage for stage in theirs if stage not in ours]
    if other:
        raise WeightsError(f"checkpoint and export are of different models: {', '.join(other)}")
    errors = []
    for stage, x in ours.items():
        difference = np.abs(x.reshape(-1) - theirs[stage].reshape(-1))
        errors.append(StageError(stage, float(difference.max()), float(np.abs(x).max())))
    return errors


def above(errors: list[StageError], limit: float) -> list[StageError]:
    """The stages whose error is a larger share than `limit`, or not a number."""
    return [e for e in errors if not e.share <= limit]


# ------------------------------------------------------------------------------------- storm_jax


class _Recorded:
    """A part of the model that notes what it returns."""

    def __init__(self, part: Callable, stage: str, stages: dict[str, jax.Array]):
        self._part, self._stage, self._stages = part, stage, stages

    def __call__(self, *args: Any) -> jax.Array:
        self._stages[self._stage] = out = self._part(*args)
        return out


class _RecordedStack:
    """A stack of layers that notes what goes into the first of them and what comes out of each."""

    def __init__(self, stack: Stack, first: str, each: str, stages: dict[str, jax.Array]):
        self._stack, self._first, self._each, self._stages = stack, first, each, stages

    def scan(self, body: Callable, x, xs=None, *, remat: Remat = KEEP_ALL):
        """As `Stack.scan`."""

        def recorded(module, x, slice_):
            x, y = body(module, x, slice_)
            return x, (x, y)

        if self._first:
            self._stages[self._first] = x
        x, (outs, ys) = self._stack.scan(recorded, x, xs, remat=remat)
        for i in range(self._stack.count):
            self._stages[f"{self._each} {i}"] = outs[i]
        return x, ys


def run_ours(config: ModelConfig, params: Params, sent: Probe) -> Stages:
    """Every stage's result in storm_jax, in float32 at the highest precision.

    The model's own code runs; its parts are wrapped, so that they note their results.
    """
    vit = dataclasses.replace(config.vit, frames_per_call=0)
    model = StormModel(dataclasses.replace(config, vit=vit, dtype="float32"))
    F, S = len(sent.frames), len(sent.tokens)
    batch = {
        "frames": sent.frames[None],
        "frame_segments": np.zeros((1, F), np.int32),
        "frame_groups": config.reduction.frame_groups(F)[None],
        "tokens": sent.tokens[None],
        "segments": np.zeros((1, S), np.int32),
        "positions": np.arange(S, dtype=np.int32)[None],
    }

    def run(params, batch):
        storm = model.bind(params)
        stages: dict[str, jax.Array] = {}

        def record(module: Any, name: str, stage: str) -> None:
            part = getattr(module, name)
            if part is not None:
                setattr(module, name, _Recorded(part, stage, stages))

        def record_stack(module: Any, first: str, each: str) -> None:
            if module is not None:
                module.blocks = _RecordedStack(module.blocks, first, each, stages)

        record_stack(storm.vit, "patches", "vit layer")
        record(storm.vit, "norm", "vit norm")
        record(storm, "projector", "projector")
        record_stack(storm.temporal, "", "mamba layer")
        record(storm, "encode", "reduction")
        record_stack(storm.decoder, "embeddings", "decoder layer")
        record(storm.decoder, "norm", "decoder norm")
        stages["logits"] = storm.decoder.logits(storm(batch))
        # The row has room for more videos.
        stages["reduction"] = stages["reduction"][:, : config.visual_tokens(F)]
        return stages

    with jax.default_matmul_precision("highest"):
        stages = jax.jit(run)(params, batch)
    # A dict that went through `jit` is sorted by name: back to the order of the model.
    return {stage: np.asarray(stages[stage], np.float32) for stage in stage_names(config)}


def stage_names(config: ModelConfig) -> list[str]:
    """Of all stages, in order."""
    norm = ["vit norm"] if config.vit.output_layer == -1 else []
    return [
        "patches",
        *(f"vit layer {i}" for i in range(config.vit.layers + 1 + config.vit.output_layer)),
        *norm,
        "projector",
        *(f"mamba layer {i}" for i in range(config.temporal.layers)),
        "reduction",
        "embeddings",
        *(f"decoder layer {i}" for i in range(config.decoder.layers)),
        "decoder norm",
        "logits",
    ]


# --------------------------------------------------------------------------------------- PyTorch


def run_theirs(folder: Path, sent: Probe) -> Stages:
    """Every stage's result in PyTorch, in float32 on the CPU. Runs the code in the folder.

    Raises:
      WeightsError: PyTorch is not installed, or transformers finds no model there.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            "check needs PyTorch: python -m pip install 'storm_jax[torch]' (or -e '.[torch]')"
        ) from error
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, frames_per_call=0
        ).eval()
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers cannot load {folder}: {error}") from error
    stages: Stages = {}

    def note(stage: str, out: Any) -> None:
        stages[stage] = (out[0] if isinstance(out, tuple) else out).numpy()

    def watch(module: Any, stage: str) -> None:
        module.register_forward_hook(lambda module, args, out: note(stage, out))

    decoder = model.language_model.model
    watch(model.vision_tower.embeddings, "patches")
    for i, layer in enumerate(model.vision_tower.encoder.layers):
        watch(layer, f"vit layer {i}")
    if model.config.vision_output_layer == -1:
        watch(model.vision_tower.post_layernorm, "vit norm")
    watch(model.projector, "projector")
    for i, layer in enumerate(model.temporal.layers):
        watch(layer, f"mamba layer {i}")
    watch(model.reduction, "reduction")
    decoder.layers[0].register_forward_pre_hook(lambda module, args: note("embeddings", args[0]))
    for i, layer in enumerate(decoder.layers):
        watch(layer, f"decoder layer {i}")
    watch(decoder.norm, "decoder norm")

    tokens = np.where(sent.tokens == VISUAL, model.config.video_token_id, sent.tokens)
    frames = np.asarray(normalise(jnp.asarray(sent.frames))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        stages["logits"] = model(
            input_ids=torch.from_numpy(tokens[None].astype(np.int64)),
            pixel_values_videos=torch.from_numpy(np.ascontiguousarray(frames)),
            frame_counts=torch.tensor([len(frames)]),
        ).logits.numpy()
    return stages
