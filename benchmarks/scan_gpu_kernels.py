"""Times the GPU kernels of the scan at the shapes for which peers were measured, and a Mamba layer.

Run `python benchmarks/scan_gpu_kernels.py` on an NVIDIA GPU with the extra `cuda`. Everything is
fused (z, D, bias, softplus), 16 states, layout "bdl", the rearrangement of B and C included. A time
is that of 10 queued calls (backward: 5) divided by their number: median, lowest and highest of 5
such, in milliseconds. The backward is the `jax.vjp` function alone, on saved residuals. Writes
benchmarks/results/scan_gpu_kernels.json.
"""

import json
import math
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from storm_jax.config import TemporalConfig  # noqa: E402
from storm_jax.models.temporal import MambaLayer  # noqa: E402
from storm_kernels.selective_scan import selective_scan  # noqa: E402

STATE = 16
# batch, channels, length; mamba_ssm 2.3.2.post1's CUDA kernel on an H100, torch 2.11+cu130:
# forward and backward in bfloat16, then in float32, ms.
SHAPES = {
    (1, 2304, 65536): (3.68, 11.6, 5.99, 12.9),
    (1, 7168, 32768): (5.37, 17.8, 9.46, 20.3),
    (1, 7168, 16384): (2.67, 9.17, 4.76, 10.0),
    (1, 2304, 8192): (0.468, 1.61, 0.760, 1.65),
    (2, 4608, 16384): (3.19, 10.9, 5.83, 12.3),
    (8, 2048, 4096): (1.17, 4.83, 2.37, 5.55),
    (32, 2304, 1024): (1.25, 5.29, 2.52, 6.41),
}
LAYER = (3584, 32768)  # width, tokens


def timed(function, arguments, calls: int) -> dict[str, float]:
    """Milliseconds of one of `calls` queued calls: median, lowest and highest of 5 runs."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


def operands(batch: int, channels: int, length: int, dtype) -> dict[str, jax.Array]:
    """Mamba's initial A and step sizes, normal for the rest."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    rows, coefficients = (batch, channels, length), (batch, length, STATE)
    low, high = math.log(0.001), math.log(0.1)
    dt = jnp.exp(jax.random.uniform(next(keys), (channels,), minval=low, maxval=high))
    return {
        "u": normal(*rows),
        "delta": 0.5 * normal(*rows),
        "A": -jnp.tile(jnp.arange(1.0, STATE + 1), (channels, 1)),
        "B": normal(*coefficients),
        "C": normal(*coefficients),
        "D": normal(channels, dtype=jnp.float32),
        "z": normal(*rows),
        "delta_bias": jnp.log(jnp.expm1(dt)),
    }


def scan_row(shape, dtype, peer) -> dict:
    """One shape and dtype: forward, backward, saved bytes, and the peer's times."""
    values = operands(*shape, dtype)
    names = list(values)

    @jax.jit
    def scan(*arguments):
        return selective_scan(
            **dict(zip(names, arguments, strict=True)),
            delta_softplus=True,
            layout="bdl",
            implementation="triton_gpu",
        )

    arguments = tuple(values.values())
    forward = timed(scan, arguments, 10)
    y, vjp = jax.vjp(scan, *arguments)
    backward = timed(jax.jit(lambda vjp, dy: vjp(dy)), (vjp, jnp.ones_like(y)), 5)
    kept = sum(x.nbytes for x in jax.tree.leaves(vjp)) - sum(x.nbytes for x in arguments)
    return {
        **dict(zip(("batch", "channels", "length"), shape, strict=True)),
        "dtype": jnp.dtype(dtype).name,
        "forward_ms": forward,
        "backward_ms": backward,
        "saved_beyond_operands_bytes": kept,
        "mamba_ssm_forward_ms": peer[0],
        "mamba_ssm_backward_ms": peer[1],
    }


def layer_row() -> dict:
    """A bidirectional Mamba layer of the model: norm, projections, convolutions, scans, gate."""
    width, tokens = LAYER
    config = TemporalConfig(layers=1)
    module = MambaLayer(config, width, nnx.Rngs(0))
    graph, parameters = nnx.split(module)
    x = jax.random.normal(jax.random.key(0), (1, tokens, width), jnp.bfloat16)
    segments = jnp.zeros((1, tokens), jnp.int32)

    @jax.jit
    def forward(parameters, x):
        return nnx.merge(graph, parameters)(x, segments)[0]

    def total(parameters, x):
        return jnp.sum(forward(parameters, x).astype(jnp.float32))

    both = jax.jit(jax.grad(total, argnums=(0, 1)))
    return {
        "width": width,
        "tokens": tokens,
        "forward_ms": timed(forward, (parameters, x), 10),
        "forward_and_backward_ms": timed(both, (parameters, x), 5),
    }


def main() -> None:
    rows = []
    for shape, peer in SHAPES.items():
        for dtype, times in ((jnp.bfloat16, peer[:2]), (jnp.float32, peer[2:])):
            rows.append(scan_row(shape, dtype, times))
            print(rows[-1], flush=True)
    layer = layer_row()
    print(layer, flush=True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "state": STATE}
    path = HERE / "results" / "scan_gpu_kernels.json"
    path.write_text(json.dumps({**about, "scans": rows, "layer": layer}, indent=1) + "\n")


if __name__ == "__main__":
    main()
