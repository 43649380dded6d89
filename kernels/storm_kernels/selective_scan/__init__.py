"""The selective scan (Mamba-1) behind one signature; see `api.selective_scan`."""

from storm_kernels.selective_scan.api import selective_scan
from storm_kernels.selective_scan.dispatch import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "selective_scan"]
