"""What all processes of a run must have in common: configuration, packages, source, XLA's flags."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import storm_jax
import storm_kernels
from storm_jax.config import RunConfig

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


def identity(config: RunConfig, workdir: str) -> dict[str, str]:
    """Names and values, for `processes.require_same`."""
    return {
        **dict(_leaves(dataclasses.asdict(config), "config")),
        "--workdir": workdir,
        "Python": platform.python_version(),
        **{f"package {name}": _version(name) for name in PACKAGES},
        "source of storm_jax": source_digest(),
        **{name: os.environ.get(name, "") for name in FLAGS},
        "device kind": jax.devices()[0].device_kind,
        "devices of a host": str(jax.local_device_count()),
    }


def source_digest() -> str:
    """Of every Python file of the two packages, for a version number says too little."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (storm_jax, storm_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}")
    else:
        yield path, repr(value)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
