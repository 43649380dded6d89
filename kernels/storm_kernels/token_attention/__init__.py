"""Attention of one token to a cache, bound by reading the cache: see `gpu.token_attention`."""

from storm_kernels.token_attention.gpu import token_attention, unsupported

__all__ = ["token_attention", "unsupported"]
