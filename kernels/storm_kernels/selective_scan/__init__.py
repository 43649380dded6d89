"""The selective scan (Mamba-1) behind one signature; see `api.selective_scan`."""

from storm_kernels.selective_scan.api import selective_scan
from storm_kernels.selective_scan.bidirectional import selective_scan_bidirectional
from storm_kernels.selective_scan.dispatch import IMPLEMENTATIONS
from storm_kernels.selective_scan.layouts import Layout, preferred_layout
from storm_kernels.selective_scan.sharded import selective_scan_sharded
from storm_kernels.selective_scan.step import selective_scan_step

__all__ = [
    "IMPLEMENTATIONS",
    "Layout",
    "preferred_layout",
    "selective_scan",
    "selective_scan_bidirectional",
    "selective_scan_sharded",
    "selective_scan_step",
]
