"""One open video file, and the frames that it shows at given times.

`VideoReader` seeks by timestamp and decodes forward, because frame numbers cannot be trusted:
variable frame rates, edit lists and containers without a frame count all make
`number = time * rate` wrong. The frame at time t is the first one, in presentation order, at or
after t minus half a mean frame period: with a constant rate that is the nearest frame (the earlier
one where t lies in the middle), and it does not depend on where a seek happened to land.
"""

import io
import itertools
import os
import time
from collections import deque
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Interpolation, VideoReformatter

_BACKOFF = (0.0, 1.0, 4.0, 16.0, 64.0)  # seconds before the target where a seek is tried
HALF_PERIOD = 0.52  # frame periods; above 0.5, so that rounded timestamps do not turn ties around
# Tags that are not UTF-8: PyAV 19 copes by itself, and no longer knows the argument.
_OPEN: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) > 18 else {"metadata_errors": "replace"}
)
_NO_GOAL = -(1 << 62)  # ticks: nothing lies before it, so nothing is skipped
_GOP_GUESS = 2.0  # seconds between key frames, until the file has shown a longer distance
_SKIPPING = ("h264", "hevc")  # decoders that were checked to skip unreferenced frames cleanly
# Of what is read from memory or from an open file: a playlist or a session description in it would
# make FFmpeg open files, addresses and ports that nobody asked for.
_NOTHING_ELSE = {"protocol_whitelist": "none"}


