"""Where a call will run, known while it is traced."""

import jax


def platform_of(x: jax.Array) -> str:
    """The platform that computation on x is traced for: "cpu", "gpu", "tpu" or another's name.

    That of the mesh in force (`jax.set_mesh`, `jax.shard_map`) or of x's own mesh, so that a
    program compiled ahead of time for a TPU on a host without one takes the TPU's choices. Without
    a mesh, JAX's default device. A program compiled ahead for one device needs a mesh of that one
    device, or an `implementation` by name: a sharding on a single device cannot be seen here.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh):
        if not mesh.empty and mesh.abstract_device is not None:
            return _common(mesh.abstract_device.platform)
    default = jax.config.jax_default_device  # pyrefly: ignore[missing-attribute]
    if default is not None:
        return _common(default if isinstance(default, str) else default.platform)
    return _common(jax.default_backend())


def _common(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which x varies; empty outside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
