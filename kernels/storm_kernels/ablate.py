"""Compares implementations of the selective scan on the platform at hand.

python -m storm_kernels.ablate                                   every implementation that runs here
python -m storm_kernels.ablate --quick                           the same in under a minute on a CPU
python -m storm_kernels.ablate --shape=1,2304,65536 --dtype=bf16 --out=results
python -m storm_kernels.ablate --implementation=xla,path/to/mine.py:my_scan
python -m storm_kernels.ablate --platform=tpu:v5e                static cost, no TPU needed
"""

import argparse
import datetime
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
from collections.abc import Sequence

import jax

from storm_kernels.ablation import floors, plot
from storm_kernels.ablation import static as static_cost
from storm_kernels.ablation.implementations import Implementation, chosen, every
from storm_kernels.ablation.operands import DTYPES, FUSED, OPTIONAL, Setting
from storm_kernels.ablation.report import JsonLines, Row, digits, table
from storm_kernels.ablation.run import DIRECTIONS, Plan, rows
from storm_kernels.ablation.shapes import SETS, Shape, parse_shape

_EPILOG = """
shapes       --shapes=storm_4b,storm_7b,mamba_ssm_tests by name, --shape=B,D,L[,N[,groups]] by
             size, as often as you like. Without either: storm_4b and storm_7b.
results      a table on standard output. --out=DIR appends to DIR/results.jsonl, a line for every
             row as it is measured, and writes DIR/table.txt and DIR/times.png (with matplotlib).
your own     --implementation=FILE.py:FUNCTION takes a function of any file that has the signature
             of storm_kernels.selective_scan.selective_scan, or less: cases that need a parameter
             which it lacks fail in its rows.
errors       the largest error over the largest value of each result against float64, on at most 8
             channels and 2 batch rows of the full problem (see storm_kernels/ablation/errors.py).
             Above mamba_ssm's relative tolerances (f32 6e-4, f16 3e-3, bf16 3e-2) a row is WRONG.
exit status  0: everything asked for was measured and is right. 1: a row failed, is wrong, or was
             asked for by name and cannot run here; or the run was interrupted (what was measured
             is shown). 2: wrong arguments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        wanted, generation = _platform(arguments.platform)
        shapes, settings = _shapes(arguments), _settings(arguments)
        directions = _listed(arguments.direction, DIRECTIONS, "--direction")
        _choose_platform(wanted, generation)
        device = _device(wanted, generation)
        here = _common(device)
        static = generation is not None and not (
            here == "tpu" and floors.tpu_generation(device.device_kind) == generation
        )
        offered = _offered(arguments.implementation, "tpu" if static else here)
        if static:
            static_cost.require_libtpu()
            offered = [static_cost.without_kernel(implementation) for implementation in offered]
    except ValueError as error:
        parser.error(str(error))  # exits with 2

    implementations = [i for i in offered if arguments.implementation or i.missing is None]
    about = _about(device, generation if static else None)
    print(_title(about), flush=True)
    for implementation in offered:
        if implementation not in implementations:
            print(f"  {implementation.name}: {implementation.missing}", flush=True)
    if not implementations:
        print("nothing to compare", file=sys.stderr)
        return 1
    plan = Plan(
        shapes, settings, implementations, directions, device,
        repeats=arguments.repeats or (5 if arguments.quick else 20),
        seconds=arguments.seconds or (0.5 if arguments.quick else 3.0),
        check=not arguments.skip_errors,
    )  # fmt: skip
    if here == "cpu" and not static and max(_work(shape) for shape in shapes) > 2**28:
        _say("on a CPU a row of such a shape takes minutes; --quick or --limit-length=N cuts it")
    if generation is not None and static:
        measured = static_cost.rows(plan, generation, _begin)
    else:
        measured = rows(plan, _begin)
    good = ("ok",) if arguments.implementation else ("ok", "not run")
    return _report(measured, len(plan), about, arguments.out, good)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m storm_kernels.ablate",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--shapes", action="append", default=[], metavar="SET,...", help=f"{', '.join(SETS)}")
    add("--shape", action="append", default=[], metavar="B,D,L[,N[,groups]]",
        help="batch, channels, length, state (16) and groups of B and C (none)")  # fmt: skip
    add("--implementation", action="append", default=[], metavar="NAME,...",
        help="default: all that can run here")  # fmt: skip
    add("--dtype", default="", metavar="DTYPE,...",
        help=f"of u, delta, z, B and C: {', '.join(DTYPES)}; default: bf16,f32")  # fmt: skip
    add("--direction", default="forward,backward", metavar="NAME,...",
        help="forward; backward: the vjp alone; both: in one program")  # fmt: skip
    add("--optional", default=",".join(FUSED), metavar="NAME,...",
        help=f"of {','.join(OPTIONAL)}, or none; default: {','.join(FUSED)}")  # fmt: skip
    add("--layout", default="bld", choices=("bld", "bdl"), help="of u, delta, z and y")
    add("--reverse", action="store_true", help="scan from the last position to the first")
    add("--platform", default="", metavar="NAME",
        help="cpu, gpu, tpu; tpu:v4, tpu:v5e, tpu:v5p, tpu:v6e: if that is not the TPU at hand, "
        "static cost by the compiler (needs libtpu)")  # fmt: skip
    add("--limit-length", type=_positive, metavar="N", help="cut every length to N")
    add("--quick", action="store_true",
        help="lengths up to 128, batches up to 2, f32, few repeats")  # fmt: skip
    add("--repeats", type=_positive, metavar="N", help="samples of a row (20)")
    add("--seconds", type=_seconds, metavar="S", help="time for them, at least 3 are taken (3.0)")
    add("--skip-errors", action="store_true", help="do not compare with float64")
    add("--out", type=pathlib.Path, metavar="DIR", help="also write files there")
    return parser


# --------------------------------------------------------------------------- reading the arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


def _listed(text: str, choices: Sequence[str], option: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in choices:
            raise ValueError(f"{option}: {name!r} is none of {', '.join(choices)}")
    if not names:
        raise ValueError(f"{option}={text!r} names nothing; there are {', '.join(choices)}")
    return list(dict.fromkeys(names))


def _platform(text: str) -> tuple[str, str | None]:
    """The platform ("" for JAX's own choice) and a TPU generation."""
    name, _, generation = text.partition(":")
    if name not in ("", "cpu", "gpu", "tpu"):
        raise ValueError(f"--platform: {text!r} is none of cpu, gpu, tpu, tpu:GENERATION")
    if generation and (name != "tpu" or generation not in floors.TPU_GENERATIONS):
        raise ValueError(
            f"--platform: {text!r} is not known; the TPU generations are "
            f"{', '.join(floors.TPU_GENERATIONS)}"
        )
    if ":" in text and not generation:
        raise ValueError(f"--platform: {text!r} lacks the generation, for example tpu:v5e")
    return name, generation or None


def _shapes(arguments: argparse.Namespace) -> list[Shape]:
    names = [n for text in arguments.shapes for n in _listed(text, tuple(SETS), "--shapes")]
    try:
        given = [parse_shape(text) for text in arguments.shape]
    except ValueError as error:
        raise ValueError(f"--shape: {error}") from None
    if not names and not given:
        names = ["storm_4b", "storm_7b"]
    length = arguments.limit_length or (128 if arguments.quick else None)
    batch = 2 if arguments.quick else None
    shapes = [shape for name in names for shape in SETS[name]] + given
    # Shapes that differed in what was cut are one now.
    return list(dict.fromkeys(shape.at_most(batch, length) for shape in shapes))


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    text = arguments.dtype or ("f32" if arguments.quick else "bf16,f32")
    dtypes = _listed(text, tuple(DTYPES), "--dtype")
    optional: list[str] = []
    if arguments.optional != "none":
        optional = _listed(arguments.optional, OPTIONAL, "--optional")
    return [Setting(d, tuple(optional), arguments.layout, arguments.reverse) for d in dtypes]


def _offered(given: Sequence[str], platform: str) -> list[Implementation]:
    names = [name for text in given for name in text.split(",") if name]
    try:
        found = [chosen(name, platform) for name in dict.fromkeys(names)] or every(platform)
    except ValueError as error:
        raise ValueError(f"--implementation: {error}") from None
    return found


def _choose_platform(name: str, generation: str | None) -> None:
    """Sets JAX's platform, before it looks for devices; the CPU stays, for the float64 values."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        # PyTorch needs some of the GPU's memory, most of which JAX would take at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if name == "cpu" or (generation is not None and not tpus):
        # libtpu's search for a TPU that is not there takes long and prints errors.
        jax.config.update("jax_platforms", "cpu")
    elif name == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")


def _device(wanted: str, generation: str | None) -> jax.Device:
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise ValueError(f"--platform={wanted}: {' '.join(str(error).split())}") from None
    if wanted == "tpu" and generation is None and device.platform != "tpu":
        raise ValueError(
            "--platform=tpu: JAX sees no TPU here; --platform=tpu:GENERATION gives the static cost "
            f"on {', '.join(floors.TPU_GENERATIONS)}"
        )
    if wanted == "gpu" and _common(device) != "gpu":
        raise ValueError("--platform=gpu: JAX sees no GPU here (pip install 'storm_jax[cuda]')")
    return device


def _common(device: jax.Device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _work(shape: Shape) -> int:
    return shape.batch * shape.length * shape.channels * shape.state


# --------------------------------------------------------------------------------------- reporting


def _report(measured, total: int, about: dict, out: pathlib.Path | None, good) -> int:
    """Shows the rows as they come and all of them at the end; the exit status."""
    lines = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(out / "results.jsonl", about)
    done: list[Row] = []
    status = 0
    try:
        for row in measured:
            done.append(row)
            _say(f"  [{len(done)}/{total}] {_outcome(row)}")
            if lines is not None:
                lines.write(row)
    except KeyboardInterrupt:
        status = 1
        _say(f"\ninterrupted after {len(done)} of {total} rows")
    if not done:
        return 1
    text = table(done)
    print(f"\n{text}")
    if out is not None:
        (out / "table.txt").write_text(f"{_title(about)}\n\n{text}\n")
        _say(f"written: {out / 'results.jsonl'}, {out / 'table.txt'}{_plotted(done, out, about)}")
    return 1 if any(row.status not in good for row in done) else status


def _plotted(done: Sequence[Row], out: pathlib.Path, about: dict) -> str:
    try:
        drawn = plot.draw(done, out / "times.png", _title(about))
    except ImportError:
        return "; no plot: matplotlib is not installed"
    return f", {out / 'times.png'}" if drawn else "; no plot: no row has a time"


def _outcome(row: Row) -> str:
    time = "" if row.ms is None else f"{digits(row.ms)} ms"
    if row.status == "ok":
        return time
    return f"{time}{', ' if time else ''}{row.status.upper()}: {row.message[:160]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _begin(label: str) -> None:
    """Half a line: what is being measured; its outcome ends it."""
    print(label, end="", file=sys.stderr, flush=True)


def _about(device: jax.Device, generation: str | None) -> dict[str, object]:
    """What every record carries about where and with what it was measured."""
    packages = ("jax", "jaxlib", "libtpu", "triton", "jax-triton", "torch", "mamba-ssm", "ejkernel")
    versions = {"python": platform.python_version()}
    for package in (*packages, "storm-jax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    where = {"platform": device.platform, "device": device.device_kind}
    if generation is not None:
        where = {"platform": "tpu", "device": f"{generation}, static cost"}
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**where, "host_cores": os.cpu_count(), "versions": versions, "begun": begun}


def _title(about: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']} ({versions})"


if __name__ == "__main__":
    sys.exit(main())