class MediaError(ValueError):
    """A media file that cannot be used as asked; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that the error survives pickling to a parent
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_media(
    source: str | BinaryIO, max_pixels: int | None = None, timeout: float | None = None
) -> InputContainer:
    """FFmpeg's demuxer on a name, or on an open file, from which it can reach nothing else.

    Args:
      max_pixels: of one picture: FFmpeg decodes no larger one to find out what the file holds.
    """
    options = {} if isinstance(source, str) else dict(_NOTHING_ELSE)
    if max_pixels is not None:
        options["max_pixels"] = str(max_pixels)
    return av.open(source, "r", options=options, timeout=timeout, **_OPEN)


def limit_pixels(context: VideoCodecContext, max_pixels: int | None, path: str) -> None:
    """Refuses pictures above the limit, before the first is decoded and later.

    Raises:
      MediaError: the header says that they are larger.
    """
    if max_pixels is None:
        return
    width, height = context.width, context.height
    if width * height > max_pixels:
        raise MediaError(path, f"has {width}x{height} pixels: more than the limit of {max_pixels}")
    if not width:  # what FFmpeg did not decode has no size
        raise MediaError(path, f"has no picture that can be decoded within {max_pixels} pixels")
    context.options = {"max_pixels": str(max_pixels)}  # of a picture larger than the header says


class VideoReader:
    """A video file opened for decoding on one thread.

    Times are seconds after the stream's first frame, whatever timestamp the file gives that one.

    Attributes:
      duration: seconds that the video stream lasts, the last frame's own duration included.
      fps: mean frame rate, frames per second.
      frames: number of frames; the header's count, or duration * fps where that is smaller (edit
        lists) or where the header has none (WebM, MPEG-TS).
      codec, width, height: as stored in the file (width and height before rotation).

    Errors are `MediaError`. The time limit is checked between packets: it cannot interrupt one
    read from a stalled disk, nor the decoding of one single packet.
    """

    def __init__(
        self,
        source: str | bytes | BinaryIO,
        timeout: float | None = None,
        name: str = "",
        max_pixels: int | None = None,
    ):
        """Opens `source`; all work must end in `timeout` seconds.

        Args:
          source: a path, the file's bytes, or a binary file that is open and seekable; it stays
            open, and nobody else may move in it meanwhile.
          name: what errors call it; by default its path, or what it is.
          max_pixels: of one picture; a larger one is refused before it is decoded.
        """
        if isinstance(source, bytes):
            name = name or f"<{len(source)} bytes>"
        self.path = name or (source if isinstance(source, str) else "<open file>")
        self._source = source
        self._max_pixels = max_pixels
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._opened = False
        self._gop = _GOP_GUESS
        self._has_keys = False  # known once a packet marked as a key frame was seen
        self._seekable = True
        self._following = _NO_GOAL  # the goal after the present one
        self.duration = 0.0
        self._open()
        self._start = self._stream.start_time or 0
        self.duration = self._header_duration() or self._scan_duration()
        self._find_start()
        stream = self._stream
        self.codec = self._context.name
        self.width, self.height = self._context.width, self._context.height
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate else max(stream.frames, 1) / max(self.duration, 1e-3)
        estimate = max(1, round(self.duration * self.fps))
        self.frames = min(stream.frames, estimate) if stream.frames > 0 else estimate
        self._tolerance = HALF_PERIOD / self.fps
        # In MP4 and AVI the header lists every frame: it tells which key frame precedes a time.
        self._indexed = 0 < stream.frames <= len(stream.index_entries)

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file."""
        if self._opened:
            self._container.close()
            self._opened = False

    def allow(self, seconds: float) -> None:
        """Starts the clock again: work from now on must end in `seconds`."""
        if self._timeout is None:
            self._timeout = seconds  # what the error says
        self._deadline = time.monotonic() + seconds

    def read(
        self, times: np.ndarray, size: int | None = None, keyframes_only: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames at the given times.

        Args:
          times: float64 [F], seconds, ascending.
          size: side of the square that frames are scaled to (bicubic, no crop); None keeps theirs.
          keyframes_only: take a key frame at or before each time instead; much faster in long
            videos, and up to one group of pictures too early.

        Returns:
          frames uint8 [F, H, W, 3] (RGB, rotated as the file asks) and their real times float64
          [F], seconds. A frame is repeated where two of the times meet the same one.

        Raises:
          MediaError: a packet on the way to a wanted frame is damaged or missing, the file ends
            before a wanted time, or the time limit is over.
        """
        pick = self._key_frame_at if keyframes_only else self._frame_at
        to_rgb = ToRgb(size)
        frames, real, last = None, np.empty(len(times)), None
        goals = [self._ticks(t) for t in times]
        for i, (t, goal) in enumerate(zip(times, goals, strict=True)):
            self._following = goals[i + 1] if i + 1 < len(goals) else _NO_GOAL
            frame = pick(goal)
            if frames is not None and frame is last:
                frames[i] = frames[i - 1]
            else:
                image = to_rgb(frame)
                if frames is None:
                    frames = np.empty((len(times), *image.shape), np.uint8)
                if image.shape != frames.shape[1:]:
                    raise self._error(
                        f"the picture size changes at {t:.2f} s from {frames.shape[2]}x"
                        f"{frames.shape[1]} to {image.shape[1]}x{image.shape[0]}; ask for a size"
                    )
                frames[i] = image
            real[i] = self._seconds(_pts(frame))
            last = frame
        if frames is None:
            raise ValueError("VideoReader.read: `times` is empty")
        return frames, real

    def first_frame(self) -> av.VideoFrame:
        """The first frame, as decoded."""
        return self._frame_at(self._ticks(0.0))

    # ------------------------------------------------------------------ opening and duration

    def _open(self) -> None:
        self.close()
        if isinstance(self._source, str):
            if os.path.isdir(self._source):
                raise self._error("is a folder, not a video file")
            # "file:" keeps a name such as "http:x" or "concat:x" from being taken as a protocol.
            source, empty = "file:" + self._source, _is_empty(self._source)
        elif isinstance(self._source, bytes):
            source, empty = io.BytesIO(self._source), not self._source
        else:
            source, empty = self._source, self._source.seek(0, os.SEEK_END) == 0
            source.seek(0)
        if empty:
            raise self._error("is empty (0 bytes)")
        try:
            self._container: InputContainer = open_media(
                source, self._max_pixels, timeout=self._timeout
            )
        except av.ExitError as error:
            raise self._late() from error
        except (av.FFmpegError, OSError) as error:
            hint = " (no video, or cut off)" if isinstance(error, av.InvalidDataError) else ""
            raise self._error(f"cannot be opened: {error.strerror}{hint}") from error
        self._opened = True
        streams = self._container.streams
        stream = streams.best("video")
        if stream is None:
            kinds = ", ".join(sorted({s.type for s in streams})) or "nothing"
            raise self._error(f"has no video stream (it holds {kinds})")
        context = stream.codec_context
        if not isinstance(context, VideoCodecContext):
            raise self._error("its video codec has no decoder here")
        for other in streams:
            if other is not stream:
                other.discard = Discard.all
        limit_pixels(context, self._max_pixels, self.path)
        context.thread_type, context.thread_count = "NONE", 1
        context.open(strict=False)  # now: dav1d would keep the `skip_frame` of its first packet
        self._stream, self._context = stream, context
        self._tick = stream.time_base or Fraction(1)  # seconds
        self._skips = context.name in _SKIPPING
        self._begin()

    def _begin(self) -> None:
        """Forgets what was decoded: the demuxer stands somewhere else now."""
        self._packets = self._container.demux(self._stream)
        self._pending: deque[av.VideoFrame] = deque()
        self._current: av.VideoFrame | None = None
        self._ended = False
        self._need_key = self._has_keys
        self._skipped = False  # frames that nothing refers to were passed over
        self._goal, self._found = _NO_GOAL, _NO_GOAL  # earliest packet read at or after the goal
        self._read_dts: int | None = None  # of the packet read last
        self._read_pts: int | None = None  # largest one read
        self._read_end: int | None = None  # largest pts + duration read

    def _header_duration(self) -> float | None:
        stream = self._stream
        if stream.duration and stream.duration > 0:
            return float(stream.duration * self._tick)
        tag = stream.metadata.get("DURATION", "")  # Matroska: "00:01:02.500000000"
        try:
            hours, minutes, seconds = tag.split(":")
            end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            return None
        return max(end - float(self._start * self._tick), 0.0) or None

    def _scan_duration(self) -> float:
        """Reads, without decoding, the packets behind the last key frame."""
        if self._container.duration:
            try:
                self._container.seek(self._container.duration, stream=None)
                self._begin()
            except (av.FFmpegError, OSError):
                self._open()
        while self._read_packet() is not None:
            pass
        end = self._read_end
        self._open()
        if end is None:
            raise self._error("has no timestamps; put it into a container: ffmpeg -i IN OUT.mp4")
        return float((end - self._start) * self._tick)

    def _find_start(self) -> None:
        """Makes the first frame that can be shown time 0, and leaves the demuxer in front of it."""
        packet = first = self._read_packet()
        while packet is not None and not packet.is_keyframe:  # cut out of a broadcast, say
            packet = self._read_packet()
        if packet is None and first is not None:  # no key frame is marked: leave it to the decoder
            self._open()
            packet = first = self._read_packet()
        if packet is None or first is None:
            raise self._error("holds no frame")
        self._has_keys = packet.is_keyframe
        # An edit list starts behind its first packets; AVI with B-frames starts one frame later
        # than its header says.
        self._start = max(self._start, packet.pts or self._start)
        lost = (packet.pts or 0) - (first.pts or 0)
        self.duration = max(self.duration - float(max(lost, 0) * self._tick), 0.0)
        self._packets = itertools.chain([packet], self._packets)

    # ------------------------------------------------------------------------------ exact frames

    def _frame_at(self, goal: int) -> av.VideoFrame:
        """The first frame whose timestamp is at least `goal` ticks."""
        if self._current is None or _pts(self._current) < goal:
            if self._seek_is_shorter(goal):
                self._seek(goal)
            while self._current is None or _pts(self._current) < goal:
                frame = self._next_frame(goal)
                if frame is None:
                    return self._last_frame(goal)
                self._current = frame
        return self._current

    def _seek_is_shorter(self, goal: int) -> bool:
        """Whether a key frame lies between the packet read last and the goal."""
        if not self._seekable:
            return False
        read = self._start if self._read_dts is None else self._read_dts
        if self._indexed:
            entries = self._stream.index_entries
            entry = entries.search_timestamp(goal)
            return entry > 0 and entries[entry].timestamp > read
        return (goal - read) * self._tick > self._gop

    def _seek(self, goal: int) -> None:
        """Makes a frame at or before `goal` the current one, or goes to the start of the file."""
        for seconds in _BACKOFF:
            ticks = goal - int(seconds / self._tick)
            if ticks <= self._start:
                break
            if not self._jump(ticks):
                break
            frame = self._next_frame(goal)
            # Later than the goal: the demuxer knows decoding order only, or the pictures before
            # this one refer to what lies before the seek (open groups, gradual refresh).
            if frame is not None and _pts(frame) <= goal:
                self._current = frame
                self._gop = max(self._gop, float((goal - _pts(frame)) * self._tick))
                return
        self._open()

    def _jump(self, ticks: int) -> bool:
        try:
            self._container.seek(ticks, stream=self._stream)
        except (av.FFmpegError, OSError):
            self._seekable = False  # from now on read forward only
            return False
        self._begin()
        self._need_key = True
        return True

    def _next_frame(self, goal: int) -> av.VideoFrame | None:
        """The next frame in presentation order; None behind the last one."""
        while not self._pending:
            if self._ended:
                return None
            packet = self._read_packet()
            if packet is None:
                self._ended = True
            elif self._need_key and not packet.is_keyframe:
                continue
            else:
                # What is not shown need not be decoded when no other frame refers to it.
                skip = self._skips and self._is_between(packet, goal)
                self._skipped |= skip
                self._context.skip_frame = "NONREF" if skip else "DEFAULT"
                self._need_key = False
            try:
                self._pending.extend(self._context.decode(packet))
            except av.FFmpegError as error:
                raise self._damaged(error) from error
        frame = self._pending.popleft()
        if frame.is_corrupt:
            raise self._error(f"is damaged at {self._seconds(_pts(frame)):.2f} s")
        return frame

    def _is_between(self, packet: av.Packet, goal: int) -> bool:
        """Whether a packet's frame lies before the goal, or behind its frame and before the next.

        Decoders give a frame out when they have read some of those behind it. These are not shown
        if a packet has been read whose frame is nearer to the goal.
        """
        if packet.pts is None:
            return False
        if packet.pts < goal:
            return True
        if goal != self._goal:
            self._goal, self._found = goal, _NO_GOAL
        if _NO_GOAL < self._found < packet.pts:
            return packet.pts < self._following
        if not packet.is_discard:
            self._found = packet.pts
        return False

    def _read_packet(self) -> av.Packet | None:
        """The next packet of the video stream; None at the end of the file."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise self._late()
        try:
            packet = next(self._packets, None)
        except av.ExitError as error:
            raise self._late() from error
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error) from error
        if packet is None or packet.size == 0:  # the empty packet stands for the end
            return None
        if packet.dts is not None:
            self._read_dts = packet.dts
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is not None:
            self._read_pts = pts if self._read_pts is None else max(self._read_pts, pts)
            end = pts + (packet.duration or 0)
            self._read_end = end if self._read_end is None else max(self._read_end, end)
        return packet

    def _last_frame(self, goal: int) -> av.VideoFrame:
        """The file ended before `goal`: its last frame, if that one is still shown at `goal`."""
        end = self._read_end
        if self._skipped and self._read_pts is not None:  # it may have been passed over
            self._seek(self._read_pts)
            while (frame := self._next_frame(_NO_GOAL)) is not None:
                self._current = frame
        if self._current is None:
            raise self._error("holds no frame that can be decoded")
        if not self._reaches(goal, end):
            raise self._truncated(goal)
        return self._current

    # -------------------------------------------------------------------------------- key frames

    def _key_frame_at(self, goal: int) -> av.VideoFrame:
        """A key frame at or before `goal` ticks; the first one where there is none.

        Where key frames cannot be decoded alone (gradual refresh) or are not shown (a short cut
        out of a long video), the frame at `goal` itself.
        """
        current = self._current
        packet = self._key_packet(goal)
        if packet is not None and current is not None and _pts(packet) == _pts(current):
            self._current = current
            return current
        frames = []
        if packet is not None:
            try:
                frames = [*self._context.decode(packet), *self._context.decode(None)]
            except av.FFmpegError as error:
                raise self._damaged(error) from error
        if packet is None or not frames:
            self._open()
            frame = self._frame_at(goal)
            self._current = None  # it is no key frame: the next goal may not take it for one
            return frame
        if frames[0].is_corrupt:
            raise self._error(f"its key frame at {self._seconds(_pts(packet)):.2f} s is damaged")
        self._current = frames[0]
        return self._current

    def _key_packet(self, goal: int) -> av.Packet | None:
        for seconds in _BACKOFF:
            ticks = goal - int(seconds / self._tick)
            if ticks <= self._start or not self._jump(ticks):
                break
            found, packet = None, self._next_key_packet()
            while packet is not None and _pts(packet) <= goal:
                found = packet
                if self._indexed and not seconds:  # the demuxer knew which one precedes the goal
                    return found
                packet = self._next_key_packet()
            if packet is None:  # the end of the file
                end = self._read_end
                if not self._reaches(goal, end) and (self._indexed or end is not None):
                    raise self._truncated(goal)
            if found is not None:
                return found
        self._open()
        return self._next_key_packet()

    def _next_key_packet(self) -> av.Packet | None:
        while (packet := self._read_packet()) is not None:
            if packet.is_keyframe and packet.pts is not None and not packet.is_discard:
                return packet
        return None

    # ------------------------------------------------------------------------------ small helpers

    def _ticks(self, seconds: float) -> int:
        return self._start + int(np.ceil(float(seconds - self._tolerance) / float(self._tick)))

    def _seconds(self, pts: int) -> float:
        return float((pts - self._start) * self._tick)

    def _reaches(self, goal: int, end: int | None) -> bool:
        """Whether packets that end at `end` ticks still show something at `goal`."""
        return end is not None and goal <= end + 2 * self._tolerance / self._tick

    def _truncated(self, goal: int) -> MediaError:
        return self._error(
            f"has no frame at {self._seconds(goal):.2f} s, but should last {self.duration:.2f} s:"
            " it is truncated; ask for an earlier `end`"
        )

    def _late(self) -> MediaError:
        return self._error(f"took longer than {self._timeout:g} s to decode")

    def _damaged(self, error: Exception) -> MediaError:
        where = ""
        if self._read_pts is not None:
            where = f" behind {self._seconds(self._read_pts):.2f} s of {self.duration:.2f} s"
        return self._error(f"is damaged{where}: {getattr(error, 'strerror', error)}")

    def _error(self, reason: str) -> MediaError:
        return MediaError(self.path, reason)


