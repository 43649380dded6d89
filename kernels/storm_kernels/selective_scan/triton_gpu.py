"""The scan on NVIDIA GPUs: Gluon kernels through jax-triton, forward and backward.

The kernels read [batch, channels, length]. The forward saves one float32 state per segment of
`GPU_BACKWARD` steps and nothing else; the backward is two kernels (the adjoint at the segments'
borders, then all gradients segment by segment) and sums over partial results in a fixed order, so
gradients are the same bits from run to run. `docs/kernels.md` describes and measures them.

Axis letters: B batch, L length, E channels, K groups, G SSM state size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from storm_kernels.platforms import platform_of
from storm_kernels.selective_scan.call import ScanCall, differentiable_once, promote_varying
from storm_kernels.selective_scan.segments import segment_marks
from storm_kernels.selective_scan.shapes import (
    GPU_BACKWARD,
    GpuSweep,
    adjoint_sweep,
    channels_of_a_program,
    forward_sweep,
    gpu_segments,
)
from storm_kernels.triton_launch import launch, not_installed


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known at trace time."""

    delta_softplus: bool
    reverse: bool
    output_dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Arrays:
    """The operands as the kernels take them; u, delta and z [B, E, L], the rest as `ScanCall`.

    marks: int8 [B, L], 0 padding, 1 valid, 3 valid and the state restarts; None without segments.
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
    marks: jax.Array | None


_WEIGHTS = ("A", "D", "delta_bias")


def unsupported(call: ScanCall) -> str | None:
    """Why the kernels do not serve a call and what to do instead, or None if they do."""
    if call.accumulation_dtype == jnp.float64:
        return "an operand is float64 and the kernels compute in float32"
    if platform_of(call.u) != "gpu":
        return "it needs an NVIDIA GPU"
    if (reason := not_installed()) is not None:
        return reason
    # A grid's second and third axes end at 65535: rows, and segments in the backward.
    longest = 65535 * GPU_BACKWARD.segment
    if call.length > longest or call.u.shape[0] > 65535:
        return f"its kernels take up to {longest} positions and 65535 rows of a batch"
    return None


def triton_gpu_scan(call: ScanCall) -> tuple[jax.Array, jax.Array]:
    """Runs a validated call in GPU kernels; differentiable once, in reverse mode.

    Layout "bdl" is read in place; "bld" is transposed by XLA before and after.
    `ScanCall.chunk_size` is not used: the tiles are those of `shapes.forward_sweep`.

    Args:
        call: the operands; see `ScanCall`. No operand is float64.

    Returns:
        y: in u's shape and `call.output_dtype`.
        h: [batch, channels, state] float32.

    Raises:
        NotImplementedError: on differentiating twice.
    """
    call = promote_varying(call)
    static = _Static(call.delta_softplus, call.reverse, jnp.dtype(call.output_dtype))
    y, h = _scan(static, _arrays(call))
    return (y if call.layout == "bdl" else jnp.swapaxes(y, 1, 2)), h


def end_state(call: ScanCall) -> jax.Array:
    """The final state of a call alone, [batch, channels, state] float32. Not differentiated."""
    # The sweep of the adjoint is the cheaper kernel, but not the same recurrence: its inflow
    # meets the decay of its own step.
    return triton_gpu_scan(dataclasses.replace(call, z=None, D=None))[1]


def entry_gradient(call: ScanCall, dy: jax.Array, dh: jax.Array) -> jax.Array:
    """The gradient of the initial state alone, [batch, channels, state]. Not differentiated.

    Args:
        call: the operands; see `ScanCall`.
        dy: the gradient of y, in u's layout.
        dh: float32 [batch, channels, state], the gradient of the final state.
    """
    call = promote_varying(call)
    static = _Static(call.delta_softplus, call.reverse, jnp.dtype(call.output_dtype))
    dy = dy if call.layout == "bdl" else jnp.swapaxes(dy, 1, 2)
    return _adjoint(static, _arrays(call), dy, dh)[0]


def _arrays(call: ScanCall) -> _Arrays:
    def channels_first(x: jax.Array) -> jax.Array:
        return x if call.layout == "bdl" else jnp.swapaxes(x, 1, 2)

    marks = None
    if call.segment_ids is not None:
        valid, restart = segment_marks(call.segment_ids, call.reverse)
        marks = valid.astype(jnp.int8) + 2 * restart.astype(jnp.int8)
    return _Arrays(
        u=channels_first(call.u),
        delta=channels_first(call.delta),
        A=call.A,
        B=call.B,
        C=call.C,
        D=call.D,
        z=None if call.z is None else channels_first(call.z),
        delta_bias=call.delta_bias,
        initial_state=call.initial_state,
        marks=marks,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static: _Static, arrays: _Arrays):
    y, h, _ = _batched(functools.partial(_forward, static, save=False))(arrays)
    return y, h


def _scan_fwd(static, arrays):
    run = _batched(functools.partial(_forward, static, save=True))
    y, h, saved = differentiable_once("triton_gpu")(run)(arrays)
    return (y, h), (arrays, saved)


def _scan_bwd(static, residuals, cotangents):
    arrays, saved = residuals
    run = _batched(functools.partial(_backward, static))
    grads = differentiable_once("triton_gpu")(run)(arrays, saved, *cotangents)
    # The kernels return a weight's gradient for every batch row.
    summed = {
        name: jnp.sum(getattr(grads, name), axis=0).astype(getattr(arrays, name).dtype)
        for name in _WEIGHTS
        if getattr(arrays, name) is not None
    }
    return (dataclasses.replace(grads, **summed, marks=None),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _batched(function: Callable) -> Callable:
    """`function` of `_Arrays` and others with the batch leading, so that `vmap` grows the batch."""
    batched = custom_vmap(function)

    @batched.def_vmap
    def _(axis_size, mapped, arrays, *others):
        if any(getattr(mapped[0], name) for name in _WEIGHTS):
            # Every row of the kernels has the same weights: one launch for each of them.
            moved = jax.tree.map(
                lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape)),
                (arrays, *others),
                tuple(mapped),
            )
            results = lax.map(lambda args: function(*args), moved)
            return results, jax.tree.map(lambda _: True, results)
        weights = {name: getattr(arrays, name) for name in _WEIGHTS}
        bare = dataclasses.replace(arrays, **dict.fromkeys(_WEIGHTS))
        bare_mapped = dataclasses.replace(mapped[0], **dict.fromkeys(_WEIGHTS))

        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded, *others = jax.tree.map(fold, (bare, *others), (bare_mapped, *mapped[1:]))
        results = batched(dataclasses.replace(folded, **weights), *others)
        results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return batched


def _padded_states(states: int) -> int:
    """The number of states that the kernels run: a multiple of four."""
    return -(-states // 4) * 4


def _coefficients(B, C, marks, steps: int, lanes: int):
    """B and C [B, L, K, G] -> float32 [B, K, tiles, states, 2, steps / 4, lanes, 4].

    Zero at padding: the kernels multiply by them, and a NaN may stand there.
    """
    batch, length, groups, states = B.shape
    tiles = -(-length // (steps * lanes))
    both = jnp.stack([B.astype(jnp.float32), C.astype(jnp.float32)], axis=-1)
    if marks is not None:
        both = jnp.where((marks == 0)[:, :, None, None, None], 0.0, both)
    more = _padded_states(states)
    pad = ((0, 0), (0, tiles * steps * lanes - length), (0, 0), (0, more - states), (0, 0))
    both = jnp.pad(both, pad).reshape(batch, tiles, lanes, steps // 4, 4, groups, more, 2)
    return both.transpose(0, 5, 1, 6, 7, 3, 2, 4)


def _coefficient_tiles(x, marks, tile: int):
    """B or C [B, L, K, G] -> float32 [B * K, tiles, states, tile].

    Zero at padding: the kernels multiply by them, and a NaN may stand there.
    """
    batch, length, groups, states = x.shape
    if marks is not None:
        x = jnp.where((marks == 0)[:, :, None, None], 0.0, x)
    more = _padded_states(states)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % tile), (0, 0), (0, more - states)))
    x = x.reshape(batch, -1, tile, groups, more).transpose(0, 3, 1, 4, 2)
    return x.reshape(batch * groups, -1, more, tile)


def _tile_marks(marks, length: int, steps: int):
    """int32 [B, tiles], not 0 where a tile has padding or a restart."""
    tiles = -(-length // steps)
    marks = jnp.pad(marks, ((0, 0), (0, tiles * steps - length)), constant_values=1)
    return jnp.any(marks.reshape(-1, tiles, steps) != 1, axis=2).astype(jnp.int32)


def _common(static: _Static, arrays: _Arrays) -> dict:
    batch, channels, length = arrays.u.shape
    states = arrays.A.shape[1]
    return dict(
        E=channels,
        L=length,
        N=states,
        NP=_padded_states(states),
        PER_GROUP=channels // arrays.B.shape[2],
        SOFTPLUS=static.delta_softplus,
        HAS_BIAS=arrays.delta_bias is not None,
        HAS_Z=arrays.z is not None,
        HAS_MARKS=arrays.marks is not None,
    )


def _operands(arrays: _Arrays, tile: int):
    """A log2 e, D, bias, z, marks and tile marks, with stand-ins for absent ones."""
    A2 = arrays.A.astype(jnp.float32) * math.log2(math.e)
    marks, tile_marks = arrays.marks, A2
    if marks is None:
        marks = A2
    else:
        tile_marks = _tile_marks(marks, arrays.u.shape[2], tile)
    return (
        A2,
        A2 if arrays.D is None else arrays.D.astype(jnp.float32),
        A2 if arrays.delta_bias is None else arrays.delta_bias.astype(jnp.float32),
        A2 if arrays.z is None else arrays.z,
        marks,
        tile_marks,
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How a sweep goes through a call.

    Attributes:
        sweep: how it is cut.
        grid: programs, one a unit.
        progress: what the units count their progress in (`gluon_units`).
        constants: the kernels' compile-time parameters.
    """

    sweep: GpuSweep
    grid: tuple[int]
    progress: jax.ShapeDtypeStruct
    constants: dict[str, int]

    @property
    def tile(self) -> int:
        """Steps of a tile."""
        return self.sweep.steps * self.sweep.lanes

    @property
    def chained(self) -> bool:
        return self.progress.size > 1


