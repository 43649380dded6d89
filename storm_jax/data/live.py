"""Frames of a video in the order in which they come: files, pipes of raw frames, cameras, URLs.

Each source is an iterator of `TimedFrame`; `Feed` runs it in a thread and holds a fixed number of
frames ready. A source that cannot wait (a camera) has its oldest waiting frame dropped when a new
one comes and there is no room, and `Feed.dropped` counts them.

Times are seconds of video time after the first frame. `fps` thins a source: of the times 0, 1/fps,
2/fps, ... each takes the first frame that is not more than half a frame period before it, as
`data.video.decode` does, but one frame is never taken twice.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer

from storm_jax.data.container import HALF_PERIOD, MediaError, ToRgb, VideoReader

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each attempt to reconnect, then the last
_FILE_FRAMES = 8  # decoded at once


class TimedFrame(NamedTuple):
    """A frame of a stream."""

    time: float  # seconds after the first one
    image: np.ndarray  # uint8 [size, size, 3], RGB


class Thinning:
    """Which frames of a stream are taken, by their times."""

    def __init__(self, fps: float, rate: float):
        """Args:
        fps: frames taken a second at most; 0: all of them.
        rate: mean frame rate of the stream; 0: not known.
        """
        self._fps = fps
        self._tolerance = HALF_PERIOD / rate if rate else 0.0
        self._next = 0  # tick

    def takes(self, seconds: float) -> bool:
        """Whether the frame at this time is taken; times come in order."""
        if not self._fps:
            return True
        tick = int(np.floor((seconds + self._tolerance) * self._fps + 1e-6))
        if tick < self._next:
            return False
        self._next = tick + 1
        return True


def file_frames(path: str, size: int, fps: float = 0.0) -> Iterator[TimedFrame]:
    """All frames of a video file, or `fps` of them a second, as `data.video.decode` takes them.

    Raises:
      MediaError: as `data.video.decode`, at the first frame that cannot be had.
    """
    with VideoReader(path) as reader:
        last = max(reader.duration - 1 / reader.fps, 0.0)
        fps = min(fps or reader.fps, reader.fps)
        count = int(last * fps + 1e-6) + 1
        shown = -1.0
        for first in range(0, count, _FILE_FRAMES):
            times = np.arange(first, min(first + _FILE_FRAMES, count)) / fps
            for image, seconds in zip(*reader.read(times, size), strict=True):
                if seconds > shown:
                    yield TimedFrame(float(seconds), image)
                shown = seconds


def raw_frames(
    pipe: BinaryIO,
    width: int,
    height: int,
    rate: float,
    size: int,
    fps: float = 0.0,
    name: str = "standard input",
) -> Iterator[TimedFrame]:
    """Frames that stand one after another in a pipe, rows of RGB bytes (FFmpeg: -pix_fmt rgb24).

    Args:
      pipe: read to its end; whoever writes into it waits for the reader.
      width, height: of the frames, pixels.
      rate: frames a second of video time.

    Raises:
      MediaError: the pipe ends within a frame.
    """
    length = width * height * 3
    thinning, to_rgb = Thinning(fps, rate), ToRgb(size)
    number = 0
    while data := _read_exactly(pipe, length):
        if len(data) < length:
            raise MediaError(
                name,
                f"ended after {len(data)} of the {length} bytes of frame {number}: is it really"
                f" {width}x{height} in rgb24?",
            )
        seconds = number / rate
        if thinning.takes(seconds):
            image = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            yield TimedFrame(seconds, to_rgb(av.VideoFrame.from_ndarray(image, format="rgb24")))
        number += 1


def _read_exactly(pipe: BinaryIO, length: int) -> bytes:
    """`length` bytes, fewer at the end."""
    parts = []
    while length and (part := pipe.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def live_frames(
    url: str,
    size: int,
    fps: float = 0.0,
    *,
    options: dict[str, str] | None = None,
    reconnects: int = 5,
    timeout: float = 10.0,
    notice: Callable[[str], None] = lambda message: None,
    waits: tuple[float, ...] = WAITS,
) -> Iterator[TimedFrame]:
    """Frames of a camera or of a stream in the network, as they come.

    Reconnecting: a source that cannot be opened at first is an error at once. One that was open and
    ends, fails, or sends nothing for `timeout` seconds is opened again, after 1, 2, 4, 8, 16 and
    then 30 seconds; a frame that arrives starts the count anew. The video goes on where it was:
    the time that the connection was away counts. A packet that cannot be decoded is passed over.

    Args:
      url: what FFmpeg opens ("rtsp://...", "tcp://...", "http://..."), or "/dev/video0".
      options: of FFmpeg's protocol and demuxer, "rtsp_transport" and "video_size", say.
      reconnects: attempts in a row; 0: the end of the stream is the end, a failure is an error.
      timeout: seconds.
      notice: told when a connection is lost and when it is back.
      waits: seconds before each attempt; the last one stays.

    Raises:
      MediaError: it cannot be opened, or it is lost and no attempt brought it back.
    """
    to_rgb = ToRgb(size)
    thinning: Thinning | None = None
    last, arrival = 0.0, None  # of the last frame: its time, and the clock then
    attempts = 0
    while True:
        reason = "it ended"
        try:
            with _opened(url, options or {}, timeout) as container:
                stream = container.streams.best("video")
                if not isinstance(stream, av.VideoStream):
                    raise MediaError(url, "has no video stream")
                rate = stream.average_rate
                thinning = thinning or Thinning(fps, float(rate) if rate else 0.0)
                start = None  # time of this connection's clock that is 0 of the video's
                for frame in _decoded(container, stream):
                    now = time.monotonic()
                    clock = now if frame.time is None else frame.time
                    if start is None:
                        start = clock if arrival is None else clock - last - (now - arrival)
                    if attempts:
                        notice(f"{url}: connected again")
                        attempts = 0
                    last, arrival = max(last, clock - start), now
                    if thinning.takes(last):
                        yield TimedFrame(last, to_rgb(frame))
        except (av.FFmpegError, OSError) as error:
            reason = error.strerror or str(error)
            if isinstance(error, av.ExitError):  # "Immediate exit requested": by the time limit
                reason = f"nothing came for {timeout:g} s"
            if arrival is None:
                raise MediaError(url, f"cannot be opened: {reason}") from error
            if not reconnects:
                raise MediaError(url, f"lost after {last:.1f} s: {reason}") from error
        if arrival is None:
            raise MediaError(url, "ended without a frame")
        if not reconnects:
            return
        if attempts == reconnects:
            raise MediaError(
                url, f"lost after {last:.1f} s and not back in {attempts} attempts: {reason}"
            )
        wait = waits[min(attempts, len(waits) - 1)]
        attempts += 1
        notice(f"{url}: lost ({reason}); attempt {attempts} of {reconnects} in {wait:g} s")
        time.sleep(wait)


def _decoded(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded."""
    for packet in container.demux(stream):
        try:
            frames = stream.codec_context.decode(packet)
        except av.InvalidDataError:
            continue
        yield from (frame for frame in frames if not frame.is_corrupt)


