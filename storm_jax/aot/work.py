"""FLOPs and memory traffic of a compiled program, loops counted as often as they run."""

import json
import re
from dataclasses import dataclass

import numpy as np

from storm_jax.aot.hlo import Computation, Instruction, Program, Shape


@dataclass(frozen=True)
class DeviceWork:
    """What one device does in a step.

    Attributes:
      flops: of matrix products (dot, convolution, matrix library calls), recomputation included,
        and of kernels that state theirs.
      hbm_bytes: operands read and results written by instructions that run one by one, as if
        nothing stayed in caches: an estimate from above. Other memory spaces are left out.
      silent_kernels: name -> executions of custom kernels that state no FLOPs; none are counted.
    """

    flops: float
    hbm_bytes: float
    silent_kernels: dict[str, float]


def device_work(program: Program) -> DeviceWork:
    """Counts one device's share of a step."""
    flops = hbm_bytes = 0.0
    silent: dict[str, float] = {}
    for computation, instruction, times in program.executed():
        opcode = instruction.opcode
        if opcode == "dot":
            flops += times * _dot_flops(computation, instruction)
        elif opcode == "convolution":
            flops += times * _convolution_flops(computation, instruction)
        elif opcode == "custom-call":
            stated = _custom_call_flops(computation, instruction)
            if stated is not None:
                flops += times * stated
            elif _is_kernel(instruction):
                name = _kernel_name(instruction)
                silent[name] = silent.get(name, 0) + times
        if computation.name in program.top_level:
            hbm_bytes += times * _traffic(program, computation, instruction)
    return DeviceWork(flops, hbm_bytes, silent)


# ------------------------------------------------------------------------------------------- FLOPs


def _dims(text: str, name: str) -> list[int]:
    match = re.search(rf"{name}=\{{([\d,]*)\}}", text)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    left = computation.operands(dot)[0].shapes[0]
    contracted = np.prod([left.dims[d] for d in _dims(dot.text, "lhs_contracting_dims")])
    return 2.0 * dot.shapes[0].elements * contracted


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Two for every pair of an input and a weight that meet; the padding meets nothing.

    The TPU compiler writes every matrix product as a convolution; batches become window dimensions
    whose dilations let each element meet one other.
    """
    left, right = (operand.shapes[0] for operand in computation.operands(convolution)[:2])
    [labels] = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.text)
    left_labels, right_labels, out_labels = labels
    window = re.search(r"window=\{([^}]*)\}", convolution.text)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    spatial = sum(label.isdigit() for label in out_labels)

    def field(name: str, default: int) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [default] * spatial

    pads = [tuple(map(int, p.split("_"))) for p in fields.get("pad", "").split("x") if p]
    pads = pads or [(0, 0)] * spatial
    meetings = 1.0
    for d in range(spatial):
        meetings *= _meetings(
            left.dims[left_labels.index(str(d))],
            right.dims[right_labels.index(str(d))],
            convolution.shapes[0].dims[out_labels.index(str(d))],
            pads[d][0],
            field("stride", 1)[d],
            field("lhs_dilate", 1)[d],
            field("rhs_dilate", 1)[d],
        )
    batch = convolution.shapes[0].dims[out_labels.index("b")]
    features = convolution.shapes[0].dims[out_labels.index("f")]
    inputs = right.dims[right_labels.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", convolution.text)
    return 2.0 * batch * features * inputs * meetings / (int(groups[1]) if groups else 1)


def _meetings(size, window, out, pad, stride, dilate, window_dilate) -> int:
    """Pairs of output and window positions that fall on an element of an axis of `size`."""
    position = np.arange(out)[:, None] * stride + np.arange(window) * window_dilate - pad
    inside = (position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)
    return int(inside.sum())


def _custom_call_flops(computation: Computation, call: Instruction) -> float | None:
    """FLOPs of a matrix library's call, or those that a Pallas kernel states."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', call.text)
    if contracted:
        left = computation.operands(call)[0].shapes[0]
        inner = np.prod([left.dims[int(d)] for d in re.findall(r"\d+", contracted[1])])
        return 2.0 * call.shapes[0].elements * inner
    stated = re.search(r'"cost_estimate":(\{[^}]*\})', call.text)
    return float(json.loads(stated[1])["flops"]) if stated else None


def _is_kernel(call: Instruction) -> bool:
    target = _target(call)
    return "tpu_custom_call" in target or "triton" in target or "mosaic" in target


def _target(call: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', call.text)
    return match[1] if match else ""


def _kernel_name(call: Instruction) -> str:
    return call.source.removesuffix("/pallas_call").rpartition("/")[2] or _target(call)


# ------------------------------------------------------------------------------------------ memory

_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "iota", "after-all", "partition-id", "replica-id", "copy-done", "async-start"),
    *("async-done", "opt-barrier", "domain", "all-gather-done", "all-reduce-done"),
    *("collective-permute-done", "send-done", "recv-done"),
}


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of main memory that one execution reads and writes."""
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or _target(instruction) == "AllocateBuffer":
        return 0.0
    operands = computation.operands(instruction)
    if opcode == "fusion":
        return _fusion_traffic(program.computations[instruction.called("calls")], operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _hbm(instruction.shapes[:1])
    if opcode == "dynamic-update-slice":
        return 2.0 * _hbm(operands[1].shapes)
    if opcode == "send":
        return _hbm(operands[0].shapes)
    if opcode == "recv":  # its result names what arrives, and a token
        return _hbm(instruction.shapes[:1])
    if opcode == "copy-start":  # its result names source and target
        return _hbm(operands[0].shapes) + _hbm(instruction.shapes[:1])
    if opcode.endswith("-start"):
        return 2.0 * sum(_hbm(operand.shapes) for operand in operands)
    return _hbm(instruction.shapes) + sum(_hbm(operand.shapes) for operand in operands)


def _fusion_traffic(fused: Computation, operands: list[Instruction]) -> float:
    """A fusion reads of an operand only the slices that it takes, and writes into one in place."""
    parameters = {int(i.literal): i for i in fused.instructions.values() if i.opcode == "parameter"}
    total = 0.0
    for index, operand in enumerate(operands):
        taken = _slices(fused, parameters[index])
        whole = _hbm(operand.shapes)
        total += whole if taken is None else min(whole, taken)
    root = fused.root
    results = fused.operands(root) if root.opcode == "tuple" else [root]
    for result in results:
        updated = _through_bitcasts(fused, result)
        if updated.opcode == "dynamic-update-slice":
            total += _hbm(fused.operands(updated)[1].shapes)
        else:
            total += _hbm(result.shapes)
    return total


def _slices(fused: Computation, value: Instruction) -> float | None:
    """Bytes read of a value that is only sliced or updated in place; None: it is read whole."""
    total = 0.0
    for user in fused.users[value.name]:
        if user.opcode == "bitcast":
            inside = _slices(fused, user)
            if inside is None:
                return None
            total += inside
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            if user.operands[0] != value.name:
                return None
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        else:
            return None
    return total


def _through_bitcasts(fused: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        [instruction] = fused.operands(instruction)
    return instruction


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.space == 0))
