"""Frames of media, decoded in worker processes ahead of the ViT.

    with Decoders() as decoders:
        frames = decoders.sample(Media("video", "talk.mp4"), config.data.frames, size=448)
        for chunk_FHWC in frames: ...

What comes out is `data.video.sample`, chunk by chunk. A medium is cut into stretches of time, which
the workers take in turn: one long video keeps all of them busy. A frame travels through a pipe, at
about 0.2 ms for 448 x 448 pixels (benchmarks/decode_ahead.py); no shared memory and no temporary
file is there that a kill could leave behind. A worker ends when its parent does, however that ends.
"""

import contextlib
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import numpy as np

from storm_jax.data.conversation import Media
from storm_jax.data.shared_file import shared
from storm_jax.data.video import MediaError
from storm_jax.frames import FrameConfig

# A stretch of densely sampled video should last this long, since it begins with decoding from the
# key frame before it: seconds.
_STRETCH = 30.0
# Seconds beyond its time limit after which a worker that hangs within one read is killed.
_GRACE = 5.0
# Media after which a process is replaced: whatever FFmpeg leaves behind goes with it. The memory of
# one grew by some 5 to 15 KB a medium (docs/log.md), and a new one takes a quarter of a second.
_MOST_MEDIA = 2000
# What pipes to a dead process raise; ValueError: this side has closed them.
_BROKEN = (EOFError, OSError, ValueError, pickle.UnpicklingError)


class Decoders:
    """A pool of worker processes. Its methods may be called from several threads."""

    def __init__(self, processes: int = 0, ahead_bytes: int = 256 << 20):
        """Starts the processes, which import their libraries meanwhile.

        Args:
          processes: 0: as many as there are cores, eight at most.
          ahead_bytes: frames of one medium that may wait to be taken; two chunks a process always
            may.
        """
        if processes < 0:
            raise ValueError(f"Decoders: processes={processes} is negative; 0 takes one per core")
        count = processes or min(_cores(), 8)
        self.stretch_bytes = ahead_bytes // (2 * count)
        self._lock = threading.Lock()
        self._idle = [_Worker() for _ in range(count)]
        self._all = list(self._idle)
        self._threads = ThreadPoolExecutor(count, "decode")  # each waits for one worker

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def processes(self) -> int:
        """Number of worker processes."""
        return len(self._all)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers, as the operating system knows them."""
        return [worker.process_id for worker in self._all]

    def sample(
        self,
        media: Media,
        frames: FrameConfig,
        size: int,
        timeout: float | None = None,
        chunk: int = 16,
        max_pixels: int | None = None,
    ) -> "Frames":
        """Starts decoding a medium; returns at once.

        Args:
          media, frames, size, max_pixels: as of `data.video.sample`. A file that is given open
            stays so until the frames are closed; its position does not matter.
          timeout: seconds of decoding that the medium may take, those of all workers added up.
            Time that decoded frames wait to be taken does not count.
          chunk: frames that come together; fewer at the end of a stretch.
        """
        if media.data is not None and not isinstance(media.data, bytes):
            media = replace(media, data=cast(Any, shared(media.data)))
        return Frames(self, media, frames, size, timeout, chunk, max_pixels)

    def clip(
        self, media: Media, frames: FrameConfig, size: int, timeout: float | None = None
    ) -> "Future[Clip]":
        """What is known about a medium before a frame is decoded; arguments as of `sample`.

        The future raises the `MediaError` of a medium that cannot be opened, or of a clip that lies
        outside it.
        """

        return Frames(self, media, frames, size, timeout, 1, None, begin=False).opened

    def close(self) -> None:
        """Ends all processes, in mid-frame if need be, and waits until they are gone.

        Who takes frames that were not decoded yet gets a `concurrent.futures.CancelledError`.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(wait=True)

    # ------------------------------------------------------------------------- used by `Frames`

    def submit(self, work: Any, *arguments: Any) -> Future:
        """Calls `work` on one of the threads; CancelledError where the pool is closed."""
        try:
            return self._threads.submit(work, *arguments)
        except RuntimeError:
            raise CancelledError from None

    @contextlib.contextmanager
    def worker(self, frames: "Frames", first: int = 0) -> Iterator["_Worker"]:
        """Lends a worker that has the medium open, and has read no frame from `first` on."""
        with self._lock:
            ready = [w for w in self._idle if w.can_read(frames, first)]
            worker = ready[0] if ready else self._idle[0]
            self._idle.remove(worker)
        try:
            if not ready:
                worker.open(frames)
            yield worker
        finally:
            with self._lock:
                if frames.closed:
                    worker.forget(frames)
                self._idle.append(worker)

    def forget(self, frames: "Frames") -> None:
        """Closes the file in the workers that have it open; busy ones do it when they are done."""
        with self._lock:
            for worker in self._idle:
                worker.forget(frames)


