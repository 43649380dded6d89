"""The memories of the PTX emulator: global, shared (with a race check) and a thread's own.

All accesses are vectors over threads. A global address holds the region's number in its upper bits,
so any arithmetic that stays within 2^40 bytes of an array is found again, and an access outside the
array is an error that names it.
"""

import dataclasses

import numpy as np

from tests.kernels.ptx_arithmetic import UNSIGNED

REGION_BITS = 40
_BASE = np.uint64(1 << (REGION_BITS - 1))  # an array's start inside its region: below is caught too
SHARED_WINDOW = 1 << 60  # generic addresses of shared and local memory start here
LOCAL_WINDOW = 1 << 61
POISON = 0x7FC07FC0  # what is there before the first write: NaN as f32, f16 and bf16


class MemoryFault(Exception):
    """An access outside an array, misaligned, or to memory that does not exist."""


class RaceError(Exception):
    """Two threads touched the same bytes, one writing, in no order that the kernel ensures."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A pointer argument whose allocation is larger than what the test holds.

    The pointer points to byte 0; `pieces` maps byte offsets (multiples of 16) to contiguous arrays.
    An access outside the pieces is an error. For 64-bit offsets without gigabytes.
    """

    pieces: dict[int, np.ndarray]


class GlobalMemory:
    """The arrays that pointer arguments name, and which CTA wrote what.

    CTAs run in no order, so these are errors: a load of what another CTA wrote, and a store of a
    new value over it. Atomics are left out, but one that releases and a later one that acquires
    the same address put what a CTA wrote before what the other does. A unit of the check is `unit`
    bytes.
    """

    def __init__(self, check=False, unit=4):
        self.check, self.unit = check, unit
        self.released: dict[int, set[int]] = {}  # by address: the CTAs whose writes it publishes
        self.seen: dict[int, set[int]] = {}  # by CTA: the CTAs whose writes it may use
        self.owners: dict[int, np.ndarray] = {}  # by the address of an array's bytes: CTA + 1
        self.regions: list[tuple[str, list[tuple[int, np.ndarray]]]] = []

    def add(self, name: str, value) -> int:
        """Maps an array or a `Window`; returns its address."""
        pieces = value.pieces if isinstance(value, Window) else {0: value}
        held = []
        for offset, array in sorted(pieces.items()):
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: not contiguous")
            held.append((offset, array.reshape(-1).view(np.uint8)))
        self.regions.append((name, held))
        return (len(self.regions) << REGION_BITS) + int(_BASE)

    def views(self, address, width):
        """A list of (positions, array of [rows, width] bytes, row of each position), by piece.

        `address` is uint64 [n]; accesses must be aligned to `width` bytes.
        """
        if (address & np.uint64(width - 1)).any():
            bad = int(address[(address & np.uint64(width - 1)) != 0][0])
            raise MemoryFault(f"address {self.describe(bad)} is not a multiple of {width} bytes")
        number = address >> np.uint64(REGION_BITS)
        first = int(number[0])
        everything = np.arange(len(address))
        if (number == number[0]).all():
            groups = [(first, everything)]
        else:
            groups = [(int(k), np.flatnonzero(number == k)) for k in np.unique(number)]
        found = []
        for k, positions in groups:
            if not 1 <= k <= len(self.regions):
                raise MemoryFault(f"address {int(address[positions[0]]):#x} is in no array")
            offset = (address[positions] - np.uint64(k << REGION_BITS) - _BASE).view(np.int64)
            left = np.ones(len(positions), bool)
            for start, raw in self.regions[k - 1][1]:
                inside = (offset >= start) & (offset + width <= start + len(raw))
                if not inside.any():
                    continue
                rows = raw[: len(raw) // width * width].reshape(-1, width)
                if inside.all():
                    found.append((positions, rows, (offset - start) // width))
                else:
                    found.append((positions[inside], rows, (offset[inside] - start) // width))
                left &= ~inside
                if not left.any():
                    break
            if left.any():
                raise MemoryFault(
                    f"{width} bytes at {self.describe(int(address[positions[left][0]]))}"
                )
        return found

    def describe(self, address):
        number = address >> REGION_BITS
        if not 1 <= number <= len(self.regions):
            return f"{address:#x} (no array)"
        name, pieces = self.regions[number - 1]
        held = ", ".join(f"[{start}, {start + len(raw)})" for start, raw in pieces)
        offset = address - (number << REGION_BITS) - int(_BASE)
        return f"byte {offset} of {name}, which holds bytes {held}"

    def load(self, address, cta, width, count, check=True):
        """`count` elements of `width` bytes at each address: unsigned [n, count]."""
        out = np.empty((len(address), count), UNSIGNED[width])
        for positions, rows, row in self.views(address, width * count):
            out[positions] = rows.view(UNSIGNED[width])[row]
            if self.check and check and rows.ctypes.data in self.owners:
                table, units = self._units(rows, row)
                foreign = self._foreign(table[units], cta[positions])
                self._raise(foreign, "reads", address, cta, positions, table, units)
        return out

    def store(self, address, cta, values, check=True):
        """Writes unsigned [n, count]."""
        for positions, rows, row in self.views(address, values.dtype.itemsize * values.shape[1]):
            cells, new = rows.view(values.dtype), values[positions]
            check = check and self.check
            if check:
                table, units = self._units(rows, row)
                foreign = self._foreign(table[units], cta[positions])
                if foreign.any():
                    # Replicated work that stores one value twice is harmless.
                    foreign &= (cells[row] != new).any(1)[:, None]
                    self._raise(foreign, "writes", address, cta, positions, table, units)
                table[units] = cta[positions, None] + 1
            cells[row] = new
            if check and (cells[row] != new).any():
                bad = positions[np.flatnonzero((cells[row] != new).any(1))[0]]
                raise RaceError(
                    f"threads write different values to {self.describe(int(address[bad]))} at once"
                )

    def synchronize(self, address, cta, acquires, releases):
        """What an atomic of one thread orders, besides its own access."""
        seen = self.seen.setdefault(cta, {cta})
        if acquires:
            seen |= self.released.get(address, set())
        if releases:
            self.released.setdefault(address, set()).update(seen)

    def _foreign(self, owner, cta):
        """Where the owner (CTA + 1, [n, units]) is another CTA that nothing puts before `cta`."""
        foreign = (owner != 0) & (owner != cta[:, None] + 1)
        for row, column in np.argwhere(foreign) if self.seen else ():
            known = self.seen.get(int(cta[row]), ())
            foreign[row, column] = int(owner[row, column]) - 1 not in known
        return foreign

    def _units(self, rows, row):
        """An array's table of owners and, for rows of it, the units that they cover."""
        key, width = rows.ctypes.data, rows.shape[1]
        if key not in self.owners:
            size = next(
                len(raw) for _, pieces in self.regions for _, raw in pieces
                if raw.ctypes.data == key
            )  # fmt: skip
            self.owners[key] = np.zeros(-(-size // self.unit), np.int32)
        count = max(width // self.unit, 1)
        return self.owners[key], (row * width // self.unit)[:, None] + np.arange(count)

    def _raise(self, conflict, does, address, cta, positions, table, units):
        if not conflict.any():
            return
        row, column = np.argwhere(conflict)[0]
        raise RaceError(
            f"CTA {cta[positions[row]]} {does} {self.describe(int(address[positions[row]]))}; CTA "
            f"{table[units[row, column]] - 1} wrote there, and CTAs run in no order"
        )


class SharedMemory:
    """Every CTA's shared bytes, and who touched them since the last barrier.

    The check keeps, for each unit of `unit` bytes, a bit per warp for readers and for writers.
    Errors: a read of what other warps wrote and this one did not, a write over what another warp
    read, a write of a new value over what another warp wrote. Atomics are left out of it.
    """

    def __init__(self, ctas, size, warps, check, unit):
        self.stride = -(-size // 16) * 16
        self.size = size
        self.bytes = np.full(ctas * self.stride // 4, POISON, np.uint32).view(np.uint8)
        self.check = check
        self.unit = unit
        self.warps = warps
        if check:
            self.readers = np.zeros(ctas * self.stride // unit, np.uint32)
            self.writers = np.zeros_like(self.readers)
            self.touched: list[np.ndarray] = []
            self.held: dict[object, tuple[np.ndarray, np.uint32]] = {}
            # The bytes as they will be when every copy under way has arrived; None: there is none.
            self.future: np.ndarray | None = None

    def locate(self, address, cta, width):
        """Byte positions, bounds and alignment checked. `address` is [n] of any unsigned type."""
        address = address.astype(np.int64)
        if (address & (width - 1)).any():
            bad = address[(address & (width - 1)) != 0][0]
            raise MemoryFault(f"shared address {bad} is not a multiple of {width} bytes")
        bad = (address < 0) | (address + width > self.size)
        if bad.any():
            raise MemoryFault(
                f"{width} bytes at shared address {address[bad][0]} of {self.size} bytes"
            )
        return cta.astype(np.int64) * self.stride + address

    def load(self, address, cta, warp, width, count, used=None, check=True):
        at = self.locate(address, cta, width * count)
        if self.check and check:
            self._read(at, warp, width * count, used)
        rows = self.bytes.reshape(-1, width * count).view(UNSIGNED[width])
        return rows[at // (width * count)]

    def hold(self, address, cta, warps):
        """Counts bytes as read by these warps (bits), past barriers too, until `free` of the key.

        `address` is of halves.
        """
        key = object()
        if self.check:
            units = np.unique(self._units(self.locate(address, cta, 2), 2))
            self.held[key] = units, warps
            self.readers[units] |= warps
            self.touched.append(units)
        return key

    def free(self, key):
        """Ends a `hold`."""
        self.held.pop(key, None)

    def reserve(self, address, cta, warp, values):
        """Counts an asynchronous store as a write from its issue on; the bytes come later."""
        width = values.dtype.itemsize * values.shape[1]
        at = self.locate(address, cta, width)
        if not self.check:
            return
        if self.future is None:
            self.future = self.bytes.copy()
        rows, row = self.future.reshape(-1, width).view(values.dtype), at // width
        self._written(at, warp, width, rows[row] == values)
        rows[row] = values

    def store(self, address, cta, warp, values, check=True):
        width = values.dtype.itemsize * values.shape[1]
        at = self.locate(address, cta, width)
        row = at // width
        rows = self.bytes.reshape(-1, width).view(values.dtype)
        check = check and self.check
        if check:
            ahead = rows
            if self.future is not None:
                ahead = self.future.reshape(-1, width).view(values.dtype)
            self._written(at, warp, width, ahead[row] == values)
            ahead[row] = values
        rows[row] = values
        if check and (rows[row] != values).any():
            bad = np.flatnonzero((rows[row] != values).any(1))[0]
            raise RaceError(
                f"threads write different values to shared address {int(address[bad])} at once"
            )

    def _units(self, at, width, used=None):
        count = max(width // self.unit, 1)
        units = (at // self.unit)[:, None] + np.arange(count)
        if used is not None:
            bits = (1 << self.unit) - 1
            units = units[:, [k for k in range(count) if used >> k * self.unit & bits]]
        return units

    def _read(self, at, warp, width, used):
        units = self._units(at, width, used)
        bit = (np.uint32(1) << warp.astype(np.uint32))[:, None]
        writers = self.writers[units]
        self._raise((writers != 0) & ((writers & bit) == 0), units, warp, writers, "reads", "wrote")
        np.bitwise_or.at(self.readers, units, np.broadcast_to(bit, units.shape))
        self.touched.append(units.ravel())

    def _written(self, at, warp, width, same):
        units = self._units(at, width)
        bit = (np.uint32(1) << warp.astype(np.uint32))[:, None]
        readers, writers = self.readers[units], self.writers[units]
        self._raise((readers & ~bit) != 0, units, warp, readers, "writes", "read")
        conflict = (writers & ~bit) != 0
        if conflict.any():
            # Replicated layouts store a value more than once: the same value is no conflict.
            conflict &= ~same.all(1)[:, None]
            self._raise(conflict, units, warp, writers, "writes", "wrote")
        np.bitwise_or.at(self.writers, units, np.broadcast_to(bit, units.shape))
        self.touched.append(units.ravel())

    def _raise(self, conflict, units, warp, others, does, did):
        if not conflict.any():
            return
        row, column = np.argwhere(conflict)[0]
        others = int(others[row, column]) & ~(1 << int(warp[row]))
        address = int(units[row, column]) * self.unit % self.stride
        names = [k for k in range(32) if others >> k & 1]
        raise RaceError(
            f"warp {int(warp[row])} {does} shared address {address}, which warps {names} {did} "
            f"since the last barrier"
        )

    def barrier(self, ctas=None, warps=None):
        """Forgets accesses: of all CTAs (None) or a mask of them; of all warps or some bits."""
        if not self.check:
            return
        if ctas is None:
            for units in self.touched:
                self.readers[units] = 0
                self.writers[units] = 0
            self.touched.clear()
        else:
            keep = np.uint32(0 if warps is None else ~warps & 0xFFFFFFFF)
            for table in (self.readers, self.writers):
                table.reshape(len(ctas), -1)[ctas] &= keep
        for units, bits in self.held.values():
            self.readers[units] |= bits
            self.touched.append(units)


class LocalMemory:
    """A thread's own bytes: what LLVM spills to, or arrays indexed at run time."""

    def __init__(self, threads, size):
        self.size = -(-size // 16) * 16
        self.bytes = np.full(threads * self.size // 4, POISON, np.uint32).view(np.uint8)

    def _rows(self, address, thread, width):
        address = address.astype(np.int64)
        if ((address < 0) | (address + width > self.size) | (address % width != 0)).any():
            raise MemoryFault(f"local address of {self.size} bytes, accesses of {width}")
        return (thread * self.size + address) // width

    def load(self, address, thread, width, count):
        row = self._rows(address, thread, width * count)
        return self.bytes.reshape(-1, width * count).view(UNSIGNED[width])[row]

    def store(self, address, thread, values):
        width = values.dtype.itemsize * values.shape[1]
        row = self._rows(address, thread, width)
        self.bytes.reshape(-1, width).view(values.dtype)[row] = values
