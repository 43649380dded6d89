"""Attention for heads that the platforms' kernels pad: see `gpu.attention`."""

from storm_kernels.attention.gpu import attention, unsupported

__all__ = ["attention", "unsupported"]
