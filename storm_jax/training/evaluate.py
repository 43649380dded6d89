"""Accuracy on held-out records while training: is greedy decoding's answer right, word for word?"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from storm_jax.models.storm import Params
from storm_jax.training.step import Batch


@dataclass
class Score:
    """Answers of one task."""

    right: int = 0
    total: int = 0
    nll: float = 0.0  # sum over answer tokens, nats

    @property
    def accuracy(self) -> float:
        """Share of answers that are right word for word."""
        return self.right / max(self.total, 1)


def evaluate(
    eval_step: Callable[[Params, Batch], tuple[jax.Array, jax.Array]],
    params: Params,
    batches: Iterable,
    place: Callable[[dict[str, np.ndarray]], Batch],
    counts: bool = True,
) -> dict[str, Score]:
    """Scores by task ("" where records name none), over all processes.

    Args:
      eval_step: jitted, see `training.step.make_eval_step`.
      params: parameters.
      batches: this process's batches (`data.pipeline.Batch`).
      place: lays local arrays out as the global batch.
      counts: false on a process that feeds rows which another one feeds too.
    """
    scores: dict[str, Score] = defaultdict(Score)
    for batch in batches:
        nll_BS, correct_BS = map(_local_rows, eval_step(params, place(batch.arrays)))
        there_BS = batch.arrays["targets"] >= 0
        for row, samples in enumerate(batch.info.rows if counts else ()):
            for number, sample in enumerate(samples):
                answer = there_BS[row] & (batch.arrays["segments"][row] == number)
                score = scores[sample.task]
                score.total += 1
                score.right += bool(correct_BS[row][answer].all())
                score.nll += float(nll_BS[row][answer].sum())
    return _summed(scores)


def _local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that this process fed, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _summed(scores: dict[str, Score], size: int = 1 << 16) -> dict[str, Score]:
    """Adds the scores of all processes, which may know different tasks."""
    if jax.process_count() == 1:
        return dict(sorted(scores.items()))
    text = json.dumps({task: [s.right, s.total, s.nll] for task, s in scores.items()}).encode()
    if len(text) > size:
        raise ValueError(f"{len(scores)} tasks are too many to sum over processes")
    padded = np.frombuffer(text.ljust(size), np.uint8)
    total: dict[str, Score] = defaultdict(Score)
    for one in multihost_utils.process_allgather(padded):
        for task, (right, count, nll) in json.loads(one.tobytes()).items():
            score = total[task]
            score.right, score.total, score.nll = (
                score.right + right,
                score.total + count,
                score.nll + nll,
            )
    return dict(sorted(total.items()))
