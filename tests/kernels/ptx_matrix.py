"""Tensor cores: wgmma, products of warpgroups, and mma.sync, products of a warp.

bfloat16 and float16 with float32 sums. wgmma has its operands in shared memory or registers. Its
product is made when it is issued; until the wait that ends it, what it reads counts as being read,
so that overwriting it is a race, barrier or not. Not checked: that registers are left alone
meanwhile, and the proxy fence.

Layouts are those of the PTX manual ("Warp level matrix instructions", "Asynchronous warpgroup level
matrix instructions").
"""

import re

import numpy as np

from tests.kernels.ptx_operands import read, write
from tests.kernels.ptx_parser import Number, Vector

GROUP = 128  # threads
_ROWS = 64  # of a product
_STEP = 16  # what it sums over, in halves


def warpgroup(machine, instruction):
    """wgmma.*"""
    what = instruction.modifiers[0]
    if what == "fence":
        return lambda mask: None
    if what == "commit_group":
        return lambda mask: machine.products.commit(_groups(machine, mask))
    if what == "wait_group":
        left = int(instruction.operands[0].text, 0)
        return lambda mask: machine.products.wait(_groups(machine, mask), left)
    if what == "mma_async":
        return _product(machine, instruction)
    raise instruction.unsupported()


class Products:
    """Which shared memory the products under way read, by warpgroup."""

    def __init__(self, shared, groups):
        self.shared = shared
        self.open = [[] for _ in range(groups)]
        self.committed = [[] for _ in range(groups)]

    def add(self, group, address, cta, warps):
        self.open[group].append(self.shared.hold(address, cta, warps))

    def commit(self, groups):
        for group in groups:
            self.committed[group].append(self.open[group])
            self.open[group] = []

    def wait(self, groups, left):
        for group in groups:
            held = self.committed[group]
            done, self.committed[group] = held[: len(held) - left], held[len(held) - left :]
            for products in done:
                for key in products:
                    self.shared.free(key)


def _groups(machine, mask):
    """Numbers of the warpgroups that run this, each of them as a whole."""
    if machine.num_threads % GROUP:
        raise RuntimeError(f"wgmma in CTAs of {machine.num_threads} threads: no warpgroups")
    active = machine._all(mask).reshape(-1, GROUP)
    if (active.any(1) != active.all(1)).any():
        raise RuntimeError("part of a warpgroup runs a wgmma")
    return np.flatnonzero(active.any(1))


