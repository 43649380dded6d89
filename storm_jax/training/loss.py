"""Next-token loss on the answers, as sums that add up over microbatches and devices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from storm_jax.config import DecoderConfig
from storm_jax.models.decoder import Decoder, output_scores
from storm_jax.parallel import sharding

# Positions of each row whose scores over the vocabulary exist at one time; of a row that is split
# over devices, of each device's stretch.
CHUNK = 1024


class LossSums(NamedTuple):
    """Sums over positions with a target; divide by `tokens` once, after all have been added."""

    nll: jax.Array  # float32, negative log likelihood in nats
    z: jax.Array  # float32, log(Z)^2
    correct: jax.Array  # float32, positions where the target has the highest score
    tokens: jax.Array  # float32, positions with a target


def loss_sums(decoder: Decoder, hidden_BSD: jax.Array, targets_BS: jax.Array) -> LossSums:
    """Sums of the loss over a batch.

    Positions with a target are moved to the front of their rows (to the front of each device's
    stretch of them), and scores are computed for `CHUNK` of them at a time, as often as the fullest
    needs: visual tokens and questions have no target and cost nothing. The backward pass computes
    scores again, so no [B, S, V] exists.

    Args:
      decoder: gives the scores.
      hidden_BSD: final hidden states.
      targets_BS: int32, the token that follows each position; negative: no loss here.
    """
    chunk = min(CHUNK, sharding.stretches(targets_BS).shape[2])
    hidden, targets = _targets_first(hidden_BSD, targets_BS, chunk)
    return _sums(decoder.config, chunk, decoder.output_weight, hidden, targets)


def _targets_first(hidden_BSD, targets_BS, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Both as `sharding.stretches`, padded to whole chunks, positions with a target first."""
    row = ("batch", "length")

    def move(x, targets):
        index = jnp.argsort(targets < 0, axis=1, stable=True)
        x = jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
        more = -x.shape[1] % chunk
        # A target of -1 is none; the states there do not matter.
        return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)), constant_values=-1)

    states = sharding.per_device(move, ((*row, None), row), (*row, None))(hidden_BSD, targets_BS)
    targets = sharding.per_device(move, (row, row), row)(targets_BS, targets_BS)
    return sharding.stretches(states), sharding.stretches(targets)


def position_scores(
    decoder: Decoder, hidden_BSD: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Per position: negative log likelihood, and whether the target has the highest score.

    Returns:
      float32 [B, S], bool [B, S]; where the target is negative, any value.
    """
    B, S = targets_BS.shape
    hidden = sharding.stretches(hidden_BSD)
    targets = sharding.stretches(sharding.shard(targets_BS, "batch", "length"))
    n, length = targets.shape[1:]
    parts = []
    for start in range(0, length, CHUNK):  # as many scores at a time as in training
        size = min(CHUNK, length - start)
        chunk = (_cut(x, start, size) for x in (hidden, targets))
        nll, _, correct = token_scores(decoder.logits(next(chunk)), next(chunk))
        parts.append([sharding.reshape(x, B, n, size) for x in (nll, correct)])
    nll, correct = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    return sharding.reshape(nll, B, S), sharding.reshape(correct, B, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(config: DecoderConfig, chunk: int, weight, hidden_BnSD, targets_BnS) -> LossSums:
    def add(index, total):
        hidden, targets = (_cut(x, index * chunk, chunk) for x in (hidden_BnSD, targets_BnS))
        more = _chunk_sums(config, weight, hidden, targets)
        return jax.tree.map(jnp.add, total, more)

    start = LossSums(*(jnp.zeros(()) for _ in LossSums._fields))
    return jax.lax.fori_loop(0, _chunks(targets_BnS, chunk), add, start)


def _sums_fwd(config, chunk, weight, hidden_BnSD, targets_BnS):
    sums = _sums(config, chunk, weight, hidden_BnSD, targets_BnS)
    return sums, (weight, hidden_BnSD, targets_BnS)


def _sums_bwd(config, chunk, residuals, cotangents):
    # A loop with one gradient of the weight that all chunks add to: JAX's own transpose of a loop
    # whose length the data decides does not exist, and of an unrolled one has a gradient a chunk.
    weight, hidden_BnSD, targets_BnS = residuals

    def add(index, gradients):
        d_weight, d_hidden = gradients
        hidden, targets = (_cut(x, index * chunk, chunk) for x in (hidden_BnSD, targets_BnS))
        scored = functools.partial(_chunk_sums, config, targets_BS=targets)
        _, pull = jax.vjp(lambda w, h: scored(w, h), weight, hidden)
        more_weight, more_hidden = pull(cotangents)
        more_hidden = sharding.reshape(more_hidden, *d_hidden.shape[:2], chunk, d_hidden.shape[3])
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, more_hidden, index * chunk, axis=2)
        return d_weight + more_weight, d_hidden

    start = (jnp.zeros_like(weight), jnp.zeros_like(hidden_BnSD))
    gradients = jax.lax.fori_loop(0, _chunks(targets_BnS, chunk), add, start)
    return *gradients, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _chunks(targets_BnS: jax.Array, chunk: int) -> jax.Array:
    """Chunks that hold targets, int32."""
    return -(-jnp.max(jnp.sum(targets_BnS >= 0, axis=2)) // chunk)


def _cut(x: jax.Array, start, size: int) -> jax.Array:
    """[B, n, S, ...] -> [B, n * size, ...], the positions from `start` on of each stretch."""
    x = jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
    return sharding.reshape(x, x.shape[0], x.shape[1] * size, *x.shape[3:])


def _chunk_sums(config: DecoderConfig, weight, hidden_BSD, targets_BS) -> LossSums:
    scores_BSV = output_scores(config, weight, hidden_BSD)
    nll, log_z, correct = token_scores(scores_BSV, targets_BS)
    there = targets_BS >= 0
    return LossSums(
        nll=jnp.sum(jnp.where(there, nll, 0)),
        z=jnp.sum(jnp.where(there, log_z**2, 0)),
        correct=jnp.sum(correct & there, dtype=jnp.float32),
        tokens=jnp.sum(there, dtype=jnp.float32),
    )


def token_scores(
    scores_BSV: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per position: negative log likelihood, log(Z), and whether the target has the highest score.

    Args:
      scores_BSV: float32, scores of the vocabulary.
      targets_BS: int32; where it is negative the results are any value.

    Returns:
      float32 [B, S], float32 [B, S], bool [B, S].
    """
    log_z = jax.nn.logsumexp(scores_BSV, axis=-1)
    # A sum over one position instead of a gather: the vocabulary may be split over devices.
    vocabulary = jnp.arange(scores_BSV.shape[-1])
    chosen = jnp.sum(jnp.where(vocabulary == targets_BS[..., None], scores_BSV, 0), axis=-1)
    return log_z - chosen, log_z, jnp.argmax(scores_BSV, axis=-1) == targets_BS
