"""Compiled programs on disk, so that a restart does not wait for the compiler."""

import os

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable(folder: str) -> None:
    """Keeps programs that took more than a second to compile; call it before the first of them.

    JAX's own variable JAX_COMPILATION_CACHE_DIR names another folder, which runs may share. The
    key of a program holds the versions, flags and devices that it was compiled for. Process 0
    writes, all read. An entry that a kill cut off is named in a warning, and is no use any more.

    Args:
      folder: made where it is missing; gs:// too.
    """
    if not os.environ.get(VARIABLE):
        jax.config.update("jax_compilation_cache_dir", folder)
