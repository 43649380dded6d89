"""Small data sets for tests: JSONL beside videos and images."""

import fractions
import io
import json
import tarfile

import av
import numpy as np

from storm_jax.config import SourceConfig
from storm_jax.data.drawing import write_video


def clip(count, seed):
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    shades = np.arange(count)[:, None, None, None] * 9
    return (still // 2 + shades).astype(np.uint8)


def write_image(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    png = av.CodecContext.create("png", "w")
    png.width = png.height = 32
    png.pix_fmt, png.time_base = "rgb24", fractions.Fraction(1, 1)
    packets = png.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")) + png.encode(None)
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def record(name, media, question, answer="yes"):
    return {
        "id": name,
        "task": question[:3],
        "media": [{"type": kind, "path": path} for kind, path in media],
        "conversations": [
            {"from": "human", "value": "".join(f"<{kind}>" for kind, _ in media) + question},
            {"from": "gpt", "value": answer},
        ],
    }


def write_records(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return SourceConfig(str(path))


def make_set(folder, name, videos=12):
    """`videos` videos of 2 to 8 frames, two records of two images, two of text alone."""
    folder.mkdir(exist_ok=True)
    records = []
    for i in range(videos):
        write_video(str(folder / f"{name}{i}.mp4"), clip(2 + i % 7, i))
        records.append(record(f"{name}-v{i}", [("video", f"{name}{i}.mp4")], f"what is {i}?"))
    for i in range(2):
        for part in "ab":
            write_image(folder / f"{name}{i}{part}.png", 100 + i)
        images = [("image", f"{name}{i}{part}.png") for part in "ab"]
        records.append(record(f"{name}-i{i}", images, f"same {i}?", "no"))
        records.append(record(f"{name}-t{i}", [], f"hello {i}", "hi"))
    return write_records(folder / f"{name}.jsonl", records)


def write_tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path
