"""Both directions of the selective scan in one call."""

from typing import Literal

import jax

from storm_kernels.selective_scan import dispatch
from storm_kernels.selective_scan.call import ScanCall
from storm_kernels.selective_scan.checks import checked_call

Both = jax.Array | tuple[jax.Array, jax.Array]
"""One array that both directions use, or the pair (forward, backward)."""
OptionalBoth = jax.Array | tuple[jax.Array | None, jax.Array | None] | None
Pair = tuple[jax.Array, jax.Array]


def selective_scan_bidirectional(
    u: Both,
    delta: Both,
    A: Both,
    B: Both,
    C: Both,
    D: OptionalBoth = None,
    *,
    z: OptionalBoth = None,
    delta_bias: OptionalBoth = None,
    delta_softplus: bool = False,
    initial_state: OptionalBoth = None,
    segment_ids: jax.Array | None = None,
    return_final_state: bool = False,
    output_dtype: jax.typing.DTypeLike | None = None,
    implementation: dispatch.Name | None = None,
    layout: Literal["bld", "bdl"] = "bld",
    chunk_size: int | None = None,
) -> Pair | tuple[Pair, Pair]:
    """`selective_scan` forward and, with `reverse`, backward over the same positions.

    Equal to the two calls, values and gradients. Nothing is flipped: the backward direction reads
    the positions from the last to the first where they lie. The directions run one after the
    other: docs/kernels.md says what one launch would save.

    Args:
        u, delta, A, B, C: as in `selective_scan`, each one array that both directions use or a
            pair (forward, backward). The two of a pair may differ in dtype; the number of states
            and of groups may differ between the directions.
        D, z, delta_bias, initial_state: the same, and either of a pair may be None. The backward
            direction's initial state comes in at the last position.
        segment_ids: int32 [batch, length], the same for both directions.
        delta_softplus, output_dtype, implementation, layout, chunk_size: as in `selective_scan`,
            for both directions.
        return_final_state: return (y, h) pairs instead of the pair y.

    Returns:
        The pair (y forward, y backward); with `return_final_state` ((y forward, y backward),
        (h forward, h backward)), the backward one being the state after position 0.

    Raises:
        ValueError, TypeError: as `selective_scan`; the message begins with the direction.
    """
    operands = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    forward, backward = (
        _call(
            [_of(x, index) for x in operands] + [segment_ids],
            index == 1,
            delta_softplus,
            layout,
            chunk_size,
            output_dtype,
        )
        for index in (0, 1)
    )
    (y_f, h_f), (y_b, h_b) = _run(forward, backward, implementation)
    return ((y_f, y_b), (h_f, h_b)) if return_final_state else (y_f, y_b)


def _of(operand, index):
    if not isinstance(operand, tuple | list):
        return operand
    if len(operand) != 2:
        raise ValueError(
            f"an operand is a sequence of {len(operand)}, expected an array for both directions or"
            " a pair (forward, backward)"
        )
    return operand[index]


def _call(operands, reverse, softplus, layout, chunk_size, output_dtype) -> ScanCall:
    try:
        return checked_call(
            *operands, delta_softplus=softplus, reverse=reverse, layout=layout,
            chunk_size=chunk_size, output_dtype=output_dtype,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        direction = "backward" if reverse else "forward"
        raise type(error)(f"{direction} direction: {error}") from error


def _run(forward: ScanCall, backward: ScanCall, implementation: str | None):
    chosen = [dispatch.implementation_for(call, implementation) for call in (forward, backward)]
    return chosen[0].scan(forward), chosen[1].scan(backward)