def _opened(url: str, options: dict[str, str], timeout: float) -> InputContainer:
    form = None
    if "://" not in url:
        form = "v4l2"
    elif url.startswith("rtsp"):
        # Over UDP a camera behind a router sends into the void, and lost packets smear pictures.
        options = {"rtsp_transport": "tcp", **options}
    return av.open(url, "r", format=form, options=options, timeout=(timeout, timeout))


def paced(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """A file's frames at the pace of its own clock; one that is late comes at once."""
    began = None
    for frame in frames:
        began = time.monotonic() - frame.time if began is None else began
        time.sleep(max(0.0, began + frame.time - time.monotonic()))
        yield frame


class Feed:
    """Frames that a thread reads ahead, a fixed number at most.

    Attributes:
      drops: frames are dropped where there is no room.
      dropped: how many were.
    """

    def __init__(self, frames: Iterator[TimedFrame], *, depth: int, drop: bool):
        """Starts reading.

        Args:
          frames: the source; it is closed when the feed is.
          depth: frames that wait at most.
          drop: a frame that finds no room drops the oldest waiting one; else the source waits.
        """
        self.drops, self.dropped = drop, 0
        self._frames, self._depth = frames, depth
        self._waiting: deque[TimedFrame] = deque()
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True, name="frames")
        self._thread.start()

    def _read(self) -> None:
        error = None
        try:
            for frame in self._frames:
                if not self._put(frame):
                    break
        except Exception as caught:  # it belongs to whoever takes the frames
            error = caught
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _put(self, frame: TimedFrame) -> bool:
        """Whether more is wanted."""
        with self._changed:
            while len(self._waiting) == self._depth and not self._closed:
                if self.drops:
                    self._waiting.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            self._waiting.append(frame)
            self._changed.notify_all()
            return not self._closed

    def take(self, timeout: float) -> TimedFrame | None:
        """The next frame; None: there was none for `timeout` seconds, or there will be none.

        Raises:
          MediaError: the source failed, and all frames before that were taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, timeout)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            return None

    @property
    def ended(self) -> bool:
        """Whether the source ended and all its frames were taken."""
        with self._changed:
            return self._ended and not self._waiting and self._error is None

    def close(self) -> None:
        """Stops reading. A read that blocks is left alone: its thread ends with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1.0)
