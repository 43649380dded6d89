"""The selective scan (Mamba-1) behind one signature; see `api.selective_scan`."""

from storm_kernels.selective_scan.api import IMPLEMENTATIONS, selective_scan

__all__ = ["IMPLEMENTATIONS", "selective_scan"]
