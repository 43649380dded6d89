"""AdamW or Adafactor with warm-up and cosine decay, one peak learning rate for each part."""

from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from storm_jax.config import ConfigError, OptimizerConfig
from storm_jax.models.storm import PARTS, Params


def trainable_parts(config: OptimizerConfig) -> tuple[str, ...]:
    """Parts with a learning rate; the others are frozen and have no gradient and no moments.

    Raises:
      ConfigError: every part is frozen.
    """
    parts = tuple(part for part in PARTS if getattr(config.rates, part) > 0)
    if not parts:
        raise ConfigError("all of train.optimizer.rates are 0: nothing would be trained")
    return parts


def split_parts(params: Params, parts: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen): the parameter tree cut at its first level."""
    trained = {part: tree for part, tree in params.items() if part in parts}
    frozen = {part: tree for part, tree in params.items() if part not in parts}
    return trained, frozen


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update i relative to the peak: linear warm-up, then a cosine."""
    warmup = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=1 / max(warmup, 1),
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of the trained parts, to be given trees as `split_parts` makes them."""

    def part_of(tree):
        return {part: jax.tree.map(lambda _, part=part: part, sub) for part, sub in tree.items()}

    def matrices(tree):
        return jax.tree_util.tree_map_with_path(_decays, tree)

    rates: dict[Hashable, optax.GradientTransformation] = {
        part: optax.scale(-getattr(config.rates, part)) for part in trainable_parts(config)
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _scaled(config),
        optax.add_decayed_weights(config.weight_decay, matrices),
        optax.scale_by_schedule(schedule(config, steps)),
        optax.partition(rates, part_of),
    )


def _scaled(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    first_moment = jnp.dtype(config.first_moment)
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=first_moment)


def update(
    optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any]:
    """`optimizer.update`, with the new state laid out over the mesh as the old one."""
    updates, new = optimizer.update(grads, state, params)
    if not jax.sharding.get_abstract_mesh().empty:
        # Sums over a split axis would come out in a layout of their own.
        new = jax.tree.map(lambda x, old: jax.reshard(x, jax.typeof(old).sharding), new, state)
    return cast(Params, updates), new


def _decays(path, _) -> bool:
    """Weight decay acts on matrices and embeddings, not on norms, biases or the SSM's A, D, dt."""
    return path[-1].key in ("weight", "table")