@dataclass(frozen=True)
class Clip:
    """What a medium's header says.

    Attributes:
      times: float64 [F] seconds of the frames that are taken, ascending, see `SampledMedium`.
      duration: of the whole medium, seconds.
    """

    times: np.ndarray
    duration: float


class Frames(Iterator[np.ndarray]):
    """The frames of one medium, in order: an iterator of uint8 [n, size, size, 3], n >= 1.

    Concatenated they are what `data.video.sample` returns. Made by `Decoders.sample`; taken by one
    thread. The first frame that cannot be had raises the `MediaError`, when it is reached. Whoever
    stops earlier calls `close`.

    Attributes:
      opened: what its header says, as soon as it is read; or the `MediaError`.
    """

    def __init__(
        self,
        decoders: Decoders,
        media: Media,
        frames: FrameConfig,
        size: int,
        timeout: float | None,
        chunk: int,
        max_pixels: int | None,
        begin: bool = True,
    ):
        """`begin`: decode ahead from now on; else the medium is opened for `opened` and closed."""
        self.source = media, frames, size
        self.max_pixels = max_pixels
        self.closed = False
        self.timeout = timeout
        self._decoders, self._chunk, self._begin = decoders, chunk, begin
        self._spent = 0.0
        self._stretches: deque[list[tuple[int, int]]] = deque()  # not begun; each a list of chunks
        self._chunks: deque[Future[np.ndarray]] = deque()  # begun, in order
        self._lock = threading.Lock()
        self.opened: Future[Clip] = decoders.submit(self._open)

    @property
    def ready(self) -> bool:
        """Whether the next chunk, or the end or an error, can be had without waiting."""
        if not self.opened.done():
            return False
        with self._lock:
            return not self._chunks or self._chunks[0].done()

    @property
    def count(self) -> int:
        """Number of frames that come in all; waits for the medium's header.

        Raises:
          MediaError: it cannot be opened, or the clip lies outside it.
        """
        return len(self.opened.result().times)

    def __next__(self) -> np.ndarray:
        if self.closed:
            raise StopIteration
        try:
            self.opened.result()
            if not self._chunks:
                raise StopIteration
            frames = self._chunks[0].result()
        except BaseException:
            self.close()
            raise
        with self._lock:
            if self._chunks:  # not closed meanwhile
                self._chunks.popleft()
        self._start_more()
        return frames

    @property
    def seconds(self) -> float:
        """What decoding has taken so far, all workers together."""
        return self._spent

    def close(self) -> None:
        """Gives up what has not been taken; the file is closed as soon as no worker reads it.

        A thread that waits for a chunk meanwhile gets a `concurrent.futures.CancelledError`.
        """
        self.closed = True
        self.opened.cancel()
        with self._lock:
            self._stretches.clear()
            for future in self._chunks:
                future.cancel()
            self._chunks.clear()
        self._decoders.forget(self)

    # ------------------------------------------------------------- called by threads of the pool

    def allowed(self) -> float | None:
        """Seconds of decoding that are left."""
        return None if self.timeout is None else self.timeout - self._spent

    def spend(self, seconds: float) -> None:
        """Counts seconds that a worker took."""
        with self._lock:
            self._spent += seconds

    def late(self) -> MediaError:
        """Says that the time is over."""
        return MediaError(self.source[0].path, f"took longer than {self.timeout:g} s to decode")

    def _open(self) -> Clip:
        with self._decoders.worker(self) as worker:
            clip = worker.clip
            self.closed |= not self._begin  # then the worker closes the file
        if self.closed:
            return clip
        times = clip.times
        processes, frame_bytes = self._decoders.processes, self.source[2] ** 2 * 3
        most = min(-(-len(times) // processes), self._decoders.stretch_bytes // frame_bytes)
        length = max(self._chunk, min(most, _dense(times)))
        self._most_chunks = 2 * processes * -(-length // self._chunk)
        for i in range(0, len(times), length):
            end = min(i + length, len(times))
            starts = range(i, end, self._chunk)
            self._stretches.append([(j, min(j + self._chunk, end)) for j in starts])
        self._start_more()
        return clip

    def _start_more(self) -> None:
        with self._lock:
            while (
                self._stretches
                and not self.closed
                and len(self._chunks) + len(self._stretches[0]) <= self._most_chunks
            ):
                work = [(span, Future()) for span in self._stretches.popleft()]
                futures = [future for _, future in work]
                job = self._decoders.submit(self._decode, work)
                job.add_done_callback(functools.partial(_cancel, futures))
                self._chunks.extend(futures)

    def _decode(self, work: list[tuple[tuple[int, int], Future]]) -> None:
        """Decodes one stretch."""
        try:
            with self._decoders.worker(self, work[0][0][0]) as worker:
                for span, future in work:
                    if self.closed:
                        return
                    chunk = worker.read(self, *span)
                    if future.set_running_or_notify_cancel():
                        future.set_result(chunk)
        except Exception as error:
            for _, future in work:
                if not future.done():
                    future.set_exception(error)


def _cancel(futures: list[Future], job: Future) -> None:
    """Leaves nobody waiting for what a stretch that was given up did not answer."""
    for future in futures:
        future.cancel()


def _dense(times: np.ndarray) -> int:
    """Frames of a stretch, for float64 [F] seconds, ascending."""
    span = float(times[-1] - times[0])
    return int(_STRETCH * (len(times) - 1) / span) if span else len(times)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """One process, asked by one thread at a time; started again after it died."""

    def __init__(self):
        self.serves: Frames | None = None  # whose medium it has open
        self.clip = Clip(np.empty(0), 0.0)  # of that medium
        self._position = 0  # frames before this one can no longer be read
        self._killed = False  # for good
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        # As multiprocessing does it: modules are found where the parent finds them.
        path = os.pathsep.join(p for p in sys.path if p)
        with self._lock:
            if self._killed:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "storm_jax.inference.media_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
            self._ready, self._opened = False, 0
            self._stdin = cast(IO[bytes], self._process.stdin)
            self._stdout = cast(IO[bytes], self._process.stdout)

    def open(self, frames: Frames) -> None:
        """Opens a medium; what was open before is closed."""
        self.serves = None
        # Where it died meanwhile, that is not this medium's fault.
        if self._opened >= _MOST_MEDIA or self._process.poll() is not None:
            with self._lock:
                self._end()
            self._start()
        self._opened += 1
        asked = *frames.source, frames.max_pixels, frames.timeout
        self.clip = Clip(*self._ask(frames, "open", *asked))
        self.serves, self._position = frames, 0

    def can_read(self, frames: Frames, first: int) -> bool:
        """Whether frames from `first` on can be read without opening anything.

        Stretches are begun in order, but the thread that takes a stretch can be overtaken before it
        takes a worker.
        """
        return self.serves is frames and self._position <= first

    def read(self, frames: Frames, first: int, last: int) -> np.ndarray:
        """Frames `first` to `last`, which is not included, of the medium that is open."""
        self._position = last
        return self._ask(frames, "read", first, last, frames.allowed())

    def _ask(self, frames: Frames, *request: Any) -> Any:
        """The answer to a request, whose last item is the seconds that it may take, or None.

        Raises:
          MediaError: the worker raised it, or died over it.
          CancelledError: the pool was closed.
        """
        limit = request[-1]
        if limit is not None and limit <= 0:
            raise frames.late()
        alarm = None
        try:
            if not self._ready:  # its libraries are being imported, which no medium pays for
                self._ready = pickle.load(self._stdout)
            if limit is not None:
                alarm = threading.Timer(limit + _GRACE, self._process.kill)
                alarm.start()
            ok, seconds, value = self._exchange(request)
        except _BROKEN:
            raise self._died(frames, alarm) from None
        finally:
            if alarm is not None:
                alarm.cancel()
        frames.spend(seconds)
        if ok:
            return value
        raise value

    def forget(self, frames: Frames) -> None:
        """Closes the file, if it is the one that is open."""
        if self.serves is frames:
            self.serves = None
            try:
                self._exchange(("close",))
            except _BROKEN:
                pass  # dead: then it holds nothing

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self) -> None:
        """Ends the process for good."""
        with self._lock:
            self._killed = True
            self._end()

    def _exchange(self, request: tuple[Any, ...]) -> Any:
        pickle.dump(request, self._stdin, protocol=5)
        self._stdin.flush()
        return pickle.load(self._stdout)

    def _died(self, frames: Frames, alarm: threading.Timer | None) -> Exception:
        if self._killed:
            return CancelledError()
        late = alarm is not None and alarm.finished.is_set()
        self.serves = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its pipes close before it has a status
        with self._lock:
            status = self._end()
        self._start()
        if late:
            return frames.late()
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        return MediaError(
            frames.source[0].path,
            f"the process that decoded it died ({reason}): the file crashes the decoder, or memory"
            " ran out",
        )

    def _end(self) -> int:
        self._process.kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):  # a request that was not sent
                pipe.close()
        return self._process.wait()
