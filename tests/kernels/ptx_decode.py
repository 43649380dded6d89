"""Turns parsed PTX instructions into functions of a `Machine` (ptx_emulator).

A PLAIN function takes the mask of the threads that run it (None: all). A CONTROL one takes the
program counter too, and returns the next one with its mask.
"""

import dataclasses

import numpy as np

from tests.kernels import ptx_arithmetic as arithmetic
from tests.kernels import ptx_exchange as exchange
from tests.kernels import ptx_matrix as matrix
from tests.kernels.ptx_arithmetic import DTYPES, FLOATS, INTEGER, PACKED, UNSIGNED
from tests.kernels.ptx_memory import LOCAL_WINDOW, SHARED_WINDOW
from tests.kernels.ptx_operands import access, address, read, space_of, spread, write
from tests.kernels.ptx_parser import BITS, Number, Pair, Symbol, Vector

PLAIN, CONTROL = 0, 1
# Hints and orderings that mean nothing where instructions complete one after the other.
_IGNORED = (
    "fence", "membar", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "setmaxnreg",
    "pmevent", "applypriority", "discard",
)  # fmt: skip


def decode(machine, instruction):
    """(PLAIN or CONTROL, function)."""
    opcode = instruction.opcode
    if opcode in ("bra", "ret", "exit", "bar", "barrier"):
        return CONTROL, _decode_control(machine, instruction)
    if opcode in _IGNORED:
        return PLAIN, lambda mask: None
    decoder = _DECODERS.get(opcode)
    if decoder is None:
        raise instruction.unsupported()
    function = decoder(machine, instruction)
    if instruction.guard is None:
        return PLAIN, function
    guard = read(machine, instruction.guard, "pred")

    def guarded(mask):
        wanted = guard() if mask is None else guard() & mask
        count = np.count_nonzero(wanted)
        if count == machine.threads:
            function(None)
        elif count:
            function(wanted)

    return PLAIN, guarded


# ---------------------------------------------------------------- control


def _decode_control(machine, instruction):
    guard = instruction.guard and read(machine, instruction.guard, "pred")
    taken = guard or (lambda: None)
    if instruction.opcode == "bra":
        target = instruction.operands[0].position
        return lambda at, mask: machine.branch(target, at, mask, taken())
    if instruction.opcode in ("ret", "exit"):
        return lambda at, mask: machine.exit(at, mask, taken())
    modifiers = instruction.modifiers
    if "warp" in modifiers:  # lanes run in step anyway
        return lambda at, mask: (at + 1, mask)
    if "red" in modifiers or "cluster" in modifiers:
        raise instruction.unsupported()
    numbers = []
    for operand in instruction.operands:
        if not isinstance(operand, Number):
            raise instruction.unsupported("a barrier's number in a register")
        numbers.append(int(operand.text, 0))
    number, count = numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else None
    wait = "arrive" not in modifiers

    def barrier(at, mask):
        if guard is not None:
            arriving = guard() if mask is None else guard() & mask
            if not arriving.any():
                return at + 1, mask
            if not arriving.all():
                machine._wait(at + 1, machine._all(mask) & ~arriving)
                return machine.barrier(at, arriving, number, count, wait)
        return machine.barrier(at, mask, number, count, wait)

    return barrier


# ---------------------------------------------------------------- arithmetic


def _result(machine, instruction, function, kinds, target):
    """Applies `function` to the operands read as `kinds`; writes the result as `target`."""
    put = write(machine, instruction.operands[0], target)
    sources = [
        read(machine, operand, kind)
        for operand, kind in zip(instruction.operands[1:], kinds, strict=True)
    ]
    if len(sources) == 1:
        (a,) = sources
        return lambda mask: put(function(a()), mask)
    if len(sources) == 2:
        a, b = sources
        return lambda mask: put(function(a(), b()), mask)
    if len(sources) == 3:
        a, b, c = sources
        return lambda mask: put(function(a(), b(), c()), mask)
    return lambda mask: put(function(*(source() for source in sources)), mask)


