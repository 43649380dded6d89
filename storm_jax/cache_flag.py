"""The flag of the commands that answer for where compiled programs are kept."""

import os

from absl import flags

from storm_jax.training import compile_cache

_CACHE = flags.DEFINE_string(
    "compile_cache",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "storm_jax", "compiled"),
    'Folder of compiled programs; "": none.',
)


def keep_programs() -> None:
    """Compiled programs are kept for the next start."""
    if _CACHE.value:
        compile_cache.enable(os.path.expanduser(_CACHE.value))
