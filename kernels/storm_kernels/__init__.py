"""Kernels of storm_jax: the selective scan and what surrounds it. Needs jax alone."""
