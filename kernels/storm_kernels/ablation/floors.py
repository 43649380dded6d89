"""Rooflines: how fast a scan could be on a device if only one of its units were the limit.

Counts are per (batch, length, channel) with N states, for a backward that recomputes the states
from a few saved ones; they say what no implementation of this recurrence can do without, so a
share of 100 % is out of reach, and one above it means that the device or its clock is not the one
of the table.

| | forward | backward |
|---|---|---|
| HBM bytes | u, delta, y, z if gated | u, delta, dy, du, ddelta; z, dz if gated |
| per (batch, length) too | B, C, segment ids | B, C, dB, dC, segment ids |
| exponentials (MUFU on GPUs, EUP on TPUs) | N, + 2 softplus, + 2 gate | N, + 3 softplus, + 2 gate |
| GPU FP32 instructions | 4 N + up to 30 | 12 N + up to 60 |
| TPU vector ALU slots | 7 N | 18 N |

The GPU's 4 are dt A, x B, the decay's multiply-add and C h; its 12 add the adjoint and its six
products. The TPU has no fused multiply-add, and its exponential takes a vector ALU slot as well.
"Up to" is bias, softplus, skip, gate, conversions, loads and stores. On GPUs "issue" is FP32 and
exponentials together, 128 lanes per cycle and SM. Sums over channels or states across lanes are not
counted, nor is reading or writing saved states.
"""

import dataclasses
import re

import jax.numpy as jnp

from storm_kernels.ablation.operands import DTYPES, Setting
from storm_kernels.ablation.shapes import Shape
from storm_kernels.tpu_cost import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates of a GPU. `lanes` and `exp_lanes` are results per cycle and SM."""

    sms: int
    gigahertz: float
    lanes: int
    exp_lanes: int
    hbm_gb: float
    source: str


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Rates of a TPU chip.

    Attributes:
        chip: clock, cores and memory.
        valu_slots: of the vector ALU, per cycle and core; a slot is 1024 float32 results.
        exp_slots: slots of the exponential unit, one a cycle, that 1024 exponentials fill.
    """

    chip: Chip
    valu_slots: int
    exp_slots: int

    @property
    def hbm_gb(self) -> float:
        return self.chip.bandwidth

    @property
    def source(self) -> str:
        return self.chip.source


# Results per cycle and SM: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic
# Instructions" (float32 add, multiply, multiply-add; and ex2). By a part of JAX's `device_kind`.
_GPUS = {
    "H100 80GB HBM3": Gpu(132, 1.755, 128, 16, 3000, "copy measured at 3020 GB/s; sustained clock"),
    "H100 PCIe": Gpu(114, 1.755, 128, 16, 2000, "NVIDIA H100 data sheet"),
    "H200": Gpu(132, 1.755, 128, 16, 4800, "NVIDIA H200 data sheet; clock as the H100's"),
    "B200": Gpu(148, 1.98, 128, 16, 7700, "NVIDIA HGX B200 data sheet; clock from 75 TFLOP/s"),
    "A100-SXM4-80GB": Gpu(108, 1.41, 64, 16, 2039, "NVIDIA A100 data sheet"),
    "A100-SXM4-40GB": Gpu(108, 1.41, 64, 16, 1555, "NVIDIA A100 data sheet"),
    "A100 80GB PCIe": Gpu(108, 1.41, 64, 16, 1935, "NVIDIA A100 data sheet"),
}

# Slots: the resource lines of libtpu's bundle dumps; an exponential of v4 is two there.
_TPUS = {name: Tpu(chip, *((2, 2) if name == "v4" else (4, 1))) for name, chip in CHIPS.items()}

TPU_GENERATIONS = tuple(_TPUS)

# JAX's `device_kind` of each generation.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def tpu_generation(device_kind: str) -> str | None:
    """The generation ("v5e") of a TPU by its `device_kind`, None if it is not in the table."""
    return _TPU_KINDS.get(device_kind)


def device_rates(device_kind: str) -> Gpu | Tpu | None:
    """The rates of a device by JAX's `device_kind`, None for a CPU and for what is not known."""
    if device_kind in _TPU_KINDS:
        return _TPUS[_TPU_KINDS[device_kind]]
    for name, gpu in _GPUS.items():
        if re.search(rf"\b{name}\b", device_kind):  # "GH200" is another device than "H200"
            return gpu
    return None


def tpu_rates(generation: str) -> Tpu:
    """The rates of a generation, one of `TPU_GENERATIONS`."""
    return _TPUS[generation]


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time that a device's units allow.

    Attributes:
        ms: milliseconds; of forward and backward together, the sum of both.
        resource: the unit that sets it (in the longer direction, of both).
        by_resource: milliseconds of every unit.
    """

    ms: float
    resource: str
    by_resource: dict[str, float]


def floor(rates: Gpu | Tpu, shape: Shape, setting: Setting, direction: str) -> Floor:
    """The floor of one direction: "forward", "backward" or "both" (one after the other)."""
    if direction == "both":
        parts = [floor(rates, shape, setting, part) for part in ("forward", "backward")]
        return Floor(
            sum(part.ms for part in parts),
            max(parts, key=lambda part: part.ms).resource,
            {name: sum(part.by_resource[name] for part in parts) for name in parts[0].by_resource},
        )
    backward = direction == "backward"
    N, gate, softplus = shape.state, "z" in setting.optional, setting.softplus
    positions = shape.batch * shape.length
    steps = positions * shape.channels

    itemsize = jnp.dtype(DTYPES[setting.dtype]).itemsize
    tensors = (5 + 2 * gate) if backward else (3 + gate)
    rows = (4 if backward else 2) * N * (shape.groups or 1)
    moved = steps * tensors * itemsize + positions * rows * itemsize
    if "segments" in setting.optional:
        moved += 4 * positions
    by_resource = {"HBM": moved / (rates.hbm_gb * 1e9)}

    exponentials = steps * (N + (2 + backward) * softplus + 2 * gate)
    if isinstance(rates, Gpu):
        clock = rates.sms * rates.gigahertz * 1e9
        fp32 = steps * (12 * N if backward else 4 * N) + steps * _overhead(setting, backward)
        by_resource["MUFU"] = exponentials / (clock * rates.exp_lanes)
        by_resource["FP32"] = fp32 / (clock * rates.lanes)
        by_resource["issue"] = (fp32 + exponentials) / (clock * 128)
    else:
        clock = rates.chip.cores * rates.chip.clock * 1e9 * 1024
        by_resource["EUP"] = exponentials * rates.exp_slots / clock
        by_resource["VALU"] = steps * N * (18 if backward else 7) / (clock * rates.valu_slots)
    by_resource = {name: 1e3 * seconds for name, seconds in by_resource.items()}
    resource = max(by_resource, key=lambda name: by_resource[name])
    return Floor(by_resource[resource], resource, by_resource)


def _overhead(setting: Setting, backward: bool) -> int:
    """GPU instructions of a step that do not grow with the state: 30 and 60 with all four."""
    forward_backward = {"bias": (1, 2), "softplus": (8, 12), "D": (1, 3), "z": (8, 19)}
    base = (12, 24)
    return base[backward] + sum(
        cost[backward] for name, cost in forward_backward.items() if name in setting.optional
    )
