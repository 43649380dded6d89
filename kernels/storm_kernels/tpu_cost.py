"""What a Pallas TPU kernel costs, counted in its compiled form, with no TPU at hand.

libtpu compiles for a TPU on any host and can write down the bundles (the instruction words) that it
made. `compile_and_count` compiles the operations that a Python expression builds, in a process of
its own because libtpu reads its options once, and returns every loop of every Pallas kernel: how
many bundles, and how many slots of each unit they fill. Counts are static: they know nothing of
waiting for memory, so a time made from them is a lower bound. `roofline` makes such times.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from storm_kernels.selective_scan.shapes import TPU_CUT, TPU_V4_CUT

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL")
"""The units of a bundle, as libtpu names them; FILL and SPILL are parts of VLOAD and VSTORE."""

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topology of each generation that libtpu describes."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation's rates.

    Attributes:
        clock: of a TensorCore, GHz.
        cores: TensorCores of a chip.
        bandwidth: of a chip's HBM, GB/s.
        source: where the numbers come from.
    """

    clock: float
    cores: int
    bandwidth: float
    source: str


CHIPS = {
    "v4": Chip(1.05, 2, 1228, "Jouppi et al. 2023 (arXiv:2304.01433): clock, bandwidth"),
    "v5e": Chip(1.5, 1, 819, "Google Cloud v5e page: bandwidth; 'How to Scale Your Model': clock"),
    "v5p": Chip(1.75, 2, 2765, "Google Cloud v5p page: bandwidth; clock from 459 bf16 TFLOP/s"),
    "v6e": Chip(1.75, 1, 1640, "Google Cloud v6e page: bandwidth; the clock is an assumption"),
}
"""Rates of the generations; the clock of v6e is not published."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a compiled kernel.

    Attributes:
        first, last: its bundles, `last` not included.
        slots: for each unit, the slots filled in them; "bundle" counts the bundles themselves.
        trips: how often it runs, None where only the program knows.
    """

    first: int
    last: int
    slots: dict[str, int]
    trips: int | None

    @property
    def bundles(self) -> int:
        return self.last - self.first

    def inside(self, other: "Loop") -> bool:
        return other is not self and other.first <= self.first and self.last <= other.last


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled Pallas kernel: its name, all its bundles, the slots of a bundle, its loops."""

    name: str
    bundles: int
    capacity: dict[str, int]
    slots: dict[str, int]
    loops: tuple[Loop, ...]

    @property
    def spills(self) -> int:
        """Stores of vector registers that the compiler added because it ran out of them."""
        return self.slots["VSTORE:SPILL"]

    def innermost(self) -> list[Loop]:
        """The loops without a loop in them, in order."""
        return [a for a in self.loops if not any(b.inside(a) for b in self.loops)]

    def hot_loop(self, unit: str = "EUP") -> Loop:
        """The innermost loop that fills most slots of a unit; the first of equals."""
        return max(self.innermost(), key=lambda loop: (loop.slots[unit], -loop.first))

    def within(self, outer: Loop) -> list[Loop]:
        """The loops directly inside another."""
        nested = [loop for loop in self.loops if loop.inside(outer)]
        return [a for a in nested if not any(a.inside(b) for b in nested)]

    def executed(self, outer: Loop) -> dict[str, int]:
        """Slots (and bundles) of one pass through a loop, loops inside as often as they run.

        Both sides of a condition count. A loop of unknown trips counts once.
        """
        total = dict(outer.slots)
        for loop in self.within(outer):
            inner = self.executed(loop)
            for unit in total:
                total[unit] += inner[unit] * (loop.trips or 1) - loop.slots[unit]
        return total


def parse_dump(folder: pathlib.Path) -> list[Kernel]:
    """Reads what libtpu wrote to `--xla_jf_dump_to`, in the order of compilation.

    A loop is a branch back to a bundle before it: each branch names a region, each bundle the
    regions that start there.
    """
    kernels = []
    for path in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        match = re.match(r"(\d+-(.+?)(?:\.\d+)?)-\d+-final_hlo-static", path.name)
        assert match is not None, path.name
        stem = path.name[: path.name.rindex("-", 0, path.name.index("-final_hlo-static"))]
        schedules = [p for p in folder.glob(f"{stem}-*-final_bundles.txt")]
        schedules = [p for p in schedules if "schedule-analysis" not in p.name]
        of_kernel = "tpu_custom_call" in _read_analysis(folder, stem) and match[2] != "TLP"
        if len(schedules) != 1 or not of_kernel:
            continue
        lines = path.read_text().splitlines()
        names = [name.strip() for name in lines[1].split(",")]
        capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
        rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]

        def total(first: int, last: int, rows=rows, names=names) -> dict[str, int]:
            columns = zip(names, zip(*rows[first:last], strict=True), strict=True)
            return {name: sum(column) for name, column in columns} | {"bundle": last - first}

        loops = [
            Loop(first, last, total(first, last), trips)
            for first, last, trips in _loops(schedules[0].read_text(), len(rows))
        ]
        kernels.append(Kernel(match[2], len(rows), capacity, total(0, len(rows)), tuple(loops)))
    return kernels


def _read_analysis(folder: pathlib.Path, stem: str) -> str:
    paths = list(folder.glob(f"{stem}-*-schedule-analysis_final_bundles.txt"))
    return paths[0].read_text() if paths else ""


_DELAY_SLOTS = 4  # bundles after a branch that are executed with it


def _loops(schedule: str, count: int) -> list[tuple[int, int, int | None]]:
    """First bundle, bundle behind the last one, and trips where the exit test is a constant."""
    starts: dict[str, int] = {}
    branches: list[tuple[int, str, str]] = []
    trips: dict[str, int] = {}
    for line in schedule.splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)
        if match is None:
            continue
        address = int(match[1], 16)
        for region in re.findall(r"Start (?:/End )?(?:empty )?region (\d+)", line):
            starts.setdefault(region, address)
        for predicate, region in re.findall(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)", line):
            branches.append((address, predicate, region))
        exits = (
            r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop exit test"
        )
        for predicate, limit in re.findall(exits, line):
            trips[predicate] = int(limit)
    return [
        (starts[region], min(address + 1 + _DELAY_SLOTS, count), trips.get(predicate))
        for address, predicate, region in branches
        if starts.get(region, address + 1) <= address
    ]


def compile_and_count(program: str, topology: str, timeout: float = 600.0) -> list[Kernel]:
    """Compiles what a program describes for a TPU and counts its kernels.

    Args:
        program: Python source run in a new process with `sharding` defined, for one device of the
            topology. It must define `function` and `arguments`, a tuple of `jax.ShapeDtypeStruct`
            (or pytrees of them) with that sharding. Import what it needs in it.
        topology: a key of `TOPOLOGIES`, or a topology as libtpu names it.
        timeout: seconds.

    Returns:
        The Pallas kernels of the compiled function; libtpu compiles some at once, so in no certain
        order.

    Raises:
        RuntimeError: libtpu is missing or refused the program; the message ends with its words.
    """
    topology = TOPOLOGIES.get(topology, topology)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        source = _COMPILE.format(topology=json.dumps(topology), program=program)
        done = subprocess.run(
            [sys.executable, "-c", source],
            env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"compiling for {topology} failed:\n" + "\n".join(done.stderr.splitlines()[-15:])
            )
        return parse_dump(pathlib.Path(folder))


_COMPILE = """
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
devices = topologies.get_topology_desc({topology}, platform="tpu").devices
sharding = SingleDeviceSharding(devices[0])
{program}
# With a mesh of this one device, which tells a kernel what it is compiled for.
mesh = Mesh([devices[0]], ("x",), axis_types=(AxisType.Auto,))
whole = NamedSharding(mesh, PartitionSpec())
arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
)
with jax.set_mesh(mesh):
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
"""


def scan_program(
    *, batch: int, length: int, channels: int, state: int, dtype: str,
    fused: bool, backward: bool, segments: bool | None = None,
) -> str:  # fmt: skip
    """A program for `compile_and_count`: `selective_scan` with implementation "pallas_tpu".

    Args:
        batch, length, channels, state: sizes; one group.
        dtype: of u, delta, z, B, C and y; weights are float32.
        fused: with softplus, bias, gate and skip, else the recurrence alone.
        backward: the gradients of all float operands; else the forward.
        segments: with segment ids; None: as `fused`.
    """
    segments = fused if segments is None else segments
    return f"""
