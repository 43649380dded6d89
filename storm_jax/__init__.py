"""storm_jax: long-video language models in JAX (STORM, arXiv 2503.04130)."""

__version__ = "0.1.0"