def _arithmetic(machine, instruction):
    kind, opcode = instruction.type, instruction.opcode
    count = len(instruction.operands) - 1
    if instruction.has("cc") or opcode in ("addc", "subc", "madc"):
        return _with_carry(machine, instruction)
    if kind in FLOATS or kind in PACKED:
        function = arithmetic.float_function(opcode, instruction.modifiers, kind)
        if function is None:
            raise instruction.unsupported()
        return _result(machine, instruction, function, [kind] * count, kind)
    if opcode in ("mul", "mad"):
        return _integer_multiply(machine, instruction, kind)
    if instruction.has("sat"):
        function = {"add": np.add, "sub": np.subtract}[opcode]
        return _result(machine, instruction, arithmetic.saturated(function), [kind] * 2, kind)
    function = INTEGER.get(opcode)
    if function is None:
        raise instruction.unsupported()
    kinds, target = [kind] * count, kind
    if kind == "pred":
        function = {"not": np.logical_not}.get(opcode, function)
    if opcode in ("popc", "clz"):
        unsigned, target = f"u{BITS[kind]}", "u32"
        kinds = [unsigned]
    if opcode == "bfi":
        kinds = [kind, kind, "u32", "u32"]
    return _result(machine, instruction, function, kinds, target)


def _integer_multiply(machine, instruction, kind):
    mad = instruction.opcode == "mad"
    if instruction.has("wide"):
        wide = f"{kind[0]}{2 * BITS[kind]}"
        dtype = DTYPES[wide]
        if mad:
            return _result(
                machine, instruction,
                lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c,
                [kind, kind, wide], wide,
            )  # fmt: skip
        return _result(
            machine, instruction, lambda a, b: a.astype(dtype) * b.astype(dtype), [kind] * 2, wide
        )
    multiply = arithmetic.multiply_high if instruction.has("hi") else np.multiply
    if mad:
        return _result(machine, instruction, lambda a, b, c: multiply(a, b) + c, [kind] * 3, kind)
    return _result(machine, instruction, multiply, [kind] * 2, kind)


def _with_carry(machine, instruction):
    """add, sub and mad that take (`c`) or leave (`.cc`) the carry of a longer number."""
    opcode, bits = instruction.opcode, BITS[instruction.type]
    if bits not in (32, 64) or (bits == 64 and opcode.startswith("mad")):
        raise instruction.unsupported()
    takes, leaves = opcode.endswith("c"), instruction.has("cc")
    subtract = opcode.startswith("sub")
    put = write(machine, instruction.operands[0], f"u{bits}")
    reads = [read(machine, operand, f"u{bits}") for operand in instruction.operands[1:]]
    signed = instruction.type.startswith("s")

    def execute(mask):
        *product, b = (r() for r in reads)
        a = product[0]
        if len(product) == 2:
            c, d = (x.view(np.int32) if signed else x for x in product)
            a = arithmetic.multiply_high(c, d) if instruction.has("hi") else c * d
            a = a.view(np.uint32)
        if subtract:
            b = ~b
        first = a + b
        # A subtraction's flag is the borrow: a - b = a + ~b + 1.
        carry = (machine.carry if takes else np.zeros(machine.threads, np.bool_)) ^ subtract
        result = first + carry.astype(first.dtype)
        put(result, mask)
        if leaves:
            out = ((first < a) | (result < first)) ^ subtract
            machine.carry = out if mask is None else np.where(mask, out, machine.carry)

    return execute


def _shift(machine, instruction):
    kind = instruction.type
    function = arithmetic.shift_left if instruction.opcode == "shl" else arithmetic.shift_right
    return _result(machine, instruction, function, [kind, "u32"], kind)


def _funnel(machine, instruction):
    function = arithmetic.funnel(instruction.has("l"), instruction.has("clamp"))
    return _result(machine, instruction, function, ["u32"] * 3, "u32")


def _extract(machine, instruction):
    kind = instruction.type
    return _result(machine, instruction, arithmetic.extract_field, [kind, "u32", "u32"], kind)


def _permute(machine, instruction):
    modes = [m for m in instruction.modifiers if m != "b32"]
    function = arithmetic.permute(modes[0] if modes else None)
    return _result(machine, instruction, function, ["b32"] * 3, "b32")


