"""Our decoder's parameters and those of Google's Gemma: one table for both directions.

The names are those of github.com/google-deepmind/gemma (`gemma/gm/nn/_modules.py`), without the
"w" of an einsum. Ours are paths inside the decoder, with all layers stacked on the first axis.
"""

from dataclasses import dataclass

import numpy as np

from storm_jax.config import DecoderConfig


@dataclass(frozen=True)
class Entry:
    """One tensor there, and the parameters here that it holds.

    Attributes:
      google: name, with "{layer}" if ours stack the layers.
      ours: paths inside the decoder; several stand one after another on the first axis there.
      order: axes of theirs (of one of several) in the order of ours, None: the same order.
    """

    google: str
    ours: tuple[str, ...]
    order: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.google

    def to_ours(self, array: np.ndarray) -> list[np.ndarray]:
        """A tensor of a checkpoint as one layer of each of our parameters."""
        parts = list(array) if len(self.ours) > 1 else [array]
        return [x if self.order is None else x.transpose(self.order) for x in parts]

    def to_google(self, arrays: list[np.ndarray]) -> np.ndarray:
        """One layer of each of our parameters as the checkpoint has them; inverse of `to_ours`."""
        if self.order is not None:
            arrays = [x.transpose(np.argsort(self.order)) for x in arrays]
        return np.stack(arrays) if len(self.ours) > 1 else arrays[0]

    def google_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape there of what has `shape` (of one layer of one parameter) here."""
        if self.order is not None:
            shape = tuple(shape[axis] for axis in np.argsort(self.order))
        return (len(self.ours), *shape) if len(self.ours) > 1 else shape


def entries(config: DecoderConfig, *, transposed_gate: bool) -> list[Entry]:
    """The table of a Gemma 1, 2 or 3 decoder; covers its parameters exactly.

    Args:
      config: of the decoder.
      transposed_gate: gating_einsum is [2, mlp, width] (Gemma 2 of 9B and more, Gemma 3) instead of
        [2, width, mlp].
    """
    layer, block = "layer_{layer}/", "blocks/layers/"
    query, key, value = (f"{block}{name}/weight" for name in ("query", "key", "value"))
    heads = (1, 0, 2)  # [heads, width, head dim] there
    if config.heads == config.kv_heads:
        attention = [Entry(f"{layer}attn/qkv_einsum", (query, key, value), heads)]
    else:
        attention = [
            Entry(f"{layer}attn/q_einsum", (query,), heads),
            Entry(f"{layer}attn/kv_einsum", (key, value), heads),
        ]
    gate = (f"{block}gate/weight", f"{block}up/weight")
    norms = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}
    if config.post_norms:
        norms["post_attention_norm"] = "attention_post_norm"
        norms["post_ffw_norm"] = "mlp_post_norm"
    if config.qk_norm:
        norms["attn/_query_norm"] = "query_norm"
        norms["attn/_key_norm"] = "key_norm"
    return [
        Entry("embedder/input_embedding", ("embedding/table",)),
        *attention,
        Entry(f"{layer}attn/attn_vec_einsum", (f"{block}out/weight",)),
        Entry(f"{layer}mlp/gating_einsum", gate, (1, 0) if transposed_gate else None),
        Entry(f"{layer}mlp/linear", (f"{block}down/weight",)),
        *(Entry(f"{layer}{a}/scale", (f"{block}{b}/scale",)) for a, b in norms.items()),
        Entry("final_norm/scale", ("norm/scale",)),
    ]
