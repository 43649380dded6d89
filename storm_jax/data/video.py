"""Frames of videos, images and frame folders: the one sampling policy, and what it needs to know.

`decode` returns frames and their real times from any file that PyAV opens; `sample` applies the
configuration's `FrameConfig` to a record's medium and is what training and evaluation call;
`SampledMedium` returns the same frames stretch by stretch; `frame_count` says beforehand, from a
`Probe` alone, how many frames `sample` will return.

Damaged files. A frame is used only if every packet from its key frame on decodes without an error
and the file reaches it. So a file that is cut off or corrupted still serves a clip that lies before
the damage; whenever one of the asked frames cannot be had, the whole call raises `MediaError` with
path and reason. Nothing is replaced by black frames, by neighbours or by fewer frames.

Images are decoded by PyAV as well, not by Pillow: one bicubic filter for images and videos, one
place where rotation is applied, and no further dependency.
"""

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import av
import numpy as np

from storm_jax.data.container import MediaError, ToRgb, VideoReader, limit_pixels, open_media
from storm_jax.data.conversation import Media
from storm_jax.frames import FrameConfig

__all__ = [
    "MediaError",
    "Probe",
    "SampledMedium",
    "decode",
    "frame_count",
    "images_in",
    "probe",
    "sample",
    "sample_images",
    "spread",
]

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FOLDER_FPS = 1.0  # a folder of frames has no clock: frame i counts as second i
_LATE = 1.0  # seconds that `end` may lie behind the clip: annotations are rounded up to seconds


@dataclass(frozen=True)
class Probe:
    """What is known about a medium without decoding it."""

    kind: Literal["video", "image", "frames"]  # frames: a folder of images
    duration: float  # seconds; 0 for an image, one second a frame for a folder
    fps: float  # mean frame rate; 0 for an image, 1 for a folder
    frames: int  # the header's count, or duration * fps where it has none or too large a one
    codec: str  # name of FFmpeg's decoder
    width: int  # pixels as stored, before rotation
    height: int
    rotation: int  # degrees counter-clockwise that the picture must be turned: 0, 90, 180, 270


def probe(
    path: str,
    kind: Literal["video", "image"] = "video",
    data: bytes | BinaryIO | None = None,
) -> Probe:
    """Reads a medium's header and decodes its first frame, which also shows that it can be.

    Args:
      path: a file, or a folder of frames.
      kind: what the record says that it is.
      data: as in `Media`: read instead of what is at `path`.

    Raises:
      MediaError: it is missing, empty, no video, or its first frame cannot be decoded.
    """
    if kind == "image" or (data is None and os.path.isdir(path)):
        files = [path] if kind == "image" else images_in(path)
        frame = _image_frame(files[0], data)
        count = len(files)
        return Probe(
            "image" if kind == "image" else "frames",
            0.0 if kind == "image" else count / _FOLDER_FPS,
            0.0 if kind == "image" else _FOLDER_FPS,
            count,
            "",
            frame.width,
            frame.height,
            _rotation(frame),
        )
    with VideoReader(path if data is None else data, name=path) as reader:
        rotation = _rotation(reader.first_frame())
        size = reader.width, reader.height
        return Probe(
            "video", reader.duration, reader.fps, reader.frames, reader.codec, *size, rotation
        )


