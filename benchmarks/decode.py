"""Times `storm_jax.data.video.decode` on an hour-long H.264 file and on a tiny clip.

    python benchmarks/decode.py [--video=FILE] [--repeats=9]

Without --video, an hour of 640x360 at 30 frames/s with a key frame every 250 frames and B-frames is
written into the temporary folder first (two minutes, 330 MB) and kept for the next call. Decoding
runs on one thread and is pinned to one core. Results go to benchmarks/results/decode.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import av
import machine
import numpy as np

from storm_jax.data.drawing import write_video
from storm_jax.data.synthetic import make_clip
from storm_jax.data.video import decode, probe

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "decode.json")
SOURCE = "testsrc2=size=640x360:rate=30:duration=3600"
ENCODER = {"preset": "veryfast", "g": "250", "keyint_min": "250", "sc_threshold": "0"}


def write_hour(path: str) -> None:
    """Encodes FFmpeg's test picture; the finished file appears at once under its name."""
    part = path + ".part"
    with av.open(SOURCE, format="lavfi") as source, av.open(part, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for frame in source.decode(video=0):
            frame.pict_type = 0  # the source's pictures say I: the encoder would obey
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    os.replace(part, path)


def measure(call: Callable[[], object], repeats: int, unit: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the seconds that `call` takes, after one call that is not counted.

    "cpu" is the median of this process's own processor time: on a busy machine it is the figure to
    compare.
    """
    call()
    times, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - start) / unit)
        cpu.append((time.process_time() - start_cpu) / unit)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "best": min(times),
        "cpu": statistics.median(cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time video decoding.")
    default = os.path.join(tempfile.gettempdir(), "storm_jax_hour.mp4")
    parser.add_argument("--video", default=default, help="an hour-long file")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if not os.path.exists(args.video):
        print(f"writing {args.video}")
        write_hour(args.video)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    clip = os.path.join(tempfile.mkdtemp(), "clip.mp4")
    write_video(clip, make_clip("direction", 0, np.random.default_rng(0)).frames)
    n = args.repeats
    seconds = {
        "hour, probe": measure(lambda: probe(args.video), n),
        "hour, 32 frames": measure(lambda: decode(args.video, n=32), n),
        "hour, 32 frames at 448x448": measure(lambda: decode(args.video, n=32, size=448), n),
        "hour, 32 key frames at 448x448": measure(
            lambda: decode(args.video, n=32, size=448, keyframes_only=True), n
        ),
        "hour, 128 frames at 448x448": measure(
            lambda: decode(args.video, n=128, size=448), max(n // 3, 2)
        ),
        "clip of 8 frames 32x32": measure(
            lambda: [decode(clip, n=8, size=32) for _ in range(100)], n, unit=100
        ),
    }
    result = {
        "seconds": seconds,
        "repeats": n,
        "video": vars(probe(args.video)),
        **machine.describe(),
    }
    os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
    with open(RESULTS, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    for name, t in seconds.items():
        spread = f"{t['quartile_1']:.4f} .. {t['quartile_3']:.4f}"
        print(f"{name:32s} {t['median']:.4f} s ({spread}), processor time {t['cpu']:.4f} s")
    print(RESULTS)


if __name__ == "__main__":
    main()
