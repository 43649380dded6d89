"""The selective scan of a sequence whose positions are split over the devices of a mesh axis.

A shard's scan maps the state before it to the state after it by h -> decay h + s, channel by
channel: s is the state it ends with when it starts from zero, decay = exp(A sum dt). So every
shard finds s in one pass without y, all exchange (sum dt, s), each composes the state that comes
in, and one ordinary scan from there gives y. Backward the same with gradients: a pass without
outputs finds the gradient c that a shard sends to the shard before it when nothing comes from
behind, all exchange c, and one ordinary backward with the composed gradient does the rest. What
is exchanged is one state per shard and direction.

Axis letters: S shards, B batch, L length (of a shard), E channels, G SSM state size.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from storm_kernels.selective_scan import dispatch
from storm_kernels.selective_scan.call import ScanCall, promote_varying
from storm_kernels.selective_scan.checks import checked_call
from storm_kernels.selective_scan.reference import softplus
from storm_kernels.selective_scan.segments import segment_marks


def selective_scan_sharded(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    axis_name: str,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    output_dtype: jax.typing.DTypeLike | None = None,
    implementation: dispatch.Name | None = None,
    layout: Literal["bld", "bdl"] = "bld",
    chunk_size: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`selective_scan` inside `jax.shard_map`, with the length axis split over a mesh axis.

    Equal to `selective_scan` of the whole sequence, gradients included. Each device scans its own
    positions with the implementation chosen, once forward and once backward, and each time makes
    one pass without y more. Segments are those of the whole sequence: a shard's first segment
    continues the last one of the shards before it if their ids are the same.

    Args:
        u, delta, B, C, z, segment_ids: this device's positions; shard i of the mesh axis holds the
            i-th stretch of the sequence, whatever `reverse` is. All shards have one length.
        A, D, delta_bias: the same on all devices of the axis.
        axis_name: the mesh axis over which the length is split.
        initial_state: [batch, channels, state], the state before the whole sequence (with
            `reverse`: after it), the same on all devices of the axis.
        delta_softplus, reverse, output_dtype, implementation, layout, chunk_size: as in
            `selective_scan`.
        return_final_state: return (y, h) instead of y.

    Returns:
        y of this device's positions, as `selective_scan`; with `return_final_state` also h
        [batch, channels, state] after the whole sequence, the same on all devices of the axis.

    Raises:
        ValueError: `axis_name` is no axis of a `jax.shard_map` around the call, or as
            `selective_scan`.
        TypeError: as `selective_scan`.
    """
    try:
        shards = lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not an axis of a jax.shard_map around this call; without"
            " one use selective_scan"
        ) from error
    call = checked_call(
        u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
        delta_softplus=delta_softplus, reverse=reverse, layout=layout, chunk_size=chunk_size,
        output_dtype=output_dtype,
    )  # fmt: skip
    chosen = dispatch.implementation_for(call, implementation)
    # The transpose of this is the sum over the shards that gradients of shared operands need.
    call = promote_varying(call, (axis_name,))
    y, h = _scan(chosen, axis_name, call)
    if not return_final_state:
        return y
    last = lax.axis_index(axis_name) == (0 if reverse else shards - 1)
    return y, lax.psum(jnp.where(last, h, 0), axis_name)


class _Links(NamedTuple):
    """What a state meets on its way, the same on all devices: entry i is shard i's.

    Attributes:
        dt_SBE: the sum of the shard's time steps.
        closed_SB: a segment ends where the shard begins, in scan direction: the state does not
            enter. None without segment ids, as `cut_SB`.
        cut_SB: the state does not get through: `closed_SB`, or it restarts inside the shard.
    """

    dt_SBE: jax.Array
    closed_SB: jax.Array | None
    cut_SB: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(chosen: dispatch.Implementation, axis_name: str, call: ScanCall):
    """y and the state after this shard."""
    call, _ = _entered(chosen, axis_name, call)
    return chosen.scan(call)


def _scan_fwd(chosen, axis_name, call):
    call, links = _entered(chosen, axis_name, call)
    arrays = {
        field.name: getattr(call, field.name)
        for field in dataclasses.fields(call)
        if isinstance(getattr(call, field.name), jax.Array) and field.name != "segment_ids"
    }
    # The backward of this shard's scan, with what it keeps, is a pytree: it is itself saved.
    outputs, pull = jax.vjp(lambda arrays: chosen.scan(dataclasses.replace(call, **arrays)), arrays)
    return outputs, (call, links, pull)


