"""Reads XLA's optimised HLO text: instructions with shapes, and how often each is executed.

`compiled.as_text()` of one SPMD program is what every device runs, with local shapes. XLA's own
`cost_analysis` counts the body of a loop once; here `executions` says how often a computation runs,
from the loops' trip counts.
"""

import functools
import math
import re
from dataclasses import dataclass

from storm_jax.config import ConfigError


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's type.

    Attributes:
      dtype: as HLO names it, "bf16".
      dims: sizes.
      space: memory space of its layout; 0 is the device's main memory (HBM).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Without the padding of a tiled layout."""
        return math.ceil(self.elements * _bits(self.dtype) / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: "fusion.3", "fusion".
      shapes: of the result, tuples flattened.
      operands: names of instructions of the same computation.
      text: what follows the operands: attributes, metadata, backend_config.
      literal: what stands in the parentheses.
      root: it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    literal: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def source(self) -> str:
        """The JAX operation that it comes from, as far as the compiler says."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    def called(self, *attributes: str) -> str:
        """The computation named by `attribute=%name`, the first of these that there is."""
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
            if match:
                return match[1]
        raise ConfigError(f"HLO {self.opcode} {self.name} has none of {attributes}")


@dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each instruction's result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users.get(operand, []).append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: name of the one that runs.
      executions: computation -> how often it runs in one call of the program; those that only
        say how to reduce or compare are not in it.
      top_level: computations whose instructions are executed one by one, results in memory; the
        others in `executions` are bodies of fusions.
      unknown_loops: sources of loops whose trip count could not be read, or depends on the data:
        their bodies count once.
      partitions: devices that its collectives number, as far as the text says: of several TPU
        slices those of one.
    """

    computations: dict[str, Computation]
    entry: str
    executions: dict[str, float]
    top_level: frozenset[str]
    unknown_loops: tuple[str, ...]
    partitions: int | None

    def executed(self):
        """(computation, instruction, times) of everything that runs."""
        for name, times in self.executions.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ConfigError: the text has no entry computation: not HLO, or of a kind not understood.
    """
    computations, entry = {}, None
    name, lines = None, []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header["name"], []
                entry = name if header["entry"] else entry
        elif line == "}":
            parsed = (_instruction(x) for x in lines)
            computations[name] = Computation(name, {i.name: i for i in parsed if i is not None})
            name = None
        elif lines and not _NAME.match(line):
            lines[-1] += line  # an attribute with a line break in it
        else:
            lines.append(line)
    if entry is None:
        raise ConfigError("the compiler's HLO text has no ENTRY: a format that is not known")
    executions: dict[str, float] = {}
    top_level, unknown = set(), []
    for called, times, fused in _calls(computations, entry, unknown):
        executions[called] = executions.get(called, 0) + times
        if not fused:
            top_level.add(called)
    partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
    return Program(
        computations,
        entry,
        executions,
        frozenset(top_level),
        tuple(unknown),
        int(partitions[1]) if partitions else None,
    )


# --------------------------------------------------------------------------------- reading lines

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    literal = rest[opcode.end() : close - 1]
    return Instruction(
        name=match["name"],
        opcode=opcode[1],
        shapes=shapes(rest[:end]),
        operands=() if opcode[1] in ("constant", "parameter") else _operands(literal),
        text=rest[close:],
        literal=literal,
        root=bool(match["root"]),
    )


def _operands(literal: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", literal))


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type's text, such as "(f32[8,128]{1,0:T(8,128)S(1)}, s32[])"."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ConfigError(f"HLO line with an open bracket: {text[:200]}")


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    return int(re.findall(r"\d+", dtype)[0])  # f8e4m3fn: the first number


# ------------------------------------------------------------------------------ who runs how often


def _calls(computations, entry: str, unknown: list[str]):
    """(computation, times, is it a fusion's body) for every call, in the order of calls."""
    # A computation may be called from several places: each call is followed with its own times.
    pending = [(entry, 1.0, False)]
    while pending:
        name, times, fused = pending.pop()
        yield name, times, fused
        for instruction in computations[name].instructions.values():
            if instruction.opcode == "while":
                trips = _trips(computations, computations[name], instruction)
                if trips is None:
                    unknown.append(instruction.source or instruction.name)
                    trips = 1
                pending.append((instruction.called("body"), times * trips, fused))
            elif instruction.opcode == "fusion":
                pending.append((instruction.called("calls"), times, True))
            elif instruction.opcode == "conditional":
                # One of them runs. Which, the program does not say: the one that writes most.
                branches = _branches(instruction.text)
                branch = max(branches, key=lambda name: _written(computations, name))
                pending.append((branch, times, fused))
            elif instruction.opcode in ("call", "async-start"):
                pending.append((instruction.called("to_apply", "calls"), times, fused))


def _written(computations, name: str) -> float:
    """Bytes of all results of a computation and of those that it calls."""
    return sum(
        times * instruction.bytes
        for called, times, _ in _calls(computations, name, [])
        for instruction in computations[called].instructions.values()
    )


def _branches(text: str) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", text)
    if match:
        return re.findall(r"%?([\w.\-]+)", match[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)


def _trips(computations, computation: Computation, loop: Instruction) -> int | None:
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    # The TPU compiler leaves none. A scan's condition compares its counter, which starts at zero
    # and grows by one, with a constant.
    condition = computations[loop.called("condition")]
    compare = _through_fusion(computations, condition.root)
    if compare is None or "direction=LT" not in compare.text:
        return None
    limits = [
        i.literal
        for i in condition.instructions.values()
        if i.opcode == "constant" and i.shapes[0].dims == () and i.shapes[0].dtype in ("s32", "s64")
    ]
    return int(limits[0]) if len(limits) == 1 else None


def _through_fusion(computations, root: Instruction) -> Instruction | None:
    if root.opcode == "fusion":
        root = computations[root.called("calls")].root
    return root if root.opcode == "compare" else None
