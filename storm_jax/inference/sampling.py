"""Which token comes next: greedy or random, for rows that each want it in their own way."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOP_TOKENS = 8


@dataclass(frozen=True)
class Sampling:
    """What one request asks of decoding.

    The filters are applied in the order of the fields, each to what the one before it left, as
    transformers does. They apply to random choices; the penalty to greedy ones too.

    Raises:
      ValueError: a value outside its range.
    """

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0  # scores of tokens that are there are divided by it; 1: off
    temperature: float = 0.0  # 0: the best token each time
    top_k: int = 0  # of the best so many tokens; 0: of all
    top_p: float = 1.0  # of the fewest best tokens whose probabilities add to this
    min_p: float = 0.0  # of tokens that are at least this times as probable as the best
    seed: int = 0  # the same seed and the same prompt give the same choices, whatever runs beside
    stop_tokens: tuple[int, ...] = ()  # ids that end an answer, and are not part of it

    def __post_init__(self):
        def need(holds: bool, name: str, range_: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: it must be {range_}")

        need(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        need(0 < self.repetition_penalty < float("inf"), "repetition_penalty", "above 0")
        need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more")
        need(self.top_k >= 0, "top_k", "0 (off) or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        need(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1")
        need(0 <= self.seed < 2**32, "seed", "between 0 and 2^32 - 1")
        need(len(self.stop_tokens) <= MAX_STOP_TOKENS, "stop_tokens", f"{MAX_STOP_TOKENS} at most")


class Wishes(NamedTuple):
    """The `Sampling` of every row, as arrays [B]."""

    repetition_penalty: jax.Array  # float32
    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    seed: jax.Array  # uint32
    stop_tokens: jax.Array  # int32 [B, MAX_STOP_TOKENS], -1 where there is none

    @classmethod
    def of(cls, sampling: Sampling) -> Self:
        """One row's, without the axis B."""
        stops = np.full(MAX_STOP_TOKENS, -1, np.int32)
        stops[: len(sampling.stop_tokens)] = sampling.stop_tokens
        values = (
            np.float32(sampling.repetition_penalty),
            np.float32(sampling.temperature),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
            np.float32(sampling.min_p),
            np.uint32(sampling.seed),
            stops,
        )
        return cls(*(jnp.asarray(x) for x in values))

    @classmethod
    def empty(cls, rows: int) -> Self:
        """Rows of the default `Sampling`."""
        return cls(*(jnp.broadcast_to(x, (rows, *x.shape)) for x in cls.of(Sampling())))


def sample(
    scores_BV: jax.Array, wishes: Wishes, seen_BV: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """The next token of each row.

    Args:
      scores_BV: float32, of the vocabulary.
      wishes: of each row.
      seen_BV: bool, the tokens of the prompt and of the answer so far.
      positions_B: int32, place of the token in its sequence, by which its random number is made.

    Returns:
      int32 [B].
    """
    penalty = wishes.repetition_penalty[:, None]
    punished = jnp.where(scores_BV > 0, scores_BV / penalty, scores_BV * penalty)
    scores_BV = jnp.where(seen_BV, punished, scores_BV)
    greedy = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)

    def drawn():
        keys = jax.vmap(lambda s, at: jax.random.fold_in(jax.random.key(s), at))(
            wishes.seed, positions_B
        )
        allowed = filtered(scores_BV, wishes)
        chosen = jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)
        return jnp.where(wishes.temperature > 0, chosen, greedy)

    return jax.lax.cond(jnp.any(wishes.temperature > 0), drawn, lambda: greedy)


def filtered(scores_BV: jax.Array, wishes: Wishes) -> jax.Array:
    """Log-probabilities up to a constant, float32 [B, V]; -inf where a token may not be chosen."""
    temperature = wishes.temperature[:, None]
    scores_BV = scores_BV / jnp.where(temperature > 0, temperature, 1)

    def by_rank():
        V = scores_BV.shape[1]
        best_BV = jnp.sort(scores_BV, axis=-1, descending=True)
        rank = jnp.arange(V)[None]
        top_k = jnp.where(wishes.top_k > 0, wishes.top_k, V)[:, None]
        # Equal scores are all kept.
        kth = jnp.take_along_axis(best_BV, jnp.minimum(top_k, V) - 1, axis=1)
        best_BV = jnp.where((rank < top_k) | (best_BV >= kth), best_BV, -jnp.inf)
        before = jnp.cumsum(jax.nn.softmax(best_BV, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        kept = (before < wishes.top_p[:, None]) & (best_BV > -jnp.inf)
        kept |= rank == 0
        lowest = jnp.min(jnp.where(kept, best_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores_BV >= lowest, scores_BV, -jnp.inf)

    ranked = jnp.any((wishes.top_k > 0) | (wishes.top_p < 1))
    scores_BV = jax.lax.cond(ranked, by_rank, lambda: scores_BV)
    # p >= min_p * max(p), in logarithms.
    best = jnp.max(scores_BV, axis=-1, keepdims=True)
    return jnp.where(scores_BV >= best + jnp.log(wishes.min_p)[:, None], scores_BV, -jnp.inf)