def _walk(arrays: _Arrays, choose: Callable[[int, int], GpuSweep]) -> _Walk:
    batch, channels, length = arrays.u.shape
    groups = arrays.B.shape[2]
    sweep = choose(batch * channels, length)
    constants = sweep.constants()
    # Two buffers of states take turns, in a multiple of four states.
    padded = _padded_states(arrays.A.shape[1])
    constants["STATES"] = next(n for n in (sweep.states, 4, 2) if padded % (2 * n) == 0)
    rows = batch * groups * -(-(channels // groups) // (sweep.channels * sweep.warps))
    tiles = -(-length // (sweep.steps * sweep.lanes))
    unit = min(sweep.unit or tiles, tiles)
    units = -(-tiles // unit)
    return _Walk(
        sweep,
        (rows * units,),
        jax.ShapeDtypeStruct((1 + rows if units > 1 else 1,), jnp.int32),
        constants | dict(BATCH=batch, UNIT=unit, SEGMENTS=gpu_segments(length)),
    )


def _forward(static: _Static, arrays: _Arrays, *, save: bool):
    from storm_kernels.selective_scan.gluon_forward import scan_forward

    batch, channels, length = arrays.u.shape
    states = arrays.A.shape[1]
    walk = _walk(arrays, functools.partial(forward_sweep, save=save))
    A2, D, bias, z, marks, tile_marks = _operands(arrays, walk.tile)
    B, C = (_coefficient_tiles(x, arrays.marks, walk.tile) for x in (arrays.B, arrays.C))
    saved = (batch, gpu_segments(length), channels, states) if save else (1,)
    *results, _ = launch(
        scan_forward,
        walk.grid,
        walk.sweep.warps,
        walk.sweep.registers,
        (arrays.u, arrays.delta, A2, B, C, D, bias, z, arrays.initial_state, marks, tile_marks),
        (
            jax.ShapeDtypeStruct(arrays.u.shape, static.output_dtype),
            jax.ShapeDtypeStruct((batch, channels, states), jnp.float32),
            jax.ShapeDtypeStruct(saved, jnp.float32),
            walk.progress,
        ),
        dict(
            **_common(static, arrays),
            HAS_D=arrays.D is not None,
            REVERSE=static.reverse,
            SEGMENT=GPU_BACKWARD.segment if save else 0,
            **walk.constants,
        ),
        zeroed=(3,) if walk.chained else (),
    )
    return results


def _adjoint(static: _Static, arrays: _Arrays, dy, dh):
    """The gradient of the initial state, and of the states at the segments' borders."""
    from storm_kernels.selective_scan.gluon_adjoint import scan_adjoint

    batch, channels, length = arrays.u.shape
    states = arrays.A.shape[1]
    walk = _walk(arrays, adjoint_sweep)
    A2, _, bias, z, marks, tile_marks = _operands(arrays, walk.tile)
    C = _coefficient_tiles(arrays.C, arrays.marks, walk.tile)
    dstate, edges, _ = launch(
        scan_adjoint,
        walk.grid,
        walk.sweep.warps,
        walk.sweep.registers,
        (arrays.delta, A2, C, bias, z, dy, dh, marks, tile_marks),
        (
            jax.ShapeDtypeStruct((batch, channels, states), jnp.float32),
            jax.ShapeDtypeStruct((batch, gpu_segments(length), channels, states), jnp.float32),
            walk.progress,
        ),
        dict(
            **_common(static, arrays),
            REVERSE=not static.reverse,
            SEGMENT=GPU_BACKWARD.segment,
            **walk.constants,
        ),
        zeroed=(2,) if walk.chained else (),
    )
    return dstate, edges


def _backward(static: _Static, arrays: _Arrays, saved, dy, dh) -> _Arrays:
    """The gradients; those of weights for every batch row, [B, ...] float32."""
    dstate, edges = _adjoint(static, arrays, dy, dh)
    states = arrays.A.shape[1]
    parts = [
        _backward_states(static, arrays, saved, edges, dy, first, states)
        for first in range(0, states, GPU_BACKWARD.states)
    ]
    total = parts[0]
    if len(parts) > 1:
        # Blocks of states add up in all that is summed over states, and follow each other in
        # what is not. The skip is the first block's.
        joined = {
            name: jnp.concatenate([getattr(part, name) for part in parts], axis=-1)
            for name in ("A", "B", "C")
        }
        summed = {
            name: sum(getattr(part, name) for part in parts)
            for name in ("u", "delta", "z", "delta_bias")
            if getattr(total, name) is not None
        }
        whole: dict = {**joined, **summed}
        total = dataclasses.replace(total, **whole)
    rounded = {
        name: getattr(total, name).astype(getattr(arrays, name).dtype)
        for name in ("u", "delta", "B", "C", "z")
        if getattr(total, name) is not None
    }
    return dataclasses.replace(total, **rounded, initial_state=dstate)


def _backward_states(static, arrays, saved, edges, dy, first: int, states: int) -> _Arrays:
    """The gradients through up to `GPU_BACKWARD.states` states, from `first`.

    The skip D belongs to the first block. `saved` and `edges` of a block are copies if there are
    several.
    """
    from storm_kernels.selective_scan.gluon_backward import scan_backward

    config = GPU_BACKWARD
    batch, channels, length = arrays.u.shape
    whole = states <= config.states
    count = min(states - first, config.states)
    part = arrays
    if not whole:
        cut = functools.partial(lax.slice_in_dim, start_index=first, limit_index=first + count)
        saved, edges = cut(saved, axis=3), cut(edges, axis=3)
        part = dataclasses.replace(
            arrays,
            A=cut(arrays.A, axis=1),
            B=cut(arrays.B, axis=3),
            C=cut(arrays.C, axis=3),
            D=arrays.D if first == 0 else None,
        )
    A2, D, bias, z, marks, tile_marks = _operands(part, config.segment)
    BC = _coefficients(part.B, part.C, part.marks, config.steps, config.lanes)
    groups = arrays.B.shape[2]
    tiles = -(-length // config.segment)
    segments = saved.shape[1]
    block = channels_of_a_program(channels // groups, groups * tiles * batch)
    blocks = -(-(channels // groups) // block)
    more = _padded_states(count)

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype if whole else jnp.float32)

    def row_sums(*shape):
        return jax.ShapeDtypeStruct((batch, segments, *shape), jnp.float32)

    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    du, ddelta, dz, dBC, dA, dD, dbias = launch(
        scan_backward,
        (groups * blocks, tiles, batch),
        config.warps,
        config.registers,
        (part.u, part.delta, A2, BC, D, bias, z, saved, edges, dy, marks, tile_marks),
        (
            like(part.u),
            like(part.delta),
            nothing if part.z is None else like(part.z),
            jax.ShapeDtypeStruct(
                (blocks, batch, groups, tiles, more, 2, config.segment), jnp.float32
            ),
            row_sums(channels, count),
            nothing if part.D is None else row_sums(channels),
            nothing if part.delta_bias is None else row_sums(channels),
        ),
        dict(
            **_common(static, part),
            HAS_D=part.D is not None,
            REVERSE=static.reverse,
            SEGMENTS=segments,
            BLOCK=block,
            **config.constants(),
        ),
    )
    dBC = jnp.sum(dBC, axis=0).transpose(4, 0, 2, 5, 1, 3)
    dBC = dBC.reshape(2, batch, -1, groups, more)[:, :, :length, :, :count]
    if arrays.marks is not None:
        dBC = jnp.where((arrays.marks == 0)[:, :, None, None], 0.0, dBC)
    return _Arrays(
        u=du,
        delta=ddelta,
        A=jnp.sum(dA[:, :tiles], axis=1),
        B=dBC[0],
        C=dBC[1],
        D=None if part.D is None else jnp.sum(dD[:, :tiles], axis=1),
        z=None if part.z is None else dz,
        delta_bias=None if part.delta_bias is None else jnp.sum(dbias[:, :tiles], axis=1),
        initial_state=None,  # pyrefly: ignore[bad-argument-type]
        marks=None,
    )
