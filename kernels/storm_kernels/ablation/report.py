"""Rows of results, as a plain-text table and as JSON lines."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from storm_kernels.ablation.floors import Floor
from storm_kernels.ablation.operands import Setting
from storm_kernels.ablation.shapes import Shape
from storm_kernels.ablation.timing import Timing


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation, direction, shape and setting.

    Attributes:
        status: "ok"; "wrong" (measured, but an error is above the tolerance); "failed" (an
            exception); "not run" (the implementation does not serve the case, or this machine has
            not the memory for it).
        message: why it failed or was not run; a remark otherwise.
        timing: None where nothing was timed.
        floor: None on devices whose rates are not known.
        memory: bytes, see `programs.Program.memory`.
        saved_bytes: see `programs.Program`.
        errors: the largest error of each result over its largest value.
        tolerance: of these errors.
        static: what the compiler's schedule says, where nothing was run.
    """

    implementation: str
    shape: Shape
    setting: Setting
    direction: str
    status: str
    message: str = ""
    timing: Timing | None = None
    floor: Floor | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    saved_bytes: int | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    tolerance: float | None = None
    static: dict[str, object] | None = None

    @property
    def ms(self) -> float | None:
        """The row's time: measured, or else what the static cost amounts to."""
        if self.timing is not None:
            return self.timing.median
        estimate = (self.static or {}).get("ms")
        return estimate if isinstance(estimate, float) else None

    def record(self, about: dict[str, object]) -> dict[str, object]:
        """A JSON object; `about` says where and with what it was measured."""
        reached = None
        if self.floor is not None and self.ms:
            reached = self.floor.ms / self.ms
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("shape", "setting", "timing", "floor"):
            if fields[name] is not None:
                fields[name] = dataclasses.asdict(fields[name])
        return {**fields, "share_of_floor": reached, **about}


class JsonLines:
    """Appends rows to a file as they come, so that an interrupted run keeps what it measured."""

    def __init__(self, path: pathlib.Path, about: dict[str, object]):
        self.path, self.about = path, about

    def write(self, row: Row) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row.record(self.about)) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with a line between shapes."""
    if any(row.static is not None for row in rows):
        head, cells = _STATIC_HEAD, _static_cells
    else:
        head, cells = _HEAD, _cells
    body = [cells(row) for row in rows]
    # The last cell is free text, and no column for what no row has.
    keep = [i for i in range(len(head)) if any(line[i] for line in body)]
    lines = [[line[i] for i in keep] for line in ([head] + body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    left = [head[i] in _LEFT for i in keep]

    def show(line):
        cells = zip(line, widths, left, strict=True)
        return "  ".join(c.ljust(w) if le else c.rjust(w) for c, w, le in cells).rstrip()

    text = [show(lines[0]), show(["-" * w for w in widths])]
    for i, row in enumerate(rows):
        if i and (row.shape, row.setting) != (rows[i - 1].shape, rows[i - 1].setting):
            text.append("")
        text.append(show(lines[i + 1]))
    return "\n".join(text)


_HEAD = [
    "shape", "dtype", "direction", "implementation", "ms", "quartiles", "floor ms", "bound by",
    "reached", "memory", "saved", "error", "in", "remark",
]  # fmt: skip
_STATIC_HEAD = [
    "shape", "dtype", "direction", "implementation", "bundles", "recurrence", "VALU", "EUP", "XLU",
    "load", "store", "spills", "ms", "bound by", "floor ms", "reached", "remark",
]  # fmt: skip
_REMARK = 100
_LEFT = {"shape", "dtype", "direction", "implementation", "bound by", "in", "remark"}


def _cells(row: Row) -> list[str]:
    worst = max(row.errors, key=lambda name: _nan_first(row.errors[name]), default="")
    remark = _remark(row)
    return [
        str(row.shape),
        row.setting.dtype,
        row.direction,
        row.implementation,
        "" if row.timing is None else digits(row.timing.median),
        ""
        if row.timing is None
        else f"{digits(row.timing.quartile_1)} - {digits(row.timing.quartile_3)}",
        *_floor_cells(row),
        memory(row.memory.get("peak")),
        memory(row.saved_bytes),
        f"{row.errors[worst]:.1e}" if worst else "",
        worst,
        remark,
    ]


def _static_cells(row: Row) -> list[str]:
    static = row.static or {}
    slots = static.get("slots", {})
    assert isinstance(slots, dict)
    remark = _remark(row)

    def number(value: object) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    floor_ms, _, reached = _floor_cells(row)
    return [
        str(row.shape),
        row.setting.dtype,
        row.direction,
        row.implementation,
        number(static.get("bundles")),
        number(static.get("recurrence")),
        *(number(slots.get(name)) for name in ("VALU", "EUP", "XLU", "load", "store")),
        number(static.get("spills")),
        "" if row.ms is None else digits(row.ms),
        str(static.get("resource", "")),
        floor_ms,
        reached,
        remark,
    ]


def _remark(row: Row) -> str:
    """Status and message, cut to a line; the JSON lines have all of it."""
    if row.status == "ok":
        text = row.message
    else:
        text = f"{row.status.upper()}{': ' if row.message else ''}{row.message}"
    return text if len(text) <= _REMARK else text[: _REMARK - 3] + "..."


def _floor_cells(row: Row) -> tuple[str, str, str]:
    if row.floor is None:
        return "", "", ""
    reached = f"{100 * row.floor.ms / row.ms:.3g} %" if row.ms else ""
    return digits(row.floor.ms), row.floor.resource, reached


def digits(ms: float) -> str:
    """Four digits of a time in milliseconds: 0.004017, 0.4017, 40.17, 4017."""
    return f"{ms:.4g}" if 1e-4 <= ms < 1e4 else f"{ms:.0f}" if ms >= 1e4 else f"{ms:.2e}"


def memory(amount: int | None) -> str:
    """Bytes as text, at least four digits of them."""
    if amount is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= 10 * size or (unit == "KiB" and amount >= size):
            return f"{amount / size:.1f} {unit}"
    return f"{amount} B"


def _nan_first(error: float) -> float:
    return error if error == error else float("inf")
