"""What one grid point is made of: videos, model, and the two stages of its training.

Every number that a result depends on is a field here, and is written beside the result.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from storm_jax.config import (
    CheckpointConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    PartRates,
    ProjectorConfig,
    RematConfig,
    TemporalConfig,
    TrainConfig,
    VitConfig,
)
from storm_jax.frames import ReductionConfig

Mixer = Literal["none", "mamba", "mlp", "attention", "convolution"]
SAMPLING = 2  # the paper's temporal sampling keeps every second pooled frame, at test time
SPLITS = ("test_seen", "test")  # drawn as the training clips; appearances that training holds out


class EvidenceError(ValueError):
    """A grid, data or output folder that cannot be used; the message names the remedy."""


@dataclass(frozen=True)
class Videos:
    """The clips of `data.controlled` that all grid points share.

    Attributes:
      frames: of a long clip; models see `Point.frames` of them, evenly spaced.
      scales: lengths of the events in long clips, in frames of the clip (`group` of the generator):
        one data set each.
      train, test: clips of each scale, of each split.
      short_train, short_frames, short_scales: the same of the clips of the first stage.
    """

    families: tuple[str, ...]
    frames: int
    scales: tuple[int, ...]
    train: int
    test: int
    short_train: int
    short_frames: int
    short_scales: tuple[int, ...]
    size: int = 48
    seed: int = 0
    backgrounds: str = ""


@dataclass(frozen=True)
class Stage:
    """One stage of training: linear warm-up, cosine to zero; 0 steps skip one on short clips."""

    steps: int
    batch: int
    rate: float
    warmup_fraction: float = 0.05


@dataclass(frozen=True)
class Sizes:
    """The tiny model."""

    patch: int = 12
    shuffle: int = 2  # 4: a frame is one token, and there is nothing to pool in space
    width: int = 64
    vit_layers: int = 1
    decoder_layers: int = 2
    heads: int = 4
    mamba_layers: int = 1
    state: int = 16
    conv: int = 4
    dt_min: float = 0.05
    dt_max: float = 1.0
    position_scale: float = 0.4
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Point:
    """One trained model of the grid."""

    mixer: Mixer
    temporal_pool: int
    spatial_pool: int
    frames: int
    direction: Literal["bidirectional", "forward"] = "bidirectional"

    @property
    def name(self) -> str:
        """Of its file."""
        mixer = "mamba_forward" if self.direction == "forward" else self.mixer
        return f"{mixer}_t{self.temporal_pool}_s{self.spatial_pool}_f{self.frames}"


@dataclass(frozen=True)
class Recipe:
    """All that a result depends on, versions and devices aside."""

    point: Point
    videos: Videos
    sizes: Sizes
    short: Stage  # first: short clips, every frame of them, no reduction
    reduced: Stage  # then: the same clips with the point's reduction
    long: Stage  # last: `point.frames` frames of long clips
    seeds: int

    def stages(self) -> tuple[Stage, Stage, Stage]:
        """In the order of training."""
        return self.short, self.reduced, self.long

    def shared(self, stage: int) -> str:
        """Equal for recipes that are the same up to the end of a stage, number 0 or 1."""
        found = described(self)
        del found["long"], found["point"]["frames"]
        if stage == 0:
            del found["reduced"], found["point"]["temporal_pool"], found["point"]["spatial_pool"]
        text = json.dumps(found, sort_keys=True).encode()
        return f"{self.point.mixer}_{stage}_{hashlib.blake2b(text, digest_size=6).hexdigest()}"


def answers_name(split: str, sampling: int) -> str:
    """Of the answers in a point's file."""
    return split if sampling == 1 else f"{split}_sampled"


def described(recipe: Recipe) -> dict:
    """The recipe as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def difference(found, wanted, where: str = "") -> str:
    """The first field in which two trees of JSON differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                return difference(found.get(name), wanted.get(name), f"{where}.{name}".strip("."))
    return f"{where} is {found!r}, not {wanted!r}"


def model_config(point: Point, sizes: Sizes, size: int, vocabulary: int) -> ModelConfig:
    """The model of a grid point: storm_jax's own, tiny.

    Args:
      size: side of a frame, pixels.
      vocabulary: ids of the tokenizer.
    """
    width = sizes.width
    return ModelConfig(
        vit=VitConfig(
            image_size=size,
            patch_size=sizes.patch,
            width=width,
            mlp=2 * width,
            layers=sizes.vit_layers,
            heads=sizes.heads,
            position_grid=size // sizes.patch,
            position_scale=sizes.position_scale,
            frames_per_call=0,
        ),
        projector=ProjectorConfig(shuffle=sizes.shuffle),
        temporal=TemporalConfig(
            layers=0 if point.mixer == "none" else sizes.mamba_layers,
            mixer="mamba" if point.mixer == "none" else point.mixer,
            direction=point.direction,
            state=sizes.state,
            conv=sizes.conv,
            dt_min=sizes.dt_min,
            dt_max=sizes.dt_max,
        ),
        reduction=ReductionConfig(
            temporal_pool=point.temporal_pool, spatial_pool=point.spatial_pool
        ),
        decoder=DecoderConfig(
            vocab_size=vocabulary,
            width=width,
            layers=sizes.decoder_layers,
            heads=sizes.heads,
            kv_heads=sizes.heads // 2,
            head_dim=width // sizes.heads,
            mlp=2 * width,
            activation="gelu_tanh",
            norm_eps=1e-6,
            norm_plus_one=True,
            post_norms=True,
            qkv_bias=False,
            qk_norm=True,
            query_scale=0.0,
            attention_softcap=0.0,
            logit_softcap=0.0,
            global_every=1,
            window=0,
            rope_theta=10_000.0,
            rope_theta_local=10_000.0,
            rope_scaling=1.0,
            tied_embeddings=True,
            scale_embeddings=True,
        ),
        dtype=sizes.dtype,
    )


def train_config(stage: Stage, seed: int) -> TrainConfig:
    """What `training.step.make_train_step` and `training.optim.make_optimizer` are given."""
    rate = stage.rate
    return TrainConfig(
        steps=stage.steps,
        batch=stage.batch,
        accumulation=1,
        optimizer=OptimizerConfig(
            rates=PartRates(vit=rate, projector=rate, temporal=rate, decoder=rate),
            warmup_fraction=stage.warmup_fraction,
        ),
        z_loss=0.0,
        remat=RematConfig(),
        checkpoint=CheckpointConfig(every=stage.steps),
        log_every=50,
        eval_every=0,
        eval_samples=1 << 30,
        seed=seed,
    )
