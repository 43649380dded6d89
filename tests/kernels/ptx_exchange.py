"""PTX instructions in which threads meet: shuffles, votes, atomics, cp.async, ldmatrix."""

import numpy as np

from tests.kernels.ptx_arithmetic import DTYPES, MAX, MIN, UNSIGNED, float_function, pack
from tests.kernels.ptx_operands import access, address, read, space_of, spread, write
from tests.kernels.ptx_parser import BITS, Number, Pair, Vector


def _lanes(machine, mask):
    """[warps, 32] of the threads that run."""
    active = np.ones(machine.threads, np.bool_) if mask is None else mask
    return active.reshape(-1, 32)


def _check_members(machine, members, mask):
    """Every lane that a member mask names must be here (or have ended), the caller among them."""
    if mask is None and (members() == np.uint32(0xFFFFFFFF)).all():
        return
    active = _lanes(machine, mask)
    gone = machine.exited.reshape(-1, 32)
    named = members().reshape(-1, 32)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    here = ((active | gone) * bits).sum(1, dtype=np.uint64).astype(np.uint32)[:, None]
    if (active & ((named & ~here) != 0)).any():
        warp, lane = np.argwhere(active & ((named & ~here) != 0))[0]
        raise RuntimeError(
            f"warp {warp % (machine.num_threads // 32)} names lanes "
            f"{int(named[warp, lane]):#010x}; only {int(here[warp, 0]):#010x} are here"
        )
    if (active & ((named & bits) == 0)).any():
        raise RuntimeError("a lane runs this that its member mask leaves out")


def shuffle(machine, instruction):
    """shfl.sync: the lane arithmetic of the PTX manual, clamp and segment mask included."""
    how = instruction.modifiers[1]
    target, *operands = instruction.operands
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    put, put_found = write(machine, first, "b32"), None
    if second is not None:
        put_found = write(machine, second, "pred")
    value, by, control, members = (read(machine, operand, "u32") for operand in operands)
    lane = machine.lane.astype(np.int64)
    warp_start = machine.thread - lane

    def execute(mask):
        _check_members(machine, members, mask)
        c, b = control().astype(np.int64), (by() & np.uint32(31)).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        highest = (lane & segment) | (clamp & ~segment)
        if how == "up":
            source = lane - b
            found = source >= highest
        elif how == "down":
            source = lane + b
            found = source <= highest
        elif how == "bfly":
            source = lane ^ b
            found = source <= highest
        else:
            source = (lane & segment) | (b & ~segment)
            found = source <= highest
        source = warp_start + np.where(found, source, lane)
        if mask is not None and (mask & ~mask[source]).any():
            bad = np.flatnonzero(mask & ~mask[source])[0]
            raise RuntimeError(f"lane {lane[bad]} reads lane {source[bad] % 32}, which is not here")
        put(value()[source], mask)
        if put_found:
            put_found(found, mask)

    return execute


def _to_bits(flags):
    """[warps, 32] to a word per warp."""
    bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
    return (flags * bits).sum(1, dtype=np.uint64).astype(np.uint32)


def vote(machine, instruction):
    how = instruction.modifiers[1]
    target, source, member = instruction.operands
    flag, members = read(machine, source, "pred"), read(machine, member, "u32")
    put = write(machine, target, "b32" if how == "ballot" else "pred")

    def execute(mask):
        _check_members(machine, members, mask)
        active = _lanes(machine, mask)
        flags = flag().reshape(-1, 32)
        some, every = (flags & active).any(1), (flags | ~active).all(1)
        if how == "ballot":
            result = _to_bits(flags & active)
        else:
            result = {"any": some, "all": every, "uni": every | ~some}[how]
        put(np.repeat(result, 32), mask)

    return execute


def active_mask(machine, instruction):
    put = write(machine, instruction.operands[0], "b32")
    return lambda mask: put(np.repeat(_to_bits(_lanes(machine, mask)), 32), mask)


def elect(machine, instruction):
    """elect.sync: the lowest lane of the member mask leads."""
    target, member = instruction.operands
    members = read(machine, member, "u32")
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    put_lane, put_leads = write(machine, first, "b32"), write(machine, second, "pred")

    def execute(mask):
        _check_members(machine, members, mask)
        word = members()
        lowest = np.zeros(machine.threads, np.uint32)
        for k in reversed(range(32)):
            lowest = np.where(word >> np.uint32(k) & np.uint32(1), np.uint32(k), lowest)
        put_lane(lowest, mask)
        put_leads(machine.lane == lowest, mask)

    return execute