def _logic3(machine, instruction):
    *operands, table = instruction.operands
    instruction = dataclasses.replace(instruction, operands=operands)
    function = arithmetic.logic3(int(table.text, 0))
    return _result(machine, instruction, function, ["b32"] * 3, "b32")


def _find(machine, instruction):
    function = arithmetic.find_highest(instruction.has("shiftamt"))
    return _result(machine, instruction, function, [instruction.type], "u32")


def _select(machine, instruction):
    kind = instruction.type
    return _result(
        machine, instruction, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], kind
    )


_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(machine, instruction):
    """setp and set."""
    kind = instruction.type
    how = instruction.modifiers[0]
    combine = next((_COMBINE[m] for m in instruction.modifiers[1:] if m in _COMBINE), None)
    target, *operands = instruction.operands
    if kind in ("f16x2", "bf16x2") and isinstance(target, Pair) and combine is None:
        return _compare_packed(machine, instruction, how, kind)
    function = arithmetic.compare(how, kind)
    if function is None:
        raise instruction.unsupported()
    a, b = (read(machine, operand, kind) for operand in operands[:2])
    other = read(machine, operands[2], "pred") if combine else None
    ftz = instruction.has("ftz") and kind == "f32"

    def compared():
        x, y = a(), b()
        if ftz:
            x, y = arithmetic.flush(x), arithmetic.flush(y)
        return function(x, y)

    if instruction.opcode == "set":
        return _set(machine, instruction, compared, combine, other)
    first = target.first if isinstance(target, Pair) else target
    put = write(machine, first, "pred")
    put_second = None
    if isinstance(target, Pair):
        put_second = write(machine, target.second, "pred")

    def execute(mask):
        result = compared()
        if combine is None:
            put(result, mask)
            if put_second:
                put_second(~result, mask)
            return
        with_other = other()
        put(combine(result, with_other), mask)
        if put_second:
            put_second(combine(~result, with_other), mask)

    return execute


def _compare_packed(machine, instruction, how, kind):
    """setp of two halves: one predicate for the low ones, one for the high ones."""
    half = arithmetic.PACKED[kind]
    function = arithmetic.compare(how, half)
    if function is None:
        raise instruction.unsupported()
    target, *operands = instruction.operands
    a, b = (read(machine, operand, kind) for operand in operands)
    puts = [write(machine, part, "pred") for part in (target.first, target.second)]

    def execute(mask):
        pairs = zip(arithmetic.unpack(a(), half), arithmetic.unpack(b(), half), strict=True)
        results = [function(x, y) for x, y in pairs]
        for put, result in zip(puts, results, strict=True):
            put(result, mask)

    return execute


def _set(machine, instruction, compared, combine, other):
    target = instruction.types[0]
    put = write(machine, instruction.operands[0], target)
    dtype = DTYPES[target]
    true = dtype(1.0) if target in ("f32", "f16") else np.array(-1).astype(dtype)
    if target == "bf16":
        true = np.uint16(0x3F80)

    def execute(mask):
        result = compared()
        if combine is not None:
            result = combine(result, other())
        put(np.where(result, true, dtype(0)), mask)

    return execute


def _convert(machine, instruction):
    target, source = instruction.types[-2:]
    if instruction.has("pack"):
        raise instruction.unsupported()
    function = arithmetic.convert(instruction)
    if function is None:
        raise instruction.unsupported()
    count = len(instruction.operands) - 1
    return _result(machine, instruction, function, [source] * count, target)


def _copy_address(machine, instruction):
    """cvta: between a space's addresses and generic ones."""
    kind = instruction.type
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
    step = next((window[s] for m in instruction.modifiers if (s := m.split("::")[0]) in window), 0)
    step = np.uint64((-step if instruction.has("to") else step) % (1 << 64))
    return _result(machine, instruction, lambda a: a + step if step else a, [kind], kind)


