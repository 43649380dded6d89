"""Compiled programs on disk, so that a restart does not wait for the compiler."""

import os

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable(active: bool, workdir: str) -> None:
    """Keeps programs that took more than a second in WORKDIR/compiled; call it before compiling.

    JAX's own variable JAX_COMPILATION_CACHE_DIR names another folder, which runs may share. The
    key of a program holds the versions, flags and devices that it was compiled for. Process 0
    writes, all read.
    """
    if active and not os.environ.get(VARIABLE):
        jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled"))