import dataclasses
import jax.numpy as jnp
from storm_kernels.selective_scan.call import ScanCall
from storm_kernels.selective_scan.pallas_tpu import pallas_tpu_scan

def of(*shape, dtype={dtype!r}):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

B, L, E, G = {batch}, {length}, {channels}, {state}
stream, vector = of(B, L, E), of(E, dtype="float32")
state = of(B, E, G, dtype="float32")
call = ScanCall(
    u=stream, delta=stream, A=of(E, G, dtype="float32"), B=of(B, L, 1, G), C=of(B, L, 1, G),
    D=vector if {fused} else None, z=stream if {fused} else None,
    delta_bias=vector if {fused} else None, initial_state=state,
    segment_ids=of(B, L, dtype="int32") if {segments} else None, delta_softplus={fused},
    reverse=False, layout="bld", chunk_size=None, output_dtype=stream.dtype,
)

def gradients(call, dy, dstate):
    floats = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    floats = {{name: getattr(call, name) for name in floats if getattr(call, name) is not None}}
    run = lambda floats: pallas_tpu_scan(dataclasses.replace(call, **floats))
    return jax.vjp(run, floats)[1]((dy, dstate))

function = gradients if {backward} else pallas_tpu_scan
arguments = (call, stream, state) if {backward} else (call,)
"""


def scan_kernel(kernels: list[Kernel], backward: bool) -> Kernel:
    """The one that `scan_program` was written for: a backward also compiles its forward."""
    name = "selective_scan_" + ("backward" if backward else "forward")
    [kernel] = [kernel for kernel in kernels if kernel.name == name]
    return kernel


SPAN = 64
"""Positions of the scan's inner loops together, with up to 16 states."""


