"""Times products of a matrix and one token at a decoder's shapes: our kernel, and XLA.

    python benchmarks/matvec.py [--size=qwen2_7b] [--cut=ROWS,WARPS,BLOCKS ...] [--out=FILE.json]

Run it on an NVIDIA GPU with the extra `cuda`. A time is that of kernels alone, by the profiler: the
median, lowest and highest over copies of the matrix that together do not fit the GPU's cache, twice
each. `--cut` tries other ways to cut a product into programs. "error" is the largest difference to
float64 of the first 64 outputs over the largest of them. XLA's time is the sum of its kernels' over
the number of products; it does the product alone, ours the norm, gate or residual too.
"""

import argparse
import contextlib
import functools
import glob
import gzip
import json
import math
import pathlib
import statistics
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import qwix  # noqa: E402

from benchmarks.train_step import configured  # noqa: E402
from storm_jax.inference.linear import apply  # noqa: E402
from storm_kernels import matvec  # noqa: E402
from storm_kernels.matvec import gpu  # noqa: E402

DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
_CACHE = 200e6  # bytes: more than a GPU keeps
_REPEATS = 3  # the first is not counted


def shapes(decoder) -> dict[str, tuple[int, int, str, bool]]:
    """Outputs, inputs, activation and whether there is a norm, of each product of a token."""
    heads = decoder.heads * decoder.head_dim
    keys = 2 * decoder.kv_heads * decoder.head_dim
    return {
        "qkv": (heads + keys, decoder.width, "", True),
        "out": (decoder.width, heads, "", False),
        "gate_up": (decoder.mlp, decoder.width, decoder.activation, True),
        "down": (decoder.width, decoder.mlp, "", False),
        "head": (decoder.vocab_size, decoder.width, "", True),
    }


@contextlib.contextmanager
def kernels():
    """A list that afterwards holds start, duration (both in us) and name of what ran on the GPU."""
    found: list[tuple[float, float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield found
        (path,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"
    }
    for e in events:
        of_gpu = e.get("ph") == "X" and "GPU" in processes.get(e["pid"], "")
        if of_gpu and "Stream" in threads.get((e["pid"], e["tid"]), ""):
            found.append((e["ts"], e["dur"], e["name"]))
    found.sort()


@functools.partial(jax.jit, static_argnums=(0, 1))
def matrix(dtype: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return (jax.random.normal(key, shape) / math.sqrt(shape[-1])).astype(dtype)


def measure(dtype: str, R: int, C: int, activation: str, has_norm: bool, cuts) -> dict:
    """Our kernel, by cut, and XLA."""
    shape = (2, R, C) if activation else (R, C)
    copies = max(2, math.ceil(_CACHE / math.prod(shape) / jnp.dtype(dtype).itemsize))
    ws = [matrix(dtype, shape, jax.random.key(i)) for i in range(copies)]
    x = jax.random.normal(jax.random.key(copies), (C,), jnp.bfloat16)
    scale = None if dtype == "bfloat16" else jnp.full(shape[:-1], 0.01)
    norm = matvec.Norm(jnp.ones(C), 1e-6) if has_norm else None
    residual = None if activation or has_norm else jnp.zeros(R, jnp.bfloat16)

    def ours(x, *ws):
        return [
            matvec.matvec(
                x, w, scale_R=scale, norm=norm, activation=activation, residual_R=residual
            )
            for w in ws
        ]

    def xla(x, *ws):
        if scale is not None:
            ws = [qwix.QArray(w, scale[..., None], None, w.dtype) for w in ws]
        return [apply(x[None, None], w, 1) for w in ws]

    def run(call):
        jax.block_until_ready(call(x, *ws))
        with kernels() as found:
            for _ in range(_REPEATS):
                jax.block_until_ready(call(x, *ws))
        return found

    exact = np.asarray(x, np.float64)
    if has_norm:
        exact = exact / np.sqrt(np.mean(exact**2) + 1e-6)
    want = np.asarray(ws[0][..., :64, :].astype(jnp.float32), np.float64) @ exact
    want = want * (1 if scale is None else 0.01)
    if activation:
        gate, up = want
        assert activation == "silu", activation
        want = gate / (1 + np.exp(-gate)) * up

    gigabytes = ws[0].nbytes / 1e9
    result: dict = {"shape": shape, "megabytes": 1e3 * gigabytes, "copies": copies, "kernel": []}
    rule = gpu._cut
    own = rule(R, C * jnp.dtype(dtype).itemsize // 4, bool(activation))
    for cut in [own, *(gpu._Cut(*cut) for cut in cuts)]:
        gpu._cut = lambda *_, cut=cut: cut
        call = jax.jit(lambda *args: ours(*args))  # its own: traced with this cut
        got = np.asarray(call(x, *ws)[0][:64], np.float64)
        times = [us for _, us, name in run(call) if "matvec" in name][copies:]
        gpu._cut = rule
        middle = statistics.median(times)
        result["kernel"].append({
            "cut": cut, "us": middle, "range": [min(times), max(times)],
            "tb_per_s": gigabytes / middle * 1e3,
            "error": float(np.max(np.abs(got - want)) / np.max(np.abs(want))),
        })  # fmt: skip
    found = run(jax.jit(xla))
    busy = sum(us for _, us, _ in found) / _REPEATS / copies
    result["xla"] = {"us": busy, "tb_per_s": gigabytes / busy * 1e3}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="qwen2_7b", help="of configs/long.py")
    parser.add_argument("--cut", action="append", default=[], metavar="ROWS,WARPS,BLOCKS")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "matvec.json"))
    args = parser.parse_args()
    cuts = [tuple(map(int, cut.split(","))) for cut in args.cut]
    result: dict = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "size": args.size,
    }  # fmt: skip
    for name, shape in shapes(configured("long", args.size, []).model.decoder).items():
        for dtype in DTYPES:
            result[f"{name}, {dtype}"] = measure(dtype, *shape, cuts)
            print(name, dtype, json.dumps(result[f"{name}, {dtype}"]), flush=True)
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
