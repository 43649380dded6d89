"""Shapes, digits and textures that made-up data sets are drawn with, and their mp4 files."""

import fractions
import functools

import av
import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "magenta": (215, 45, 205),
    "cyan": (40, 200, 215),
}
SHAPES = ("square", "disc", "triangle", "cross", "ring", "diamond")
FPS = 8  # frames per second of the files

_QUANTISER = 14  # of H.264: 0 is lossless, 51 the worst
# Five columns by seven rows; a row is five bits, the leftmost one is the highest.
DIGITS = {
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}


def tint(rng: np.random.Generator, colour: str) -> np.ndarray:
    """An exact colour, int [3], near the nominal one."""
    return np.clip(np.array(COLOURS[colour]) + rng.integers(-25, 26, 3), 0, 255)


@functools.lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> np.ndarray:
    """The pixels of a shape, bool [side, side]."""
    v, u = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1  # -1 .. 1, downwards and to the right
    return {
        "square": np.ones_like(u, bool),
        "disc": u**2 + v**2 <= 1,
        "triangle": 2 * np.abs(u) <= v + 1,
        "cross": (np.abs(u) < 0.4) | (np.abs(v) < 0.4),
        "ring": (u**2 + v**2 <= 1) & (u**2 + v**2 > 0.3),
        "diamond": np.abs(u) + np.abs(v) <= 1,
    }[shape]


@functools.lru_cache(maxsize=128)
def digit_mask(digit: str, scale: int) -> np.ndarray:
    """The pixels of a digit, bool [7 * scale, 5 * scale]."""
    bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in DIGITS[digit]])
    return np.kron(bits, np.ones((scale, scale), int)).astype(bool)


def paint(frame: np.ndarray, mask: np.ndarray, colour: np.ndarray, x: int, y: int) -> None:
    """Gives [H, W, 3] the colour where the mask, its upper left corner at (x, y), is set."""
    frame[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = colour


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise whose spectrum falls as in natural images, float [size, size], mean 0, variance 1.

    It continues across opposite edges, and its distribution is the same after any shift.
    """
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) + 1 / size
    wave = np.fft.fft2(rng.normal(size=(size, size))) / frequency ** rng.uniform(0.0, 2.0)
    noise = np.fft.ifft2(wave).real
    return (noise - noise.mean()) / (noise.std() + 1e-9)


def write_video(path: str, frames: np.ndarray, fps: int = FPS) -> None:
    """Writes uint8 [F, H, W, 3] as H.264 in mp4, every frame a key frame at one quantiser.

    A decoded frame then depends on that frame alone: a picture predicted from its neighbour would
    show traces of it. H and W are even (chroma is stored at half the resolution).
    """
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # starting threads takes longer than the work
        stream.options = {"preset": "superfast", "tune": "zerolatency", "qp": str(_QUANTISER)}
        stream.codec_context.gop_size = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
