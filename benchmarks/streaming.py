"""Cost of a new frame and memory of a stream, from its first frames to its last.

    python benchmarks/streaming.py [--size=tiny] [--frames=100000] [--policy=recent] [--batch=8]
        [--budget=TOKENS] [--snapshot=N] [--out=FILE.json]

Builds configs/long.py:size=SIZE with a temporal encoder that runs forward only and random
parameters, and gives it random frames, which cost nothing to make: decoding is not measured here
(benchmarks/decode.py does). Every batch is timed from `Stream.push` until the device has taken it
in. A hundred times, or every `--snapshot` frames, the visual tokens are gathered as for a question,
and memory is noted: the process's resident set, the arrays that JAX holds, and what the device
reports where it does (GPU, TPU). Early figures are of the first tenth behind frame 100, late ones
of the last. Since other work on the machine comes and goes, the old stream and a new one that
stands at frame 100 are timed side by side at the end, batch by batch in turns: the ratio of these
two medians is the figure to look at. Results go to benchmarks/results/streaming_SIZE.json.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import resource
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
from train_step import configured  # noqa: E402

from storm_jax.inference import load  # noqa: E402
from storm_jax.inference.history import POLICIES  # noqa: E402
from storm_jax.inference.streaming import Stream  # noqa: E402

SETTLED = 100  # frames after which cost and memory must not change
IMAGES = 64  # different random frames


def memory() -> dict[str, float]:
    """Megabytes held at this moment."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    held = {
        "resident": pages * resource.getpagesize() / 1e6,
        "arrays": sum(x.nbytes for x in jax.live_arrays()) / 1e6,
    }
    reported = jax.devices()[0].memory_stats()
    if reported:
        held["device"] = reported["bytes_in_use"] / 1e6
        held["device_peak"] = reported["peak_bytes_in_use"] / 1e6
    return held


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def tenths(values: list[float]) -> dict:
    """The first and the last tenth, their ratio, and the median of each tenth."""
    size = max(len(values) // 10, 2)
    parts = [values[i * size : (i + 1) * size] for i in range(10)]
    early, late = spread(values[:size]), spread(values[-size:])
    return {
        "early": early,
        "late": late,
        "late_over_early": late["median"] / early["median"],
        "medians": [statistics.median(part) for part in parts if part],
    }


def pushed(stream: Stream, images: np.ndarray) -> tuple[float, float]:
    """Takes the next batch in; wall and process time a frame, milliseconds."""
    first = stream.frames % IMAGES
    start, start_cpu = time.perf_counter(), time.process_time()
    stream.push(images[first : first + stream.batch])
    stream.wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return 1e3 * seconds / stream.batch, 1e3 * cpu / stream.batch


def side_by_side(old: Stream, new: Stream, images: np.ndarray, batches: int) -> dict:
    """The two streams in turns."""
    new.warm_up()
    while new.frames < SETTLED:
        pushed(new, images)
    at = {"old": old.frames, "new": new.frames}
    times = {"old": [], "new": []}
    for i in range(batches):
        both = (("old", old), ("new", new))
        for name, stream in both if i % 2 else both[::-1]:
            times[name].append(pushed(stream, images)[0])
    figures = {name: {"frame": at[name], **spread(x)} for name, x in times.items()}
    ratio = figures["old"]["median"] / figures["new"]["median"]
    return {**figures, "old_over_new": ratio}


def measure(stream: Stream, images: np.ndarray, frames: int, snapshot: int) -> dict:
    """Runs the stream up to `frames` frames."""
    stream.warm_up()
    # All there from the start: what the stream itself needs should be all that could grow.
    batches = -(-frames // stream.batch)
    times = np.zeros((batches, 2))
    visual, held = [], []
    began = time.perf_counter()
    told = next_snapshot = SETTLED
    for number in range(batches):
        times[number] = pushed(stream, images)
        if stream.frames >= next_snapshot:
            next_snapshot += snapshot
            start = time.perf_counter()
            jax.block_until_ready(stream.visual().tokens)
            visual.append(1e3 * (time.perf_counter() - start))
            held.append({"frame": stream.frames, **memory()})
        if stream.frames >= told:
            told = max(2 * told, stream.frames)
            rate = stream.frames / (time.perf_counter() - began)
            print(f"{stream.frames} frames, {rate:.0f} a second, {held[-1]}", flush=True)
    held.append({"frame": stream.frames, **memory()})
    wall, processor = times[-(-SETTLED // stream.batch) :].T.tolist()
    kinds = [k for k in held[0] if k != "frame"]
    return {
        "milliseconds_per_frame": tenths(wall),
        "processor_milliseconds_per_frame": tenths(processor),
        "question_tokens_milliseconds": spread(visual[1:] if len(visual) > 2 else visual * 2),
        "memory_megabytes": {
            "first": held[0],
            "last": held[-1],
            "largest": {kind: max(m[kind] for m in held) for kind in kinds},
            "between": held[:: max(len(held) // 10, 1)],
        },
        "frames_per_second": stream.frames / (time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost and memory of a stream, frame by frame.")
    parser.add_argument("--size", default="tiny", help="of configs/common.py")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--policy", choices=POLICIES, default="recent")
    parser.add_argument("--budget", type=int, default=0, help="visual tokens; 0: as in training")
    parser.add_argument("--snapshot", type=int, default=0, help="frames; 0: a hundredth of all")
    parser.add_argument("--compared", type=int, default=1000, help="batches, old and new stream")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of the config")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if IMAGES % args.batch or args.frames < 2 * SETTLED:
        parser.error(f"--batch divides {IMAGES}, and --frames is at least {2 * SETTLED}")
    changes = ['model.temporal.direction="forward"', *args.set]
    config = configured("long", args.size, changes)
    loaded = load.random(config, devices=jax.devices()[:1])

    def new_stream() -> Stream:
        return Stream(loaded, budget=args.budget, policy=args.policy, batch=args.batch)

    stream = new_stream()
    side = config.model.vit.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
    snapshot = args.snapshot or max(args.frames // 100, args.batch)
    measured = measure(stream, images, args.frames, snapshot)
    compared = side_by_side(stream, new_stream(), images, args.compared)
    result = {
        "size": args.size,
        "frames": args.frames,
        "batch": args.batch,
        "policy": args.policy,
        "budget_tokens": stream.capacity * config.model.group_tokens,
        "frame_tokens": config.model.frame_tokens,
        "reduction": dataclasses.asdict(config.model.reduction),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **measured,
        "milliseconds_per_frame_in_turns": compared,
        **machine.describe(),
    }
    out = pathlib.Path(args.out or ROOT / "benchmarks/results" / f"streaming_{args.size}.json")
    os.makedirs(out.parent, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("milliseconds_per_frame", "processor_milliseconds_per_frame"):
        figures = result[name]
        print(
            f"{name}: early {figures['early']['median']:.3f}, late {figures['late']['median']:.3f},"
            f" ratio {figures['late_over_early']:.3f}"
        )
    print(
        f"in turns: frame {compared['old']['frame']} {compared['old']['median']:.3f} ms, frame"
        f" {compared['new']['frame']} {compared['new']['median']:.3f} ms, ratio"
        f" {compared['old_over_new']:.3f}"
    )
    first, last = (result["memory_megabytes"][k] for k in ("first", "last"))
    print(f"memory at frame {first['frame']}: {first}; at frame {last['frame']}: {last}")
    print(out)


if __name__ == "__main__":
    main()
