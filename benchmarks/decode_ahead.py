"""Times decoding in worker processes (`storm_jax.inference.media`) against one process.

    python benchmarks/decode_ahead.py [--repeats=7] [--frames=128] [--size=448]

Two H.264 files are written into the temporary folder first and kept: a minute of 1280x720 (frames
lie close: stretches begin with decoding from a key frame), ten minutes of 640x360 (every frame is
a seek). Each round times all ways one after another, so that a busy machine slows all of them; the
ratios are of the same round. Results go to benchmarks/results/decode_ahead.json.

    one process     data.video.sample in this process
    N workers       all chunks taken from a running pool of N, as fast as they come
    first chunk     until the first 16 frames have come
    processor       seconds of this process and of the workers together: what sharing a video costs.
                    On N free cores N workers can be N / (processor ratio) times as fast
    machine         what two processes get done that each decode the whole video, against one: 2
                    on two free cores, less where others use them. No sharing can be faster
    transfer        a frame from a worker to here through the pipe, with nothing decoded
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import av
import machine
import numpy as np

from storm_jax.data.conversation import Media
from storm_jax.data.video import sample
from storm_jax.frames import FrameConfig
from storm_jax.inference.media import Decoders

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "decode_ahead.json")
SOURCES = {
    "60 s, 1280x720": "testsrc2=size=1280x720:rate=30:duration=60",
    "600 s, 640x360": "testsrc2=size=640x360:rate=30:duration=600",
}
ENCODER = {"preset": "veryfast", "g": "250", "keyint_min": "250", "sc_threshold": "0"}
_SENDER = """
import pickle, sys
import numpy as np
chunk = np.random.default_rng(0).integers(0, 256, (16, {size}, {size}, 3), np.uint8)
while pickle.load(sys.stdin.buffer):
    pickle.dump(chunk, sys.stdout.buffer, protocol=5)
    sys.stdout.buffer.flush()
"""


def write_video(path: str, source: str) -> None:
    """Encodes FFmpeg's test picture; the finished file appears at once under its name."""
    part = path + ".part"
    with av.open(source, format="lavfi") as pictures, av.open(part, "w", format="mp4") as output:
        video = pictures.streams.video[0]
        stream = output.add_stream("libx264", rate=30, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        for frame in pictures.decode(video):
            frame.pict_type = 0  # the source's pictures say I: the encoder would obey
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    os.replace(part, path)


def processor(decoders: Decoders) -> float:
    """Processor seconds that this process and the workers have taken so far."""
    total = time.process_time()
    for pid in decoders.process_ids:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def take(decoders: Decoders, media: Media, frames: FrameConfig, size: int) -> tuple[float, float]:
    """Seconds until the first chunk and until all chunks have come."""
    began = time.perf_counter()
    chunks = iter(decoders.sample(media, frames, size))
    next(chunks)
    first = time.perf_counter() - began
    for _ in chunks:
        pass
    return first, time.perf_counter() - began


def both(pools: list[Decoders], media: Media, frames: FrameConfig, size: int) -> float:
    """Seconds until each of the pools has decoded all of it, at the same time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(pools)) as threads:
        list(threads.map(lambda pool: take(pool, media, frames, size), pools))
    return time.perf_counter() - began


def transfer(size: int, repeats: int) -> float:
    """Seconds that a frame takes from a process to here."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SENDER.format(size=size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    times = []
    for _ in range(10 * repeats):
        began = time.perf_counter()
        pickle.dump(True, process.stdin)
        process.stdin.flush()
        frames = pickle.load(process.stdout)
        times.append((time.perf_counter() - began) / len(frames))
    pickle.dump(False, process.stdin)
    process.communicate()
    return statistics.median(times)


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decoding ahead in worker processes.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=448)
    args = parser.parse_args()
    policy = FrameConfig(args.frames)
    pools = {n: Decoders(n) for n in (1, 2)}
    second = Decoders(1)
    results = {}
    for name, source in SOURCES.items():
        path = os.path.join(tempfile.gettempdir(), f"storm_jax_{name}.mp4".replace(", ", "_"))
        if not os.path.exists(path):
            print(f"writing {path}")
            write_video(path, source)
        media = Media("video", path)
        expected = sample(media, policy, args.size)[0]
        seconds: dict[str, list[float]] = {}
        ratios: dict[str, list[float]] = {}
        for n, pool in pools.items():
            found = np.concatenate(list(pool.sample(media, policy, args.size)))
            assert np.array_equal(found, expected), f"{n} workers give other frames"
        for _ in range(args.repeats):
            began, cpu = time.perf_counter(), time.process_time()
            sample(media, policy, args.size)
            one, one_cpu = time.perf_counter() - began, time.process_time() - cpu
            seconds.setdefault("one process", []).append(one)
            seconds.setdefault("one process, processor", []).append(one_cpu)
            for n, pool in pools.items():
                cpu = processor(pool)
                first, whole = take(pool, media, policy, args.size)
                seconds.setdefault(f"{n} workers", []).append(whole)
                seconds.setdefault(f"{n} workers, first chunk", []).append(first)
                seconds.setdefault(f"{n} workers, processor", []).append(processor(pool) - cpu)
                ratios.setdefault(f"{n} workers", []).append(one / whole)
            whole = both([pools[1], second], media, policy, args.size)
            ratios.setdefault("machine", []).append(2 * seconds["1 workers"][-1] / whole)
        results[name] = {
            "seconds": {k: spread(v) for k, v in seconds.items()},
            "times_as_fast_as_one_process": {k: spread(v) for k, v in ratios.items()},
        }
        for key, value in results[name]["seconds"].items():
            print(f"{name}: {key:24s} {value['median']:.3f} s")
        for key, value in results[name]["times_as_fast_as_one_process"].items():
            quartiles = f"{value['quartile_1']:.2f} .. {value['quartile_3']:.2f}"
            print(f"{name}: {key:24s} {value['median']:.2f} times as fast ({quartiles})")
    for pool in (*pools.values(), second):
        pool.close()
    result = {
        "videos": results,
        "transfer_milliseconds_per_frame": 1e3 * transfer(args.size, args.repeats),
        "frames": args.frames,
        "size": args.size,
        "repeats": args.repeats,
        **machine.describe(),
    }
    print(f"transfer {result['transfer_milliseconds_per_frame']:.3f} ms a frame")
    with open(RESULTS, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
