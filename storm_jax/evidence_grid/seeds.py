"""Several seeds of one model at once: the project's training step under `jax.vmap`.

The seeds have their own parameters and their own order of clips. Steps run in chunks inside one
compiled program, on clips that lie on the device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import TrainConfig
from storm_jax.evidence_grid.rows import Rows
from storm_jax.models.storm import Params, StormModel
from storm_jax.training.optim import make_optimizer, split_parts, trainable_parts
from storm_jax.training.state import TrainState
from storm_jax.training.step import make_eval_step, make_train_step


def init_params(model: StormModel, seeds: int) -> Params:
    """Random parameters of seeds 0, 1, ..., with a leading axis of seeds.

    Each seed's are those of `training.state.init_state` with that seed.
    """
    return jax.jit(jax.vmap(model.init))(jnp.stack([jax.random.key(s) for s in range(seeds)]))


def start(config: TrainConfig, params: Params) -> TrainState:
    """The state before the first step of a stage, from stacked parameters."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    parts = trainable_parts(config.optimizer)

    def one(params: Params) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.init(split_parts(params, parts)[0]))

    return jax.jit(jax.vmap(one))(params)


def order(clips: int, stage: int, seed: int, steps: int, batch: int) -> np.ndarray:
    """Which clips are in each batch, int32 [steps, batch]: epochs in random order."""
    rng = np.random.default_rng([stage, seed])
    epochs = -(-steps * batch // clips)
    numbers = np.concatenate([rng.permutation(clips) for _ in range(epochs)])
    return numbers[: steps * batch].reshape(steps, batch).astype(np.int32)


def make_train_chunk(model: StormModel, config: TrainConfig) -> Callable:
    """The jitted function (state, rows, index [C, K, B]) -> (state, metrics [C, K]).

    K: seeds, C: steps. The state is donated.
    """
    step = make_train_step(model, make_optimizer(config.optimizer, config.steps), config)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(state: TrainState, rows: Rows, index_CKB: jax.Array):
        def one_step(state: TrainState, index_KB: jax.Array):
            def one_seed(state: TrainState, index_B: jax.Array):
                state, metrics = step(state, {name: x[index_B] for name, x in rows.items()})
                return state, {name: metrics[name] for name in ("loss", "accuracy", "grad_norm")}

            return jax.vmap(one_seed)(state, index_KB)

        return jax.lax.scan(one_step, state, index_CKB)

    return train_chunk


def make_score(model: StormModel) -> Callable:
    """The jitted function (params, rows, index [C, B]) -> bool [K, C, B].

    True where greedy decoding answers word for word (`training.step.make_eval_step`).
    """
    step = make_eval_step(model)

    @jax.jit
    def score(params: Params, rows: Rows, index_CB: jax.Array) -> jax.Array:
        def one(index_B: jax.Array) -> jax.Array:
            batch = {name: x[index_B] for name, x in rows.items()}
            there = batch["targets"] >= 0

            def one_seed(params: Params) -> jax.Array:
                _, correct = step(params, batch)
                return jnp.all(correct | ~there, axis=1)

            return jax.vmap(one_seed)(params)

        return jnp.moveaxis(jax.lax.map(one, index_CB), 0, 1)

    return score


def scored(score: Callable, params: Params, rows: Rows, batch: int) -> np.ndarray:
    """`make_score`'s function over all rows, bool [K, N]."""
    count = len(rows["tokens"])
    index = np.resize(np.arange(count, dtype=np.int32), (-(-count // batch), batch))
    right = np.asarray(score(params, rows, index))
    return right.reshape(len(right), -1)[:, :count]