def _move(machine, instruction):
    kind = instruction.type
    target, source = instruction.operands
    if isinstance(source, Vector):
        part = _part_kind(kind, source)
        sources = [read(machine, item, part) for item in source.items]
        put = write(machine, target, kind)
        return lambda mask: put(arithmetic.pack([s() for s in sources]), mask)
    if isinstance(target, Vector):
        part = _part_kind(kind, target)
        puts = [write(machine, item, part) for item in target.items]
        value = read(machine, source, kind)
        width = len(puts)
        word = UNSIGNED[BITS[part] // 8]

        def split(mask):
            parts = np.ascontiguousarray(value()).view(word).reshape(-1, width)
            for k, put in enumerate(puts):
                put(np.ascontiguousarray(parts[:, k]), mask)

        return split
    return _result(machine, instruction, lambda a: a, [kind], kind)


def _part_kind(kind, vector):
    return f"b{BITS[kind] // len(vector.items)}"


# ---------------------------------------------------------------- loads and stores


def _load(machine, instruction):
    if space_of(instruction) == "param":
        return _load_parameter(machine, instruction)
    kind = instruction.type
    target, place, *_ = instruction.operands  # a cache policy may follow
    targets = target.items if isinstance(target, Vector) else (target,)
    puts = [write(machine, item, kind) for item in targets]
    where = address(machine, place)
    acquires = instruction.has("acquire")
    load, _ = access(machine, space_of(instruction), check=not acquires)
    width, count, dtype = BITS[kind] // 8, len(targets), DTYPES[kind]
    used = instruction.used_bytes

    def execute(mask):
        at = where() if mask is None else where()[mask]
        if acquires:
            ctas = machine.cta_number if mask is None else machine.cta_number[mask]
            for place, cta in zip(at.tolist(), ctas.tolist(), strict=True):
                machine.memory.synchronize(place, cta, True, False)
        values = load(at, mask, width, count, used)
        for k, put in enumerate(puts):
            put(spread(machine, values[:, k], mask).view(dtype), mask)

    return execute


def _load_parameter(machine, instruction):
    kind = instruction.type
    target, place = instruction.operands
    if not isinstance(place.base, Symbol) or place.offset or isinstance(target, Vector):
        raise instruction.unsupported()
    bits = machine.parameters[place.base.name]
    word = UNSIGNED[BITS[kind] // 8]
    constant = np.full(machine.threads, bits).astype(word).view(DTYPES[kind])
    put = write(machine, target, kind)
    return lambda mask: put(constant, mask)


def _store(machine, instruction):
    kind = instruction.type
    place, source, *_ = instruction.operands
    sources = source.items if isinstance(source, Vector) else (source,)
    word = UNSIGNED[BITS[kind] // 8]
    reads = [read(machine, item, kind) for item in sources]
    where = address(machine, place)
    _, store = access(machine, space_of(instruction))

    def execute(mask):
        values = np.stack([r().view(word) for r in reads], 1)
        at = where()
        if mask is not None:
            at, values = at[mask], values[mask]
        store(at, mask, values)

    return execute


def _policy(machine, instruction):
    put = write(machine, instruction.operands[0], "b64")
    zero = np.zeros(machine.threads, np.uint64)
    return lambda mask: put(zero, mask)


_ARITHMETIC = (
    "add", "addc", "sub", "subc", "mul", "mad", "madc", "fma", "div", "rem", "neg", "abs", "min",
    "max", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign",
    "and", "or", "xor", "not", "brev", "popc", "clz", "bfi",
)  # fmt: skip
_DECODERS = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "shl": _shift, "shr": _shift, "shf": _funnel, "bfe": _extract, "prmt": _permute,
    "lop3": _logic3, "bfind": _find, "selp": _select, "setp": _compare, "set": _compare,
    "cvt": _convert, "cvta": _copy_address, "mov": _move, "ld": _load, "ldu": _load, "st": _store,
    "createpolicy": _policy, "shfl": exchange.shuffle, "vote": exchange.vote,
    "activemask": exchange.active_mask, "elect": exchange.elect, "redux": exchange.redux,
    "match": exchange.match, "atom": exchange.atomic, "red": exchange.atomic,
    "cp": exchange.copy_async, "ldmatrix": exchange.load_matrix, "stmatrix": exchange.store_matrix,
    "wgmma": matrix.warpgroup, "mma": matrix.warp,
}  # fmt: skip
