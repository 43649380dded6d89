"""Video files for tests, written with PyAV. Every frame shows its own number as a row of bits."""

import fractions
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

BITS = 10


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]: `number` in BITS columns of black and white, over grey texture."""
    rng = np.random.default_rng(number)
    image = rng.integers(90, 160, (height // 4, width // 4, 1)).repeat(4, 0).repeat(4, 1)
    image = (
        np.broadcast_to(
            np.pad(image, ((0, height % 4), (0, width % 4), (0, 0)), "edge"), (height, width, 3)
        )
        .astype(np.uint8)
        .copy()
    )
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[height // 3 : 2 * height // 3, left:right] = 255 * (number >> bit & 1)
    return image


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that uint8 [F, H, W, 3] show."""
    height, width = frames.shape[1:3]
    columns = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    bits = frames[:, height // 2, columns].mean(-1) > 127
    return [int(x) for x in bits @ (1 << np.arange(BITS))]


def write(
    path: Path,
    count: int,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    fps: int = 30,
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    audio_seconds: float = 0.0,
    hold: int = 0,
    number: int = 0,
) -> Path:
    """Writes a video of `count` frames, numbered from `number` on.

    Args:
      options, container: of the encoder and of the muxer; gop size and B-frames are options.
      pts: timestamps in units of 1 / (100 * fps); 100 apart from 0 on by default.
      rotation: degrees counter-clockwise that players must turn the picture.
      mirrored: players must then mirror it, left to right.
      audio_seconds: length of a silent audio track, 0 for none.
      hold: how long the last frame is shown, in units of pts; 0: as long as the others.
    """
    with av.open(str(path), "w", format=format, options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        step = 1 if codec in ("mpeg4", "gif") else 100  # the others' clocks are finer than frames
        tick = fractions.Fraction(1, step * fps)
        stream.codec_context.time_base = tick
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if audio_seconds:
            sound = output.add_stream("aac", rate=16000, layout="mono")
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number + i, *size), format="rgb24")
            frame.time_base = tick
            frame.pts = i * step if pts is None else pts[i]
            output.mux(stream.encode(frame))
        packets = stream.encode()
        if hold:
            last = max(packets, key=lambda packet: packet.pts)
            last.duration = int(hold * tick / last.time_base)
        output.mux(packets)
        if audio_seconds:
            _silence(output, sound, audio_seconds)
    return path


def blank_png(width: int, height: int) -> bytes:
    """A black picture, packed without ever being in memory as a whole."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pack = zlib.compressobj()
    rows = b"".join(pack.compress(bytes(1 + 3 * width)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    with av.open(str(path), "w") as output:
        _silence(output, output.add_stream("aac", rate=16000, layout="mono"), seconds)
    return path


def _silence(output, stream, seconds: float) -> None:
    for start in range(0, int(16000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, start
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def cut_edit_list(path: Path, media_time: int, seconds: float) -> None:
    """Rewrites an mp4's only edit: show `seconds` from `media_time` (ticks of the track) on."""
    data = bytearray(path.read_bytes())
    movie = data.index(b"mvhd")
    (timescale,) = struct.unpack(">I", data[movie + 16 : movie + 20])
    at = data.index(b"elst") + 4
    assert data[movie + 4] == data[at] == 0  # versions with 32-bit fields
    assert struct.unpack(">I", data[at + 4 : at + 8]) == (1,)
    data[at + 8 : at + 16] = struct.pack(">Ii", int(seconds * timescale), media_time)
    path.write_bytes(data)


def sequential(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times (s, from the first frame) and pictures of a whole file, read from its beginning."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (f.pts, f.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray())
            for f in container.decode(stream)
        ]
        tick = float(stream.time_base)
    return np.array([(p - frames[0][0]) * tick for p, _ in frames]), [image for _, image in frames]
