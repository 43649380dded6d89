"""Does the input keep up? Loads batches of configs/long.py's shapes as training does.

    python benchmarks/input.py [--step_ms=1250] [--workers=0,1,2] [--batches=6] [--only=NAME,...]

Videos of 640x360 at 30 frames/s (FFmpeg's test picture, H.264 with B-frames) are written into the
temporary folder first, some minutes, and kept for the next call. For each kind of video and number
of workers the data pipeline then loads rows of 128 frames at 448 pixels, and the table says

    a core      frames that one core loads in a second: frames / processor time of the threads that
                read, decode and lay out; what else runs on the machine hardly matters
    all         frames a second that arrived in fact, on this machine's cores
    needed      frames a second that one accelerator takes at --step_ms a step of one row
    cores       needed / a core: cores that one accelerator keeps busy
    memory      peak of the process and its workers together, MiB: proportional set size, so that
                pages which they share count once

--record=NAME keeps the results under that name in benchmarks/results/input.json, beside others.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import av
import machine
import numpy as np

from configs import long
from storm_jax.config import RunConfig, SourceConfig, from_mapping
from storm_jax.data import pipeline, text
from storm_jax.data.load import Load

RESULTS = Path(__file__).parent / "results" / "input.json"


@dataclass(frozen=True)
class Video:
    """A kind of video file."""

    seconds: int
    gop: int  # frames from one key frame to the next
    rate: int = 30  # frames a second
    keyframes_only: bool = False  # how it is read

    def write(self, folder: Path) -> Path:
        """The file; encoded if it is not there."""
        path = folder / f"{self.seconds}s-{self.rate}fps-gop{self.gop}.mp4"
        if path.exists():
            return path
        print(f"writing {path}")
        source = f"testsrc2=size=640x360:rate={self.rate}:duration={self.seconds}"
        options = {"preset": "veryfast", "g": str(self.gop), "keyint_min": str(self.gop)}
        part = f"{path}.part"
        with av.open(source, format="lavfi") as pictures, av.open(part, "w", "mp4") as output:
            stream = output.add_stream(
                "libx264", rate=self.rate, options={**options, "sc_threshold": "0"}
            )
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for frame in pictures.decode(video=0):
                frame.pict_type = 0  # the source's pictures say I: the encoder would obey
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        os.replace(part, path)
        return path


VIDEOS = {
    "1 min, GOP 30": Video(60, 30),
    "1 min, GOP 250": Video(60, 250),
    "5 min, GOP 30": Video(300, 30),
    "5 min, GOP 250": Video(300, 250),
    "10 min, GOP 250": Video(600, 250),
    "10 min, GOP 250, key frames": Video(600, 250, keyframes_only=True),
    "10 min at 2/s, GOP 10": Video(600, 10, rate=2),
}


def measure(video: Video, folder: Path, workers: int, batches: int) -> dict[str, float]:
    """Loads `batches` batches of one row, after one that is not counted."""
    run = from_mapping(
        RunConfig, json.loads(long.get_config("size=qwen2_1_5b").to_json_best_effort())
    )
    records = folder / "records.jsonl"
    turns = [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "Time passes."},
    ]
    record = {"video": str(video.write(folder)), "conversations": turns}
    records.write_text(json.dumps(record) + "\n")
    frames = replace(run.data.frames, keyframes_only=video.keyframes_only)
    data = replace(
        run.data,
        train=(SourceConfig(str(records)),),
        frames=frames,
        tokenizer="bytes",
        workers=workers,
        prefetch_megabytes=1024,
        decode_timeout=600.0,  # a busy machine is slow, not the file
    )
    tokenizer = text.load_tokenizer("bytes")
    peak = PeakMemory()
    loads: list[Load] = []
    times: list[float] = []
    with pipeline.train_batches(data, run.model, tokenizer, batch=1, steps=batches + 1) as stream:
        for batch in stream:
            assert batch.info.errors == () and batch.info.load.frames == frames.max_frames
            times.append(time.perf_counter())
            loads.append(batch.info.load)
    per_core = [load.frames / load.cpu_seconds for load in loads[1:]]
    low, middle, high = statistics.quantiles(per_core, n=4, method="inclusive")
    return {
        "frames_per_core_second": middle,
        "quartile_1": low,
        "quartile_3": high,
        "frames_per_second": sum(load.frames for load in loads[1:]) / (times[-1] - times[0]),
        "peak_mebibytes": peak.stop() / 2**20,
    }


class PeakMemory:
    """The largest sum of proportional set sizes of this process and its children, sampled."""

    def __init__(self):
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self._peak = max(self._peak, sum(map(_set_size, _family(os.getpid()))))


def _family(process: int) -> list[int]:
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _family(int(child))
    return found


def _set_size(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the input against a training step.")
    parser.add_argument("--step_ms", type=float, default=1250.0, help="a step of one row")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--only", default="", help=f"of {'; '.join(VIDEOS)}, separated by ;")
    parser.add_argument("--record", default="", help="name under which results are kept")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "storm_jax_input"
    folder.mkdir(exist_ok=True)
    chosen = args.only.split(";") if args.only else list(VIDEOS)
    needed = 128 / (args.step_ms / 1000)
    results = []
    print(
        f"{'video':<30}{'workers':>8}{'a core':>8}{'all':>8}{'needed':>8}{'cores':>7}{'memory':>8}"
    )
    for name in chosen:
        for workers in map(int, args.workers.split(",")):
            found = measure(VIDEOS[name], folder, workers, args.batches)
            found["cores_needed"] = needed / found["frames_per_core_second"]
            results.append({"video": name, "workers": workers, **found})
            print(
                f"{name:<30}{workers:>8}{found['frames_per_core_second']:>8.0f}"
                f"{found['frames_per_second']:>8.0f}{needed:>8.0f}{found['cores_needed']:>7.1f}"
                f"{found['peak_mebibytes']:>8.0f}",
                flush=True,
            )
    if args.record:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[args.record] = {
            "results": results,
            "step_ms": args.step_ms,
            "frames_needed_per_second": needed,
            "row": {"frames": 128, "pixels": 448, "batches": args.batches},
            "numpy": np.__version__,
            **machine.describe(),
        }
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
        print(RESULTS)


if __name__ == "__main__":
    main()
