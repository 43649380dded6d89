"""Counts what the TPU scan kernels cost in their compiled form; needs libtpu and no TPU.

Run `python benchmarks/scan_tpu_static.py [GENERATION ...]`. Writes
benchmarks/results/tpu_static.json: bundles per register of state (1024 elements) and position,
slots by unit, spills, and the roofline of B=1, D=2304, L=65536 and B=1, D=7168, L=32768.
"""

import importlib.metadata
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "kernels"))

from storm_kernels import tpu_cost  # noqa: E402

STATE = 16
# A last block of 1024 channels that is not full has a second form of the loops in the backward:
# the loops are counted with full ones, times are for the blocks that a size fills.
COUNTED = {"batch": 1, "length": 1024, "channels": 7168, "state": STATE}
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
SHAPES = ((1, 65536, 2304), (1, 32768, 7168))  # batch, length, channels


def row(generation: str, dtype: str, fused: bool, backward: bool) -> dict:
    program = tpu_cost.scan_program(
        **COUNTED, dtype=dtype, fused=fused, backward=backward, segments=False
    )
    kernel = tpu_cost.scan_kernel(tpu_cost.compile_and_count(program, generation), backward)
    cost = tpu_cost.scan_cost(kernel, generation, STATE)
    rooflines = {}
    for batch, length, channels in SHAPES:
        size = {"batch": batch, "length": length, "channels": channels, "state": STATE}
        moved = tpu_cost.scan_hbm_bytes(
            **size, itemsize=4 if dtype == "float32" else 2, fused=fused, backward=backward
        )
        line = tpu_cost.roofline(cost, kernel, generation, **size, hbm_bytes=moved)
        times = {name: round(ms, 3) for name, ms in line.by_resource.items()}
        rooflines[f"{batch}x{length}x{channels}"] = {
            "ms": round(line.ms, 3), "resource": line.resource, "by_resource": times,
        }  # fmt: skip
    return {
        "generation": generation,
        "kernel": kernel.name,
        "dtype": dtype,
        "fused": fused,
        "bundles_per_vreg_step": round(cost.bundles, 3),
        "recurrence_bundles_per_vreg_step": round(cost.recurrence, 3),
        "overhead_bundles_per_vreg_step_of_one_block": round(cost.overhead, 3),
        "slots_per_vreg_step": {unit: round(n, 3) for unit, n in cost.slots.items()},
        "spills": cost.spills,
        "kernel_bundles": kernel.bundles,
        "roofline": rooflines,
    }


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    about = {"versions": versions, "topologies": tpu_cost.TOPOLOGIES, "counted": COUNTED}
    path = HERE / "results" / "tpu_static.json"
    rows = []
    for dtype in ("bfloat16", "float32"):
        for generation in sys.argv[1:] or GENERATIONS:
            for fused in (False, True):
                for backward in (False, True):
                    rows.append(row(generation, dtype, fused, backward))
                    print({k: v for k, v in rows[-1].items() if k != "roofline"}, flush=True)
                    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
