"""Products of a matrix and one token, bound by reading the matrix: see `gpu.matvec`."""

from storm_kernels.matvec.gpu import ACTIVATIONS, Norm, matvec, unsupported

__all__ = ["ACTIVATIONS", "Norm", "matvec", "unsupported"]
