"""The recurrence inside one chunk of the XLA scan, forward and backward, in two forms.

Axis letters: T steps of a chunk, N rows = batch x groups, P channels of a group, G SSM state
size. The state is [N, G, P]: the channels are minor, so that vector units are full whatever G is.
Batch and groups are one axis because XLA's CPU backend vectorises a loop with an axis of size 1
in its middle badly (measured backward: 1.3 to 4 times slower). A is [1, G, P] or [N, G, P].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Chosen by the platform of the call.
# CPU, measured at B=1, L=4096, E=512, G=16 turn by turn on 2 busy Xeon cores, jax 0.10.2, ns for a
# state element, forward and forward + backward: steps 1.5 and 5.1; an associative scan 2.6 and 29
# in chunks of 8, 5.2 and 66 in chunks of 32. Several steps written out in one loop body are slower
# too (forward 2.7 to 3.7 against 0.63): XLA fuses them and computes the first ones again. Working
# out all exponentials of a chunk first gains 5 to 12 % backward and loses up to 28 % forward.
# GPU: an H100 runs the associative scan 5 to 20 times faster (benchmarks/results/scan_gpu.json):
# one step fills little of the card. TPU: not run; the compiler's own estimates for one v5e (libtpu
# 0.0.42.1) at L=8192, E=2304, G=16, bf16, chunks of 128, in millions of cycles, forward and forward
# + backward: associative 48 and 186, steps 189 and 706, 32 steps written out 131 forward.
ASSOCIATIVE_PLATFORMS = ("gpu", "tpu")


class ChunkOperands(NamedTuple):
    """What the recurrence h = exp(dt A) h + x B, y = C h needs, in the accumulation dtype.

    dt_TNP and x_TNP (= dt * u) are zero at padding, B_TNG and C_TNG finite. restart_TN is
    None or True where the state before the step counts as zero.
    """

    dt_TNP: jax.Array
    x_TNP: jax.Array
    B_TNG: jax.Array
    C_TNG: jax.Array
    restart_TN: jax.Array | None


class ChunkGradients(NamedTuple):
    """Gradients of one chunk; `dt_TNP` without the part that comes through x."""

    dt_TNP: jax.Array
    x_TNP: jax.Array
    B_TNG: jax.Array
    C_TNG: jax.Array
    A_NGP: jax.Array


def _einsum(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # Without this, TPUs and recent GPUs would round float32 operands to bfloat16 or tf32.
    return jnp.einsum(spec, left, right, precision=lax.Precision.HIGHEST)


def _clear(state_NGP: jax.Array, restart_N: jax.Array | None) -> jax.Array:
    # A select rather than a factor 0: an infinite state must not leak into the next segment.
    if restart_N is None:
        return state_NGP
    return jnp.where(restart_N[:, None, None], 0, state_NGP)


def _advance(h_NGP, dt_NP, x_NP, B_NG, restart_N, A_NGP):
    """The state after one step."""
    decay_NGP = jnp.exp(dt_NP[:, None, :] * A_NGP)
    return decay_NGP * _clear(h_NGP, restart_N) + x_NP[:, None, :] * B_NG[..., None]


def forward_steps(
    h_NGP: jax.Array, operands: ChunkOperands, A_NGP: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Runs a chunk one step at a time. Returns the state after it and y [T, N, P]."""

    def step(h_NGP, position):
        dt_NP, x_NP, B_NG, C_NG, restart_N = position
        h_NGP = _advance(h_NGP, dt_NP, x_NP, B_NG, restart_N, A_NGP)
        # As a matrix-vector product: XLA's CPU backend would fuse a sum over G with the line
        # above and compute the exponentials again (measured: 1.4 times slower at B=64, 8 at B=1).
        return h_NGP, _einsum("ngp,ng->np", h_NGP, C_NG)

    return lax.scan(step, h_NGP, tuple(operands), reverse=reverse)


