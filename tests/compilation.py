"""How XLA compiles in these tests: quickly, for most of their time is compiling."""

import importlib.metadata
import os

FUSION_CAN_BE_PLAIN = importlib.metadata.version("jaxlib").startswith("0.10.")
"""Later versions have no such flag, and end the process on a flag that they do not know."""

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # By itself it halves the time, and costs a rounding here and there.
    *(("--xla_cpu_use_fusion_emitters=false",) if FUSION_CAN_BE_PLAIN else ()),
)

FUSED = {"xla_cpu_use_fusion_emitters": True} if FUSION_CAN_BE_PLAIN else {}
"""Options of `jax.jit` for a test that compares two programs to the last digits of float32."""

SHARED = "JAX_COMPILATION_CACHE_DIR"
"""The variable that names where all processes of a session look for compiled programs."""


def without_shared_cache() -> dict[str, str]:
    """The environment of a process that keeps its compiled programs where a user's would."""
    return {name: value for name, value in os.environ.items() if name != SHARED}