@dataclasses.dataclass(frozen=True)
class ScanCost:
    """The static cost of a scan kernel, per register of state (1024 elements) and position.

    Attributes:
        kernel: its name.
        bundles: of everything that a block of 1024 channels needs, elementwise work and the
            change between natural and row form included.
        recurrence: of the loops over positions that hold the recurrence, and backward its products
            and their sums; with softplus or a gate also elementwise loops with as many
            exponentials.
        overhead: of the rest of a grid step, which its blocks share: B and C spread over the
            lanes, the pipeline's own bundles, what runs at the first and the last step alone.
        slots: as `bundles`, by unit.
        spills: stores of spilled vector registers in that code.
    """

    kernel: str
    bundles: float
    recurrence: float
    overhead: float
    slots: dict[str, float]
    spills: int


def scan_cost(kernel: Kernel, generation: str, state: int = 16) -> ScanCost:
    """Reads the cost of one of the scan's kernels off its loops.

    Args:
        kernel: compiled with several blocks of 1024 channels and in one form: a multiple of 1024
            channels and of 128 positions, no segment ids.
        generation: a key of `CHIPS`.
        state: states of a channel, at most 16.
    """
    per_step = SPAN * state
    cut = TPU_V4_CUT if generation == "v4" else TPU_CUT
    held, unroll, time_block = cut.held, cut.unroll, cut.time_blocks[0]
    if "backward" in kernel.name:
        held, unroll, time_block = cut.back_held, cut.back_unroll, cut.time_blocks[1]
    # The smallest loop of the recurrence has an exponential for every state and position; a v4
    # fills two slots with one. A few may be taken over from one pass to the next.
    least = 0.75 * min(held, state) * unroll * (2 if generation == "v4" else 1)
    hot = [loop for loop in kernel.innermost() if loop.slots["EUP"] >= least]
    around = [loop for loop in kernel.loops if all(inner.inside(loop) for inner in hot)]
    block, *outer = sorted(around, key=lambda loop: loop.bundles)
    grid = outer[-1] if outer else block
    executed = kernel.executed(block)
    overhead = kernel.executed(grid)["bundle"]
    if outer:
        overhead -= executed["bundle"] * _runs(kernel, block, grid)
    else:
        # One block of channels in a grid step, and no loop over blocks (backward on a v4): all
        # that is not overhead is loops, and of the loops only sums over lanes are overhead.
        loops = [loop for loop in kernel.within(grid) if not loop.slots["XLU"]]
        counts = [(kernel.executed(loop), loop.trips or 1) for loop in loops]
        executed = {unit: sum(count[unit] * trips for count, trips in counts) for unit in executed}
        overhead -= executed["bundle"]
    recurrence = sum(
        kernel.executed(loop)["bundle"] * (loop.trips or 1)
        for loop in kernel.within(block)
        if loop in hot or any(inner.inside(loop) for inner in hot)
    )
    return ScanCost(
        kernel=kernel.name,
        bundles=executed["bundle"] / per_step,
        recurrence=recurrence / per_step,
        overhead=overhead / (time_block * state),
        slots={unit: executed[unit] / per_step for unit in UNITS},
        spills=block.slots["VSTORE:SPILL"],
    )


