"""Next-token loss on the answers, as sums that add up over microbatches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.models.decoder import Decoder

CHUNK = 512  # positions whose scores over the vocabulary exist at one time


class LossSums(NamedTuple):
    """Sums over positions with a target; divide by `tokens` once, after all have been added."""

    nll: jax.Array  # float32, negative log likelihood in nats
    z: jax.Array  # float32, log(Z)^2
    correct: jax.Array  # float32, positions where the target has the highest score
    tokens: jax.Array  # float32, positions with a target


def loss_sums(decoder: Decoder, hidden_BSD: jax.Array, targets_BS: jax.Array) -> LossSums:
    """Sums of the loss over a batch.

    Scores are computed for `CHUNK` positions at a time and again in the backward pass, so that no
    [B, S, V] array exists.

    Args:
      decoder: gives the scores.
      hidden_BSD: final hidden states.
      targets_BS: int32, the token that follows each position; negative: no loss here.
    """
    S = targets_BS.shape[1]

    def chunk_sums(hidden, targets):
        nll, log_z, correct = token_scores(decoder, hidden, targets)
        there = targets >= 0
        return LossSums(
            nll=jnp.sum(jnp.where(there, nll, 0)),
            z=jnp.sum(jnp.where(there, log_z**2, 0)),
            correct=jnp.sum(correct & there, dtype=jnp.float32),
            tokens=jnp.sum(there, dtype=jnp.float32),
        )

    total = LossSums(*(jnp.zeros(()) for _ in LossSums._fields))
    for start in range(0, S, CHUNK):
        part = slice(start, start + CHUNK)
        # Not a scan: its backward pass would add a whole embedding gradient a step to a carry.
        step = jax.checkpoint(chunk_sums) if S > CHUNK else chunk_sums
        total = jax.tree.map(jnp.add, total, step(hidden_BSD[:, part], targets_BS[:, part]))
    return total


def token_scores(
    decoder: Decoder, hidden_BSD: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per position: negative log likelihood, log(Z), and whether the target has the highest score.

    Returns:
      float32 [B, S], float32 [B, S], bool [B, S]; where the target is negative, any value.
    """
    scores_BSV = decoder.logits(hidden_BSD)
    log_z = jax.nn.logsumexp(scores_BSV, axis=-1)
    # A sum over one position instead of a gather: the vocabulary may be split over devices.
    vocabulary = jnp.arange(scores_BSV.shape[-1])
    chosen = jnp.sum(jnp.where(vocabulary == targets_BS[..., None], scores_BSV, 0), axis=-1)
    return log_z - chosen, log_z, jnp.argmax(scores_BSV, axis=-1) == targets_BS
