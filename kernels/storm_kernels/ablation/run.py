"""Measures every case of a plan, row by row; no case can end the run."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from storm_kernels.ablation import errors, floors, peers, programs
from storm_kernels.ablation.implementations import Implementation, why_unsupported
from storm_kernels.ablation.operands import DTYPES, Operands, Setting, cotangents, operands
from storm_kernels.ablation.report import Row
from storm_kernels.ablation.shapes import Shape
from storm_kernels.ablation.timing import Timing, measure
from storm_kernels.selective_scan import IMPLEMENTATIONS

DIRECTIONS = ("forward", "backward", "both")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: everything with everything.

    Attributes:
        shapes, settings, implementations, directions: see their modules and `DIRECTIONS`.
        device: where; its kind chooses the floors.
        repeats, seconds: see `timing.measure`.
        check: compare with float64.
    """

    shapes: Sequence[Shape]
    settings: Sequence[Setting]
    implementations: Sequence[Implementation]
    directions: Sequence[str]
    device: jax.Device
    repeats: int = 20
    seconds: float = 3.0
    check: bool = True

    def __len__(self) -> int:
        sizes = (self.shapes, self.settings, self.implementations, self.directions)
        total = 1
        for size in sizes:
            total *= len(size)
        return total


def rows(plan: Plan, announce: Callable[[str], None]) -> Iterator[Row]:
    """Measures the plan. `announce` gets the name of a row before it is measured.

    An exception of a case is its row's text. Only KeyboardInterrupt passes.
    """
    for shape in plan.shapes:
        for setting in plan.settings:
            yield from _Case(plan, shape, setting, announce).rows()


class _Case:
    """One shape and setting: the operands and exact values that all implementations share."""

    def __init__(self, plan: Plan, shape: Shape, setting: Setting, announce):
        self.plan, self.shape, self.setting, self.announce = plan, shape, setting, announce
        self.exact: errors.Exact | None = None
        self.remark = ""
        self.dispatch_ms: float | None = None
        self.by_layout: dict[str, tuple[Operands, programs.Values]] = {}

    def rows(self) -> Iterator[Row]:
        failure = None
        try:
            case, _ = self._operands(self.setting)
            if self._queued:
                self.dispatch_ms = self._timing(programs.nothing(case)).median
            if self.plan.check:
                self.exact = errors.exact(self.shape, case, self.setting)
        except RuntimeError as error:
            if not self.by_layout:
                failure = explain(error)
            self.remark = f"errors not measured: {explain(error)}"
        except Exception as error:
            failure = explain(error)
        for implementation in self.plan.implementations:
            for direction in self.plan.directions:
                if failure is not None:
                    yield self._row(implementation, direction, "failed", failure)
                    continue
                yield self._measured(implementation, direction)
            if implementation.layout is not None and implementation.layout != self.setting.layout:
                self.by_layout.pop(implementation.layout, None)

    def _row(self, implementation: Implementation, direction: str, status: str, message: str, **k):
        return Row(implementation.name, self.shape, self.setting, direction, status, message, **k)

    def _operands(self, setting: Setting) -> tuple[Operands, programs.Values]:
        if setting.layout not in self.by_layout:
            given = cotangents(self.shape, setting)
            self.by_layout[setting.layout] = (operands(self.shape, setting), given)
        return self.by_layout[setting.layout]

    def _measured(self, implementation: Implementation, direction: str) -> Row:
        label = f"{self.shape} {self.setting.dtype} {direction} {implementation.name}"
        self.announce(label)
        if implementation.missing is not None:
            status = "failed" if implementation.broken else "not run"
            return self._row(implementation, direction, status, implementation.missing)
        setting = dataclasses.replace(
            self.setting, layout=implementation.layout or self.setting.layout
        )
        try:
            reason = implementation.unsupported(self.shape, setting)
            case, given = self._operands(setting)
            if reason is None and implementation.name in IMPLEMENTATIONS:
                reason = why_unsupported(implementation.name, case, setting)
            if reason is not None:
                return self._row(implementation, direction, "not run", reason)
            program = _program(implementation, case, setting, given, direction)
            timing = self._timing(program)
            memory = program.memory()
        except MemoryError as error:
            return self._row(implementation, direction, "not run", str(error))
        except Exception as error:
            return self._row(implementation, direction, "failed", explain(error))
        rates = floors.device_rates(self.plan.device.device_kind)
        status, remarks, found = "ok", [self.remark] if self.remark else [], {}
        if setting.layout != self.setting.layout:
            remarks.append(f"in layout {setting.layout!r}")
        if self.exact is not None:
            try:
                found, remark = self._errors(program, direction, setting)
                remarks += remark
            except Exception as error:
                status = "wrong"
                remarks.append(explain(error))
        if self.dispatch_ms is not None and timing.median < 2 * self.dispatch_ms:
            remarks.append(f"bound by the host, whose share of a call is {self.dispatch_ms:.3g} ms")
        tolerance = errors.tolerance(self.setting)
        if any(not error <= tolerance for error in found.values()):  # a NaN is not below anything
            status = "wrong"
            wrong = [name for name, error in found.items() if not error <= tolerance]
            remarks.append(f"{', '.join(wrong)} above the tolerance of {tolerance:g}")
        return self._row(
            implementation, direction, status, "; ".join(remarks),
            timing=timing,
            floor=None if rates is None else floors.floor(rates, self.shape, setting, direction),
            memory=memory,
            saved_bytes=program.saved_bytes,
            errors=found,
            tolerance=tolerance if found else None,
        )  # fmt: skip

    @property
    def _queued(self) -> bool:
        return self.plan.device.platform != "cpu"

    def _timing(self, program: programs.Program) -> Timing:
        plan = self.plan
        return measure(program, repeats=plan.repeats, seconds=plan.seconds, queued=self._queued)

    def _errors(self, program: programs.Program, direction: str, setting: Setting):
        """The errors of a program's results and remarks on their dtypes."""
        assert self.exact is not None
        if direction == "forward":
            found = program.values()
            dtype = jnp.dtype(DTYPES[setting.dtype])
            remarks = [] if found["y"].dtype == dtype else [f"y is {found['y'].dtype}"]
            return self.exact.errors(found, "", setting), remarks
        given = self.exact.cotangents
        if setting.layout != self.setting.layout:
            given = given | {"y": jnp.swapaxes(given["y"], 1, 2)}
        return self.exact.errors(program.values(given), "d", setting), []


def _program(implementation, case, setting, given, direction) -> programs.Program:
    if implementation.torch:
        return peers.TorchProgram(case, setting, given, direction)
    if direction == "forward":
        return programs.forward(implementation.scan, case, setting)
    make = programs.backward if direction == "backward" else programs.both
    return make(implementation.scan, case, setting, given)


def explain(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
