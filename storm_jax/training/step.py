"""One optimizer update, and one evaluation step."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from storm_jax.config import TrainConfig
from storm_jax.models.storm import Params, StormModel
from storm_jax.parallel.sharding import reshape, shard
from storm_jax.training.loss import LossSums, loss_sums, position_scores
from storm_jax.training.optim import schedule, split_parts, trainable_parts
from storm_jax.training.state import TrainState

Batch = dict[str, jax.Array]  # see data.packing
Metrics = dict[str, jax.Array]


def make_train_step(
    model: StormModel, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function to jit: (state, global batch) -> (state, metrics).

    The loss is the sum over all answer tokens of the global batch divided by their number, whatever
    the number of microbatches. Metrics are float32 scalars: loss (with the z-loss), nll, accuracy
    (of answer tokens, teacher forced), answer_tokens, grad_norm, learning_rate (relative to peak).
    """
    parts = trainable_parts(config.optimizer)
    relative_rate = schedule(config.optimizer, config.steps)

    def objective(trained: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        storm = model.bind({**trained, **frozen})
        sums = loss_sums(storm.decoder, storm(batch, config.remat), batch["targets"])
        return sums.nll + config.z_loss * sums.z, sums

    def gradients(trained: Params, frozen: Params, batch: Batch) -> tuple[LossSums, Params]:
        gradient = jax.grad(objective, has_aux=True)
        if config.accumulation == 1:
            grads, sums = gradient(trained, frozen, batch)
            return sums, grads

        def add(total, microbatch):
            grads, sums = gradient(trained, frozen, microbatch)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        start = (LossSums(*(jnp.zeros(()) for _ in LossSums._fields)), _zeros_like(trained))
        return jax.lax.scan(add, start, _microbatches(batch, config.accumulation))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = split_parts(state.params, parts)
        sums, grads = gradients(trained, frozen, batch)
        count = jnp.maximum(sums.tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**cast(Params, optax.apply_updates(trained, updates)), **frozen}
        metrics = {
            "loss": (sums.nll + config.z_loss * sums.z) / count,
            "nll": sums.nll / count,
            "accuracy": sums.correct / count,
            "answer_tokens": sums.tokens,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(relative_rate(state.step)),
        }
        params = {part: params[part] for part in state.params}  # the order of the tree stays
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: StormModel) -> Callable[[Params, Batch], Any]:
    """The function to jit: (params, batch) -> (nll [B, S], correct [B, S]).

    `correct` says where the target has the highest score. A sample whose answer is correct at every
    position is one that greedy decoding answers word for word: as long as the answer is right, what
    decoding sees is what teacher forcing shows.
    """

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        storm = model.bind(params)
        scores = position_scores(storm.decoder, storm(batch), batch["targets"])
        return tuple(shard(x, "batch", None) for x in scores)

    return eval_step


def _zeros_like(tree: Params) -> Params:
    # Under a mesh a gradient must start with its parameter's layout.
    return jax.tree.map(jnp.zeros_like, tree)


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]: every device keeps an equal share of each microbatch."""

    def cut(x: jax.Array) -> jax.Array:
        x = reshape(x, x.shape[0] // count, count, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(cut, batch)