def backward_steps(
    h_NGP: jax.Array,
    g_NGP: jax.Array,
    operands: ChunkOperands,
    dy_TNP: jax.Array,
    A_NGP: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, ChunkGradients]:
    """Recomputes the states of a chunk from the one before it, then runs back over them.

    Args:
        h_NGP: the state before the chunk.
        g_NGP: the gradient with respect to the state after the chunk.
        dy_TNP: the gradient with respect to y.

    Returns:
        The gradient with respect to the state before the chunk, and the chunk's gradients.
    """

    dt_TNP, x_TNP, B_TNG, C_TNG, restart_TN = operands

    def recompute(h_NGP, position):
        dt_NP, x_NP, B_NG, restart_N = position
        return _advance(h_NGP, dt_NP, x_NP, B_NG, restart_N, A_NGP), h_NGP

    last_NGP, before_TNGP = lax.scan(
        recompute, h_NGP, (dt_TNP, x_TNP, B_TNG, restart_TN), reverse=reverse
    )

    def step(carry, position):
        g_NGP, dA_NGP, after_NGP = carry
        before_NGP, (dt_NP, x_NP, B_NG, C_NG, restart_N), dy_NP = position
        dC_NG = _einsum("ngp,np->ng", after_NGP, dy_NP)
        g_NGP = g_NGP + C_NG[..., None] * dy_NP[:, None, :]
        dB_NG = _einsum("ngp,np->ng", g_NGP, x_NP)
        dx_NP = _einsum("ngp,ng->np", g_NGP, B_NG)
        g_NGP = _clear(g_NGP * jnp.exp(dt_NP[:, None, :] * A_NGP), restart_N)
        s_NGP = g_NGP * _clear(before_NGP, restart_N)
        dA_NGP = dA_NGP + s_NGP * dt_NP[:, None, :]
        ddt_NP = _einsum("ngp,ng->np", s_NGP * A_NGP, jnp.ones_like(B_NG))
        return (g_NGP, dA_NGP, before_NGP), (ddt_NP, dx_NP, dB_NG, dC_NG)

    (g_NGP, dA_NGP, _), grads = lax.scan(
        step,
        (g_NGP, jnp.zeros_like(g_NGP), last_NGP),
        (before_TNGP, operands, dy_TNP),
        reverse=not reverse,
    )
    return g_NGP, ChunkGradients(*grads, dA_NGP)


def _states_associative(h_NGP, operands, A_NGP, reverse):
    """Decays and states [T, N, G, P] of a chunk by a scan of logarithmic depth."""
    first = -1 if reverse else 0
    decay = jnp.exp(operands.dt_TNP[:, :, None, :] * A_NGP)
    if operands.restart_TN is not None:
        decay = jnp.where(operands.restart_TN[:, :, None, None], 0, decay)
    inflow = operands.x_TNP[:, :, None, :] * operands.B_TNG[..., None]
    inflow = inflow.at[first].add(decay[first] * h_NGP)
    _, states = lax.associative_scan(_compose, (decay, inflow), reverse=reverse)
    return decay, states


def _compose(earlier, later):
    """The pair (decay, inflow) of two stretches of h -> decay h + inflow, one after the other."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def forward_associative(
    h_NGP: jax.Array, operands: ChunkOperands, A_NGP: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """As `forward_steps`, with the whole chunk at once."""
    _, states = _states_associative(h_NGP, operands, A_NGP, reverse)
    y_TNP = _einsum("tngp,tng->tnp", states, operands.C_TNG)
    return states[0 if reverse else -1], y_TNP


def backward_associative(
    h_NGP: jax.Array,
    g_NGP: jax.Array,
    operands: ChunkOperands,
    dy_TNP: jax.Array,
    A_NGP: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, ChunkGradients]:
    """As `backward_steps`, with the whole chunk at once."""
    dt_TNP, x_TNP, B_TNG, C_TNG, _ = operands
    decay, states = _states_associative(h_NGP, operands, A_NGP, reverse)
    # g at a step is C dy there, plus the *next* step's decay times the next step's g.
    inflow = C_TNG[..., None] * dy_TNP[:, :, None, :]
    one = jnp.ones_like(g_NGP)[None]
    if reverse:
        before = jnp.concatenate([states[1:], h_NGP[None]])
        next_decay = jnp.concatenate([one, decay[:-1]])
        inflow = inflow.at[0].add(g_NGP)
        last = -1
    else:
        before = jnp.concatenate([h_NGP[None], states[:-1]])
        next_decay = jnp.concatenate([decay[1:], one])
        inflow = inflow.at[-1].add(g_NGP)
        last = 0
    _, g = lax.associative_scan(_compose, (next_decay, inflow), reverse=not reverse)
    carried = g * decay
    s = carried * before
    return carried[last], ChunkGradients(
        dt_TNP=jnp.sum(s * A_NGP, axis=2),
        x_TNP=_einsum("tngp,tng->tnp", g, B_TNG),
        B_TNG=_einsum("tngp,tnp->tng", g, x_TNP),
        C_TNG=_einsum("tngp,tnp->tng", states, dy_TNP),
        A_NGP=_einsum("tngp,tnp->ngp", s, dt_TNP),
    )
