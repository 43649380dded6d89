"""Rows of a split as arrays on the device: the layout of `data.packing`, one clip a row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from storm_jax.config import ModelConfig
from storm_jax.data.packing import Limits, RowBuilder, Sample
from storm_jax.data.text import encode_unexpanded
from storm_jax.evidence_grid.clips import Clips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Rows = dict[str, jax.Array]  # arrays of `data.packing` with a leading axis of clips


def row_length(
    clips: Sequence[Clips], model: ModelConfig, tokenizer: "PreTrainedTokenizerFast"
) -> int:
    """Tokens of the longest row, visual ones included."""
    longest = 0
    for part in clips:
        encoded = encode_unexpanded(tokenizer, "gemma", part.turns)
        text = max(len(one.tokens) for one in encoded) - 1  # the placeholder makes room
        longest = max(longest, text + model.visual_tokens(part.frames.shape[1]))
    return longest


def layout(
    clips: Clips, model: ModelConfig, tokenizer: "PreTrainedTokenizerFast", length: int
) -> dict[str, np.ndarray]:
    """All arrays of the rows but the frames."""
    count = clips.frames.shape[1]
    side = model.vit.image_size
    # The builder copies pixels too, and they are here already.
    blank = np.broadcast_to(np.uint8(0), (count, side, side, 3))
    rows = []
    for encoded in encode_unexpanded(tokenizer, "gemma", clips.turns):
        builder = RowBuilder(model, Limits(length, count))
        builder.add(Sample(encoded, (blank,)))
        rows.append({name: x for name, x in builder.row.items() if name != "frames"})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def on_device(frames: jax.Array, arrays: dict[str, np.ndarray]) -> Rows:
    """`layout` with the frames, which may be shared by several layouts."""
    return {"frames": frames, **{name: jax.device_put(x) for name, x in arrays.items()}}
