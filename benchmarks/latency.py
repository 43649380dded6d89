"""Time to first token and per token of a model with random weights, on the devices at hand.

    python benchmarks/latency.py --size=qwen2_7b --case=128,1,1 --case=128,4,1 --out=FILE.jsonl

A case is frames, temporal pooling, temporal sampling. Frames are random pixels in host memory; the
prompt is them and `--text` tokens. ViT with projector, temporal encoder with reduction, and the
decoder's prefill are measured alone and together: the time to first token goes from the frames in
the host's memory to the first token's id in it. Then `--new` tokens are decoded. Every number is
the median of `--repeats`, after two that are not counted, with the smallest and the largest.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def timed(call, repeats: int) -> dict:
    """Milliseconds of a call that waits for its result."""
    times = []
    for repeat in range(repeats + 2):
        began = time.perf_counter()
        call()
        if repeat >= 2:
            times.append(1000 * (time.perf_counter() - began))
    return {"ms": statistics.median(times), "range": [min(times), max(times)]}


def measure(loaded, case: tuple[int, int, int], args) -> dict:
    """One case; the weights serve all of them."""
    import dataclasses

    import jax
    import numpy as np

    from storm_jax.config import VISUAL
    from storm_jax.inference.engine import Engine
    from storm_jax.inference.sampling import Sampling

    count, pool, sampling = case
    reduction = dataclasses.replace(
        loaded.config.model.reduction, temporal_pool=pool, temporal_sampling=sampling
    )
    model_config = dataclasses.replace(loaded.config.model, reduction=reduction)
    run = dataclasses.replace(loaded.config, model=model_config)
    model = dataclasses.replace(loaded.model, config=model_config)
    loaded = dataclasses.replace(loaded, config=run, model=model)

    side = run.model.vit.image_size
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    words = rng.integers(0, run.model.decoder.vocab_size, args.text).astype(np.int32)
    visual = run.model.visual_tokens(count)
    tokens = np.concatenate([words[:16], np.full(visual, VISUAL, np.int32), words[16:]])
    context = -(-(len(tokens) + args.new) // 2048) * 2048
    engine = Engine(loaded, slots=args.slots, context=context)
    wish = Sampling(max_new_tokens=args.new)

    def encode():
        return engine.encode(frames)

    encoder = engine.encode_frames
    encoded = jax.block_until_ready(encode().tokens)
    del encoded
    with jax.set_mesh(loaded.mesh):
        batches = [jax.device_put(batch) for batch, _ in encoder._batches([frames])]
        parts = [encoder.features(batch) for batch in batches]

        def vit():
            jax.block_until_ready([encoder.features(batch) for batch in batches])

        result = {"vit": timed(vit, args.repeats)}
        result["temporal"] = timed(
            lambda: jax.block_until_ready(encoder.reduce(list(parts), count, model_config).tokens),
            args.repeats,
        )
    about = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "size": args.size,
        "quantization": args.quantization,
        "frames": count,
        "temporal_pool": pool,
        "temporal_sampling": sampling,
        "visual_tokens": visual,
        "repeats": args.repeats,
        "set": args.set,
    }

    def peak() -> float:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30

    if args.encoder:
        return {**about, **result, "peak_gib": peak()}
    media = [encode()]

    def first_token(media):
        slot = engine.admit(tokens, media() if callable(media) else media, wish)
        np.asarray(engine._rows.token)
        engine.release(slot)

    result["prefill"] = timed(lambda: first_token(media), args.repeats)
    result["first token"] = timed(lambda: first_token(lambda: [encode()]), args.repeats)

    if args.new > 1:
        slots = [engine.admit(tokens, media, wish) for _ in range(args.slots)]
        while len(slots) > engine.free_slots and not any(p.finish for p in engine.step()):
            pass  # compiles
        for slot in slots:
            engine.release(slot)
        slots = [engine.admit(tokens, media, wish) for _ in range(args.slots)]
        times = []
        engine.step()  # the first tokens
        while True:
            began = time.perf_counter()
            progress = engine.step()
            if any(p.finish for p in progress):
                break
            made = len(progress[0].tokens)
            times.append(1000 * (time.perf_counter() - began) / made)
        for slot in slots:
            engine.release(slot)
        result["token"] = {
            "ms": statistics.median(times), "range": [min(times), max(times)],
        }  # fmt: skip
    if args.profile:
        with jax.profiler.trace(args.profile, create_perfetto_trace=True):
            slot = engine.admit(tokens, [encode()], wish)
            engine.step()
        engine.release(slot)
    shape = {"prompt_tokens": len(tokens), "context": context, "slots": args.slots}
    return {**about, **shape, **result, "peak_gib": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="qwen2_7b", help="of configs/long.py")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--case", action="append", required=True, metavar="FRAMES,POOL,SAMPLING")
    parser.add_argument("--quantization", default="", choices=("", "int8", "fp8", "fp8_dynamic"))
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--encoder", action="store_true", help="the encoder alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", default="", help="folder for a trace of each case")
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    from benchmarks.train_step import configured
    from storm_jax.inference import load

    config = configured("long", args.size, args.set)
    loaded = load.random(config, quantization=args.quantization)
    for case in args.case:
        frames, pool, sampling = map(int, case.split(","))
        line = json.dumps(measure(loaded, (frames, pool, sampling), args))
        print(line, flush=True)
        if args.out:
            with open(args.out, "a") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
