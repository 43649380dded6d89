"""What a run is made of: frozen dataclasses, built once from an `ml_collections.ConfigDict`.

`from_mapping(RunConfig, mapping)` checks every name and type and says where a mistake stands; each
dataclass then checks its own values. Nothing here imports JAX: data workers read it too.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from storm_jax.frames import VISUAL as VISUAL  # `x as x`: for those who import it from here
from storm_jax.frames import ConfigError as ConfigError
from storm_jax.frames import FrameConfig, ReductionConfig
from storm_jax.frames import require as _require

# ------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class VitConfig:
    """SigLIP vision transformer (arXiv 2303.15343), applied to every frame alone."""

    image_size: int  # side of the square input, pixels
    patch_size: int  # side of a patch, pixels; the remainder of image_size is not seen
    width: int
    mlp: int  # hidden width of the MLP
    layers: int
    heads: int
    position_grid: int  # side of the learned position table; resized when it is not `grid`
    position_scale: float  # standard deviation of the position embeddings at initialisation
    output_layer: int = -1  # -1: last layer and final norm; -2: input of the last layer, no norm
    norm_eps: float = 1e-6
    frames_per_call: int = 64  # frames that a device encodes at once; 0: all it has

    def __post_init__(self):
        _require(
            self.output_layer in (-1, -2),
            f"vit.output_layer={self.output_layer}: -1 (last) or -2 (last but one) are offered",
        )
        _require(
            self.width % self.heads == 0,
            f"vit.width={self.width} is not a multiple of vit.heads={self.heads}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"vit.image_size={self.image_size} is smaller than one patch ({self.patch_size})",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ProjectorConfig:
    """Pixel shuffle, LayerNorm and one linear map to the decoder's width (paper fig. 6, eq. 3)."""

    shuffle: int = 2  # shuffle x shuffle neighbouring patches become one token
    norm: bool = True  # LayerNorm over the concatenated channels
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class TemporalConfig:
    """Mamba layers over all tokens of a video: x + Mixer(LayerNorm(x)) (paper section 3.2).

    The other mixers are controls with as many parameters as the Mamba mixer that the remaining
    fields describe, `expand` to `dt_rank`; see `models.temporal_controls`.
    """

    layers: int = 2  # 0 turns the temporal encoder off
    mixer: Literal["mamba", "mlp", "attention", "convolution"] = "mamba"
    # "forward": a frame sees itself and earlier ones; for "mlp" only the parameters differ.
    direction: Literal["bidirectional", "forward"] = "bidirectional"
    heads: int = 0  # of "attention"; 0: as many as match the parameters best
    expand: int = 2  # inner width / width
    state: int = 16  # SSM state per channel
    conv: int = 4  # taps of the causal depthwise convolution
    dt_rank: int = 0  # 0: ceil(width / 16)
    dt_min: float = 1e-3  # step sizes at initialisation are log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self):
        _require(self.layers >= 0, f"temporal.layers={self.layers} is negative")
        _require(self.conv >= 1, f"temporal.conv={self.conv}: at least one tap is needed")
        _require(self.heads >= 0, f"temporal.heads={self.heads} is negative")
        _require(
            self.heads == 0 or self.mixer == "attention",
            f"temporal.heads={self.heads} is of temporal.mixer='attention' alone, not of"
            f" {self.mixer!r}: leave it at 0",
        )

    def mamba_parameters(self, width: int) -> int:
        """Parameters of one Mamba mixer for tokens of `width`, its LayerNorm left out."""
        E, G, K = self.expand * width, self.state, self.conv
        R = self.dt_rank or math.ceil(width / 16)
        directions = 2 if self.direction == "bidirectional" else 1
        return 3 * width * E + directions * E * (K + 2 * R + 3 * G + 3)

    def hidden(self, width: int) -> int:
        """Hidden units of the gated MLP with as many parameters, 3 a unit and channel.

        A multiple of the largest power of two, up to 64, that moves the number by at most 0.5 %:
        what devices compute and share out well. Below 200 units it is the nearest number.
        """
        exact = self.mamba_parameters(width) / (3 * width)
        step = next((s for s in (64, 32, 16, 8, 4, 2) if s / 2 <= 0.005 * exact), 1)
        return max(1, round(exact / step)) * step

    def attention_heads(self, width: int) -> tuple[int, int]:
        """Heads of the attention with as many parameters, and channels of a head.

        Four matrices, of queries, keys, values and outputs, have width * heads * channels each. A
        head has 32 to 128 channels, a multiple of 8, which the fused kernels want: of those that
        match within 0.5 % the number nearest to 64, if there is none the one that matches best.
        With `heads` given it has the even number, for rotary pairs, that matches best.
        """
        exact = self.mamba_parameters(width) / (4 * width)
        if self.heads or exact < 32:
            heads = self.heads or 1
            return heads, max(2, 2 * round(exact / (2 * heads)))

        def preference(shape):
            heads, channels = shape
            mismatch = abs(heads * channels / exact - 1)
            return max(mismatch, 0.005), abs(channels - 64), mismatch

        shapes = ((max(1, round(exact / c)), c) for c in range(32, 129, 8))
        return min(shapes, key=preference)


