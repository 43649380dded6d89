"""Decoding of all rows together, many steps in one program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.inference.cache import Cache
from storm_jax.inference.decoder import CachedDecoder
from storm_jax.inference.sampling import Wishes, sample
from storm_jax.inference.weights import Weights


class Rows(NamedTuple):
    """Where the answer of each row stands, arrays [B]."""

    token: jax.Array  # int32, the newest token: part of the answer, not yet of the cache
    position: jax.Array  # int32, its place: the cache holds the tokens before it
    remaining: jax.Array  # int32, tokens that may follow it
    running: jax.Array  # bool, a token follows
    stopped: jax.Array  # bool, a stop token was chosen
    seen: jax.Array  # bool [B, V], tokens of prompt and answer
    finite: jax.Array  # bool, no score so far was infinite or NaN
    wishes: Wishes


def no_rows(rows: int, vocabulary: int) -> Rows:
    """Rows of which none runs."""
    zeros = jnp.zeros(rows, jnp.int32)
    off = jnp.zeros(rows, bool)
    # Each an array of its own: they are donated.
    return Rows(
        zeros, zeros + 0, zeros + 0, off, off & False, jnp.zeros((rows, vocabulary), bool),
        ~off, jax.tree.map(jnp.copy, Wishes.empty(rows)),
    )  # fmt: skip


def begin(
    rows: Rows,
    row: jax.Array,
    scores_V: jax.Array,
    position: jax.Array,
    limit: jax.Array,
    seen_V: jax.Array,
    wishes: Wishes,
) -> Rows:
    """Chooses the first token of an answer.

    Args:
      row: int32, the row that the answer is made in.
      scores_V: float32, behind the prompt.
      position: int32, length of the prompt.
      limit: int32, tokens that the answer may have.
      seen_V: bool, tokens of the prompt.
      wishes: one row's, without the axis B.
    """
    one = jax.tree.map(lambda x: x[None], wishes)
    token = sample(scores_V[None], one, seen_V[None], position[None])[0]
    stopped = jnp.any(token == wishes.stop_tokens)
    new = Rows(
        token=token,
        position=position,
        remaining=limit - 1,
        running=~stopped & (limit > 1),
        stopped=stopped,
        seen=seen_V.at[token].set(True),
        finite=jnp.isfinite(scores_V).all(),
        wishes=wishes,
    )
    return jax.tree.map(lambda all_, x: all_.at[row].set(x), rows, new)


def decode(
    decoder: CachedDecoder,
    weights: Weights,
    cache: Cache,
    rows: Rows,
    steps: int,
    until_one: jax.Array,
    most: jax.Array,
) -> tuple[Cache, Rows, jax.Array]:
    """Adds up to `most` tokens to every row that runs.

    Args:
      steps: that there is room for, fixed when compiled.
      until_one: bool: returns when the first row ends, else when all have.
      most: int32, tokens of a row, at most `steps`.

    Returns:
      cache, rows, and the new tokens, int32 [B, steps], -1 where there is none.
    """
    B = rows.token.shape[0]
    before = jnp.sum(rows.running)

    def goes_on(state):
        step, _, rows, _ = state
        running = jnp.sum(rows.running)
        enough = jnp.where(until_one, running == before, running > 0)
        return (step < jnp.minimum(most, steps)) & enough & (running > 0)

    def one(state):
        step, cache, rows, out = state
        scores, cache = decoder.token(weights, cache, rows.token, rows.position, rows.running)
        position = rows.position + 1
        token = sample(scores, rows.wishes, rows.seen, position)
        is_stop = jnp.any(token[:, None] == rows.wishes.stop_tokens, axis=1)
        new = rows.running & ~is_stop
        out = out.at[:, step].set(jnp.where(new, token, -1))
        remaining = rows.remaining - new
        rows = Rows(
            token=jnp.where(new, token, rows.token),
            # Where a stop token was chosen, the token before it is in the cache now.
            position=jnp.where(rows.running, position, rows.position),
            remaining=remaining,
            running=new & (remaining > 0),
            stopped=rows.stopped | (rows.running & is_stop),
            seen=rows.seen.at[jnp.arange(B), token].max(new),
            finite=rows.finite & (jnp.isfinite(scores).all(axis=1) | ~rows.running),
            wishes=rows.wishes,
        )
        return step + 1, cache, rows, out

    out = jnp.full((B, steps), -1, jnp.int32)
    _, cache, rows, out = jax.lax.while_loop(goes_on, one, (0, cache, rows, out))
    return cache, rows, out
