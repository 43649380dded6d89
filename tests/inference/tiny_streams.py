"""Models that stream, small enough for every test, and frames for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import MeshConfig
from storm_jax.inference.load import LoadedModel, made_ready
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params
from tests.tiny import run_config, tiny_model

ONE = MeshConfig(data=1)
# Untied, else a random model repeats the last token; room for the ids of the "bytes" tokenizer.
DECODER = {"tied_embeddings": False, "vocab_size": 264}


@functools.cache
def parameters(direction: str, layers: int, dtype: str) -> dict:
    """Random ones, as training has them but for the dtype; on the host."""
    temporal = {"direction": direction, "layers": layers}
    model = StormModel(tiny_model(temporal=temporal, decoder=DECODER))
    made = jax.jit(model.init)(jax.random.key(3))
    return jax.tree.map(lambda x: np.asarray(x.astype(dtype)), made)


@functools.cache
def weighted(axes: MeshConfig, devices: int, direction: str, layers: int, dtype: str):
    """A model with these parameters, as it is loaded."""
    temporal = {"direction": direction, "layers": layers}
    config = tiny_model(temporal=temporal, decoder=DECODER, dtype=dtype)
    run = dataclasses.replace(run_config(), model=config)
    model, mesh = StormModel(run.model), make_mesh(axes, jax.devices()[:devices])
    abstract = abstract_params(model, mesh, jnp.dtype(dtype))
    params = jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding),
        parameters(direction, layers, dtype),
        abstract,
    )
    return made_ready(run, params, mesh)


def loaded(
    axes=ONE, devices=1, direction="forward", layers=2, dtype="float32", **reduction
) -> LoadedModel:
    """`reduction` replaces fields of that part, which has no parameters."""
    made = weighted(axes, devices, direction, layers, dtype)
    reduction = dataclasses.replace(made.config.model.reduction, **reduction)
    model = dataclasses.replace(made.config.model, reduction=reduction)
    config = dataclasses.replace(made.config, model=model)
    return dataclasses.replace(made, config=config, model=StormModel(model))


def video(frames, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 12, 12, 3), dtype=np.uint8)
