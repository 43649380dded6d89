"""Times what one token of one row does to its cache: rotary angles, the write and attention.

    python benchmarks/token_attention.py [--only=qwen2_7b] [--cut=PROGRAMS,TILE,STAGES,WARPS ...]
        [--out=FILE.json]

Run it on an NVIDIA GPU with the extra `cuda`. A time is that of kernels alone, by the profiler: the
median, lowest and highest over caches that together do not fit the GPU's own, twice each; they are
donated. "parts" turns, writes and reads the slots, "whole" adds what its programs found, "both" is
their sum without what passes between them. XLA's time is the sum of its kernels' over the number of
caches, and so is "all", which shows what runs beside ours, such as copies of a cache. XLA reads
empty slots too. "tb_per_s" counts slots that are not empty. "error" is the largest difference to
float64 over the largest result. `--cut` tries other ways to cut the slots into programs.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.matvec import kernels  # noqa: E402
from storm_jax.inference import cache as slots  # noqa: E402
from storm_jax.inference.token_attention import turned  # noqa: E402
from storm_jax.models.attention_kernels import masked_attention  # noqa: E402
from storm_jax.models.layers import rotary  # noqa: E402
from storm_kernels.token_attention import gpu, token_attention  # noqa: E402

_CACHE = 200e6  # bytes: more than a GPU keeps
_REPEATS = 3  # the first is not counted


class Case(NamedTuple):
    kv_heads: int
    heads: int  # of a key-value head
    head_dim: int
    slots: int
    position: int  # of the token
    softcap: float = 0.0


CASES = {
    "qwen2_7b": Case(4, 7, 128, 10240, 8256),
    "qwen2_7b, few": Case(4, 7, 128, 10240, 1000),
    "qwen2_7b, short": Case(4, 7, 128, 2048, 2000),
    "qwen2_7b, long": Case(4, 7, 128, 65536, 65000),
    "gemma3_1b": Case(1, 4, 256, 10240, 8256),
    "gemma3_1b, window": Case(1, 4, 256, 512, 8256),
    "gemma3_4b": Case(4, 2, 256, 10240, 8256),
    "gemma3_4b, window": Case(4, 2, 256, 1024, 8256),
    "gemma2_2b": Case(4, 2, 256, 10240, 8256, 50.0),
}


@jax.jit
def normal(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(key, like.shape, like.dtype)


def attend_by_xla(qkv, cos, sin, k_BTKC, v_BTKC, position_B, scale: float, softcap: float):
    """What a decoder does without our kernel: the result and the cache."""
    q, k, v = turned(qkv[:, None], cos[:, None], sin[:, None])
    k_BTKC = slots.write_token(k_BTKC, k[:, 0], position_B)
    v_BTKC = slots.write_token(v_BTKC, v[:, 0], position_B)
    B, S, K, G, C = q.shape
    mask = (jnp.arange(k_BTKC.shape[1]) <= position_B[:, None])[:, None]
    out = masked_attention(q.reshape(B, S, K * G, C), k_BTKC, v_BTKC, mask, scale, softcap)
    return out.reshape(B, K, G, C), k_BTKC, v_BTKC


def reference(qkv, cos, sin, k_BTKC, v_BTKC, case: Case, scale: float) -> np.ndarray:
    """The result in float64."""
    T, at = case.slots, case.position
    q, new_k, new_v = turned(qkv[:, None], cos[:, None], sin[:, None])
    filled = min(at + 1, T)
    k, v = (
        np.asarray(x[0].at[at % T].set(new[0, 0])[:filled].astype(jnp.float32), np.float64)
        for x, new in ((k_BTKC, new_k), (v_BTKC, new_v))
    )
    s = scale * (np.asarray(q[0, 0].astype(jnp.float32), np.float64) @ k.transpose(1, 2, 0))
    if case.softcap:
        s = case.softcap * np.tanh(s / case.softcap)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v.swapaxes(0, 1)


def times(us: list[float]) -> dict:
    return {"us": statistics.median(us), "range": [min(us), max(us)]}


def measure(case: Case, cuts) -> dict:
    """Our kernels, by cut, and XLA."""
    K, G, C, T, at, softcap = case
    one = jnp.zeros((1, T, K, C), jnp.bfloat16)
    copies = min(max(2, math.ceil(_CACHE / 2 / one.nbytes)), 40)
    keys = iter(jax.random.split(jax.random.key(0), 2 * copies + 1))
    caches = [(normal(next(keys), one), normal(next(keys), one)) for _ in range(copies)]
    qkv = normal(next(keys), jnp.zeros((1, K, G + 2, C), jnp.bfloat16))
    # A sharp softmax: its result is not the mean of all values, which is nearly zero.
    scale = 3 / math.sqrt(C)
    position = jnp.full(1, at, jnp.int32)
    cos, sin = (x[0] for x in rotary(position[None], C, 1e6))
    gigabytes = 2 * min(at, T) * K * C * 2 / 1e9
    # Before a call overwrites the cache: what it writes is the same each time.
    want = reference(qkv, cos, sin, *caches[0], case, scale)

    def each(attend):
        """A function of all caches, which it gives back."""

        def call(qkv, cos, sin, position, caches):
            found = [attend(qkv, cos, sin, k, v, position) for k, v in caches]
            return [out for out, _, _ in found], [(k, v) for _, k, v in found]

        return jax.jit(call, donate_argnums=4)

    def ours(qkv, cos, sin, k, v, position):
        return token_attention(
            qkv, cos, sin, k, v, position, position, scale=scale, softcap=softcap
        )

    def xla(*args):
        return attend_by_xla(*args, scale, softcap)

    def run(call):
        nonlocal caches
        got, caches = jax.block_until_ready(call(qkv, cos, sin, position, caches))
        off = np.abs(np.asarray(got[0][0].astype(jnp.float32), np.float64) - want)
        with kernels() as found:
            for _ in range(_REPEATS):
                _, caches = jax.block_until_ready(call(qkv, cos, sin, position, caches))
        busy = sum(us for _, us, _ in found) / _REPEATS / copies
        return found, busy, float(off.max() / np.abs(want).max())

    result: dict = {
        "case": case._asdict(), "megabytes": 1e3 * gigabytes, "copies": copies, "kernel": [],
    }  # fmt: skip
    rule = gpu._cut
    for cut in [rule(C), *(gpu._Cut(*cut) for cut in cuts)]:
        gpu._cut = lambda _, cut=cut: cut
        found, busy, off = run(each(ours))
        gpu._cut = rule
        parts, whole = (
            [us for _, us, name in found if kernel in name][copies:]
            for kernel in ("token_attention_parts", "token_attention_whole")
        )
        both = times([a + b for a, b in zip(parts, whole, strict=True)])
        result["kernel"].append({
            "cut": cut, "both": both, "parts": times(parts), "whole": times(whole), "all": busy,
            "tb_per_s": gigabytes / both["us"] * 1e3, "error": off,
        })  # fmt: skip
    found, busy, off = run(each(xla))
    result["xla"] = {
        "us": busy, "kernels": len(found) / _REPEATS / copies,
        "tb_per_s": gigabytes / busy * 1e3, "error": off,
    }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names start so")
    parser.add_argument("--cut", action="append", default=[], metavar="PROGRAMS,TILE,STAGES,WARPS")
    parser.add_argument(
        "--out", default=str(ROOT / "benchmarks" / "results" / "token_attention.json")
    )
    args = parser.parse_args()
    cuts = [tuple(map(int, cut.split(","))) for cut in args.cut]
    result: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name, case in CASES.items():
        if name.startswith(args.only):
            result[name] = measure(case, cuts)
            print(name, json.dumps(result[name]), flush=True)
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