def decode(
    source: str | bytes | BinaryIO,
    *,
    n: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    size: int | None = None,
    keyframes_only: bool = False,
    timeout: float | None = None,
    max_frames: int | None = None,
    name: str = "",
    max_pixels: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes evenly spaced frames of a video file.

    Exactly one of `n` and `fps` is given. With `n`, the times run evenly from the first frame to
    the last one, both included (n=1: the first). With `fps` they are 1/fps apart from the first
    frame on. For each of these times the frame nearest to it is returned, or more exactly the
    first one at or after that time less half a mean frame period.

    Args:
      source: path of a video file, the file's bytes, or a binary file that is open and seekable.
      n: number of frames; fewer are returned where the clip has fewer.
      fps: frames per second of video time; never more than the video has.
      start, end: the clip in seconds after the file's first frame; None: the whole file. An `end`
        up to one second behind the last frame is taken as the end of the file.
      size: frames are scaled to size x size (bicubic, aspect ratio not kept); None: as stored.
      keyframes_only: return the key frame at or before each time instead: about four times faster
        in long videos, up to one group of pictures too early.
      timeout: seconds after which decoding is given up. Checked between packets, so that one
        blocked read or one huge packet can exceed it.
      max_frames: upper limit; where `fps` asks for more, times are spread evenly again.
      name: what errors call the file; its path by default.
      max_pixels: of one picture, as stored; a larger one is refused before it is decoded.

    Returns:
      frames uint8 [F, H, W, 3] in RGB, turned upright, and their real times, float64 [F], seconds
      after the first frame of the file. F depends on the header only. Where the frame rate
      varies, two times can meet the same frame, which is then repeated.

    Raises:
      MediaError: the file cannot be opened, has no video, is damaged before a wanted frame, is
        shorter than its header says, took longer than `timeout`, the clip lies outside it, or
        pictures are above `max_pixels`.
      ValueError: neither or both of `n` and `fps` were given, or one is not positive.
    """
    if (n is None) == (fps is None):
        raise ValueError(f"decode: give one of n and fps, got n={n} and fps={fps}")
    if (n is not None and n < 1) or (fps is not None and not fps > 0):
        raise ValueError(f"decode: n={n}, fps={fps} must be positive")
    limit = min(x for x in (n, max_frames, math.inf) if x is not None)
    with VideoReader(source, timeout, name, max_pixels) as reader:
        clip = reader.path, reader.duration, reader.fps, reader.frames
        times = _times(clip, (start, end), limit, fps or 0.0)
        return reader.read(times, size, keyframes_only)


class SampledMedium:
    """A medium opened under the policy: any stretch of the frames that `sample` returns.

    A frame of a video does not depend on the stretch that it is read in. Damage that no wanted
    frame needs can show in a long stretch, which is decoded through, and not in two short ones.

    Attributes:
      times: float64 [F], seconds, that the policy asks for. A folder's frame i has time i, an image
        time 0.
      duration: of the whole file, seconds; 0 for an image, one second a frame for a folder.
    """

    def __init__(
        self,
        media: Media,
        frames: FrameConfig,
        size: int,
        timeout: float | None = None,
        max_pixels: int | None = None,
    ):
        """Opens it. Arguments and errors are those of `sample`."""
        self._max_pixels = max_pixels
        self._size, self._keyframes_only = size, frames.keyframes_only
        self._reader: VideoReader | None = None
        self._media, self._files = media, list[str]()
        self._next = 0  # earlier frames can no longer be read
        span = media.start, media.end
        if media.kind == "image":
            self.times, self.duration = np.zeros(1), 0.0
        elif media.data is None and os.path.isdir(media.path):
            self._files = images_in(media.path)
            self.duration = len(self._files) / _FOLDER_FPS
            clip = media.path, self.duration, _FOLDER_FPS, len(self._files)
            times = _times(clip, span, frames.max_frames, frames.fps)
            picks = [min(math.ceil(t * _FOLDER_FPS - 0.5), len(self._files) - 1) for t in times]
            self.times = np.array(picks) / _FOLDER_FPS
        else:
            source = media.path if media.data is None else media.data
            reader = VideoReader(source, timeout, media.path, max_pixels)
            try:
                clip = reader.path, reader.duration, reader.fps, reader.frames
                self.times = _times(clip, span, frames.max_frames, frames.fps)
                self.duration = reader.duration
            except MediaError:
                reader.close()
                raise
            self._reader = reader

    def __enter__(self) -> "SampledMedium":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file."""
        if self._reader is not None:
            self._reader.close()

    def read(
        self, first: int = 0, last: int | None = None, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames `first` to `last`, which is not included. Stretches must ascend.

        Args:
          timeout: seconds from now on that replace what is left of the first time limit.

        Returns:
          frames uint8 [n, size, size, 3] and their real times, float64 [n].

        Raises:
          MediaError: as `decode`.
          ValueError: the stretch begins before the end of the one before.
        """
        if first < self._next:
            raise ValueError(f"frames from {first} on were asked for behind frame {self._next - 1}")
        times = self.times[first:last]
        self._next = first + len(times)
        if self._reader is not None:
            if timeout is not None:
                self._reader.allow(timeout)
            return self._reader.read(times, self._size, self._keyframes_only)
        if self._media.kind == "image":
            image = _image(self._media.path, self._size, self._media.data, self._max_pixels)
            return image[None], times
        picks = np.rint(times * _FOLDER_FPS).astype(int)
        images = [_image(self._files[i], self._size, None, self._max_pixels) for i in picks]
        return np.stack(images), times


def sample(
    media: Media,
    frames: FrameConfig,
    size: int,
    timeout: float | None = None,
    max_pixels: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a record's medium under the configured policy.

    Args:
      media: a video file, a folder of frames (sorted naturally: 2 before 10) or an image; with
        `data`, that is read, and `path` is only its name in errors.
      frames: the policy; see `FrameConfig`.
      size: side of the square frames, pixels.
      timeout: seconds that the file may take; see `decode`.
      max_pixels: of one picture; see `decode`.

    Returns:
      frames uint8 [F, size, size, 3] and times float64 [F]; F is `frame_count` of the medium's
      probe. A folder's frame i has time i, an image time 0.

    Raises:
      MediaError: as `decode`.
    """
    with SampledMedium(media, frames, size, timeout, max_pixels) as medium:
        return medium.read()


def sample_images(images: Sequence[np.ndarray], frames: FrameConfig, size: int) -> np.ndarray:
    """Frames that are decoded already: all of them, or `max_frames` spread evenly over them.

    They have no clock, so `frames.fps` says nothing about them.

    Args:
      images: uint8 [H, W, 3] each, RGB, at least one.
      frames: the policy.
      size: side of the square frames, pixels.

    Returns:
      uint8 [F, size, size, 3].
    """
    to_rgb = ToRgb(size)

    def scaled(image: np.ndarray) -> np.ndarray:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        return to_rgb(frame)

    return np.stack([scaled(images[i]) for i in spread(len(images), frames.max_frames)])


def spread(count: int, limit: int) -> list[int]:
    """Numbers of at most `limit` of `count` pictures without a clock, evenly spaced."""
    times = _times(("", float(count), 1.0, count), (None, None), limit, 0.0)
    return [math.ceil(t - 0.5) for t in times]


def frame_count(probe: Probe, media: Media, frames: FrameConfig) -> int:
    """Number of frames that `sample` returns for `media`, from its probe alone.

    Raises:
      MediaError: the clip's start or end lies outside the medium.
    """
    if probe.kind == "image":
        return 1
    clip = media.path, probe.duration, probe.fps, probe.frames
    return len(_times(clip, (media.start, media.end), frames.max_frames, frames.fps))


def _times(
    clip: tuple[str, float, float, int],
    span: tuple[float | None, float | None],
    limit: float,
    fps: float,
) -> np.ndarray:
    """The times that the policy asks for, float64 [F]; `fps=0` means `limit` frames evenly spaced.

    Args:
      clip: path, duration (s), frame rate and number of frames of the medium.
      span: start and end, seconds or None.
      limit: largest number of frames.
      fps: frames per second asked for, or 0.
    """
    path, duration, rate, count = clip
    start, end = span
    has = f"the clip lasts {duration:.2f} s"
    if start is not None and not 0 <= start < duration:
        raise MediaError(path, f"start={start:g} s is outside the video: {has}")
    if end is not None and not (start or 0.0) < end <= duration + _LATE:
        where = "not after start" if end <= (start or 0.0) else "outside the video"
        raise MediaError(path, f"end={end:g} s is {where}: {has}")
    last = max(duration - 1 / rate, 0.0)
    first = min(start or 0.0, last)
    last = last if end is None else max(min(end, last), first)
    available = min(count, int((last - first) * rate + 0.5) + 1)
    limit = min(limit, available)
    if fps:
        times = first + np.arange(int((last - first) * fps + 1e-6) + 1) / fps
        if len(times) <= limit:
            return times
    return np.linspace(first, last, int(limit))


# ------------------------------------------------------------------------------------------ images


def images_in(path: str) -> list[str]:
    """Paths of the images in a folder, sorted so that numbers in their names count.

    Raises:
      MediaError: it cannot be listed, or holds none.
    """

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]

    try:
        names = [x for x in os.listdir(path) if x.lower().endswith(_IMAGES)]
    except OSError as error:
        raise MediaError(path, f"cannot be listed: {error.strerror}") from error
    if not names:
        raise MediaError(path, f"is a folder without images ({', '.join(_IMAGES)})")
    return [os.path.join(path, x) for x in sorted(names, key=natural)]


def _image_frame(
    path: str, data: bytes | BinaryIO | None, max_pixels: int | None = None
) -> av.VideoFrame:
    if data is None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise MediaError(path, f"cannot be read: {error.strerror}") from error
    elif not isinstance(data, bytes):
        data.seek(0)
        data = data.read()
    if not data:
        raise MediaError(path, "is empty (0 bytes)")
    try:
        # From bytes: given a name, FFmpeg would take "%03d" in it for a pattern.
        with open_media(io.BytesIO(data), max_pixels) as container:
            if not container.streams.video:
                raise MediaError(path, "is not an image")
            limit_pixels(container.streams.video[0].codec_context, max_pixels, path)
            container.streams.video[0].thread_type = "NONE"
            for frame in container.decode(video=0):
                return frame
    except av.FFmpegError as error:
        raise MediaError(path, f"is not an image that can be read: {error.strerror}") from error
    raise MediaError(path, "is not an image: no picture could be decoded")


def _image(
    path: str, size: int, data: bytes | BinaryIO | None = None, max_pixels: int | None = None
) -> np.ndarray:
    """An image file, read from `path` unless `data` holds it, as uint8 [size, size, 3]."""
    return ToRgb(size)(_image_frame(path, data, max_pixels))


def _rotation(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4 * 90
