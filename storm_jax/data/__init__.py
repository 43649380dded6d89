"""Records, video decoding, chat text, packing, the input pipeline and the synthetic data set.

Nothing here imports `storm_jax.models` or JAX: data workers run without an accelerator.
"""
