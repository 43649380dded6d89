"""Whether a run's model and data can be split over its mesh, told before anything is compiled."""

import dataclasses
import math
from collections.abc import Callable

import jax

from storm_jax.config import RunConfig, TemporalConfig
from storm_jax.frames import require
from storm_jax.parallel.heads import padded_heads

# Work on padding, as a share of the work itself, that is accepted without a word.
MAX_PADDING = 0.5
_MISMATCH = 0.02  # of parameters, that another number of heads may cost


def check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the batch axes do not divide the rows of a microbatch."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.train.batch // config.train.accumulation
    require(
        rows % shares == 0,
        f"a microbatch of {rows} rows (train.batch / train.accumulation) cannot be split over"
        f" {shares} devices (mesh data x fsdp); make it a multiple of {shares}",
    )


def check_divisible(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where an axis would not be split, or padded by more than `MAX_PADDING`.

    An array that the mesh does not divide stays whole on every device (`sharding.spec`). That is
    accepted for what is small: key-value heads, which are repeated, and the ViT's heads and MLP,
    which are whole where they are used anyway. Frames, and query heads over seq, are padded.
    """
    model, decoder = config.model, config.model.decoder
    tensor, seq, fsdp = (mesh.shape[axis] for axis in ("tensor", "seq", "fsdp"))

    def divides(field: str, size: int, devices: int, axis: str, what: str) -> None:
        most = math.gcd(size, devices)
        require(
            size % devices == 0,
            f"{field}={size} is not a multiple of mesh.{axis}={devices}: {what} would be whole on"
            f" every device; set mesh.{axis} to {most} or another divisor of {size}",
        )

    divides("model.decoder.heads", decoder.heads, tensor, "tensor", "attention")
    divides("model.decoder.mlp", decoder.mlp, tensor, "tensor", "the MLP")
    divides("model.decoder.vocab_size", decoder.vocab_size, tensor, "tensor", "the vocabulary")
    if model.temporal.layers:
        _check_temporal(model.temporal, decoder.width, divides, tensor, seq)
    divides("data.sequence_length", config.data.sequence_length, seq, "seq", "every row")

    for part, width in (("decoder", decoder.width), ("vit", model.vit.width)):
        most = math.gcd(width, fsdp * seq)
        require(
            width % (fsdp * seq) == 0,
            f"model.{part}.width={width} is not a multiple of mesh.fsdp * mesh.seq={fsdp * seq}:"
            " its parameters would be whole on every device; make the product"
            f" {most}, and mesh.data {fsdp * seq // most} times what it is",
        )

    frames = config.data.row_frames
    padded = math.ceil(frames / seq) * seq
    require(
        padded <= (1 + MAX_PADDING) * frames,
        f"data.row_frames={frames} would be padded to {padded} for mesh.seq={seq}; lower mesh.seq,"
        " or raise data.row_frames",
    )
    padded = padded_heads(decoder.heads, decoder.kv_heads, tensor, seq)
    require(
        padded <= (1 + MAX_PADDING) * decoder.heads,
        f"model.decoder.heads={decoder.heads} would be padded to {padded} for mesh.tensor *"
        f" mesh.seq={tensor * seq}, since each device takes whole heads; lower mesh.seq",
    )


def _check_temporal(
    config: TemporalConfig, width: int, divides: Callable[..., None], tensor: int, seq: int
) -> None:
    match config.mixer:
        case "mamba":
            inner, field = config.expand * width, "model.temporal.expand * model.decoder.width"
            divides(field, inner, tensor, "tensor", "the Mamba channels")
        case "attention":
            heads, _ = config.attention_heads(width)
            if config.heads == 0:
                require(heads % tensor == 0, _automatic_heads(config, width, tensor))
            divides("model.temporal.heads", heads, tensor, "tensor", "temporal attention")
        case "mlp" | "convolution":
            field = f"the hidden width of model.temporal.mixer={config.mixer!r}"
            divides(field, config.hidden(width), tensor, "tensor", "its MLP")
    if config.mixer in ("attention", "convolution"):
        require(seq == 1, split_frames(config, seq))


def _automatic_heads(config: TemporalConfig, width: int, tensor: int) -> str:
    """That `tensor` does not divide the heads that nobody gave, and which number to give.

    The number itself does not follow the mesh: a checkpoint has the same shapes on every one.
    """
    heads, _ = config.attention_heads(width)
    most = math.gcd(heads, tensor)
    number = _nearest_heads(config, width, tensor)
    given = "" if number is None else f"model.temporal.heads={number}, as many parameters, or "
    return (
        f"model.temporal.heads=0 makes {heads} heads at model.decoder.width={width}, not a multiple"
        f" of mesh.tensor={tensor}: temporal attention would be whole on every device; set {given}"
        f"mesh.tensor to {most} or another divisor of {heads}"
    )


def _nearest_heads(config: TemporalConfig, width: int, devices: int) -> int | None:
    """What `temporal.heads` may be set to so that `devices` divides it and parameters are matched.

    Preferred as in `TemporalConfig.attention_heads`: 32 to 128 channels, a multiple of 8, then a
    match within 0.5 %, then about 64 channels. None: all are off by more than 2 %.
    """
    exact = config.mamba_parameters(width) / (4 * width)
    choices = []
    for heads in range(devices, int(exact) + 1, devices):
        _, channels = dataclasses.replace(config, heads=heads).attention_heads(width)
        mismatch = abs(heads * channels / exact - 1)
        if mismatch <= _MISMATCH:
            usual = channels % 8 == 0 and 32 <= channels <= 128
            rank = not usual, max(mismatch, 0.005), abs(channels - 64)
            choices.append((rank, heads))
    return min(choices)[1] if choices else None


def split_frames(config: TemporalConfig, devices: int) -> str:
    """Why a mixer of the temporal encoder cannot have its frames split over devices."""
    return (
        f"temporal.mixer={config.mixer!r} needs all frames of a row on each device, but"
        f" mesh.seq={devices} splits them: set mesh.seq=1 (fsdp, data and tensor serve it), or take"
        ' "mamba" or "mlp"'
    )
