"""A validated call of the scan, in the one form that every implementation receives."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.once import not_differentiable
from storm_kernels.platforms import varying_axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "segment_ids",
    ],
    meta_fields=["delta_softplus", "reverse", "layout", "chunk_size", "output_dtype"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class ScanCall:
    """Operands whose shapes and dtypes `api.selective_scan` has checked. A pytree of its arrays.

    Attributes:
        u, delta, z: [batch, length, channels], or [batch, channels, length] in layout "bdl";
            z may be None.
        A: [channels, state].
        B, C: [batch, length, groups, state], the group axis always there.
        D, delta_bias: [channels] or None.
        initial_state: [batch, channels, state], zeros where the caller gave none.
        segment_ids: int32 [batch, length] or None.
        delta_softplus, reverse, layout, chunk_size: as in the public signature.
        output_dtype: the dtype of y.
    """

    u: jax.Array
    delta: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    delta_bias: jax.Array | None
    initial_state: jax.Array
    segment_ids: jax.Array | None
    delta_softplus: bool
    reverse: bool
    layout: str
    chunk_size: int | None
    output_dtype: jnp.dtype

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        """float32; float64 where an operand is float64 (which needs jax_enable_x64)."""
        return self.initial_state.dtype

    @property
    def length(self) -> int:
        return self.B.shape[1]


def differentiable_once(implementation: str) -> Callable[[Callable], Callable]:
    """`not_differentiable` for the launches of a kernel of the scan."""
    return not_differentiable(
        f"selective_scan with implementation={implementation!r}",
        "implementation='reference' (or 'xla'), which keeps every state, [length, batch, channels,"
        " state],",
    )


def promote_varying(call: ScanCall, also: tuple[str, ...] = ()) -> ScanCall:
    """Makes every operand vary over each manual mesh axis over which any of them varies.

    The axes named in `also` count as if one varied over them.

    Inside `jax.shard_map` the loops of a scan need carries of one varying type, and a custom
    backward must return gradients of its primals' types. Weights usually are the same on every
    shard of a batch axis while u is not. The transpose of this cast is the `psum` over the shards
    that a weight's gradient needs. Outside `shard_map` nothing happens.
    """
    arrays = {
        field.name: getattr(call, field.name)
        for field in dataclasses.fields(call)
        if isinstance(getattr(call, field.name), jax.Array)
    }
    axes = frozenset(also).union(*(varying_axes(x) for x in arrays.values()))
    cast = {
        name: lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying")
        for name, x in arrays.items()
        if axes - varying_axes(x)
    }
    return dataclasses.replace(call, **cast)
