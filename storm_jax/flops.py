"""Model FLOPs of a batch, and what share of a device's peak a step reaches (MFU)."""

from dataclasses import dataclass

import numpy as np

from storm_jax.chips import chip_of_kind
from storm_jax.config import DataConfig, ModelConfig
from storm_jax.models.storm import PARTS


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None for one without a data sheet here: no MFU."""
    chip = chip_of_kind(device_kind)
    return None if chip is None else chip.peak_flops


@dataclass(frozen=True)
class Work:
    """What a batch really holds, padding left out."""

    frames: int
    tokens: int  # text and visual tokens
    scored: int  # tokens with a target: scores of the vocabulary are needed of them alone
    attended: int  # pairs of query and key that causal attention visits
    frame_pairs: int  # pairs of frames of one video, in both orders, and each frame with itself

    @classmethod
    def of(cls, batch: dict[str, np.ndarray]) -> "Work":
        """Counts a packed batch (`data.packing`)."""
        there = batch["segments"] >= 0
        rows, frames = np.nonzero(batch["frame_segments"] >= 0)
        videos = np.stack([rows, batch["frame_segments"][rows, frames]])
        _, lengths = np.unique(videos, axis=1, return_counts=True)
        return cls(
            frames=len(frames),
            tokens=int(there.sum()),
            scored=int((batch["targets"] >= 0).sum()),
            attended=int((batch["positions"][there].astype(np.int64) + 1).sum()),
            frame_pairs=int((lengths.astype(np.int64) ** 2).sum()),
        )

    @classmethod
    def full(cls, data: DataConfig, model: ModelConfig, rows: int) -> "Work":
        """What `rows` rows without padding hold: one video each, and text that all has targets."""
        S, visual = data.sequence_length, model.visual_tokens(data.row_frames)
        return cls(
            frames=rows * data.row_frames,
            tokens=rows * S,
            scored=rows * max(0, S - visual),
            attended=rows * S * (S + 1) // 2,
            frame_pairs=rows * data.row_frames**2,
        )


def forward_flops(config: ModelConfig, work: Work) -> dict[str, float]:
    """FLOPs of one forward pass by part: matrix products and attention, two per multiply-add.

    Not counted: norms, activations, softmax and the recurrence of the selective scan. A local layer
    counts as if it saw every earlier token.
    """
    vit, decoder = config.vit, config.decoder
    patches, D_v, D = vit.grid**2, vit.width, decoder.width
    used_layers = vit.layers + 1 + vit.output_layer
    per_patch = 2 * (4 * D_v * D_v + 2 * D_v * vit.mlp) + 4 * patches * D_v
    per_frame = patches * (used_layers * per_patch + 2 * 3 * vit.patch_size**2 * D_v)

    H, K, C = decoder.heads, decoder.kv_heads, decoder.head_dim
    layer = D * C * (2 * H + 2 * K) + 3 * D * decoder.mlp
    head = 2 * D * decoder.vocab_size
    return {
        "vit": work.frames * per_frame,
        "projector": work.frames * config.frame_tokens * 2 * config.projector.shuffle**2 * D_v * D,
        "temporal": config.frame_tokens * config.temporal.layers * _mixer(config, work),
        "decoder": (
            work.tokens * 2 * decoder.layers * layer
            + work.scored * head
            + 4 * decoder.layers * H * C * work.attended
        ),
    }


def _mixer(config: ModelConfig, work: Work) -> float:
    """FLOPs of one layer of the temporal encoder, for one place of all frames."""
    temporal, D = config.temporal, config.decoder.width
    match temporal.mixer:
        case "mamba":
            E, G = temporal.expand * D, temporal.state
            R = temporal.dt_rank or -(-D // 16)
            directions = 2 if temporal.direction == "bidirectional" else 1
            weights = 3 * D * E + directions * E * (temporal.conv + (R + 2 * G) + R)
            return 2 * work.frames * weights
        case "mlp" | "convolution":
            return 2 * work.frames * 3 * D * temporal.hidden(D)
        case "attention":
            heads, channels = temporal.attention_heads(D)
            causal = temporal.direction == "forward"
            visited = (work.frame_pairs + work.frames) // 2 if causal else work.frame_pairs
            return heads * channels * (2 * work.frames * 4 * D + 4 * visited)


def training_flops(config: ModelConfig, work: Work, trained: tuple[str, ...]) -> float:
    """FLOPs of a training step, recomputation not counted.

    A trained part costs three forward passes. A frozen part costs two if gradients pass through it
    to an earlier part, else one.
    """
    forward = forward_flops(config, work)
    total, gradients_flow = 0.0, False
    for part in PARTS:
        passes = 3 if part in trained else 2 if gradients_flow else 1
        total += passes * forward[part]
        gradients_flow |= part in trained
    return total
