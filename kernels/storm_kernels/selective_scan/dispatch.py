"""Which implementation serves a call, and what each offers besides the scan itself."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from storm_kernels.platforms import platform_of
from storm_kernels.selective_scan import reference, xla, xla_ends
from storm_kernels.selective_scan.call import ScanCall

Name = Literal["reference", "xla", "pallas_tpu", "triton_gpu"]
IMPLEMENTATIONS: tuple[Name, ...] = ("reference", "xla", "pallas_tpu", "triton_gpu")
"""The names that `implementation` takes."""

Result = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation's functions. All are differentiable where they say nothing else.

    Attributes:
        name: one of `IMPLEMENTATIONS`.
        scan: y and the final state of a call.
        unsupported: why a call is not served and what to do instead, or None if it is.
        end_state: the final state of a call alone, or None: that of `scan`. Not differentiated.
        entry_gradient: of a call and the gradients of its y and final state, the gradient of its
            initial state alone, or None: that of `scan`'s backward. Not differentiated.
    """

    name: Name
    scan: Callable[[ScanCall], Result]
    unsupported: Callable[[ScanCall], str | None] = lambda call: None
    end_state: Callable[[ScanCall], jax.Array] | None = None
    entry_gradient: Callable[[ScanCall, jax.Array, jax.Array], jax.Array] | None = None


def implementation_for(call: ScanCall, name: str | None) -> Implementation:
    """The implementation called `name`; for None the platform's fastest that serves the call.

    Raises:
        ValueError: there is no such implementation, or it does not serve the call.
    """
    if name is not None:
        chosen = load(name)
        reason = chosen.unsupported(call)
        if reason is not None:
            raise ValueError(
                f"implementation={name!r} does not serve this call: {reason}. implementation='xla'"
                " serves every call, and None takes the fastest that does"
            )
        return chosen
    kernel = {"tpu": "pallas_tpu", "gpu": "triton_gpu"}.get(platform_of(call.u))
    if kernel is None or call.accumulation_dtype == jnp.float64:
        return load("xla")
    chosen = load(kernel)
    reason = chosen.unsupported(call)
    if reason is None:
        return chosen
    # Python shows the same warning of one place once.
    warnings.warn(f"selective_scan takes 'xla', not {kernel!r}: {reason}", stacklevel=3)
    return load("xla")


def load(name: str) -> Implementation:
    """Imports an implementation. The kernels are imported here alone, so that JAX is enough.

    Raises:
        ValueError: there is no implementation of this name.
    """
    if name == "reference":
        return Implementation(name, reference.reference_scan)
    if name == "xla":
        return Implementation(
            name,
            xla.xla_scan,
            end_state=xla_ends.end_state,
            entry_gradient=xla_ends.entry_gradient,
        )
    if name == "pallas_tpu":
        from storm_kernels.selective_scan import pallas_tpu

        return Implementation(name, pallas_tpu.pallas_tpu_scan, pallas_tpu.unsupported)
    if name == "triton_gpu":
        from storm_kernels.selective_scan import triton_gpu

        return Implementation(
            name,
            triton_gpu.triton_gpu_scan,
            triton_gpu.unsupported,
            end_state=triton_gpu.end_state,
            entry_gradient=triton_gpu.entry_gradient,
        )
    raise ValueError(
        f"implementation={name!r} does not exist; there are "
        f"{', '.join(map(repr, IMPLEMENTATIONS))}, and None for the platform's fastest"
    )
