"""The two orders of axes that a scan's operands may have."""

from typing import Literal

import jax

from storm_kernels.platforms import platform_of

Layout = Literal["bld", "bdl"]


def preferred_layout(x: jax.Array) -> Layout:
    """The layout of u, delta, z and y that is fastest where computation on x is traced for.

    "bdl" on GPUs, where a thread takes consecutive positions of one channel; "bld" elsewhere,
    where channels fill the vector units.
    """
    return "bdl" if platform_of(x) == "gpu" else "bld"
