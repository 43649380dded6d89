"""Times the selective scan on this machine's CPU: `python benchmarks/scan_cpu.py`.

Compares `xla` with the plain forms that JAX differentiates: a `lax.scan` (`reference`) and an
associative scan, in chunks whose states are recomputed and, where that fits, of the whole length.
All in one run and turn by turn, so that other load on the machine meets all. Prints a table and
writes `benchmarks/results/scan_cpu.json`. Times are milliseconds, median (lowest to highest).
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

# Chunks of the plain associative scan; the whole length where all states take up to 64 MiB.
FORMS = ("xla", "reference", "associative 64", "associative whole")
# name: (batch, length, channels, state, with D + z + bias + softplus, repetitions)
CASES = {
    "long": (1, 32768, 512, 16, False, 3),
    "long, everything fused": (1, 32768, 512, 16, True, 3),
    "demo": (64, 128, 128, 16, False, 15),
    "demo, everything fused": (64, 128, 128, 16, True, 15),
    "4b, everything fused": (1, 4096, 2304, 16, True, 3),
    "mamba_ssm's test, 4096": (2, 4096, 4, 8, True, 40),
    "mamba_ssm's test, 128": (2, 128, 4, 8, True, 40),
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


def associative(case, fused, chunk):
    """The scan as it is usually written in JAX: `lax.associative_scan` over (decay, inflow)."""
    u, z = case["u"], case.get("z")
    batch, length, channels = u.shape
    chunk = min(chunk, length)
    dt = case["delta"] + case.get("delta_bias", 0)
    dt = jax.nn.softplus(dt) if fused else dt

    @jax.checkpoint
    def body(h, operands):
        dt, x, B, C = operands  # [chunk, batch, ...]
        decay = jnp.exp(dt[..., None] * case["A"])
        inflow = (x[..., None] * B[:, :, None, :]).at[0].add(decay[0] * h)
        states = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, inflow)
        )[1]
        return states[-1], jnp.einsum("tbeg,tbg->tbe", states, C)

    def chunks(x):
        return jnp.moveaxis(x, 1, 0).reshape(length // chunk, chunk, batch, -1)

    h = jnp.zeros((batch, *case["A"].shape))
    y = jax.lax.scan(body, h, tuple(chunks(x) for x in (dt, dt * u, case["B"], case["C"])))[1]
    y = jnp.moveaxis(y.reshape(length, batch, channels), 0, 1)
    if fused:
        y = (y + case["D"] * u) * jax.nn.silu(z)
    return y


def forms(case):
    """Those of `FORMS` that fit."""
    states = 4 * case["u"].size * case["A"].shape[1]
    return [f for f in FORMS if f != "associative whole" or states <= 2**26]


def compiled(form, case, fused):
    def scan(case):
        if form.startswith("associative"):
            size = form.split()[1]
            chunk = case["u"].shape[1] if size == "whole" else int(size)
            return associative(case, fused, chunk)
        return selective_scan(**case, delta_softplus=fused, implementation=form)

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
    programs = {form: compiled(form, case, fused) for form in forms(case)}
    if programs["reference"]["forward + backward"][1].memory_analysis().temp_size_in_bytes > 2**33:
        del programs["reference"]
    expected = programs["xla"]["forward"][0]()
    for form in programs:  # all of them compute the same
        np.testing.assert_allclose(programs[form]["forward"][0](), expected, 1e-3, 1e-3)
    rows = []
    for direction in ("forward", "forward + backward"):
        times = {form: [] for form in programs}
        for repetition in range(repetitions + 1):
            for form in programs:
                start = time.perf_counter()
                jax.block_until_ready(programs[form][direction][0]())
                if repetition:  # the first one warms up
                    times[form].append(1e3 * (time.perf_counter() - start))
        best = min(min(ms) for form, ms in times.items() if form != "xla")
        for form, ms in times.items():
            memory = programs[form][direction][1].memory_analysis()
            rows.append(
                {
                    "case": name,
                    "shape": {"B": batch, "L": length, "E": channels, "G": state},
                    "direction": direction,
                    "form": form,
                    "median_ms": round(statistics.median(ms), 2),
                    "lowest_ms": round(min(ms), 2),
                    "highest_ms": round(max(ms), 2),
                    "repetitions": repetitions,
                    "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
                    # Of the lowest times: other load lengthens the others.
                    "over_best_plain": round(min(ms) / best, 3),
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
    print(f"{'case':24} {'direction':19} {'':17} {'ms':>30} {'temp MiB':>9} {'of best plain':>13}")
    rows = []
    path = HERE / "results" / "scan_cpu.json"
    path.parent.mkdir(exist_ok=True)
    for name in CASES:
        for row in measure(name):
            rows.append(row)
            ms = f"{row['median_ms']:.1f} ({row['lowest_ms']:.1f} to {row['highest_ms']:.1f})"
            print(
                f"{name:24} {row['direction']:19} {row['form']:17} {ms:>30} "
                f"{row['temporaries_mib']:9.1f} {row['over_best_plain']:13.3f}",
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
