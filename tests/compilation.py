"""How XLA compiles in these tests: quickly, for most of their time is compiling."""

import importlib.metadata

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
