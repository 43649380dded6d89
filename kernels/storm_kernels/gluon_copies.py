"""Copies from global to shared memory that go on while a program does something else."""

from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 renamed it.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
