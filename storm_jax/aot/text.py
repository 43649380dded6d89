"""A `Report` as the lines that the command prints."""

from collections.abc import Iterator, Sequence
from typing import Any

from storm_jax.aot.analyse import Counted, Report, Speed

_GiB = 2**30


def lines(report: Report) -> Iterator[str]:
    """The report, one line at a time."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    slices = f", {report.slices} slices or hosts" if report.slices > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"{report.config} on {report.topology}: {report.devices} x {report.chip}{slices}"
    yield f"  mesh {mesh}; batch {report.batch} in {report.accumulation} microbatch(es)"
    yield "  remat " + ", ".join(_remat(report.remat))
    yield f"  compiled by {report.compiler} ({versions}) in {report.compile_seconds:.0f} s"
    yield from _memory(report)
    if report.counted is not None:
        yield from _work(report, report.counted)
        yield from _traffic(report, report.counted)
        yield from _speed(report.counted, report.counted.speed)


def _remat(remat: dict[str, Any]) -> Iterator[str]:
    for name, value in remat.items():
        if not isinstance(value, dict):
            yield f"{name}={value}"
        elif value["policy"] in ("names", "offload"):
            yield f"{name}={value['policy']} of {' '.join(value['saved']) or 'nothing'}"
        else:
            yield f"{name}={value['policy']}"


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / _GiB:.2f} GiB"


def _memory(report: Report) -> Iterator[str]:
    memory = report.memory
    yield ""
    yield "Memory of a device, GiB (from shapes and shardings)"
    yield f"  {'':<12}{'parameters':>18}{'stored':>10}{'gradients':>11}{'optimizer':>11}"
    for part in (*report.parameters, "other"):
        count = report.parameters.get(part, 0)
        own = [d.get(part, 0) for d in (memory.parameters, memory.gradients, memory.optimizer)]
        if count or any(own):
            stored, gradients, optimizer = (f"{x / _GiB:.2f}" for x in own)
            yield f"  {part:<12}{count:>18,}{stored:>10}{gradients:>11}{optimizer:>11}"
    gradients = sum(memory.gradients.values())
    yield "Memory of a device, GiB (from the compiler)"
    for name, count in (
        ("parameters", sum(memory.parameters.values())),
        ("optimizer", sum(memory.optimizer.values())),
        ("batch", memory.batch),
        ("padding of these", memory.padding),
        ("temporaries", memory.temporaries),
        ("  gradients, at most", min(gradients, memory.temporaries)),
        ("  activations, other", max(0, memory.temporaries - gradients)),
        ("new outputs", memory.outputs),
        ("code", memory.code),
    ):
        yield f"  {name:<22}{count / _GiB:>10.2f}"
    at_least = "at least " if memory.estimated else ""
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    share = memory.total / memory.available
    yield f"  {'together':<22}{memory.total / _GiB:>10.2f}  of {gib(memory.available)}" + (
        f" that a program may use: {at_least}{share:.0%}, {verdict}"
    )
    for whole in report.whole[:5]:
        axes = " x ".join(whole.axes)
        yield f"  whole on every device along {axes}: {whole.path}, {gib(whole.bytes)}"


def _work(report: Report, counted: Counted) -> Iterator[str]:
    recomputed = counted.matmul_flops / report.model_flops
    yield ""
    yield "Work of a device and step"
    yield f"  model FLOPs                {report.model_flops / 1e12:>10.1f} TFLOP" + (
        "  (formula, full rows)"
    )
    yield f"  matrix products compiled   {counted.matmul_flops / 1e12:>10.1f} TFLOP" + (
        f"  ({recomputed:.2f} x: recomputation, masked attention)"
    )
    yield f"  XLA's cost analysis        {counted.xla_flops / 1e12:>10.1f} TFLOP" + (
        "  (every loop body once)"
    )
    yield f"  memory traffic             {counted.hbm_bytes / 1e9:>10.1f} GB  (estimate from above)"
    for name, times in counted.silent_kernels.items():
        yield f"  not counted: {times:.0f} executions of kernel {name}"
    for loop in counted.unknown_loops:
        yield f"  counted once, its length is not in the program: {loop}"


def _traffic(report: Report, counted: Counted) -> Iterator[str]:
    apart = report.slices > 1  # what the links inside carry, and what the network between does
    heads = ("inside, GB", "between, GB") if apart else ("GB",)
    yield ""
    yield f"{'Received by a device in a step':<48}" + "".join(f"{head:>14}" for head in heads)
    if not counted.traffic:
        yield "  nothing: no collectives"
    sums = [0.0, 0.0]
    for t in counted.traffic:
        parts = (t.bytes - t.network_bytes, t.network_bytes) if apart else (t.bytes,)
        sums = [total + part for total, part in zip(sums, parts, strict=False)]
        yield f"  {t.axes:<16}{t.kind:<20}{t.executions:>8.0f} x" + _gigabytes(parts)
    if apart:
        yield f"  {'together':<46}" + _gigabytes(sums)


def _gigabytes(parts: Sequence[float]) -> str:
    return "".join(f"{part / 1e9:>14.3f}" for part in parts)


def _speed(counted: Counted, speed: Speed) -> Iterator[str]:
    yield ""
    yield "Least time of a step by resource, seconds"
    for name, seconds in counted.roofline.by_resource().items():
        mark = "  <- binds" if name == counted.binds else ""
        yield f"  {name:<10}{seconds:>10.3f}{mark}"
    yield f"  {'':<16}{'all overlapped':>16}{'nothing overlapped':>20}"
    for name, values, form in (
        ("step, s", speed.step_seconds, "{:.3f}"),
        ("tokens/s", speed.tokens_per_second, "{:,.0f}"),
        ("frames/s", speed.frames_per_second, "{:,.0f}"),
        ("MFU", speed.mfu, "{:.1%}"),
    ):
        yield f"  {name:<16}{form.format(values[0]):>16}{form.format(values[1]):>20}"
