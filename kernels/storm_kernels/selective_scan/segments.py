"""What `segment_ids` means for a scan: which positions count and where the state restarts."""

import jax
import jax.numpy as jnp
from jax import lax


def segment_marks(segment_ids_BL: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Turns segment ids into the two flags that a scan needs at each position.

    A negative id is padding. A position that is not padding restarts the state if an earlier
    position (in scan direction) that is not padding exists and the *last* of them has another id.
    So padding never restarts anything by itself: `5 5 -1 5` is one segment and `5 5 -1 6` two,
    and the first position that is not padding continues the initial state, whatever its id.
    An id that comes back later (`5 6 5`) is a new segment.

    Args:
        segment_ids_BL: int32 [batch, length].
        reverse: the scan runs from the last position to the first.

    Returns:
        valid: bool [batch, length], False on padding.
        restart: bool [batch, length], True where the state before this position counts as zero.
    """
    length = segment_ids_BL.shape[1]
    valid = segment_ids_BL >= 0
    here = lax.broadcasted_iota(jnp.int32, segment_ids_BL.shape, 1)
    # The index of the nearest valid position already passed, this one included ...
    if reverse:
        last = lax.cummin(jnp.where(valid, here, length), axis=1, reverse=True)
        before = jnp.pad(last[:, 1:], ((0, 0), (0, 1)), constant_values=length)
        exists = before < length
    else:
        last = lax.cummax(jnp.where(valid, here, -1), axis=1)
        before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        exists = before >= 0
    # ... moved by one step, so that a position looks at what came before it.
    previous_id = jnp.take_along_axis(segment_ids_BL, jnp.clip(before, 0, length - 1), axis=1)
    return valid, valid & exists & (previous_id != segment_ids_BL)
