"""Errors of a scan's results against float64, on a few channels of the full problem.

Channels do not see each other, so the float64 values of a few of them are those of the whole
problem, at any length. Only the gradients of B and C sum over channels (and those of A, D and
delta_bias over batch rows). So the gradient of y that the implementation gets for this purpose is
zero outside the chosen rows and channels: then these sums too consist of the chosen ones alone,
while the implementation still runs its full shape. What it computes for the other channels is not
looked at; the chosen ones are spread over the whole width, first and last included.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from storm_kernels.ablation.operands import DTYPES, Operands, Setting, cotangents, results
from storm_kernels.ablation.programs import Values
from storm_kernels.ablation.shapes import Shape
from storm_kernels.selective_scan import selective_scan

CHANNELS = 8
ROWS = 2

TOLERANCE = {"f32": 6e-4, "f16": 3e-3, "bf16": 3e-2}
"""mamba_ssm's relative tolerances, here of the largest error over the largest value."""

_BY_POSITION = ("u", "delta", "z", "y")  # [batch, length, channels]
_BY_CHANNEL = ("A", "D", "delta_bias")
_BY_ROW = ("B", "C", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Exact:
    """The float64 results of one case.

    Attributes:
        rows, channels: those that count.
        cotangents: for the implementation: zero elsewhere.
        values: by name, of the chosen rows and channels: y, h, and "d" + name for gradients.
    """

    setting: Setting
    rows: np.ndarray
    channels: np.ndarray
    cotangents: Values
    values: dict[str, np.ndarray]

    def errors(self, found: Values, prefix: str, setting: Setting) -> dict[str, float]:
        """The largest error of each result over the largest value of it.

        Args:
            found: what an implementation returned, complete, by name.
            prefix: "" for y and h, "d" for gradients.
            setting: the implementation's; its layout may be another one.
        """
        errors = {}
        for name, x in found.items():
            exact = self.values[prefix + name]
            part = _part(name, x, self.rows, self.channels, setting.layout)
            if part.shape != exact.shape:
                raise ValueError(
                    f"{prefix}{name} has shape {tuple(x.shape)}: its part under test is "
                    f"{part.shape}, expected {exact.shape}"
                )
            largest = np.abs(exact).max()
            errors[prefix + name] = float(np.abs(part - exact).max() / (largest or 1.0))
        return errors


def exact(shape: Shape, case: Operands, setting: Setting) -> Exact:
    """Runs `reference` and its gradients in float64 on the CPU.

    Args:
        shape, setting: of the case.
        case: its operands, which are taken as they are, rounded to their dtype.

    Raises:
        RuntimeError: JAX has no CPU backend because JAX_PLATFORMS leaves it out.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise RuntimeError(
            "the float64 reference runs on the CPU, which JAX_PLATFORMS leaves out: add ',cpu'"
        ) from None
    rows = np.unique(np.linspace(0, shape.batch - 1, ROWS).astype(int))
    channels = _spread_channels(shape.channels, shape.groups or 1)
    given = _masked(cotangents(shape, setting), rows, channels, setting.layout)

    small, small_given = (
        {name: _part(name, x, rows, channels, setting.layout) for name, x in arrays.items()}
        for arrays in (case, given)
    )
    small_setting = dataclasses.replace(setting, layout="bld")
    with jax.enable_x64(True), jax.default_device(cpu):
        y_and_h, gradients = _run(small, small_given, small_setting)
        y_and_h |= {"d" + name: x for name, x in gradients.items()}
        values: dict[str, np.ndarray] = {name: np.asarray(x) for name, x in y_and_h.items()}
    return Exact(setting, rows, channels, given, values)


def _run(case, given, setting):
    def scan(case, setting):
        return selective_scan(
            **case,
            delta_softplus=setting.softplus,
            reverse=setting.reverse,
            return_final_state=setting.final_state,
            implementation="reference",
        )

    def run(case, given):
        fixed = {name: case[name] for name in ("segment_ids",) if name in case}
        moving = {name: x for name, x in case.items() if name not in fixed}
        y_and_h, pull = jax.vjp(lambda moving: results(scan, moving | fixed, setting), moving)
        return y_and_h, pull(given)[0]

    return jax.jit(run).lower(case, given).compile()(case, given)


def _spread_channels(channels: int, groups: int) -> np.ndarray:
    """About `CHANNELS` channels, equally many of each group, so that groups stay groups."""
    per_group = channels // groups
    chosen = np.unique(
        np.linspace(0, per_group - 1, max(1, min(per_group, CHANNELS // groups))).astype(int)
    )
    return (np.arange(groups)[:, None] * per_group + chosen).ravel()


def _part(name: str, x: jax.Array, rows, channels, layout: str) -> np.ndarray:
    """The chosen rows and channels, in layout "bld", float64 (integers stay)."""
    if name in _BY_CHANNEL:
        x = x[channels]
    elif name in _BY_ROW:
        x = x[rows]
    elif name in _BY_POSITION and layout == "bld":
        x = x[rows][:, :, channels]
    else:  # the states, [batch, channels, state], as well
        x = x[rows][:, channels]
    part = np.asarray(x)
    if name in _BY_POSITION and layout == "bdl":
        part = np.swapaxes(part, 1, 2)
    return part if np.issubdtype(part.dtype, np.integer) else part.astype(np.float64)


def _masked(given, rows, channels, layout):
    masked = {}
    for name, x in given.items():
        by_channel = layout == "bdl" or name == "h"
        batch, width = x.shape[0], x.shape[1 if by_channel else 2]
        mask = np.zeros((batch, width), bool)
        mask[np.ix_(rows, channels)] = True
        mask = mask[:, :, None] if by_channel else mask[:, None, :]
        masked[name] = jnp.where(mask, x, jnp.zeros((), x.dtype))
    return masked


def tolerance(setting: Setting) -> float:
    """Above this, a result counts as wrong."""
    return TOLERANCE[setting.dtype]


assert set(TOLERANCE) == set(DTYPES)