def _runs(kernel: Kernel, loop: Loop, outer: Loop) -> int:
    """How often a loop's body runs in one pass through an outer loop; unknown trips count once."""
    runs = loop.trips or 1
    for middle in kernel.loops:
        if loop.inside(middle) and middle.inside(outer):
            runs *= middle.trips or 1
    return runs


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of a scan's time from its static cost, milliseconds.

    Attributes:
        by_resource: "issue" (all bundles of the blocks, one a cycle), "VALU" and "EUP" (as if
            their slots were always full), "HBM" (every operand and result moved once).
        resource: the one that takes longest.
        ms: its time.
    """

    by_resource: dict[str, float]
    resource: str
    ms: float


def roofline(
    cost: ScanCost, kernel: Kernel, generation: str, *, batch: int, length: int, channels: int,
    state: int, hbm_bytes: float,
) -> Roofline:  # fmt: skip
    """Times a scan from its counts, with all of a chip's cores at work.

    Args:
        cost, kernel: of one kernel.
        generation: a key of `CHIPS`.
        batch, length, channels, state: of the scan; the channels are filled up to blocks of 1024.
        hbm_bytes: read and written.
    """
    chip = CHIPS[generation]
    registers = batch * length * -(-channels // 1024) * state
    cycles = 1e6 * chip.clock * chip.cores  # per millisecond, all cores
    times = {"issue": registers * cost.bundles / cycles, "HBM": hbm_bytes / chip.bandwidth / 1e6}
    for unit in ("VALU", "EUP"):
        times[unit] = registers * cost.slots[unit] / kernel.capacity[unit] / cycles
    resource = max(times, key=lambda name: times[name])
    return Roofline(times, resource, times[resource])


def scan_hbm_bytes(
    *, batch: int, length: int, channels: int, state: int, itemsize: int, fused: bool,
    backward: bool,
) -> float:  # fmt: skip
    """Bytes that the scan's forward or backward kernel moves with one group of B and C.

    Streams of [batch, length, channels]: u, delta, y, and z if fused; backward u, delta, dy, du,
    ddelta, and z and dz. B and C lie padded to 128 lanes, once for each half of the channels. The
    saved states are written by a forward that keeps them, and read by the backward.
    """
    positions = batch * length
    streams = (5 + 2 * fused) if backward else (3 + fused)
    states = positions / 64 * channels * state * 4 if backward else 0
    return positions * channels * streams * itemsize + 2 * 2 * positions * 128 * itemsize + states
