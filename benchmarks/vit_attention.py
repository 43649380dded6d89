"""Times attention for heads of 72 channels, SigLIP-So400m's, by our kernels and by the others.

Run `python benchmarks/vit_attention.py` on an NVIDIA GPU of compute capability 9.0 with the extra
`cuda`. bfloat16, [64, N, 16, 72], every query sees every key; a time is that of 10 queued calls
divided by their number: median, lowest and highest of 5 such, in milliseconds. The backward pass is
timed alone, with all that it does outside of kernels. "error" is the largest difference to float64
over what roundings to bfloat16 explain, in two of the heads; "late" are keys whose scores are far
above those of the first hundred; "rms" are the root mean squares of the errors of the gradients of
q, k and v over those of the gradients. Where the other is XLA, cuDNN computes no gradient of such a
number of tokens. Writes benchmarks/results/vit_attention.json.
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


def rms(gradients, arguments) -> list[float]:
    """Relative errors of the gradients of q, k and v, in one head."""
    q, k, v, dy, *got = (np.asarray(x[-1, :, -1], np.float64) for x in (*arguments, *gradients))
    scores = q @ k.T * SCALE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    of_scores = p * (dy @ v.T - np.sum(p @ v * dy, -1, keepdims=True)) * SCALE
    wanted = of_scores @ k, of_scores.T @ q, p.T @ dy
    return [
        float(np.sqrt(np.mean((x - want) ** 2) / np.mean(want**2)))
        for x, want in zip(got, wanted, strict=True)
    ]


def backward(function, plain) -> dict:
    dy = jax.random.normal(jax.random.key(1), plain[0].shape, jnp.bfloat16)
    _, pull = jax.jit(lambda *args: jax.vjp(function, *args))(*plain)
    call = jax.jit(lambda pull, dy: pull(dy))
    return {"ms": timed(call, (pull, dy)), "rms": rms(call(pull, dy), [*plain, dy])}


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
        other = functions["cudnn"]
        if N % 2:
            other = functools.partial(jax.nn.dot_product_attention, scale=SCALE)
        result[f"{N}, backward"] = {
            "kernel": backward(functions["kernel"], plain),
            "xla" if N % 2 else "cudnn": backward(other, plain),
        }
        print(N, json.dumps(result[str(N)]), json.dumps(result[f"{N}, backward"]), flush=True)
    (HERE / "results" / "vit_attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
