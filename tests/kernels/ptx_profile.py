"""What a kernel asks of the memories, counted while the PTX emulator runs it.

Counted of PTX, before ptxas: spills, and what it merges or moves, are not in here. The rules are
those of sm_70 to sm_100: shared memory has 32 banks of 4 bytes and serves one word of each bank a
wave; accesses of 8 and 16 bytes a thread go half a warp and a quarter of a warp at a time; global
memory moves sectors of 32 bytes.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Profile:
    """Sums over the whole grid; every array has one entry per instruction of the kernel."""

    warps: np.ndarray  # warps that ran the instruction
    waves: np.ndarray  # of shared memory
    least_waves: np.ndarray  # the same words with no bank conflicts
    sectors: np.ndarray  # of global memory
    least_sectors: np.ndarray  # the same bytes packed

    @classmethod
    def empty(cls, count):
        return cls(*(np.zeros(count, np.int64) for _ in dataclasses.fields(cls)))

    def ran(self, at, threads, mask):
        """Counts the warps of an instruction; mask as the machine's."""
        active = threads // 32 if mask is None else mask.reshape(-1, 32).any(1).sum()
        self.warps[at] += active

    def shared(self, at, address, thread, width):
        """Counts a shared access of `width` bytes by each of the threads."""
        address, words = address.astype(np.int64) // 4, max(width // 4, 1)
        # Threads that are served together: a warp, or its halves or quarters.
        group = thread // (32 // words if words > 1 else 32)
        cell = (group[:, None] << 40) + address[:, None] + np.arange(words)
        cell = np.unique(cell)
        banks, words_of_bank = np.unique((cell >> 40) * 32 + cell % 32, return_counts=True)
        _, start = np.unique(banks // 32, return_index=True)
        self.waves[at] += int(np.maximum.reduceat(words_of_bank, start).sum())
        _, words_of_group = np.unique(cell >> 40, return_counts=True)
        self.least_waves[at] += int((-(-words_of_group // 32)).sum())

    def memory(self, at, address, thread, width):
        """Counts a global access of `width` bytes by each of the threads."""
        warp = (thread // 32).astype(np.int64) << 45
        start = (address & np.uint64((1 << 45) - 1)).astype(np.int64)
        first, last = start // 32, (start + width - 1) // 32
        both = np.unique(np.concatenate([warp + first, warp + last]))
        self.sectors[at] += len(both)
        _, touched = np.unique(np.unique(warp + start) >> 45, return_counts=True)
        self.least_sectors[at] += int((-(-touched * width // 32)).sum())


def describe(kernel, profile) -> str:
    """A line per memory instruction: executions by a warp, waves or sectors, the least possible."""
    lines = []
    for k, instruction in enumerate(kernel.instructions):
        for name, count, least in (
            ("waves", profile.waves[k], profile.least_waves[k]),
            ("sectors", profile.sectors[k], profile.least_sectors[k]),
        ):
            if count:
                lines.append(
                    f"{profile.warps[k]:8d} warps {count:9d} {name:7} (least {least:9d})  "
                    f"{instruction.text}   {instruction.source}"
                )
    return "\n".join(lines)
