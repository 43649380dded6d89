"""Operands of PTX instructions as functions of a `Machine`: values, addresses, memory."""

import struct

import numpy as np

from tests.kernels.ptx_arithmetic import DTYPES, UNSIGNED
from tests.kernels.ptx_memory import LOCAL_WINDOW, SHARED_WINDOW, MemoryFault
from tests.kernels.ptx_parser import BITS, Address, Number, Register, Special, Symbol

_SPACES = ("global", "shared", "param", "local", "const")


def literal(text, kind):
    """The bits of an immediate operand, as a Python int."""
    bits = BITS[kind]
    prefix, digits = text[:2].lower(), text[2:]
    if prefix == "0f":
        value = int(digits, 16)
        if kind == "f64":
            raise ValueError(f"f32 literal {text} as {kind}")
        return value
    if prefix == "0d":
        return int(digits, 16)
    if kind in ("f32", "f64") and not prefix.startswith("0x"):
        code = "<f" if kind == "f32" else "<d"
        return int.from_bytes(struct.pack(code, float(text)), "little")
    return int(text.rstrip("U"), 0) % (1 << bits)


def read(machine, operand, kind):
    """A function that gives an operand's value in all threads, in the dtype of a PTX type."""
    dtype = DTYPES[kind]
    if isinstance(operand, Register):
        return _read_register(machine, operand, kind)
    if isinstance(operand, Number):
        value = literal(operand.text, kind)
        if kind == "pred":
            constant = np.full(machine.threads, bool(value))
        else:
            word = UNSIGNED[BITS[kind] // 8]
            constant = np.full(machine.threads, word(value)).view(dtype)
        return lambda: constant
    if isinstance(operand, Special):
        constant = _special(machine, operand.name)
        constant = constant.astype(UNSIGNED[BITS[kind] // 8]).view(dtype)
        return lambda: constant
    if isinstance(operand, Symbol) and operand.name in machine.symbols:
        value = machine.symbols[operand.name] + operand.offset
        constant = np.full(machine.threads, value, np.uint64)
        constant = constant.astype(UNSIGNED[BITS[kind] // 8]).view(dtype)
        return lambda: constant
    raise NotImplementedError(f"operand {operand}")


def _read_register(machine, register, kind):
    registers, index, dtype = machine.registers, register.index, DTYPES[kind]
    if kind == "pred":
        if register.bits != 1:
            raise ValueError(f"{register.name} is no predicate")
        if register.negated:
            return lambda: ~registers[index]
        return lambda: registers[index]
    if register.bits == 1:
        raise ValueError(f"predicate {register.name} read as {kind}")
    if register.bits == BITS[kind]:
        return lambda: registers[index].view(dtype)
    if register.bits < BITS[kind]:
        raise ValueError(f"{register.name} has {register.bits} bits, {kind} reads more")
    word = UNSIGNED[BITS[kind] // 8]
    return lambda: registers[index].astype(word).view(dtype)


def write(machine, register, kind):
    """A function (value, mask) that writes a PTX type into a register, extended if it is wider."""
    if register is None:
        return lambda value, mask: None
    if not isinstance(register, Register):
        raise NotImplementedError(f"destination {register}")
    registers, index = machine.registers, register.index
    stored = registers[index].dtype
    if (kind == "pred") != (register.bits == 1) or register.bits < BITS[kind]:
        raise ValueError(f"{register.name} of {register.bits} bits cannot take {kind}")
    same = register.bits == BITS[kind]
    signed = kind.startswith("s")

    def put(value, mask):
        if same:
            value = value.view(stored)
        else:
            value = value.view(UNSIGNED[value.dtype.itemsize]) if not signed else value
            value = value.astype(stored)  # extends by the sign of its own dtype
        registers[index] = value if mask is None else np.where(mask, value, registers[index])

    return put


def _special(machine, name):
    zero, one = np.zeros(machine.threads, np.uint32), np.ones(machine.threads, np.uint32)
    base, _, axis = name.partition(".")
    k = "xyz".index(axis) if axis in ("x", "y", "z") else 0
    lane = machine.lane
    values = {
        "%tid": machine.tid if k == 0 else zero,
        "%ntid": one * np.uint32(machine.num_threads) if k == 0 else one,
        "%ctaid": machine.ctaid[k],
        "%nctaid": one * np.uint32(machine.grid[k]),
        "%laneid": lane,
        "%warpid": machine.warp,
        "%nwarpid": one * np.uint32(machine.num_threads // 32),
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": ((one << lane) - one) | (one << lane),
        "%lanemask_gt": ~(((one << lane) - one) | (one << lane)),
        "%lanemask_ge": ~((one << lane) - one),
        "%cluster_ctarank": zero,
        "%cluster_ctaid": zero,
        "%cluster_nctarank": one,
        "%smid": zero,
        "%clock": zero,
        "%clock64": zero,
        "%globaltimer": zero,
    }
    if base not in values:
        raise NotImplementedError(f"special register {name}")
    return values[base]


def address(machine, operand, bits=64):
    """A function that gives an address operand in all threads, as uint64."""
    if not isinstance(operand, Address):
        raise NotImplementedError(f"address {operand}")
    offset = operand.offset
    if isinstance(operand.base, Register):
        wide = "u64" if operand.base.bits == 64 else "u32"
        base = read(machine, operand.base, wide)
        if wide == "u32":
            if not offset:
                return lambda: base().astype(np.uint64)
            step = np.uint32(offset % (1 << 32))
            return lambda: (base() + step).astype(np.uint64)
        if not offset:
            return base
        step = np.uint64(offset % (1 << 64))
        return lambda: base() + step
    start = 0
    if operand.base is not None:
        if operand.base.name not in machine.symbols:
            raise NotImplementedError(f"address of {operand.base.name}")
        start = machine.symbols[operand.base.name]
    constant = np.full(machine.threads, start + offset, np.uint64)
    return lambda: constant


def space_of(instruction):
    """The state space of a memory instruction; "" is generic."""
    for modifier in instruction.modifiers:
        if modifier.split("::")[0] in _SPACES:
            return modifier.split("::")[0]
    return ""


def smallest_store(kernel):
    """Bytes of the narrowest element that any instruction may store to global memory."""
    widths = [
        BITS[instruction.type] // 8
        for instruction in kernel.instructions
        if instruction.opcode == "st" and space_of(instruction) in ("global", "")
    ]
    return min(widths, default=4)


def smallest_shared_access(kernel):
    """Bytes of the narrowest element that any instruction may move to or from shared memory."""
    smallest = 4
    for instruction in kernel.instructions:
        opcode = instruction.opcode
        if opcode in ("ldmatrix", "stmatrix", "wgmma"):
            smallest = min(smallest, 2)
        elif opcode in ("ld", "st") and space_of(instruction) in ("shared", ""):
            smallest = min(smallest, BITS[instruction.type] // 8)
    return smallest


def _pick(values, mask):
    return values if mask is None else values[mask]


def access(machine, space, check=True):
    """(load, store) of a state space.

    load(address, mask, width, count, used) gives unsigned [active threads, count];
    store(address, mask, values) takes the same. check=False: leave them out of the race check.
    """
    if space == "shared":

        def load(at, mask, width, count, used=None):
            cta, warp = _pick(machine.cta, mask), _pick(machine.warp, mask)
            if machine.profile:
                thread = _pick(machine.thread, mask)
                machine.profile.shared(machine.current, at, thread, width * count)
            return machine.shared.load(at, cta, warp, width, count, used, check)

        def store(at, mask, values):
            cta, warp = _pick(machine.cta, mask), _pick(machine.warp, mask)
            if machine.profile:
                thread, width = _pick(machine.thread, mask), values[0].nbytes
                machine.profile.shared(machine.current, at, thread, width)
            machine.shared.store(at, cta, warp, values, check)

    elif space == "local":

        def load(at, mask, width, count, used=None):
            return machine.local.load(at, _pick(machine.thread, mask), width, count)

        def store(at, mask, values):
            machine.local.store(at, _pick(machine.thread, mask), values)

    elif space in ("global", "const"):

        def load(at, mask, width, count, used=None):
            if machine.profile:
                thread = _pick(machine.thread, mask)
                machine.profile.memory(machine.current, at, thread, width * count)
            return machine.memory.load(at, _pick(machine.cta_number, mask), width, count, check)

        def store(at, mask, values):
            if machine.profile:
                thread, width = _pick(machine.thread, mask), values[0].nbytes
                machine.profile.memory(machine.current, at, thread, width)
            machine.memory.store(at, _pick(machine.cta_number, mask), values, check)

    else:
        return _generic_access(machine, check)
    return load, store


def _generic_access(machine, check):
    windows = (("global", 0), ("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW))

    def by_space(at, mask):
        threads = machine.thread if mask is None else np.flatnonzero(mask)
        number = (at >> np.uint64(60)).astype(np.int64)
        if (number > 2).any():
            raise MemoryFault(f"generic address {int(at[number > 2][0]):#x}")
        for k in np.unique(number):
            chosen = number == k
            inner = np.zeros(machine.threads, np.bool_)
            inner[threads[chosen]] = True
            space, window = windows[k]
            yield chosen, at[chosen] - np.uint64(window), inner, access(machine, space, check)

    def load(at, mask, width, count, used=None):
        out = np.empty((len(at), count), UNSIGNED[width])
        for chosen, inside, inner, (one, _) in by_space(at, mask):
            out[chosen] = one(inside, inner, width, count, used)
        return out

    def store(at, mask, values):
        for chosen, inside, inner, (_, one) in by_space(at, mask):
            one(inside, inner, values[chosen])

    return load, store


def spread(machine, values, mask):
    """Values of the active threads as a contiguous vector over all."""
    if mask is None:
        return np.ascontiguousarray(values)
    full = np.zeros(machine.threads, values.dtype)
    full[mask] = values
    return full
