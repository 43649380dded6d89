"""The training state: a plain tree of arrays, laid out on the mesh."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from storm_jax.models.storm import Params, StormModel
from storm_jax.parallel import sharding
from storm_jax.training.optim import split_parts


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32, optimizer updates done
    params: Params  # float32
    opt_state: Any  # of the trained parts


def parameter_shardings(model: StormModel, mesh: jax.sharding.Mesh) -> Params:
    """Where each parameter lies, from its logical axes."""
    return jax.tree.map(
        lambda x, axes: sharding.named(axes, x.shape, mesh), model.abstract(), model.axes()
    )


def abstract_params(
    model: StormModel, mesh: jax.sharding.Mesh, dtype: jnp.dtype | None = None
) -> Params:
    """Shapes, dtypes and shardings of the parameters; nothing is allocated.

    Args:
      dtype: None: float32, as they are trained.
    """
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
        model.abstract(),
        parameter_shardings(model, mesh),
    )


def abstract_state(
    model: StormModel,
    optimizer: optax.GradientTransformation,
    parts: tuple[str, ...],
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Adam's moments lie where their parameters lie.
    """
    params = abstract_params(model, mesh)
    whole = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        opt_state = jax.eval_shape(optimizer.init, split_parts(params, parts)[0])

    def placed(x):
        spec = x.sharding.spec if x.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(cast(jax.Array, step), params, jax.tree.map(placed, opt_state))


def init_state(
    model: StormModel,
    optimizer: optax.GradientTransformation,
    parts: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    seed: int,
) -> TrainState:
    """A state with random parameters, each made where it lies."""

    def init(key):
        params = model.init(key)
        opt_state = optimizer.init(split_parts(params, parts)[0])
        return TrainState(jnp.int32(0), params, opt_state)

    abstract = abstract_state(model, optimizer, parts, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
