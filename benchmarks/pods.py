"""Compiles recipes for pods and clusters, and makes the table of docs/compile.md.

Run `python benchmarks/pods.py [CASE…]` (default: `CASES`), a topology that may be followed by
`*SLICES`, a recipe, and overrides: "v5p:8x8x8*2 long.py:cluster=v5p_512 mesh.data=8". Reports go to
benchmarks/results/pods/; the table is made of all that lie there and put between the marks of
docs/compile.md; `--table` makes it alone. Needs libtpu, and JAX's CUDA plug-in for GPUs; no
accelerator. Some minutes and 6 GiB each.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "pods"
PAGE = ROOT / "docs" / "compile.md"
MARKS = "<!-- table: benchmarks/pods.py -->", "<!-- end of table -->"
CASES = (
    "v5e:16x16 long.py:cluster=v5e_256",
    "v6e:16x16 long.py:cluster=v6e_256",
    "v5p:8x8x8 long.py:cluster=v5p_512",
    "v5p:8x8x8 hour.py:cluster=v5p_512",
)


def file_of(case: str) -> pathlib.Path:
    """Where the report of a case goes."""
    return RESULTS / (re.sub(r"[^\w.=-]+", "_", case) + ".json")


def compile_case(case: str) -> None:
    """Runs `storm_jax.compile`; that a step does not fit is a result too."""
    place, recipe, *overrides = case.split()
    topology, _, slices = place.partition("*")
    command = [
        *(sys.executable, "-m", "storm_jax.compile", f"--config=configs/{recipe}", "--noadvice"),
        *(f"--topology={topology}", f"--slices={slices or 1}", f"--json={file_of(case)}"),
        *(f"--config.{override}" for override in overrides),
    ]
    paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    print(case, flush=True)
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode not in (0, 1):
        sys.exit(f"{case}: the command failed")


def is_sliced(report: dict) -> bool:
    """Whether it is of several TPU slices; hosts of GPUs stand in the topology's name."""
    return report["compiler"] == "libtpu" and report["slices"] > 1


def row(report: dict) -> str:
    """A line of the table."""
    mesh = " ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    memory, counted = report["memory"], report["counted"]
    gib = [f"{memory[name] / 2**30:.1f}" for name in ("total", "available")]
    cells = [
        report["topology"] + (f" x {report['slices']}" if is_sliced(report) else ""),
        report["config"],
        mesh,
        f"{report['batch']}" + (f" / {a}" if (a := report["accumulation"]) > 1 else ""),
        remat(report["remat"]),
        f"{gib[0]} of {gib[1]}" + ("" if report["fits"] else ", does not fit"),
    ]
    if counted is None:
        return "| " + " | ".join([*cells, *["" for _ in range(4)]]) + " |"
    times = counted["roofline"]
    low, high = counted["speed"]["step_seconds"]
    mfu = counted["speed"]["mfu"]
    cells += [
        " / ".join(f"{times[name]:.2f}" for name in ("compute", "hbm", "ici", "network")),
        f"{low:.2f} to {high:.2f}",
        f"{counted['speed']['tokens_per_second'][1] / 1e6:.2f}M to"
        f" {counted['speed']['tokens_per_second'][0] / 1e6:.2f}M",
        f"{mfu[1]:.0%} to {mfu[0]:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def remat(policies: dict) -> str:
    """Policies in few words."""
    calls = ", ViT calls" if policies["vit_calls"] else ""
    said = {}
    for part in ("vit", "temporal", "decoder"):
        how = policies[part]
        keeps = how["policy"] in ("names", "offload")
        said[part] = how["policy"] + (f" ({', '.join(how['saved'])})" if keeps else "")
    same = len(set(said.values())) == 1
    return (said["vit"] if same else ", ".join(f"{p} {how}" for p, how in said.items())) + calls


def table() -> str:
    """All reports, as Markdown."""
    head = (
        "topology", "config", "mesh", "rows / microbatches", "remat", "GiB of a device",
        "s: compute / HBM / ICI / network", "step, s", "tokens/s", "MFU",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [row(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"))]
    return "\n".join(lines)


def main(cases: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for case in cases:
        compile_case(case)
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main([] if sys.argv[1:] == ["--table"] else sys.argv[1:] or list(CASES))
