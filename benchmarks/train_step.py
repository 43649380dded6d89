"""Time, MFU and memory of real training steps on the devices at hand.

    python benchmarks/train_step.py --size=qwen2_7b --set train.batch=2 --out=FILE.json

Builds the run of configs/long.py:size=SIZE with random parameters, fills its rows with one video
each of `data.frames.max_frames` random frames and `--text` tokens with loss, and runs the jitted
step that `storm_jax.train` runs. MFU is model FLOPs (storm_jax/flops.py: matrix products and
attention of forward and backward, recomputation not counted) over time, devices and peak.
`--set FIELD=VALUE` changes any field of the configuration, VALUE as Python writes it. Each
`--variant "A=1;B=2"` is one more measurement, in a process of its own.
"""

import argparse
import ast
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def configured(config_module: str, size: str, changes: list[str]):
    """The run of a file in configs/ with some fields changed."""
    from storm_jax.config import RunConfig, from_mapping

    config = importlib.import_module(f"configs.{config_module}").get_config(f"size={size}")
    with config.unlocked():
        for change in changes:
            path, _, value = change.partition("=")
            *groups, name = path.split(".")
            target = config
            for group in groups:
                target = target[group]
            try:
                target[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                target[name] = value
    return from_mapping(RunConfig, json.loads(config.to_json_best_effort()))


def random_batch(config, text: int) -> dict:
    """Rows of one video and `text` tokens that all have loss, as `storm_jax.data` packs them."""
    import numpy as np

    from storm_jax.config import VISUAL
    from storm_jax.data.packing import Limits, RowBuilder, Sample
    from storm_jax.data.text import Encoded

    rng = np.random.default_rng(0)
    side, frames = config.model.vit.image_size, config.data.frames.max_frames
    limits = Limits(config.data.sequence_length, config.data.row_frames)
    rows = []
    for _ in range(config.train.batch):
        builder = RowBuilder(config.model, limits)
        tokens = rng.integers(0, config.model.decoder.vocab_size, text + 1).astype(np.int32)
        tokens[0] = VISUAL
        loss = np.arange(text + 1) > 0
        video = rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        builder.add(Sample(Encoded(tokens, loss), (video,)))
        rows.append(builder.row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def measure(config, text: int, steps: int, profile: str) -> dict:
    """Compiles and runs the step."""
    import jax

    from storm_jax.flops import Work, peak_flops, training_flops
    from storm_jax.models.storm import StormModel, count_parameters
    from storm_jax.parallel import sharding
    from storm_jax.parallel.mesh import make_mesh
    from storm_jax.training.optim import make_optimizer, trainable_parts
    from storm_jax.training.state import init_state
    from storm_jax.training.step import make_train_step

    mesh = make_mesh(config.mesh)
    model = StormModel(config.model)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    parts = trainable_parts(config.train.optimizer)
    batch = random_batch(config, text)
    work = Work.of(batch)
    flops = training_flops(config.model, work, parts)

    state = init_state(model, optimizer, parts, mesh, seed=0)
    arrays = {
        name: jax.device_put(x, sharding.of_batch(name, x.shape, mesh)) for name, x in batch.items()
    }
    train_step = jax.jit(make_train_step(model, optimizer, config.train), donate_argnums=0)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        compiled = train_step.lower(state, arrays).compile()
        compile_seconds = time.perf_counter() - began
        times, losses = [], []
        for step in range(steps + 2):
            began = time.perf_counter()
            state, metrics = compiled(state, arrays)
            losses.append(float(metrics["loss"]))
            if step >= 2:  # the first ones load kernels
                times.append(1000 * (time.perf_counter() - began))
        if profile:
            with jax.profiler.trace(profile, create_perfetto_trace=True):
                state, metrics = compiled(state, arrays)
                jax.block_until_ready(state)
    devices = jax.devices()
    peak = peak_flops(devices[0].device_kind)
    middle = statistics.median(times)
    memory = compiled.memory_analysis()
    used = devices[0].memory_stats() or {}
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "config": config.name,
        "mesh": dict(mesh.shape),
        "parameters": count_parameters(model.abstract()),
        "frames": work.frames,
        "tokens": work.tokens,
        "ms": middle,
        "ms_range": [min(times), max(times)],
        "steps": steps,
        "model_tflop": flops / 1e12,
        "mfu": None if peak is None else flops / (middle / 1000) / peak / len(devices),
        "peak_gib": used.get("peak_bytes_in_use", 0) / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "compile_seconds": compile_seconds,
        "losses": losses[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="long", help="a file of configs/, without .py")
    parser.add_argument("--size", default="qwen2_7b")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--variant", action="append", metavar="FIELD=VALUE;...")
    parser.add_argument("--text", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", default="", help="a folder for a trace of one step")
    parser.add_argument("--out", default="", help="JSON lines are added to this file")
    args = parser.parse_args()
    if args.variant:
        for variant in args.variant:
            changes = [x for change in variant.split(";") if change for x in ("--set", change)]
            shared = [x for change in args.set for x in ("--set", change)]
            command = [sys.executable, __file__, f"--config={args.config}", f"--size={args.size}"]
            command += [f"--text={args.text}", f"--steps={args.steps}", f"--out={args.out}"]
            subprocess.run([*command, *shared, *changes], check=False)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    try:
        result = measure(
            configured(args.config, args.size, args.set), args.text, args.steps, args.profile
        )
    except Exception as error:  # memory: the other variants are still wanted
        result = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    result["set"] = args.set
    print(json.dumps(result), flush=True)
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
