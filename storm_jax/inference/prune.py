"""What a video shows twice: near-duplicate frames, and static tokens behind the temporal encoder.

Skipping them is not in the STORM paper, and needs no training. `DuplicateFilter` works on pixels,
so that a skipped frame costs no ViT. `prune_static` works on tokens, in the manner of Efficient
Video Sampling (EVS, arXiv 2510.14624, section 3): a token that is like the one at the same place of
the frame before says little that is new.
"""

import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GRID = 32  # side of the small picture that frames are compared in; smaller frames as they are
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def small_luma(frames_FHWC: np.ndarray) -> np.ndarray:
    """Means of the luma over the cells of a 32 x 32 grid, float32 [F, 32, 32], levels 0 to 255.

    Args:
      frames_FHWC: uint8, RGB, square; of fewer than 32 pixels a side each is a cell.
    """
    side = frames_FHWC.shape[1]
    cells = min(GRID, side)
    edges = np.arange(cells + 1) * side // cells
    rows = np.add.reduceat(frames_FHWC, edges[:-1], axis=1, dtype=np.uint32)
    sums = np.add.reduceat(rows, edges[:-1], axis=2)
    height = np.diff(edges).astype(np.float32)
    return (sums @ _LUMA) / (height[:, None] * height)


class DuplicateFilter:
    """Skips frames that look like the last one that was kept.

    A frame is skipped where the mean absolute difference of the two small pictures
    (`small_luma`) is below the threshold. It is compared with what was kept, not with its
    neighbour, so that slow changes add up and are seen. The first frame is always kept.

    Attributes:
      seen, kept: frames so far.
    """

    def __init__(self, threshold: float):
        """`threshold` is in levels of 255; 0 keeps everything."""
        self.seen = self.kept = 0
        self._threshold = threshold
        self._last: np.ndarray | None = None

    def __call__(self, frames_FHWC: np.ndarray) -> np.ndarray:
        """The frames of the next chunk that are kept, uint8 [n, H, W, 3], n may be 0."""
        lumas = small_luma(frames_FHWC)
        keep = np.zeros(len(lumas), bool)
        for i, luma in enumerate(lumas):
            last = self._last
            if last is None or np.mean(np.abs(luma - last)) >= self._threshold:
                keep[i], self._last = True, luma
        self.seen += len(keep)
        self.kept += int(keep.sum())
        return frames_FHWC if keep.all() else frames_FHWC[keep]

    def filtered(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Chunks without the frames that are skipped; empty ones are left out."""
        for chunk in chunks:
            kept = self(chunk)
            if len(kept):
                yield kept


def kept_tokens(tokens: int, group_tokens: int, share: float) -> int:
    """Quota of `prune_static`: this share of the tokens, rounded down, at least the first frame."""
    return min(tokens, max(group_tokens, math.floor(tokens * share + 1e-9)))


def prune_static(
    x_VD: jax.Array,
    group_tokens: int,
    keep: int,
    count: jax.Array | int | None = None,
    quota: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keeps the tokens that differ most from those at the same place of the frame before.

    Dissimilarity is 1 - cosine in float32. The first frame stays whole. Of equally dissimilar
    tokens the earlier one stays. The result keeps the order of the video.

    Args:
      x_VD: visual tokens, pooled frame after pooled frame; V is a multiple of group_tokens.
      group_tokens: tokens of a pooled frame.
      keep: rows K of the result, `kept_tokens` of V: static, so that one program serves all
        videos of a bucket.
      count: int32, real tokens, the rest is padding and never kept; None: all V.
      quota: int32, how many of the K rows are wanted, `kept_tokens` of `count`; None: all K.

    Returns:
      The kept tokens [K, D] in the dtype of x, and their places in x, int32 [K], ascending. Rows
      from min(quota, count) on are zeros with place V.
    """
    V, D = x_VD.shape
    if V % group_tokens:
        raise ValueError(f"prune_static: {V} tokens are not a multiple of {group_tokens} a frame")
    if not group_tokens <= keep <= V:
        raise ValueError(
            f"prune_static: keep={keep} is not between a frame ({group_tokens}) and {V}"
        )
    count = V if count is None else count
    wanted = jnp.minimum(keep if quota is None else quota, count)
    x = x_VD.astype(jnp.float32).reshape(-1, group_tokens, D)
    here, before = x[1:], x[:-1]
    norms = jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8)
    cosine = jnp.sum(here * before, axis=-1) / (norms[1:] * norms[:-1])
    place = jnp.arange(V, dtype=jnp.int32)
    score = jnp.concatenate([jnp.full(group_tokens, jnp.inf), (1 - cosine).reshape(-1)])
    score = jnp.where(place < count, score, -jnp.inf)
    _, best_K = lax.top_k(score, keep)  # of equal scores the earlier comes first
    index_K = jnp.sort(jnp.where(jnp.arange(keep) < wanted, best_K, V)).astype(jnp.int32)
    return x_VD.at[index_K].get(mode="fill", fill_value=0), index_K
