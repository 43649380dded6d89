"""What the selective-scan tests share: a float64 loop in NumPy, and inputs."""

import jax.numpy as jnp
import numpy as np

# Most of these tests' time is compiling. This halves it: LLVM at -O0, XLA's own passes all there.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def loop(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, segment_ids=None, reverse=False,
):  # fmt: skip
    """The recurrence of kernels.md section 2, one number at a time, in float64.

    Operands as `selective_scan` in layout "bld". Returns y [batch, length, channels] and the final
    state [batch, channels, state].
    """
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    batch, length, channels = u.shape
    group_of = np.arange(channels) // (channels // B.shape[2])
    y = np.zeros(u.shape)
    state = np.zeros((batch, channels, A.shape[1]))
    if initial_state is not None:
        state += np.asarray(initial_state, np.float64)
    for b in range(batch):
        seen = None
        for t in range(length)[:: -1 if reverse else 1]:
            if segment_ids is not None:
                segment = int(segment_ids[b, t])
                if segment < 0:
                    continue
                if seen is not None and segment != seen:
                    state[b] = 0
                seen = segment
            dt = delta[b, t].copy()
            if delta_bias is not None:
                dt += np.asarray(delta_bias, np.float64)
            if delta_softplus:
                dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
            inflow = (dt * u[b, t])[:, None] * B[b, t][group_of]
            state[b] = np.exp(dt[:, None] * A) * state[b] + inflow
            out = (state[b] * C[b, t][group_of]).sum(1)
            if D is not None:
                out += np.asarray(D, np.float64) * u[b, t]
            if z is not None:
                gate = np.asarray(z[b, t], np.float64)
                out *= gate / (1 + np.exp(-gate))
            y[b, t] = out
    return y, state


def inputs(
    seed=0, *, batch=2, length=19, channels=6, state=3, groups=None, dtype=np.float32,
    optional=True, segments=False, initial_state=False, real=False,
):  # fmt: skip
    """Keyword arguments of `selective_scan` in layout "bld", as NumPy or JAX arrays.

    `real` draws Mamba's own initialisation: A = -(1..state), dt log-uniform in 1e-3..0.1.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    grouped = (batch, length, state) if groups is None else (batch, length, groups, state)
    wide = np.promote_types(np.float32, dtype) if dtype != jnp.bfloat16 else np.float32
    case = {
        "u": normal(batch, length, channels),
        "delta": jnp.asarray(0.5 * rng.random((batch, length, channels)), dtype),
        "A": jnp.asarray(-0.5 * rng.random((channels, state)), wide),
        "B": normal(*grouped),
        "C": normal(*grouped),
    }
    if real:
        case["A"] = jnp.asarray(np.tile(-np.arange(1.0, state + 1), (channels, 1)), wide)
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), case["delta"].shape))
        case["delta"] = jnp.asarray(dt, dtype)
    if optional:
        case["D"] = jnp.asarray(rng.standard_normal(channels), wide)
        case["z"] = normal(batch, length, channels)
        case["delta_bias"] = jnp.asarray(0.5 * rng.random(channels), wide)
    if initial_state:
        case["initial_state"] = jnp.asarray(rng.standard_normal((batch, channels, state)), wide)
    if segments:
        case["segment_ids"] = packed_ids(rng, batch, length)
    return case


def packed_ids(rng, batch, length):
    """Runs of 1 to 5 positions with ids -1 (padding) to 2; neighbours may share an id."""
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        start = 0
        while start < length:
            run = int(rng.integers(1, 6))
            row[start : start + run] = rng.integers(-1, 3)
            start += run
    return jnp.asarray(ids)


def swapped(case):
    """The same case in layout "bdl"."""
    return case | {k: jnp.swapaxes(case[k], 1, 2) for k in ("u", "delta", "z") if k in case}


def flipped(case):
    """The same case with the length axis reversed."""
    along = ("u", "delta", "z", "B", "C", "segment_ids")
    return case | {k: jnp.flip(case[k], 1) for k in along if k in case}
