"""How far a model with random weights is off when it is quantized, against the weights as they are.

    python benchmarks/quantization_error.py --size=qwen2_7b --frames=128 --out=FILE.json

For each kind of quantization one process makes the same weights, encodes the same frames of random
pixels, and prefills a prompt of them and `--text` tokens. Reported against the model's own dtype:
error of the visual tokens and of the first token's scores, root mean square over root mean square,
the Kullback-Leibler divergence of the first token's distribution in nats, and whether its best
token is the same. "prefill alone" is the same for the visual tokens of the weights as they are.
Random weights make scores so large that one token has all the probability, so the divergence is
also given for scores that are divided by their standard deviation.
Random weights keep no direction from layer to layer as trained ones do: this is how roundings
spread, and says nothing about answers (`benchmarks/quantization.py` does, for a checkpoint).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

KINDS = ("", "int8", "fp8", "fp8_dynamic")


def outputs(args, kind: str, folder: pathlib.Path) -> None:
    """Writes the visual tokens and the first token's scores of one kind."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.train_step import configured
    from storm_jax.config import VISUAL
    from storm_jax.inference import load
    from storm_jax.inference.cache import empty_cache
    from storm_jax.inference.prefill import Encoder
    from storm_jax.inference.vit import compiler_options

    run = configured("long", args.size, args.set)
    reduction = dataclasses.replace(run.model.reduction, temporal_pool=args.pool)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, reduction=reduction))
    loaded = load.random(run, quantization=kind)
    config, decoder = run.model, loaded.decoder
    side = config.vit.image_size
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (args.frames, side, side, 3), dtype=np.uint8)
    words = rng.integers(0, config.decoder.vocab_size, args.text).astype(np.int32)
    visual = np.full(config.visual_tokens(args.frames), VISUAL, np.int32)
    tokens = np.concatenate([words[:16], visual, words[16:]])
    count = len(tokens)
    tokens = np.pad(tokens, (0, -count % 512))

    def first(weights, visual):
        cache = empty_cache(config.decoder, 1, len(tokens), decoder.dtype)
        return decoder.prefill(weights, cache, jnp.int32(0), tokens, jnp.int32(count), visual)[0]

    first = jax.jit(first, compiler_options=compiler_options(loaded.mesh))
    seen = Encoder(loaded)(frames).tokens
    kept = folder / "visual.npy"  # of the weights as they are, which come first
    if not kind:
        np.save(kept, np.asarray(seen, np.float32))
    same = jnp.asarray(np.load(kept), seen.dtype)
    with jax.set_mesh(loaded.mesh):
        scores = [np.asarray(first(loaded.weights, x)[0], np.float64) for x in (seen, same)]
    np.savez(
        folder / f"{kind or 'exact'}.npz",
        visual=np.asarray(seen, np.float32)[: len(visual)],
        together=scores[0],
        alone=scores[1],
    )


def compared(exact, found) -> dict:
    """Errors of one kind; arguments as `outputs` writes them."""
    import numpy as np

    def relative(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.sqrt(np.mean((y - x) ** 2) / np.mean(x**2)))

    def divergence(x, y):
        p, q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (x, y))
        return float((np.exp(p) * (p - q)).sum())

    def scores(x, y):
        return {
            "relative error": relative(x, y),
            "divergence, nats": divergence(x, y),
            "divergence of standardised scores, nats": divergence(x / x.std(), y / x.std()),
            "same best token": bool(x.argmax() == y.argmax()),
        }

    return {
        "visual tokens, relative error": relative(exact["visual"], found["visual"]),
        "first token": scores(exact["together"], found["together"]),
        "first token, prefill alone": scores(exact["alone"], found["alone"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="qwen2_7b", help="of configs/long.py")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--pool", type=int, default=4)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--kind", action="append", choices=KINDS[1:], help="default: all")
    parser.add_argument("--out", default="")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        outputs(args, args.one, pathlib.Path(args.folder))
        return

    import numpy as np

    report: dict = {name: getattr(args, name) for name in ("size", "set", "frames", "pool", "text")}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("", *(args.kind or KINDS[1:])):
            # A process each: two models of this size need not fit one device.
            call = [sys.executable, __file__, *sys.argv[1:], f"--one={kind}", f"--folder={folder}"]
            subprocess.run(call, check=True)
            path = pathlib.Path(folder)
            if kind:
                with np.load(path / "exact.npz") as exact, np.load(path / f"{kind}.npz") as found:
                    report[kind] = compared(exact, found)
                print(kind, json.dumps(report[kind]), flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