class ToRgb:
    """Turns decoded frames into uint8 [H, W, 3]: scaled to `size` x `size`, upright.

    Scaled to BGR first, since FFmpeg does that 2.7 times as fast on x86 as straight to RGB, and
    with less error against 16 bits (r.m.s. 0.63 and 0.76 of 255); the swap then costs little.
    """

    def __init__(self, size: int | None):
        """`size` is in pixels; None keeps the size of the frames."""
        self._size = size
        self._scale, self._swap = VideoReformatter(), VideoReformatter()  # each keeps its tables

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        scaled = frame
        if self._size is not None:
            scaled = self._scale.reformat(
                frame,
                width=self._size,
                height=self._size,
                format="bgr24",
                interpolation=Interpolation.BICUBIC,
                threads=1,
            )
        rgb = self._swap.reformat(
            scaled, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        return upright(rgb.to_ndarray(), frame)


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """`image` [H, W, 3] as the frame's display matrix asks: turned by quarters, mirrored."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists no side data at all beside a kind that it does not know: EXIF
        return np.rot90(image, round(frame.rotation / 90))
    if data is None:
        return image
    # Rows of 3; (x, y) is shown at (a x + c y, b x + d y), y downwards.
    a, b, _, c, d = (int(x) for x in np.frombuffer(data, np.int32)[:5])
    if abs(a) < abs(b):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _pts(item: av.VideoFrame | av.Packet) -> int:
    """Timestamp in ticks; where a file has decoding times only, that one."""
    pts = item.dts if item.pts is None else item.pts
    return 0 if pts is None else pts


def _is_empty(path: str) -> bool:
    try:
        return os.path.getsize(path) == 0
    except OSError:
        return False  # the reason comes with the attempt to open it
