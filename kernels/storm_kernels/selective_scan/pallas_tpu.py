"""The scan on TPUs: Pallas (Mosaic) kernels, forward and backward, behind `ScanCall`.

The forward keeps one float32 state per span of 64 positions, the backward recomputes the rest a
span at a time in VMEM: nothing of size [length, channels, state] exists in HBM.
`docs/kernels.md` describes the kernels and what they cost.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from storm_kernels.selective_scan.call import ScanCall, differentiable_once, promote_varying
from storm_kernels.selective_scan.pallas_tpu_backward import backward
from storm_kernels.selective_scan.pallas_tpu_forward import forward
from storm_kernels.selective_scan.pallas_tpu_operands import Arrays, Operands
from storm_kernels.selective_scan.pallas_tpu_tiles import cut_for
from storm_kernels.selective_scan.segments import segment_marks
from storm_kernels.selective_scan.shapes import TpuCut

_WEIGHTS = ("A", "D", "delta_bias")


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known at trace time."""

    channels: int
    reverse: bool
    softplus: bool
    output_dtype: jnp.dtype
    cut: TpuCut
    interpret: object

    def operands(self, arrays: Arrays) -> Operands:
        return Operands(arrays, self.channels, self.reverse, self.softplus, self.cut)


def unsupported(call: ScanCall) -> str | None:
    """Why the kernels do not serve a call and what to do instead, or None if they do."""
    if call.accumulation_dtype == jnp.float64:
        return "an operand is float64, which TPUs do not compute; use 'xla' or 'reference'"
    return None


def pallas_tpu_scan(call: ScanCall, *, interpret=None) -> tuple[jax.Array, jax.Array]:
    """Runs a validated call in Pallas kernels for TPU; differentiable once, in reverse mode.

    On a CPU the kernels run in Pallas' interpret mode, slowly and with the same results: for
    tests. What decides is where the program is lowered to, so that one compiled ahead of time for
    a TPU on a host without one is the real one. Gradients are the same bits from run to run.

    Inside `jax.shard_map` interpreting needs `check_vma=False`, as JAX's interpreter mixes operands
    that vary over the mesh with buffers that do not; compiled for a TPU it works either way.

    float16 operands become float32 arrays first (Mosaic loads no float16); bfloat16 and float32
    are read as they are.

    Layout "bdl" is transposed by XLA before and after: on TPUs the fast layout is "bld".
    `ScanCall.chunk_size` is not used: the spans are what fits VMEM.

    Args:
        call: the operands; see `ScanCall`.
        interpret: as `pallas_call` takes it (True, or `InterpretParams`); None as said above.

    Returns:
        y: in u's shape and `call.output_dtype`.
        h: [batch, channels, state] float32.

    Raises:
        TypeError: an operand is float64.
        NotImplementedError: on differentiating twice.
    """
    if call.accumulation_dtype == jnp.float64:
        raise TypeError(
            "implementation='pallas_tpu' computes in float32 and an operand is float64: cast it, "
            "or take implementation='xla' or 'reference'"
        )
    if call.layout == "bdl":
        return _in_layout_bdl(call, interpret)
    if call.output_dtype == jnp.float16:
        wide = dataclasses.replace(call, output_dtype=jnp.dtype(jnp.float32))
        y, h = pallas_tpu_scan(wide, interpret=interpret)
        return y.astype(jnp.float16), h
    call = _without_float16(promote_varying(call))
    valid, restart = None, None
    if call.segment_ids is not None:
        valid, restart = segment_marks(call.segment_ids, call.reverse)
    static = _Static(
        channels=call.A.shape[0],
        reverse=call.reverse,
        softplus=call.delta_softplus,
        output_dtype=jnp.dtype(call.output_dtype),
        cut=cut_for(call.u),
        interpret=interpret,
    )
    arrays = Arrays(
        u=call.u,
        delta=call.delta,
        B=call.B,
        C=call.C,
        z=call.z,
        initial_state=call.initial_state,
        valid=valid,
        restart=restart,
        # One row for all of the batch; `vmap` may make it one for each.
        A=call.A[None],
        D=None if call.D is None else call.D[None],
        delta_bias=None if call.delta_bias is None else call.delta_bias[None],
    )
    return _scan(static, arrays)


def _without_float16(call: ScanCall) -> ScanCall:
    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if x.dtype == jnp.float16 else x

    z = None if call.z is None else wide(call.z)
    u, delta, B, C = wide(call.u), wide(call.delta), wide(call.B), wide(call.C)
    return dataclasses.replace(call, u=u, delta=delta, B=B, C=C, z=z)


def _in_layout_bdl(call: ScanCall, interpret) -> tuple[jax.Array, jax.Array]:
    u, delta = jnp.swapaxes(call.u, 1, 2), jnp.swapaxes(call.delta, 1, 2)
    z = None if call.z is None else jnp.swapaxes(call.z, 1, 2)
    swapped = dataclasses.replace(call, u=u, delta=delta, z=z, layout="bld")
    y, h = pallas_tpu_scan(swapped, interpret=interpret)
    return jnp.swapaxes(y, 1, 2), h


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static: _Static, arrays: Arrays):
    y, h, _ = _batched(functools.partial(_forward, static, keep_states=False))(arrays)
    return y, h


def _scan_fwd(static, arrays):
    run = _batched(functools.partial(_forward, static, keep_states=True))
    y, h, states = differentiable_once("pallas_tpu")(run)(arrays)
    return (y, h), (arrays, states)


def _scan_bwd(static, residuals, cotangents):
    arrays, states = residuals
    run = _batched(functools.partial(_backward, static))
    grads = differentiable_once("pallas_tpu")(run)(arrays, states, *cotangents)
    weights = {}
    for name in _WEIGHTS:
        primal = getattr(arrays, name)
        if primal is not None:
            # The kernel returns one gradient per batch row.
            total = jnp.sum(getattr(grads, name), axis=0, keepdims=True)
            weights[name] = total.astype(primal.dtype)
    return (dataclasses.replace(grads, **weights),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(static: _Static, arrays: Arrays, *, keep_states: bool):
    operands = static.operands(arrays)
    y, final, states = forward(operands, static.output_dtype, keep_states, static.interpret)
    y = operands.cut_channels(y, -1)[:, : arrays.u.shape[1]]
    return y, operands.state_out(final), states


def _backward(static: _Static, arrays: Arrays, states, dy, dfinal) -> Arrays:
    return backward(static.operands(arrays), states, dy, dfinal, static.interpret)


def _batched(function):
    """`function` of arrays with the batch leading, so that `vmap` grows the batch."""
    function_vmap = custom_vmap(function)

    @function_vmap.def_vmap
    def _(axis_size, in_batched, *args):
        arrays = args[0]
        batch = arrays.u.shape[1 if in_batched[0].u else 0]

        def fold(path, x, mapped):
            if path and getattr(path[0], "name", None) in _WEIGHTS:
                if not mapped:
                    return x if x.shape[0] == 1 else jnp.tile(x, (axis_size,) + (1,) * (x.ndim - 1))
                x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            elif not mapped:
                x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = jax.tree_util.tree_map_with_path(
            lambda path, x, mapped: fold(path[1:] if len(path) > 1 else (), x, mapped),
            args,
            tuple(in_batched),
        )
        results = _batched(function)(*folded)
        unfolded = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda x: True, unfolded)

    return function_vmap