def _scan_bwd(chosen, axis_name, residuals, cotangents):
    call, links, pull = residuals
    dy, dh = cotangents
    me = lax.axis_index(axis_name)
    if chosen.entry_gradient is None:
        sent = pull((dy, dh))[0]["initial_state"]
    else:
        sent = chosen.entry_gradient(call, dy, dh)
    sent = _unless(None if links.closed_SB is None else links.closed_SB[me], sent)
    sent_SBEG = lax.all_gather(sent, axis_name)
    received = _composed(jnp.zeros_like(dh), sent_SBEG, links, call.A, me, not call.reverse)
    (gradients,) = pull((dy, dh + received))
    shards = lax.axis_size(axis_name)
    first = me == (shards - 1 if call.reverse else 0)
    # Every other shard's initial state came from its neighbours, and its gradient has gone there.
    gradients["initial_state"] = jnp.where(first, gradients["initial_state"], 0)
    return (dataclasses.replace(call, segment_ids=None, **gradients),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _entered(chosen, axis_name, call) -> tuple[ScanCall, _Links]:
    """The call with the state that comes in from the shards before, in scan direction."""
    me = lax.axis_index(axis_name)
    links = _links(axis_name, call)
    from_zero = dataclasses.replace(call, initial_state=jnp.zeros_like(call.initial_state))
    end = chosen.scan(from_zero)[1] if chosen.end_state is None else chosen.end_state(from_zero)
    end_SBEG = lax.all_gather(end, axis_name)
    h_BEG = _composed(call.initial_state, end_SBEG, links, call.A, me, call.reverse)
    h_BEG = _unless(None if links.closed_SB is None else links.closed_SB[me], h_BEG)
    return dataclasses.replace(call, initial_state=h_BEG), links


def _links(axis_name: str, call: ScanCall) -> _Links:
    acc = call.accumulation_dtype
    length_axis = 1 if call.layout == "bld" else 2
    dt = call.delta.astype(acc)
    if call.delta_bias is not None:
        dt += jnp.expand_dims(call.delta_bias.astype(acc), length_axis - 1)
    if call.delta_softplus:
        dt = softplus(dt)
    if call.segment_ids is None:
        return _Links(lax.all_gather(jnp.sum(dt, length_axis), axis_name), None, None)
    valid_BL, restart_BL = segment_marks(call.segment_ids, call.reverse)
    dt = jnp.where(jnp.expand_dims(valid_BL, 3 - length_axis), dt, 0)
    # The first and the last id of every shard, padding (-1) if it has none, in a row are enough
    # to tell at which shard's entry another segment begins.
    ends_B = [_outermost_id(call.segment_ids, valid_BL, last) for last in (False, True)]
    ends_SB2 = lax.all_gather(jnp.stack(ends_B, -1), axis_name)
    ends_BS2 = jnp.swapaxes(ends_SB2, 0, 1)
    _, changes = segment_marks(ends_BS2.reshape(ends_BS2.shape[0], -1), call.reverse)
    closed_SB = changes.reshape(ends_BS2.shape)[:, :, 1 if call.reverse else 0].T
    restarts_SB = lax.all_gather(jnp.any(restart_BL, axis=1), axis_name)
    dt_SBE = lax.all_gather(jnp.sum(dt, length_axis), axis_name)
    return _Links(dt_SBE, closed_SB, closed_SB | restarts_SB)


def _outermost_id(ids_BL, valid_BL, last: bool):
    """The id of the first or last position that is not padding, -1 if all are."""
    index_B = jnp.argmax(jnp.flip(valid_BL, 1) if last else valid_BL, axis=1)
    index_B = ids_BL.shape[1] - 1 - index_B if last else index_B
    id_B = jnp.take_along_axis(ids_BL, index_B[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(valid_BL, axis=1), id_B, -1)


def _composed(start_BEG, added_SBEG, links: _Links, A, me, reverse: bool):
    """Runs h -> decay h + added over the shards before `me`, from the last one if `reverse`."""
    A_EG = A.astype(start_BEG.dtype)

    def step(h_BEG, shard):
        index, dt_BE, cut_B, added_BEG = shard
        through_BEG = _unless(cut_B, jnp.exp(dt_BE[..., None] * A_EG) * h_BEG)
        passed = index > me if reverse else index < me
        return jnp.where(passed, through_BEG + added_BEG, h_BEG), None

    shards = (jnp.arange(len(added_SBEG)), links.dt_SBE, links.cut_SB, added_SBEG)
    return lax.scan(step, start_BEG, shards, reverse=reverse)[0]


def _unless(flag_B, x_BEG):
    """x where the flag is not set, 0 elsewhere: a select, so that what is infinite stays behind."""
    return x_BEG if flag_B is None else jnp.where(flag_B[:, None, None], 0, x_BEG)
