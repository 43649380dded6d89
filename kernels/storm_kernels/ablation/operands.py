"""Operands of one case, and how a case calls a scan.

Axis letters: B batch, L length, E channels, K groups, G SSM state.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from storm_kernels.ablation.shapes import Shape

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
OPTIONAL = ("z", "D", "bias", "softplus", "segments", "state")
FUSED = ("z", "D", "bias", "softplus")
"""What the model's scan has besides u, delta, A, B and C."""

Operands = dict[str, jax.Array]
"""The array arguments of `selective_scan` by name, those that are absent left out."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the scan is called, shapes apart.

    Attributes:
        dtype: of u, delta, z, B, C and y, a key of `DTYPES`; A, D, delta_bias and the states are
            float32.
        optional: which of `OPTIONAL` there are. "state" is a given initial state and a returned
            final state, both with gradients.
        layout, reverse: as `selective_scan` takes them.
    """

    dtype: str
    optional: tuple[str, ...] = FUSED
    layout: str = "bld"
    reverse: bool = False

    @property
    def softplus(self) -> bool:
        return "softplus" in self.optional

    @property
    def final_state(self) -> bool:
        return "state" in self.optional


Scan = Callable[[Operands, Setting], jax.Array | tuple[jax.Array, jax.Array]]
"""y of some operands; with `setting.final_state` also the final state."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def operands(shape: Shape, setting: Setting) -> Operands:
    """Random operands, the same at every call and the same values in both layouts.

    Inputs "model": A = -(1 ... G); the step size, after bias and softplus where there are any, is
    around 1e-3 to 0.1, log-uniform over the channels; the rest is normal. Inputs "mamba_ssm":
    A, delta and delta_bias uniform, in -0.5 ... 0 and 0 ... 0.5, the rest normal. Segments: four of
    a length, then padding over the last sixteenth.
    """
    keys = iter(jax.random.split(jax.random.key(0), 16))
    dtype = DTYPES[setting.dtype]
    by_channel = (shape.batch, shape.length, shape.channels)
    groups = () if shape.groups is None else (shape.groups,)
    by_state = (shape.batch, shape.length, *groups, shape.state)

    def normal(size, dtype=dtype):
        return jax.random.normal(next(keys), size, dtype)

    def uniform(size, low, high):
        return jax.random.uniform(next(keys), size, jnp.float32, low, high)

    def step_size(size):  # what softplus makes a step size of, if there is a softplus
        dt = jnp.exp(uniform(size, math.log(1e-3), math.log(0.1)))
        return dt + jnp.log(-jnp.expm1(-dt)) if setting.softplus else dt

    bias = "bias" in setting.optional
    if shape.inputs == "mamba_ssm":
        A = -uniform((shape.channels, shape.state), 0.0, 0.5)
        delta = uniform(by_channel, 0.0, 0.5)
        delta_bias = uniform(shape.channels, 0.0, 0.5)
    else:
        A = -jnp.tile(jnp.arange(1.0, shape.state + 1), (shape.channels, 1))
        delta_bias = step_size((shape.channels,))
        delta = step_size(by_channel)
        if bias:
            delta = 0.5 * normal(by_channel, jnp.float32)
            if not setting.softplus:
                delta = delta_bias * jnp.tanh(delta)  # between nothing and twice the bias
    case = {
        "u": normal(by_channel),
        "delta": delta.astype(dtype),
        "A": A,
        "B": normal(by_state),
        "C": normal(by_state),
    }
    if "D" in setting.optional:
        case["D"] = normal((shape.channels,), jnp.float32)
    if "z" in setting.optional:
        case["z"] = normal(by_channel)
    if bias:
        case["delta_bias"] = delta_bias
    if "state" in setting.optional:
        case["initial_state"] = normal((shape.batch, shape.channels, shape.state), jnp.float32)
    if "segments" in setting.optional:
        position, end = jnp.arange(shape.length), shape.length - shape.length // 16
        ids = jnp.where(position < end, 4 * position // shape.length, -1)
        case["segment_ids"] = jnp.broadcast_to(ids.astype(jnp.int32), by_channel[:2])
    if setting.layout == "bdl":
        for name in {"u", "delta", "z"} & set(case):
            case[name] = jnp.swapaxes(case[name], 1, 2)
    return case


@functools.partial(jax.jit, static_argnums=(0, 1))
def cotangents(shape: Shape, setting: Setting) -> dict[str, jax.Array]:
    """Normal gradients of what the scan returns: "y", and "h" where it returns the final state."""
    keys = jax.random.split(jax.random.key(1))
    y = jax.random.normal(
        keys[0], (shape.batch, shape.length, shape.channels), DTYPES[setting.dtype]
    )
    given = {"y": jnp.swapaxes(y, 1, 2) if setting.layout == "bdl" else y}
    if setting.final_state:
        given["h"] = jax.random.normal(keys[1], (shape.batch, shape.channels, shape.state))
    return given


def results(scan: Scan, case: Operands, setting: Setting) -> dict[str, jax.Array]:
    """What the scan returns, by the names of `cotangents`.

    Raises:
        TypeError: it is not one array, or not a pair where the final state is asked for.
    """
    result = scan(case, setting)
    if setting.final_state:
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"expected (y, final state), the scan returned {_kind(result)}")
        return {"y": result[0], "h": result[1]}
    if isinstance(result, (tuple, list)) or not hasattr(result, "dtype"):
        raise TypeError(f"expected y alone, the scan returned {_kind(result)}")
    return {"y": result}


def _kind(result: object) -> str:
    if isinstance(result, (tuple, list)):
        return f"{len(result)} results"
    return type(result).__name__