def redux(machine, instruction):
    """redux.sync over the lanes that run; one member mask per warp."""
    how, kind = instruction.modifiers[1], instruction.type
    target, source, member = instruction.operands
    value, members = read(machine, source, kind), read(machine, member, "u32")
    put = write(machine, target, kind)
    if kind == "f32":
        if instruction.has("abs", "NaN"):
            raise instruction.unsupported()
        combine = {"min": MIN, "max": MAX}[how]
        identity = {"min": np.inf, "max": -np.inf}[how]
    else:
        limits = np.iinfo(DTYPES[kind])
        combine, identity = {
            "add": (np.add, 0), "min": (np.minimum, limits.max), "max": (np.maximum, limits.min),
            "and": (np.bitwise_and, limits.max), "or": (np.bitwise_or, 0),
            "xor": (np.bitwise_xor, 0),
        }[how]  # fmt: skip

    def execute(mask):
        _check_members(machine, members, mask)
        lanes = np.where(_lanes(machine, mask), value().reshape(-1, 32), DTYPES[kind](identity))
        result = np.ascontiguousarray(lanes[:, 0])
        for k in range(1, 32):
            result = combine(result, np.ascontiguousarray(lanes[:, k]))
        put(np.repeat(result, 32), mask)

    return execute


def match(machine, instruction):
    """match.any.sync: the lanes that hold the same value."""
    if not instruction.has("any"):
        raise instruction.unsupported()
    kind = instruction.type
    target, source, member = instruction.operands
    value, members = read(machine, source, kind), read(machine, member, "u32")
    put = write(machine, target, "b32")

    def execute(mask):
        _check_members(machine, members, mask)
        values, active = value().reshape(-1, 32), _lanes(machine, mask)
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        put(_to_bits(same.reshape(-1, 32)), mask)

    return execute


# ---------------------------------------------------------------- atomics

