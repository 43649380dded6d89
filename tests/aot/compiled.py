"""Small programs compiled on the eight simulated devices."""

import math

import jax
import numpy as np

from storm_jax.aot import hlo


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices; axes as named, in this order."""
    count = math.prod(sizes.values())
    devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes))


def program(function, mesh, in_specs, out_specs, *shapes) -> hlo.Program:
    """The compiled form of `function` inside `jax.shard_map`, global shapes in float32."""
    body = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return hlo.parse(jax.jit(body).lower(*arguments).compile().as_text())
