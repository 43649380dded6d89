"""A checkpoint made ready to answer."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax import checkpoint
from storm_jax.config import MeshConfig, RunConfig
from storm_jax.inference.decoder import CachedDecoder
from storm_jax.inference.weights import Quantization, Weights, check_quantization, prepare
from storm_jax.models.storm import Params, StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params


@dataclass(frozen=True)
class LoadedModel:
    """A model and its parameters, in the dtype that it computes with."""

    config: RunConfig
    model: StormModel
    weights: Weights
    mesh: jax.sharding.Mesh

    @property
    def decoder(self) -> CachedDecoder:
        """Functions of the weights' decoder."""
        return CachedDecoder(self.config.model.decoder, jnp.dtype(self.config.model.dtype))


def load(
    path: str | Path, *, quantization: Quantization = "", devices: list[jax.Device] | None = None
) -> LoadedModel:
    """Reads the configuration and the parameters of a checkpoint.

    Args:
      path: a training workdir, or one checkpoint in it.
      quantization: of the decoder's matrices, or also of the ViT's: see `weights.prepare`.
      devices: over which heads, hidden units and vocabulary are split, and frames; None: all.

    Raises:
      CheckpointError: there is none, or it is of another layout.
      ConfigError: a quantization that is not known, or not for so many devices.
    """
    config = checkpoint.read_config(path)
    model, mesh = StormModel(config.model), _mesh(devices)
    check_quantization(quantization, mesh)  # before much is read
    abstract = abstract_params(model, mesh, jnp.dtype(config.model.dtype))
    params = checkpoint.load_params(path, abstract)
    return made_ready(config, params, mesh, quantization)


def replicas(loaded: LoadedModel, groups: list[list[jax.Device]]) -> list[LoadedModel]:
    """Copies of a model on further groups of devices, each split as the first one is.

    Args:
      groups: as many devices each as `loaded` is on.
    """

    def copy(devices: list[jax.Device]) -> LoadedModel:
        mesh = _mesh(devices)

        def moved(x: jax.Array) -> jax.Array:
            assert isinstance(x.sharding, jax.sharding.NamedSharding)
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, x.sharding.spec))

        return replace(loaded, weights=jax.tree.map(moved, loaded.weights), mesh=mesh)

    return [copy(devices) for devices in groups]


def random(
    config: RunConfig,
    *,
    quantization: Quantization = "",
    devices: list[jax.Device] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """A model with random parameters, for measurements; `load` has the arguments."""
    model, mesh = StormModel(config.model), _mesh(devices)
    abstract = abstract_params(model, mesh, jnp.dtype(config.model.dtype))

    def normal(index: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Each by itself: all at once would be held in float32 beside each other.
        fan_in = max(int(np.prod(leaf.shape[:-1])) // max(leaf.shape[0], 1), 1)

        @jax.jit
        def make():
            x = jax.random.normal(jax.random.key(seed * 100_003 + index), leaf.shape, leaf.dtype)
            return jax.device_put(x * fan_in**-0.5, leaf.sharding)

        return make()

    leaves, tree = jax.tree.flatten(abstract)
    params = jax.tree.unflatten(tree, [normal(i, leaf) for i, leaf in enumerate(leaves)])
    return made_ready(config, params, mesh, quantization)


def made_ready(
    config: RunConfig, params: Params, mesh: jax.sharding.Mesh, quantization: Quantization = ""
) -> LoadedModel:
    """`params` on `mesh`, in the model's dtype, rearranged; they are used up."""
    weights = prepare(params, config.model, mesh, quantization)
    return LoadedModel(config, StormModel(config.model), weights, mesh)


def _mesh(devices: list[jax.Device] | None) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=1, tensor=-1), devices)