def _product(machine, instruction):
    shape = next(m for m in map(re.compile(r"m64n(\d+)k16").fullmatch, instruction.modifiers) if m)
    columns = int(shape[1])
    kinds = instruction.types
    if kinds[0] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("bf16", "f16"):
        raise instruction.unsupported()
    sums, a, b, accumulates, *immediates = instruction.operands
    sums = sums.items
    transposes = 2 if not isinstance(a, Vector) else 1
    values = [int(number.text, 0) for number in immediates]
    if values[:2] != [1, 1] or len(values) != 2 + transposes or len(sums) != columns // 2:
        raise instruction.unsupported()
    reads = [read(machine, item, "f32") for item in sums]
    puts = [write(machine, item, "f32") for item in sums]
    if isinstance(accumulates, Number):
        wanted = np.full(machine.threads, int(accumulates.text, 0) != 0)
        accumulate = lambda: wanted  # noqa: E731
    else:
        accumulate = read(machine, accumulates, "pred")
    left = [read(machine, item, "b32") for item in a.items] if transposes == 1 else None
    where_a = None if left is not None else read(machine, a, "b64")
    where_b = read(machine, b, "b64")

    def execute(mask):
        groups = _groups(machine, mask)
        lead = groups * GROUP
        if left is not None:
            x = _from_registers([r() for r in left], groups, kinds[1])
        else:
            x = _from_shared(machine, where_a()[lead], groups, _ROWS, values[2], kinds[1])
        y = _from_shared(machine, where_b()[lead], groups, columns, values[-1], kinds[1])
        result = np.matmul(x, y.swapaxes(1, 2))  # [groups, 64, columns]
        row, column = _places(columns)  # [128, columns / 2]
        result = result[:, row, column].reshape(-1, columns // 2)
        threads = (lead[:, None] + np.arange(GROUP)).ravel()
        add = accumulate()[threads]
        for k, (get, put) in enumerate(zip(reads, puts, strict=True)):
            out = get().copy()
            out[threads] = np.where(add, out[threads], np.float32(0)) + result[:, k]
            put(out, mask)

    return execute


_WARP = re.compile(r"sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32")


def warp(machine, instruction):
    """mma.sync.aligned.m16n8k16"""
    form = _WARP.fullmatch(".".join(instruction.modifiers))
    if form is None:
        raise instruction.unsupported()
    kind = form[1]
    sums, a, b, c = (operand.items for operand in instruction.operands)
    left, right = ([read(machine, item, "b32") for item in x] for x in (a, b))
    before = [read(machine, item, "f32") for item in c]
    puts = [write(machine, item, "f32") for item in sums]
    lane = np.arange(32)
    row, column = lane // 4, 2 * (lane % 4)

    def execute(mask):
        if mask is not None and not (active := mask.reshape(-1, 32)).all(1)[active.any(1)].all():
            raise RuntimeError("part of a warp runs an mma")
        x = np.empty((machine.threads // 32, 16, _STEP), np.float32)
        y = np.empty((machine.threads // 32, _STEP, 8), np.float32)
        for k, get in enumerate(left):
            pairs = _pairs(get(), kind)
            for j in (0, 1):
                x[:, row + 8 * (k % 2), column + 8 * (k // 2) + j] = pairs[:, :, j]
        for k, get in enumerate(right):
            pairs = _pairs(get(), kind)
            for j in (0, 1):
                y[:, column + 8 * k + j, row] = pairs[:, :, j]
        with np.errstate(invalid="ignore", over="ignore"):
            product = np.matmul(x, y)
            results = [
                get() + product[:, row + 8 * (k // 2), column + k % 2].ravel()
                for k, get in enumerate(before)
            ]
        for put, result in zip(puts, results, strict=True):
            put(result, mask)

    return execute


def _pairs(registers, kind):
    """[warps, 32, 2] from a register of two halves a thread."""
    halves = np.ascontiguousarray(registers).view(np.uint16)
    return _widened(halves, kind).reshape(-1, 32, 2)


def _places(columns):
    """Row and column of each of a thread's sums."""
    thread = np.arange(GROUP)[:, None]
    k = np.arange(columns // 2)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (k // 2 % 2)
    return row, 8 * (k // 4) + 2 * (thread % 4) + k % 2


def _widened(halves, kind):
    if kind == "f16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _from_registers(registers, groups, kind):
    """[groups, 64, 16] from four registers of two halves a thread."""
    x = np.empty((len(groups), _ROWS, _STEP), np.float32)
    thread = np.arange(GROUP)
    for k, register in enumerate(registers):
        halves = np.ascontiguousarray(register.reshape(-1, GROUP)[groups]).view(np.uint16)
        halves = _widened(halves.reshape(-1, GROUP, 2), kind)
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (k % 2)
        for j in (0, 1):
            x[:, row, 8 * (k // 2) + 2 * (thread % 4) + j] = halves[:, :, j]
    return x


def _from_shared(machine, descriptor, groups, rows, transposed, kind):
    """[groups, rows, 16] that a descriptor describes; `transposed`: rows follow each other."""
    address = ((descriptor & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    leading = ((descriptor >> np.uint64(16) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    stride = ((descriptor >> np.uint64(32) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    if (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise NotImplementedError("wgmma with a base offset in a descriptor")
    mode = int(descriptor[0] >> np.uint64(62))
    if (descriptor >> np.uint64(62) != mode).any() or mode == 0:
        raise NotImplementedError("wgmma without swizzling")
    width = {1: 128, 2: 64, 3: 32}[mode]  # bytes of a swizzled row
    address, leading, stride = (x[:, None, None] for x in (address, leading, stride))
    outer, inner = np.arange(rows)[:, None], np.arange(_STEP)[None]
    if transposed:
        wide = width // 2
        place = outer // wide * leading + outer % wide * 2
        place = place + inner // 8 * stride + inner % 8 * width
    else:
        place = outer // 8 * stride + outer % 8 * width + inner * 2
    place = address + place
    place = place ^ ((place >> 7 & (width // 16 - 1)) << 4)
    flat = place.reshape(len(groups), -1)
    warps = machine.num_threads // 32
    cta, first = groups * 4 // warps, groups * 4 % warps
    bits = np.uint32(15) << first.astype(np.uint32)
    out = np.empty(flat.shape, np.uint16)
    for k, group in enumerate(groups):
        at, of = flat[k].astype(np.uint64), np.full(flat.shape[1], cta[k])
        # By its first warp: what other warps wrote is seen to be a race in the same way.
        warp = np.full(flat.shape[1], first[k])
        out[k] = machine.shared.load(at, of, warp, 2, 1)[:, 0]
        machine.products.add(group, at, of, bits[k])
    return _widened(out, kind).reshape(place.shape)