_ATOMIC = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _atomic_function(how, kind):
    """(old, operand, second operand) to the new value, on vectors of one."""
    if how == "exch":
        return lambda old, b, c: b
    if how == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if how == "inc":
        return lambda old, b, c: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
    if how == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
    if how == "add":
        add = float_function("add", (), kind) if kind[0] in "fb" and kind[1] != "3" else None
        add = float_function("add", (), kind) if kind in ("f32", "f64") else add
        return (lambda old, b, c: add(old, b)) if add else (lambda old, b, c: old + b)
    function = {
        "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[how]  # fmt: skip
    return lambda old, b, c: function(old, b)


def atomic(machine, instruction):
    """atom and red: thread by thread, in the order of their numbers."""
    how = next((m for m in instruction.modifiers if m in _ATOMIC), None)
    kind = instruction.type
    if how is None:
        raise instruction.unsupported()
    operands = list(instruction.operands)
    targets = []
    if instruction.opcode == "atom":
        first = operands.pop(0)
        targets = list(first.items) if isinstance(first, Vector) else [first]
    place, *values = operands
    columns = [list(v.items) if isinstance(v, Vector) else [v] for v in values]
    reads = [[read(machine, item, kind) for item in column] for column in columns[:2]]
    puts = [write(machine, item, kind) for item in targets]
    where = address(machine, place)
    load, store = access(machine, space_of(instruction), check=False)
    function = _atomic_function(how, kind)
    width, dtype, word = BITS[kind] // 8, DTYPES[kind], UNSIGNED[BITS[kind] // 8]
    one_thread = np.zeros(machine.threads, np.bool_)
    orders = instruction.has("acquire", "acq_rel"), instruction.has("release", "acq_rel")

    def execute(mask):
        threads = machine.thread if mask is None else np.flatnonzero(mask)
        at = where()
        if any(orders):
            for thread in threads:
                machine.memory.synchronize(
                    int(at[thread]), int(machine.cta_number[thread]), *orders
                )
        operands = [[r() for r in column] for column in reads]
        count = len(operands[0])
        old = np.zeros((count, machine.threads), dtype)
        for thread in threads:
            one_thread[thread] = True
            here = at[thread : thread + 1]
            before = load(here, one_thread, width, count).view(dtype)
            new = []
            for k in range(count):
                b = operands[0][k][thread : thread + 1]
                c = operands[1][k][thread : thread + 1] if len(operands) > 1 else None
                one = np.ascontiguousarray(before[:, k])
                new.append(np.asarray(function(one, b, c), dtype).view(word))
                old[k, thread] = one[0]
            store(here, one_thread, np.stack(new, 1))
            one_thread[thread] = False
        for k, put in enumerate(puts):
            put(old[k], mask)

    return execute


# ---------------------------------------------------------------- asynchronous copies


def copy_async(machine, instruction):
    """cp.async: the data arrives when a wait_group says so, not before."""
    modifiers = instruction.modifiers
    if modifiers[0] != "async" or instruction.has("bulk", "mbarrier", "reduce"):
        raise instruction.unsupported()
    if "commit_group" in modifiers:
        return lambda mask: _commit(machine, mask)
    if "wait_group" in modifiers:
        left = int(instruction.operands[0].text, 0)
        return lambda mask: _wait(machine, mask, left)
    if "wait_all" in modifiers:

        def wait_all(mask):
            _commit(machine, mask)
            _wait(machine, mask, 0)

        return wait_all
    target, source, size, *rest = instruction.operands
    size = int(size.text, 0)
    # A register here is the size of what is read, the rest being zeros; a policy would be 64 bits.
    given = None
    if rest and not (isinstance(rest[0], Number) is False and getattr(rest[0], "bits", 32) == 64):
        given = read(machine, rest[0], "u32")
    to, start = address(machine, target), address(machine, source)
    load, _ = access(machine, "global")
    word = 4 if size >= 4 else size

    def execute(mask):
        active = np.ones(machine.threads, np.bool_) if mask is None else mask
        values = np.zeros((machine.threads, size // word), UNSIGNED[word])
        count = given() if given is not None else np.full(machine.threads, size, np.uint32)
        for amount in np.unique(count[active]):
            chosen = active & (count == amount)
            if amount not in (0, size):
                raise instruction.unsupported("part of the bytes")
            if amount:
                values[chosen] = load(start()[chosen], chosen, word, size // word)
        machine.open_copies.append((active.copy(), to().copy(), values))
        here = (machine.cta[active], machine.warp[active])
        machine.shared.reserve(to()[active], *here, values[active])

    return execute


def _commit(machine, mask):
    """Closes the open copies of these threads into a group (an empty one counts too)."""
    active = np.ones(machine.threads, np.bool_) if mask is None else mask
    mine = [(m & active, to, values) for m, to, values in machine.open_copies]
    others = [(m & ~active, to, values) for m, to, values in machine.open_copies]
    machine.copies.append((active.copy(), [copy for copy in mine if copy[0].any()]))
    machine.open_copies = [copy for copy in others if copy[0].any()]


def _wait(machine, mask, left):
    """Completes all but these threads' `left` newest groups, the oldest first."""
    active = np.ones(machine.threads, np.bool_) if mask is None else mask
    newer = np.zeros(machine.threads, np.int64)
    ready = []
    for members, copies in reversed(machine.copies):
        ready.append((members & active & (newer >= left), copies))
        newer += members
    _, store = access(machine, "shared")
    for (done, copies), k in zip(reversed(ready), range(len(ready)), strict=True):
        if not done.any():
            continue
        for threads, to, values in copies:
            if (now := threads & done).any():
                store(to[now], now, values[now])
        members, _ = machine.copies[k]
        rest = [(t & ~done, to, values) for t, to, values in copies]
        machine.copies[k] = (members & ~done, [copy for copy in rest if copy[0].any()])
    machine.copies = [group for group in machine.copies if group[0].any()]


# ---------------------------------------------------------------- matrices of 8 x 8 halves


def _matrix_rows(machine, instruction, where, matrix):
    """Addresses, for each thread, of the rows of its two elements; and their columns' offsets."""
    lane = machine.lane.astype(np.int64)
    start = machine.thread - lane + 8 * matrix
    at = where()
    if instruction.has("trans"):
        column = 2 * (lane // 4).astype(np.uint64)
        return [at[start + 2 * (lane % 4) + k] + column for k in (0, 1)]
    return [at[start + lane // 4] + 4 * (lane % 4).astype(np.uint64)]


def _matrix_count(instruction):
    if instruction.type != "b16" or not instruction.has("m8n8"):
        raise instruction.unsupported()
    return next(int(m[1:]) for m in instruction.modifiers if m in ("x1", "x2", "x4"))


def load_matrix(machine, instruction):
    count = _matrix_count(instruction)
    target, place = instruction.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    puts = [write(machine, item, "b32") for item in targets]
    where = address(machine, place)
    load, _ = access(machine, "shared")
    width = 2 if instruction.has("trans") else 4

    def execute(mask):
        if (
            mask is not None
            and not (mask.reshape(-1, 32).any(1) == mask.reshape(-1, 32).all(1)).all()
        ):
            raise RuntimeError("part of a warp loads a matrix")
        for k in range(count):
            parts = []
            for at in _matrix_rows(machine, instruction, where, k):
                at = at if mask is None else at[mask]
                parts.append(spread(machine, load(at, mask, width, 1)[:, 0], mask))
            puts[k](pack(parts) if width == 2 else parts[0], mask)

    return execute


def store_matrix(machine, instruction):
    count = _matrix_count(instruction)
    place, source = instruction.operands
    sources = source.items if isinstance(source, Vector) else (source,)
    reads = [read(machine, item, "b32") for item in sources]
    where = address(machine, place)
    _, store = access(machine, "shared")

    def execute(mask):
        if (
            mask is not None
            and not (mask.reshape(-1, 32).any(1) == mask.reshape(-1, 32).all(1)).all()
        ):
            raise RuntimeError("part of a warp stores a matrix")
        for k in range(count):
            places = _matrix_rows(machine, instruction, where, k)
            words = reads[k]()
            parts = words.view(np.uint16).reshape(-1, 2)
            for j, at in enumerate(places):
                values = words[:, None] if len(places) == 1 else parts[:, j : j + 1].copy()
                if mask is not None:
                    at, values = at[mask], values[mask]
                store(at, mask, values)

    return execute