@dataclass(frozen=True)
class DecoderConfig:
    """A Gemma 2, Gemma 3 or Qwen2 text decoder; the fields say in what these differ."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    activation: Literal["gelu_tanh", "silu"]  # of the gated MLP: GeGLU or SwiGLU
    norm_eps: float
    norm_plus_one: bool  # RMSNorm multiplies by 1 + w (Gemma) instead of w (Qwen2)
    post_norms: bool  # further RMSNorms on the outputs of attention and MLP (Gemma 2, 3)
    qkv_bias: bool
    qk_norm: bool  # RMSNorm on queries and keys, per head (Gemma 3)
    query_scale: float  # queries are multiplied by this; 0: head_dim ** -0.5
    attention_softcap: float  # scores become cap * tanh(scores / cap); 0: off
    logit_softcap: float
    global_every: int  # every so many layers attention is global, else local; 1: always global
    window: int  # keys that a local layer sees, the query's own included; 0: no limit
    rope_theta: float  # base of the rotary embedding in global layers
    rope_theta_local: float  # the same in local layers
    rope_scaling: float  # positions are divided by this in global layers (linear scaling)
    tied_embeddings: bool
    scale_embeddings: bool  # token embeddings are multiplied by sqrt(width)

    def __post_init__(self):
        _require(
            self.heads % self.kv_heads == 0,
            f"decoder.heads={self.heads} is not a multiple of decoder.kv_heads={self.kv_heads}",
        )
        _require(
            self.head_dim % 2 == 0, f"decoder.head_dim={self.head_dim} is odd: no rotary pairs"
        )
        _require(self.global_every >= 1, f"decoder.global_every={self.global_every} is below 1")
        _require(
            self.global_every == 1 or self.window > 0,
            f"decoder.global_every={self.global_every} has local layers: set decoder.window",
        )


@dataclass(frozen=True)
class ModelConfig:
    """STORM: ViT, projector, temporal encoder, token reduction, decoder."""

    vit: VitConfig
    projector: ProjectorConfig
    temporal: TemporalConfig
    reduction: ReductionConfig
    decoder: DecoderConfig
    dtype: Literal["float32", "bfloat16"]  # of activations and matrix products

    def __post_init__(self):
        _require(
            self.grid % self.reduction.spatial_pool == 0,
            f"a frame has {self.grid} tokens a side, not a multiple of"
            f" reduction.spatial_pool={self.reduction.spatial_pool}",
        )

    @property
    def grid(self) -> int:
        """Tokens along one side of a frame, between projector and reduction.

        The projector pads an odd grid with zeros: 27 patches a side (384 pixels) become 14 tokens.
        """
        return math.ceil(self.vit.grid / self.projector.shuffle)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame that the temporal encoder mixes."""
        return self.grid**2

    @property
    def group_tokens(self) -> int:
        """Tokens of a pooled frame, as the decoder sees it."""
        return (self.grid // self.reduction.spatial_pool) ** 2

    def visual_tokens(self, frames: int) -> int:
        """Visual tokens that reach the decoder from one video of `frames` frames (an image: 1)."""
        return self.reduction.groups(frames) * self.group_tokens


# ------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class SourceConfig:
    """One data set of the mixture."""

    # A file, several ("train-*.tar", "{a,b}.jsonl", "{000..127}.parquet"), or a folder of TFDS;
    # docs/data.md describes the formats.
    path: str
    media_root: str = ""  # media paths are relative to it; "": the folder of `path`
    weight: float = 1.0  # share of the samples, relative to the other sources
    # "": as the path's ending says: .json .jsonl .array_record .arrayrecord .tar .parquet .yaml,
    # or a folder that holds dataset_info.json
    format: Literal["", "json", "array_record", "tfds", "webdataset", "parquet", "mixture"] = ""
    split: str = "train"  # of a TFDS data set


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is laid out in rows, and how bad records are treated."""

    train: tuple[SourceConfig, ...]
    eval: tuple[SourceConfig, ...]
    frames: FrameConfig
    tokenizer: str  # "bytes", a folder with tokenizer.json, or a Hugging Face hub id
    chat_template: Literal["gemma", "qwen2"]
    sequence_length: int  # text and visual tokens in a row
    row_frames: int  # frames in a row
    pack: bool  # several samples in a row where they fit
    decode_timeout: float = 30.0  # seconds that one media file may take
    max_bad_fraction: float = 0.02  # share of bad records above which the run stops
    workers: int = 0  # data worker processes; 0 reads in threads of the main process
    prefetch_megabytes: int = 2048  # host memory for batches that are ready ahead of time
    seed: int = 0


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class PartRates:
    """Learning rate of each part at the peak of the schedule; 0 freezes the part."""

    vit: float
    projector: float
    temporal: float
    decoder: float


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor, with linear warm-up and cosine decay."""

    rates: PartRates
    # What is kept of gradients. "adamw": a first and a second moment, 8 bytes a parameter or 6.
    # "adafactor": sums over rows and over columns (arXiv 1804.04235, without its scaling by the
    # size of parameters), next to nothing.
    kind: Literal["adamw", "adafactor"] = "adamw"
    warmup_fraction: float = 0.03  # of all steps
    final_fraction: float = 0.0  # learning rate at the end / at the peak
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # The first moment in bfloat16 saves two bytes a parameter. The second stays float32: with
    # beta2 = 0.999 its steps are smaller than bfloat16 can see.
    first_moment: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global gradient norm; 0: off


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 once: what is left. docs/parallelism.md says how to choose."""

    data: int = -1  # batch
    fsdp: int = 1  # batch, and parameters sharded
    tensor: int = 1  # heads, MLP, vocabulary, Mamba channels
    seq: int = 1  # frames and tokens of a row, and parameters sharded
    slices: int = 1  # TPU slices (else: equal groups of hosts); `data` is split over them first


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int  # steps
    keep: int = 3  # newest checkpoints that stay


# Tensors that remat policies can name, see `RematConfig`.
SAVED_NAMES = (
    "attention",  # the result of attention, and what its backward pass needs of the softmax
    "qkv",  # queries, keys and values, as attention takes them
    "mlp",  # the hidden units of an MLP, before its activation
    "mamba",  # what a Mamba layer's input projection gives
)


@dataclass(frozen=True)
class Remat:
    """What the backward pass computes again, layer by layer, instead of keeping it.

    "none": nothing; "dots": all but matrix products; "names": all but the tensors in `saved`;
    "offload": as "names", and the tensors in `saved` wait in the host's memory; "full": everything
    but the input of each layer.
    """

    policy: Literal["none", "dots", "names", "full", "offload"] = "none"
    saved: tuple[str, ...] = ()  # of SAVED_NAMES

    def __post_init__(self):
        unknown = sorted(set(self.saved) - set(SAVED_NAMES))
        _require(
            not unknown,
            f"train.remat: saved names {', '.join(unknown)}; there are {', '.join(SAVED_NAMES)}",
        )


@dataclass(frozen=True)
class RematConfig:
    """What the backward pass computes again in each part."""

    vit: Remat = Remat()
    temporal: Remat = Remat()
    decoder: Remat = Remat()
    # Each call of the ViT (vit.frames_per_call frames) is computed again as a whole, its policy
    # applies within: then activations do not grow with the number of frames.
    vit_calls: bool = False


@dataclass(frozen=True)
class DivergenceConfig:
    """The run stops when the loss stays above a multiple of its running median."""

    factor: float = 2.0  # of the median; 0: never stops
    window: int = 100  # steps whose median it is; nothing is judged before there are so many
    steps: int = 20  # above it, one after another

    def __post_init__(self):
        _require(
            self.factor == 0 or self.factor > 1,
            f"train.divergence.factor={self.factor}: above 1, or 0 for never",
        )
        _require(
            1 <= self.steps <= self.window // 2,
            f"train.divergence.steps={self.steps} is not between 1 and half of"
            f" train.divergence.window={self.window}: the median would follow the loss",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation run."""

    steps: int  # optimizer updates
    batch: int  # rows in a global batch
    accumulation: int  # microbatches that a batch is cut into
    optimizer: OptimizerConfig
    z_loss: float  # weight of log(Z)^2
    remat: RematConfig
    checkpoint: CheckpointConfig
    log_every: int
    eval_every: int  # 0: only at the end
    eval_samples: int  # records of data.eval that are scored; 0: none
    seed: int = 0
    skip_nonfinite: int = 0  # updates in a row left out for a loss or gradient that is not finite
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    watchdog: float = 1800.0  # seconds without progress until stacks are shown; 0: never
    preemption_grace: float = 600.0  # seconds that saving may take after SIGTERM; 0: no limit
    compile_cache: bool = True  # compiled programs stay in WORKDIR/compiled for the next start
    log_records: bool = False  # writes which records are in the rows of every step

    def __post_init__(self):
        _require(self.steps >= 1, f"train.steps={self.steps} is below 1")
        _require(
            self.batch % self.accumulation == 0,
            f"train.batch={self.batch} is not a multiple of train.accumulation={self.accumulation}",
        )


@dataclass(frozen=True)
class InitConfig:
    """Checkpoints of earlier stages that parameters start from; "" starts that part at random.

    `--config.init_from=CKPT` is `--config.init_from.all=CKPT`; a part's own goes before it.
    """

    all: str = ""
    vit: str = ""
    projector: str = ""
    temporal: str = ""
    decoder: str = ""


@dataclass(frozen=True)
class RunConfig:
    """Everything that `storm_jax.train` needs; saved with every checkpoint."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_from: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self):
        row, frames = self.data.sequence_length, self.data.frames.max_frames
        _require(
            self.data.row_frames >= frames,
            f"data.row_frames={self.data.row_frames} cannot hold one video of"
            f" data.frames.max_frames={frames} frames",
        )
        needed = self.model.visual_tokens(frames)
        _require(
            needed < row,
            f"{frames} frames are {needed} visual tokens, but data.sequence_length={row};"
            " lower data.frames.max_frames, raise model.reduction, or lengthen the sequence",
        )


# ------------------------------------------------------------------------------- building, saving


def from_mapping(cls: type, mapping: Mapping[str, Any], path: str = "") -> Any:
    """Builds dataclass `cls` from a nested mapping, checking names and types.

    Raises:
      ConfigError: an unknown field, a missing field or a value of the wrong type, with its path.
    """
    names = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(mapping) - set(names))
    _require(
        not unknown,
        f"{path or 'config'} has no field {', '.join(unknown)}; it has {', '.join(sorted(names))}",
    )
    values = {}
    for name, spec in names.items():
        where = f"{path}.{name}" if path else name
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], where)
        else:
            has_default = (
                spec.default is not dataclasses.MISSING
                or spec.default_factory is not dataclasses.MISSING
            )
            _require(has_default, f"{where} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping), f"{path}={value!r} must be a group of fields")
        return from_mapping(typing.cast(type, hint), value, path)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        _require(
            value in choices, f"{path}={value!r} is not one of {', '.join(map(repr, choices))}"
        )
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        _require(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list")
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    assert not isinstance(hint, types.UnionType), hint
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _require(right, f"{path}={value!r} must be of type {hint.__name__}")
    return value


def to_json(config: Any) -> str:
    """The configuration as JSON text that `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(cls: type, text: str) -> Any:
    """Inverse of `to_json`."""
    return from_mapping(cls, json.loads(text))
