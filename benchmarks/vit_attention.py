"""Times attention for heads of 72 channels, SigLIP-So400m's, by our kernel and by cuDNN.

Run `python benchmarks/vit_attention.py` on an NVIDIA GPU of compute capability 9.0 with the extra
`cuda`. bfloat16, [64, N, 16, 72], every query sees every key; a time is that of 10 queued calls
divided by their number: median, lowest and highest of 5 such, in milliseconds. "error" is the
largest difference to float64 over what roundings to bfloat16 explain, in two of the heads; "late"
are keys whose scores are far above those of the first hundred. Writes
benchmarks/results/vit_attention.json.
"""

import functools
import json
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from storm_kernels.attention import attention  # noqa: E402

TOKENS = (1024, 729, 256)
SCALE = 72**-0.5


def operands(N: int, late: bool) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (64, N, 16, 72), jnp.bfloat16) for key in keys)
    if late:
        k = k * jnp.where(jnp.arange(N) < 100, 1, 60).astype(jnp.bfloat16)[:, None, None]
    return [q, k, v]


def error(result: jax.Array, arguments: list[jax.Array]) -> float:
    """Above 1, or NaN: wrong."""
    found = []
    for row, head in ((0, 0), (-1, -1)):
        y, q, k, v = (np.asarray(x[row, :, head], np.float64) for x in (result, *arguments))
        scores = q @ k.T * SCALE
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        want = weights @ v
        # Half a unit in the last of 8 places: of each weight, of their sum, and of the result.
        bound = 2.0**-9 * 1.02 * (weights @ np.abs(v) + 2 * np.abs(want)) + 1e-6
        found.append(np.max(np.abs(y - want) / bound))
    return float(np.max(found))


def timed(function, arguments) -> dict[str, float]:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - began) / 10)
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


def main() -> None:
    functions = {
        "kernel": jax.jit(functools.partial(attention, scale=SCALE)),
        "cudnn": jax.jit(
            functools.partial(
                jax.nn.dot_product_attention, scale=SCALE, implementation="cudnn"
            )  # fmt: skip
        ),
    }
    result: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for N in TOKENS:
        plain, late = operands(N, False), operands(N, True)
        result[str(N)] = {
            name: {
                "ms": timed(function, plain),
                "error": error(function(*plain), plain),
                "error, late": error(function(*late), late),
            }
            for name, function in functions.items()
        }
        print(N, json.dumps(result[str(N)]), flush=True)
    (HERE / "results" / "vit_attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
