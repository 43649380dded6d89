"""Times the forms and chunks of the XLA scan on this machine's GPU.

Run `python benchmarks/scan_gpu.py`. `storm_kernels.selective_scan.shapes` takes its choice from
here. bfloat16 operands, float32 state, everything fused. Times are milliseconds, median of `n`
calls; writes benchmarks/results/scan_gpu.json.
"""

import json
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "kernels"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from storm_kernels.selective_scan import selective_scan, xla_chunk  # noqa: E402

SHAPES = ((1, 32768, 7168), (1, 65536, 2304), (64, 32, 128))  # batch, length, channels
STATE = 16
CHUNKS = {"associative": (16, 32, 64, 128, 256), "steps": (64, 256)}


def operands(batch: int, length: int, channels: int) -> tuple[jax.Array, ...]:
    """u, delta, A, B, C, D, z."""
    keys = jax.random.split(jax.random.key(0), 5)
    big, small = (batch, length, channels), (batch, length, STATE)
    u, z, delta = (jax.random.normal(key, big, jnp.bfloat16) for key in keys[:3])
    B, C = (jax.random.normal(key, small, jnp.bfloat16) for key in keys[3:])
    A = -jnp.tile(jnp.arange(1.0, STATE + 1), (channels, 1))
    return u, delta * 0.5 - 3, A, B, C, jnp.ones(channels), z


def timed(function, arguments) -> dict[str, float]:
    """Median, number of calls and compiled temporaries of one jitted function."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times: list[float] = []
    while len(times) < 5 and sum(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"ms": statistics.median(times) * 1e3, "n": len(times), "temp_mib": temporaries}


def main() -> None:
    rows = []
    for batch, length, channels in SHAPES:
        arguments = operands(batch, length, channels)
        segments = jnp.zeros((batch, length), jnp.int32)
        for form, chunks in CHUNKS.items():
            xla_chunk.ASSOCIATIVE_PLATFORMS = ("gpu",) if form == "associative" else ()
            for chunk in (c for c in chunks if c <= length):

                def scan(u, delta, A, B, C, D, z, chunk=chunk, segments=segments):
                    return selective_scan(
                        u, delta, A, B, C, D,
                        z=z, delta_softplus=True, segment_ids=segments, chunk_size=chunk,
                    )  # fmt: skip

                def total(*arguments, scan=scan):
                    return jnp.sum(scan(*arguments).astype(jnp.float32))

                row = {"batch": batch, "length": length, "channels": channels}
                row |= {"form": form, "chunk": chunk, "forward": timed(scan, arguments)}
                row["both"] = timed(jax.grad(total, argnums=tuple(range(7))), arguments)
                rows.append(row)
                print(row, flush=True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "state": STATE}
    path = HERE / "results" / "scan_gpu.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
