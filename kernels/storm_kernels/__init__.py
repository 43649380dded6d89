"""Kernels of storm_jax: the selective scan and what surrounds it, attention. Needs jax alone."""
