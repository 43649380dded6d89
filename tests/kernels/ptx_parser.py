"""Reads the PTX that Triton's LLVM back end writes: one kernel's parameters, registers and code.

The language is that of NVIDIA's "Parallel Thread Execution ISA" manual; only what LLVM and Triton's
inline assembly use is read: no functions but the kernel, no `.v2` registers, no textures.
"""

import bisect
import dataclasses
import re

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64,
    "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "b128": 128, "e4m3x2": 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Register:
    """A declared register; `index` counts all registers of the kernel, scopes resolved."""

    name: str
    index: int
    bits: int  # 1 for a predicate
    negated: bool = False  # written `!%p`


@dataclasses.dataclass(frozen=True)
class Special:
    """A read-only register such as `%tid.x`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Number:
    text: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The address of a variable, plus bytes."""

    name: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base+offset]`; a base of None is an absolute address."""

    base: Register | Symbol | None
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple


@dataclasses.dataclass(frozen=True)
class Pair:
    """`d|p`: a result and its predicate, or two predicates."""

    first: Register | None
    second: Register | None


@dataclasses.dataclass(frozen=True)
class Label:
    """A branch's target; `position` is the index of the instruction behind it."""

    name: str
    position: int


@dataclasses.dataclass
class Instruction:
    """One instruction; `operands` are the classes above, None for `_`."""

    line: int  # of the PTX text, from 1
    text: str
    source: str  # "file:line" of the Python code, or ""
    opcode: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: list
    guard: Register | None
    used_bytes: int | None = None  # bit k: byte k of a vector load is used (`used_bytes_mask`)

    @property
    def type(self):
        """The last modifier that names a type."""
        for modifier in reversed(self.modifiers):
            if modifier in BITS:
                return modifier
        raise NotImplementedError(f"no type in {self.text!r} (PTX line {self.line})")

    @property
    def types(self):
        return [m for m in self.modifiers if m in BITS]

    def has(self, *modifiers):
        return any(m in self.modifiers for m in modifiers)

    def unsupported(self, why=""):
        why = f" ({why})" if why else ""
        return NotImplementedError(f"PTX instruction {self.text}{why}")


@dataclasses.dataclass
class Variable:
    """A variable of the module or the kernel; `data` for initialised `.global` ones."""

    space: str  # "shared", "global", "local"
    size: int  # bytes, 0 for `.extern .shared x[]`
    align: int
    data: bytes = b""


@dataclasses.dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, str]]  # name, type
    required_threads: int | None  # product of `.reqntid`
    register_bits: list[int]
    instructions: list[Instruction]
    variables: dict[str, Variable]
    target: str


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(\(.*?\))?([^{(]*)\{", re.S)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_NUMBER = re.compile(r"[-+]?(0[xXfFdDbB][0-9a-fA-F]+U?|\d+(\.\d+)?([eE][-+]?\d+)?U?)$")
_VARIABLE = re.compile(
    r"\.(shared|global|local|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?(?:\s*=\s*(.*))?$",
    re.S,
)
_ADDRESS = re.compile(r"([%\w$]+)?\s*(?:([+-])\s*(-?\s*\w+))?$")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LINE = re.compile(r"\.(loc|file)\b")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_USED = re.compile(r"used_bytes_mask\s+(\w+)")


def parse(ptx: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX module, or its only one."""
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in _FILE.finditer(ptx)}
    text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n"), ptx)
    entries = [m for m in _ENTRY.finditer(text) if name in (None, m[1])]
    if len(entries) != 1:
        raise ValueError(f"kernels named {name or 'anything'}: {[m[1] for m in entries]}, not one")
    entry = entries[0]
    variables = {}
    for statement in re.findall(r"\.(?:shared|global|const)\s[^;(]*;", text[: entry.start()]):
        _declare_variable(statement[:-1].strip(), variables)
    parameters = []
    for declaration in (entry[2] or "()")[1:-1].split(","):
        words = declaration.split()
        if words:
            if "[" in words[-1]:
                raise NotImplementedError(f"parameter {declaration.strip()!r} by value in bytes")
            parameters.append((words[-1], words[1].lstrip(".")))
    threads = re.search(r"\.reqntid\s+([\d,\s]+)", entry[3])
    required = None
    if threads:
        required = 1
        for dimension in threads[1].replace(",", " ").split():
            required *= int(dimension)
    target = re.search(r"\.target\s+(\w+)", text)
    body = _Body(text, entry.end(), files, variables)
    return Kernel(
        entry[1], parameters, required, body.register_bits, body.instructions, variables,
        target[1] if target else "",
    )  # fmt: skip


def _declare_variable(statement, variables):
    match = _VARIABLE.match(statement)
    if not match:
        raise NotImplementedError(f"variable {statement!r}")
    space, align, kind, name, count, data = match.groups()
    width = BITS[kind] // 8
    raw = b""
    if data:
        values = [int(v, 0) for v in data.strip().strip("{}").split(",") if v.strip()]
        raw = b"".join((v % (1 << 8 * width)).to_bytes(width, "little") for v in values)
    size = width * (int(count) if count else (0 if count == "" else 1))
    space = "global" if space == "const" else space
    variables[name] = Variable(space, size, int(align or width), raw.ljust(size, b"\0"))


class _Body:
    """The statements between a kernel's braces."""

    def __init__(self, text, start, files, variables):
        self.text, self.files, self.variables = text, files, variables
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.register_bits: list[int] = []
        self.instructions: list[Instruction] = []
        self.scopes: list[dict[str, Register]] = [{}]
        self.label_scopes: list[dict[str, int]] = [{}]
        self.unresolved = []  # (instruction, its chain of label scopes)
        self.source, self.used_bytes = "", None
        self._read(start)
        for instruction, chain in self.unresolved:
            self._resolve(instruction, chain)

    def _read(self, at):
        text = self.text
        space = re.compile(r"\s*")
        while True:
            at = space.match(text, at).end()
            if text[at] == "{":
                self.scopes.append({})
                self.label_scopes.append({})
                at += 1
            elif text[at] == "}":
                at += 1
                self.scopes.pop()
                self.label_scopes.pop()
                if not self.scopes:
                    return
            elif _LINE.match(text, at):
                end = text.index("\n", at)
                if loc := _LOC.match(text, at):
                    file = self.files.get(loc[1], "")
                    self.source = f"{file}:{loc[2]}" if loc[2] != "0" else self.source
                at = end
            elif label := _LABEL.match(text, at):
                self.label_scopes[-1][label[1]] = len(self.instructions)
                at = label.end()
            else:
                end = text.index(";", at)
                self._statement(" ".join(text[at:end].split()), at)
                at = end + 1

    def _statement(self, statement, at):
        line = bisect.bisect_left(self.newlines, at) + 1
        if not statement:
            return
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif statement.startswith(".pragma"):
            if used := _USED.search(statement):
                self.used_bytes = int(used[1], 0)
        elif statement.startswith((".shared", ".local", ".global")):
            _declare_variable(statement, self.variables)
        elif statement.startswith("."):
            raise NotImplementedError(f"PTX line {line}: directive {statement}")
        else:
            self._instruction(statement, line)

    def _declare_registers(self, statement):
        _, kind, names = statement.split(None, 2)
        bits = BITS[kind.lstrip(".")]
        for name in names.split(","):
            name = name.strip()
            if many := re.match(r"(.*)<(\d+)>$", name):
                for k in range(int(many[2])):
                    self._register(f"{many[1]}{k}", bits)
            else:
                self._register(name, bits)

    def _register(self, name, bits):
        self.scopes[-1][name] = Register(name, len(self.register_bits), bits)
        self.register_bits.append(bits)

    def _instruction(self, statement, line):
        text, guard = statement, None
        if statement.startswith("@"):
            word, statement = re.match(r"@\s*(!?\s*[%\w$]+)\s+(.*)$", statement).groups()
            guard = self._operand(word.replace(" ", ""))
        opcode, _, rest = statement.partition(" ")
        opcode, *modifiers = re.split(r"\.", opcode)
        operands = [self._operand(part) for part in _split(rest)]
        instruction = Instruction(
            line, text, self.source, opcode, tuple(modifiers), operands, guard, self.used_bytes
        )
        self.used_bytes = None
        if opcode == "bra":
            self.unresolved.append((instruction, list(self.label_scopes)))
        self.instructions.append(instruction)

    @staticmethod
    def _resolve(instruction, chain):
        name = instruction.operands[0].name
        for scope in reversed(chain):
            if name in scope:
                instruction.operands = [Label(name, scope[name])]
                return
        raise ValueError(f"PTX line {instruction.line}: no label {name}")

    def _operand(self, word):
        word = word.strip()
        if word == "_":
            return None
        if word.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(word[1:-1])))
        if word.startswith("["):
            return self._address(word[1:-1].strip())
        if "|" in word:
            return Pair(*(self._operand(part) for part in word.split("|")))
        if word.startswith("!"):
            return dataclasses.replace(self._operand(word[1:]), negated=True)
        if _NUMBER.match(word):
            return Number(word)
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        if word.startswith("%"):
            return Special(word)
        name, sign, offset = re.match(r"([\w$]+)\s*(?:([+-])\s*(\d+))?", word).groups()
        return Symbol(name, int((sign or "") + (offset or "0")))

    def _address(self, word):
        match = _ADDRESS.match(word)
        if not match:
            return Symbol(word)  # a tensor's coordinates: whoever decodes it refuses
        base, sign, offset = match.groups()
        offset = int(offset.replace(" ", ""), 0) * (-1 if sign == "-" else 1) if offset else 0
        if base is None or _NUMBER.match(base):
            return Address(None, int(base or "0", 0) + offset)
        return Address(self._operand(base), offset)


def _split(text):
    """Splits at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for k, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:k])
            start = k + 1
    if text[start:].strip():
        parts.append(text[start:])
    return parts
