"""Times the selective scan on this machine's CPU: `python benchmarks/scan_cpu.py`.

Compares `xla` with a plain `lax.scan` that JAX differentiates (`reference`), in one run and turn by
turn, so that other load on the machine meets both. Prints a table and writes
`benchmarks/results/scan_cpu.json`. Times are milliseconds, median (lowest to highest).
"""

import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "kernels"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402

from storm_kernels.selective_scan import selective_scan  # noqa: E402
from storm_kernels.selective_scan.shapes import default_chunk  # noqa: E402

IMPLEMENTATIONS = ("reference", "xla")
# name: (batch, length, channels, state, with D + z + bias + softplus, repetitions)
CASES = {
    "long": (1, 32768, 512, 16, False, 3),
    "long, everything fused": (1, 32768, 512, 16, True, 3),
    "demo": (64, 128, 128, 16, False, 15),
    "demo, everything fused": (64, 128, 128, 16, True, 15),
}


def operands(batch, length, channels, state, fused):
    """Float32 operands with Mamba's own initialisation: A = -(1..state), dt in 1e-3..0.1."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (batch, length, channels)))
    case = {
        "u": normal(batch, length, channels),
        "delta": jnp.asarray(dt, jnp.float32),
        "A": jnp.asarray(np.tile(-np.arange(1.0, state + 1), (channels, 1)), jnp.float32),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
    }
    if fused:
        case |= {"D": normal(channels), "z": normal(batch, length, channels)}
        case |= {"delta_bias": 0.1 * normal(channels) - 3}
    return case


def compiled(implementation, case, fused):
    def scan(case):
        return selective_scan(**case, delta_softplus=fused, implementation=implementation)

    def loss(case, weights):
        return jnp.sum(scan(case) * weights)

    weights = jnp.cos(case["u"])
    forward = jax.jit(scan).lower(case).compile()
    both = jax.jit(jax.value_and_grad(loss)).lower(case, weights).compile()
    return {
        "forward": (lambda: forward(case), forward),
        "forward + backward": (lambda: both(case, weights), both),
    }


def measure(name):
    batch, length, channels, state, fused, repetitions = CASES[name]
    case = operands(batch, length, channels, state, fused)
    programs = {i: compiled(i, case, fused) for i in IMPLEMENTATIONS}
    rows = []
    for direction in ("forward", "forward + backward"):
        times = {i: [] for i in IMPLEMENTATIONS}
        for repetition in range(repetitions + 1):
            for implementation in IMPLEMENTATIONS:
                start = time.perf_counter()
                jax.block_until_ready(programs[implementation][direction][0]())
                if repetition:  # the first one warms up
                    times[implementation].append(1e3 * (time.perf_counter() - start))
        for implementation in IMPLEMENTATIONS:
            memory = programs[implementation][direction][1].memory_analysis()
            ms = times[implementation]
            rows.append(
                {
                    "case": name,
                    "shape": {"B": batch, "L": length, "E": channels, "G": state},
                    "direction": direction,
                    "implementation": implementation,
                    "median_ms": round(statistics.median(ms), 2),
                    "lowest_ms": round(min(ms), 2),
                    "highest_ms": round(max(ms), 2),
                    "repetitions": repetitions,
                    "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
                    "median_over_reference": round(
                        statistics.median(ms) / statistics.median(times["reference"]), 3
                    ),
                }
            )
    return rows


def main():
    device = {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "dtype": "float32",
        "chunk": default_chunk("cpu"),
    }
    print(device)
    print(f"{'case':24} {'direction':19} {'':10} {'ms':>30} {'temp MiB':>9} {'of reference':>13}")
    rows = []
    path = HERE / "results" / "scan_cpu.json"
    path.parent.mkdir(exist_ok=True)
    for name in CASES:
        for row in measure(name):
            rows.append(row)
            ms = f"{row['median_ms']:.1f} ({row['lowest_ms']:.1f} to {row['highest_ms']:.1f})"
            print(
                f"{name:24} {row['direction']:19} {row['implementation']:10} {ms:>30} "
                f"{row['temporaries_mib']:9.1f} {row['median_over_reference']:13.3f}",
                flush=True,
            )
        # After every case, so that a run cut short leaves what it measured.
        device["load_average_after"] = round(os.getloadavg()[0], 2)
        path.write_text(json.dumps({"machine": device, "rows": rows}, indent=1) + "\n")
    print(f"written to {path.relative_to(HERE.parent)}")


def processor():
    """The processor's name where Linux tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
