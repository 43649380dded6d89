"""The checks of the scan's arguments. Every message names the argument and what was expected."""

import jax
import jax.numpy as jnp

from storm_kernels.selective_scan.call import ScanCall

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def checked_call(
    u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
    *, delta_softplus, reverse, layout, chunk_size, output_dtype,
) -> ScanCall:  # fmt: skip
    """Checks the arguments of `selective_scan`, u first, and brings them into their general form.

    Raises:
        ValueError: a shape, layout or chunk size is wrong.
        TypeError: a dtype is wrong.
    """
    if layout not in ("bld", "bdl"):
        raise ValueError(f"layout={layout!r}, expected 'bld' or 'bdl'")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}, expected a positive int or None")
    names = "[batch, length, channels]" if layout == "bld" else "[batch, channels, length]"
    u = floating("u", u)
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(
            f"u has shape {u.shape}, expected {names}, no axis empty (layout={layout!r})"
        )
    batch, length, channels = u.shape if layout == "bld" else (u.shape[0], u.shape[2], u.shape[1])
    operands = _operands(
        u, delta, A, B, C, D, z, delta_bias, initial_state, "initial_state",
        leading=(batch, length), channels=channels, names=names, output_dtype=output_dtype,
    )  # fmt: skip
    if segment_ids is not None:
        segment_ids = checked_segment_ids(segment_ids, (batch, length))
    return ScanCall(
        **operands, segment_ids=segment_ids, delta_softplus=delta_softplus, reverse=reverse,
        layout=layout, chunk_size=chunk_size,
    )  # fmt: skip


def checked_step(
    state, u, delta, A, B, C, D, z, delta_bias, *, delta_softplus, output_dtype
) -> ScanCall:
    """As `checked_call` for `selective_scan_step`: the call has no length axis anywhere."""
    u = floating("u", u)
    if u.ndim != 2 or 0 in u.shape:
        raise ValueError(f"u has shape {u.shape}, expected [batch, channels], no axis empty")
    operands = _operands(
        u, delta, A, B, C, D, z, delta_bias, state, "state", leading=u.shape[:1],
        channels=u.shape[1], names="[batch, channels]", output_dtype=output_dtype,
    )  # fmt: skip
    return ScanCall(
        **operands, segment_ids=None, delta_softplus=delta_softplus, reverse=False, layout="bld",
        chunk_size=None,
    )  # fmt: skip


def _operands(
    u, delta, A, B, C, D, z, delta_bias, state, state_name,
    *, leading, channels, names, output_dtype,
) -> dict:  # fmt: skip
    """The floating operands by their names in `ScanCall`, and y's dtype."""
    delta = shaped("delta", floating("delta", delta), u.shape, f"{names}, as u")
    A = floating("A", A)
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {A.shape}, expected ({channels}, state): [channels, state]")
    states = A.shape[1]
    B = _grouped("B", floating("B", B), leading, channels, states)
    C = _grouped("C", floating("C", C), leading, channels, states)
    if B.shape != C.shape:
        raise ValueError(f"C has {C.shape[-2]} groups, expected {B.shape[-2]}, as B")
    if D is not None:
        D = shaped("D", floating("D", D), (channels,), "[channels]")
    if z is not None:
        z = shaped("z", floating("z", z), u.shape, f"{names}, as u")
    if delta_bias is not None:
        delta_bias = floating("delta_bias", delta_bias)
        delta_bias = shaped("delta_bias", delta_bias, (channels,), "[channels]")
    acc = _accumulation_dtype(u, delta, A, B, C, D, z, delta_bias, state)
    shape = (leading[0], channels, states)
    if state is None:
        state = jnp.zeros(shape, acc)
    else:
        state = jnp.asarray(state)
        if state.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"{state_name} has dtype {state.dtype}, expected float32")
        state = shaped(state_name, state, shape, "[batch, channels, state]").astype(acc)
    return {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": state, "output_dtype": _output_dtype(output_dtype, u.dtype, acc),
    }  # fmt: skip


def floating(name: str, x) -> jax.Array:
    """x as an array, refused unless its dtype is one of `FLOATS`."""
    x = jnp.asarray(x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}, expected float16, bfloat16, float32 or float64"
        )
    return x


def shaped(name: str, x: jax.Array, expected: tuple[int, ...], axes: str) -> jax.Array:
    """x, refused unless it has the expected shape, whose axes are named `axes`."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}: {axes}")
    return x


def checked_segment_ids(segment_ids, expected: tuple[int, int]) -> jax.Array:
    """int32 [batch, length]."""
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.dtype != jnp.int32:
        raise TypeError(f"segment_ids has dtype {segment_ids.dtype}, expected int32")
    return shaped("segment_ids", segment_ids, expected, "[batch, length]")


def _accumulation_dtype(*operands):
    """float64 if an operand is, float32 otherwise."""
    wide = any(x is not None and jnp.asarray(x).dtype == jnp.float64 for x in operands)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _output_dtype(output_dtype, default, acc):
    dtype = jnp.dtype(default if output_dtype is None else output_dtype)
    if dtype not in FLOATS:
        raise TypeError(
            f"output_dtype={dtype}, expected float16, bfloat16, float32, float64 or None"
        )
    if dtype.itemsize > acc.itemsize:
        raise TypeError(
            f"output_dtype={dtype}, but the arithmetic is {acc}: make an operand {dtype}, or take"
            f" output_dtype={acc}"
        )
    return dtype


def _grouped(name, x, leading, channels, state) -> jax.Array:
    """B or C as [*leading, groups, state]."""
    start = "".join(f"{n}, " for n in leading)
    count = len(leading)
    if x.ndim not in (count + 1, count + 2) or x.shape[:count] != leading or (x.shape[-1] != state):
        raise ValueError(
            f"{name} has shape {x.shape}, expected ({start}{state}) or ({start}groups, {state})"
        )
    x = x if x.ndim == count + 2 else jnp.expand_dims(x, count)
    groups = x.shape[count]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{name} has shape {x.shape}: {groups} groups do not divide {channels} channels"
        )
    return x
