"""Runs a PTX kernel on NumPy: the numerics of GPU kernels on a machine without a GPU.

    y = np.zeros(n, np.float32)
    run(compiled.ptx, (n // 256, 1, 1), 128, [x, y, n], compiled.shared_bytes)

Every instruction is decoded once into a function of NumPy vectors over all threads of many CTAs at
once (`batch_threads`), so CTAs must not wait for each other. Threads that branch apart run by the
smallest program counter first, under a mask. What is checked: bounds and alignment of every access,
races between warps in shared memory and between CTAs in global memory, shuffles and votes that name
absent lanes, barriers that some thread never reaches. Memory and registers start as NaN patterns.
Numerics: see ptx_arithmetic.

Not covered: TMA, mbarriers, tensor cores but for what ptx_matrix has, clusters, calls, textures.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tests.kernels import ptx_decode
from tests.kernels.ptx_matrix import GROUP, Products
from tests.kernels.ptx_memory import (
    POISON,
    GlobalMemory,
    LocalMemory,
    MemoryFault,
    RaceError,
    SharedMemory,
    Window,
)
from tests.kernels.ptx_operands import smallest_shared_access, smallest_store
from tests.kernels.ptx_parser import BITS, Kernel, parse
from tests.kernels.ptx_profile import Profile, describe

__all__ = ["MemoryFault", "RaceError", "Report", "Window", "run"]

# A kernel is often run again, and nothing changes what was parsed.
_parsed = functools.lru_cache(maxsize=32)(parse)
_REGISTER_DTYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclasses.dataclass
class Report:
    """What a run did."""

    kernel: Kernel
    executed: np.ndarray  # how often each instruction ran, summed over batches of CTAs
    profile: Profile | None

    def __str__(self):
        if self.profile is None:
            return f"{self.executed.sum()} instructions"
        warps = self.profile.warps.sum()
        return f"{warps} instructions of a warp\n{describe(self.kernel, self.profile)}"


def run(
    ptx: str,
    grid: tuple[int, int, int],
    num_threads: int,
    args: Sequence,
    shared_bytes: int = 0,
    *,
    name: str | None = None,
    check_races: bool = True,
    batch_threads: int = 8192,
    max_steps: int = 50_000_000,
    profile: bool = False,
) -> Report:
    """Executes one kernel; arrays among the arguments are changed in place.

    Args:
        ptx: the module's text.
        grid: CTAs along x, y, z.
        num_threads: of a CTA, a multiple of 32 (one-dimensional blocks).
        args: one value per kernel parameter: a contiguous NumPy array (pointer to its first
            element), `Window`, None (null pointer), int, float or bool. Parameters beyond `args`
            (Triton's scratch pointers) are null.
        shared_bytes: dynamic shared memory of a CTA.
        name: the kernel, where the module holds several.
        check_races: raise `RaceError` on shared accesses of different warps with no barrier
            between, and where a CTA reads or overwrites what another wrote (atomics excepted).
        batch_threads: at most this many threads run at once (at least one CTA).
        max_steps: raise `RuntimeError` after this many instructions of one batch.

        profile: count what the kernel asks of the memories (ptx_profile); some times slower.

    Raises:
        NotImplementedError: an instruction the emulator does not know, at decoding.
        MemoryFault, RaceError, RuntimeError: what a GPU would get wrong, with the PTX line, its
            text and the Python line that it came from.
    """
    kernel = _parsed(ptx, name)
    if num_threads % 32 or not 32 <= num_threads <= 1024:
        raise ValueError(f"num_threads is {num_threads}, not a multiple of 32 up to 1024")
    if kernel.required_threads not in (None, num_threads):
        raise ValueError(f"num_threads is {num_threads}; the kernel says {kernel.required_threads}")
    if len(args) > len(kernel.parameters):
        raise ValueError(f"{len(args)} arguments for {len(kernel.parameters)} parameters")
    memory = GlobalMemory(check_races, smallest_store(kernel))
    parameters = {
        parameter: _argument(memory, parameter, kind, args[k] if k < len(args) else None)
        for k, (parameter, kind) in enumerate(kernel.parameters)
    }
    ctas = int(np.prod(grid))
    per_batch = max(1, batch_threads // num_threads)
    executed = np.zeros(len(kernel.instructions), np.int64)
    counts = Profile.empty(len(executed)) if profile else None
    with np.errstate(all="ignore"):
        for start in range(0, ctas, per_batch):
            batch = np.arange(start, min(start + per_batch, ctas))
            machine = Machine(
                kernel, grid, batch, num_threads, parameters, memory, shared_bytes, check_races,
                counts,
            )  # fmt: skip
            executed += machine.run(max_steps)
    return Report(kernel, executed, counts)


def _argument(memory, name, kind, value):
    """A parameter's bits as a NumPy unsigned scalar."""
    width = BITS[kind] // 8
    if isinstance(value, (np.ndarray, Window)):
        value = memory.add(name, value)
    elif value is None:
        value = 0
    elif kind in ("f32", "f64") or isinstance(value, (float, np.floating)):
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[width]
        return np.array(value, dtype).view(_REGISTER_DTYPES[8 * width])[()]
    return np.uint64(int(value) % (1 << 64)).astype(_REGISTER_DTYPES[8 * width])


def _located(error, instruction):
    """The error, with the place that it came from."""
    where = f"   ({instruction.source})" if instruction.source else ""
    error.add_note(f"PTX line {instruction.line}: {instruction.text}{where}")
    return error


class Machine:
    """The state of a batch of CTAs, and the loop that runs their threads.

    A mask of None means every thread; otherwise it is a bool vector with at least one true.
    """

    def __init__(
        self, kernel, grid, batch, num_threads, parameters, memory, shared_bytes, races, profile
    ):
        self.kernel, self.grid, self.parameters, self.memory = kernel, grid, parameters, memory
        self.num_threads, self.profile = num_threads, profile
        self.current = 0  # the instruction that runs, for the profile
        self.ctas = len(batch)
        self.threads = self.ctas * num_threads
        self.thread = np.arange(self.threads)
        self.cta = self.thread // num_threads
        self.tid = (self.thread % num_threads).astype(np.uint32)
        self.lane = self.tid % np.uint32(32)
        self.warp = self.tid // np.uint32(32)
        self.cta_number = linear = batch[self.cta]
        self.ctaid = [
            (linear % grid[0]).astype(np.uint32),
            (linear // grid[0] % grid[1]).astype(np.uint32),
            (linear // (grid[0] * grid[1])).astype(np.uint32),
        ]
        self.registers = [
            np.full(self.threads, POISON & ((1 << min(bits, 32)) - 1), _REGISTER_DTYPES[bits])
            if bits > 1
            else np.zeros(self.threads, np.bool_)
            for bits in kernel.register_bits
        ]
        self._place_variables(shared_bytes, races)
        self.copies: list[tuple[np.ndarray, list]] = []  # cp.async groups: threads, stores
        self.open_copies: list = []
        self.products = Products(self.shared, self.threads // GROUP)
        self.carry = np.zeros(self.threads, np.bool_)
        self.exited = np.zeros(self.threads, np.bool_)
        self.blocked: dict[int, list[tuple[int, np.ndarray, int | None]]] = {}
        self.waiting: dict[int, np.ndarray] = {}
        self.operations = [self._decode(instruction) for instruction in kernel.instructions]

    def _place_variables(self, shared_bytes, races):
        self.symbols: dict[str, int] = {}
        sizes = {"shared": 0, "local": 0}
        for name, variable in self.kernel.variables.items():
            if variable.space == "global":
                data = np.frombuffer(variable.data, np.uint8).copy()
                self.symbols[name] = self.memory.add(name, data)
            elif variable.size:
                start = -(-sizes[variable.space] // variable.align) * variable.align
                self.symbols[name] = start
                sizes[variable.space] = start + variable.size
        dynamic = -(-sizes["shared"] // 128) * 128
        for name, variable in self.kernel.variables.items():
            if variable.space == "shared" and not variable.size:
                self.symbols[name] = dynamic
        unit = smallest_shared_access(self.kernel)
        warps = self.num_threads // 32
        self.shared = SharedMemory(self.ctas, dynamic + shared_bytes, warps, races, unit)
        self.local = LocalMemory(self.threads, sizes["local"])

    def _decode(self, instruction):
        try:
            return ptx_decode.decode(self, instruction)
        except Exception as error:
            raise _located(error, instruction) from None

    # ------------------------------------------------------------ the loop

    def run(self, max_steps):
        """Until every thread has left; returns how often each instruction ran."""
        kinds = [kind for kind, _ in self.operations]
        functions = [function for _, function in self.operations]
        end = len(functions)
        if self.profile:
            functions = [self._profiled(k, f) for k, f in enumerate(functions)]
        executed = [0] * (end + 1)
        at: int | None = 0
        mask = None
        nearest = end + 1  # the smallest program counter among the waiting threads
        try:
            for _ in range(max_steps):
                if at == end:
                    at, mask = self._leave(mask)
                elif kinds[at] == ptx_decode.PLAIN:
                    executed[at] += 1
                    functions[at](mask)
                    at += 1
                    if at < nearest:
                        continue
                    at, mask = self._switch(at, mask)
                else:
                    executed[at] += 1
                    at, mask = functions[at](at, mask)
                    at, mask = self._switch(at, mask)
                if at is None:
                    return np.array(executed[:end])
                nearest = min(self.waiting, default=end + 1)
        except Exception as error:
            if at is None or at >= end:
                raise
            raise _located(error, self.kernel.instructions[at]) from None
        raise RuntimeError(f"no end after {max_steps} instructions: a loop that never leaves?")

    def _profiled(self, at, function):
        def profiled(*arguments):  # (mask) or (program counter, mask)
            self.current = at
            self.profile.ran(at, self.threads, arguments[-1])
            return function(*arguments)

        return profiled

    def _all(self, mask):
        return np.ones(self.threads, np.bool_) if mask is None else mask

    def _switch(self, at, mask):
        """Continues with the threads of the smallest program counter."""
        if at is not None:
            if not self.waiting:
                return at, mask
            self._wait(at, self._all(mask))
        if not self.waiting:
            return self._stuck()
        at = min(self.waiting)
        mask = self.waiting.pop(at)
        return at, None if mask.all() else mask

    def _wait(self, at, mask):
        other = self.waiting.get(at)
        self.waiting[at] = mask if other is None else mask | other

    def _leave(self, mask):
        self.exited |= self._all(mask)
        return self._switch(None, None)

    def branch(self, target, at, mask, taken):
        """Threads of `mask` that are in `taken` (None: all) go to `target`."""
        if taken is None:
            return target, mask
        if mask is not None:
            taken = taken & mask
        count = np.count_nonzero(taken)
        if count == 0:
            return at + 1, mask
        if count == (self.threads if mask is None else np.count_nonzero(mask)):
            return target, mask
        self._wait(target, taken)
        self._wait(at + 1, ~taken if mask is None else mask & ~taken)
        return None, None

    def exit(self, at, mask, taken):
        """Threads of `mask` that are in `taken` (None: all) end."""
        if taken is None:
            return self._leave(mask)
        taken = taken if mask is None else taken & mask
        self.exited |= taken
        rest = self._all(mask) & ~taken
        if not rest.any():
            return self._switch(None, None)
        return at + 1, rest

    # ------------------------------------------------------------ barriers

    def barrier(self, at, mask, number, count, wait=True):
        """bar.sync (or bar.arrive) of `count` threads, None: all that have not ended."""
        if mask is None and count in (None, self.num_threads) and not self.blocked:
            self.shared.barrier()
            return at + 1, None
        mask = self._all(mask)
        self.blocked.setdefault(number, []).append((at + 1 if wait else -1, mask, count))
        if not wait:
            self._wait(at + 1, mask)
        self._release(number)
        return None, None

    def _release(self, number):
        """Lets the CTAs go on whose threads have all arrived; says whether there were any."""
        held = self.blocked.get(number, [])
        arrived = np.zeros(self.ctas, np.int64)
        for _, mask, _ in held:
            arrived += self._per_cta(mask)
        if held and held[0][2] is not None:
            needed = np.full(self.ctas, held[0][2])
        else:
            needed = self.num_threads - self._per_cta(self.exited)
        ready = (arrived >= needed) & (arrived > 0)
        if not ready.any():
            return False
        threads = ready[self.cta]
        kept = []
        together = np.zeros(self.threads, np.bool_)
        for at, mask, count in held:
            released = mask & threads
            together |= released
            if at >= 0 and released.any():
                self._wait(at, released)
            if (rest := mask & ~threads).any():
                kept.append((at, rest, count))
        if kept:
            self.blocked[number] = kept
        else:
            del self.blocked[number]
        self._forget_accesses(ready, together)
        return True

    def _forget_accesses(self, ready, together):
        # A barrier of some warps orders those only; each warp's own record goes as it arrives.
        by_warp = together.reshape(self.ctas, -1, 32).any(2)
        patterns = by_warp @ (1 << np.arange(by_warp.shape[1]))
        everyone = (1 << by_warp.shape[1]) - 1
        gone = self.exited.reshape(self.ctas, -1, 32).all(2) @ (1 << np.arange(by_warp.shape[1]))
        patterns = patterns | gone
        for pattern in np.unique(patterns[ready]):
            warps = None if pattern == everyone else int(pattern)
            self.shared.barrier(ready & (patterns == pattern), warps)

    def _per_cta(self, mask):
        return mask.reshape(self.ctas, -1).sum(1)

    def _stuck(self):
        """No thread can run: all have ended, or a barrier waits for threads that have."""
        for number in list(self.blocked):
            if self._release(number):
                return self._switch(None, None)
        if self.blocked:
            where = {
                number: [
                    (self.kernel.instructions[at - 1].line, int(mask.sum()), count)
                    for at, mask, count in held
                ]
                for number, held in self.blocked.items()
            }
            raise RuntimeError(
                f"deadlock: barriers wait for ever; number: (PTX line, threads, needed) {where}"
            )
        return None, None
