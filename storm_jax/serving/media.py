"""From the media that a request names to frames: bytes under limits, their hash, decoding."""

import asyncio
import binascii
import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

import numpy as np

from storm_jax.config import DataConfig
from storm_jax.data import video
from storm_jax.data.conversation import Media
from storm_jax.inference.media import Decoders
from storm_jax.serving.conversation import Source
from storm_jax.serving.errors import ApiError, invalid
from storm_jax.serving.local_files import LocalFiles
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.remote import Remote
from storm_jax.serving.settings import Settings

T = TypeVar("T")

_REMEMBERED = 4096  # hashes of local files


@dataclass(frozen=True)
class Fetched:
    """A medium's files, ready to be decoded.

    Attributes:
      key: equal for equal content that is shown alike.
    """

    source: Source
    files: tuple[bytes | BinaryIO, ...]
    frames: int
    key: Hashable

    def close(self) -> None:
        for file in self.files:
            if not isinstance(file, bytes):
                file.close()


class MediaReader:
    """Fetches media, and has them decoded by `settings.decoders` processes.

    A file that crashes the decoder, or makes it hang, ends a process that is started again.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataConfig,
        image_size: int,
        metrics: Metrics,
        remote: Remote | None,
    ):
        """
        Args:
          data: how frames are taken.
          image_size: side of the frames, pixels.
          remote: fetches URLs of other servers; None: they are refused.
        """
        self._settings, self._data, self._size = settings, data, image_size
        self._metrics, self._remote = metrics, remote
        self._local = LocalFiles(settings.allowed_media_path)
        self._pool = ThreadPoolExecutor(settings.decoders, "media")
        self.decoders = Decoders(settings.decoders)
        self._hashes: dict[tuple[int, ...], bytes] = {}

    async def fetch(self, source: Source, frames: int) -> Fetched:
        """Opens a medium and reads what its hash needs.

        Args:
          frames: taken from a video, at most.

        Raises:
          ApiError: it is not allowed, too large, or not there.
          MediaError: a folder without images.
        """
        urls = source.urls
        if not source.frames and urls[0].startswith("file:"):
            path = self._local.resolve(urls[0], source.where)
            if source.kind == "video" and os.path.isdir(path):
                files = await self._blocking(lambda: video.images_in(path))
                source = dataclasses.replace(source, frames=True)
                urls = tuple("file://" + quote(file) for file in files)
        if source.frames:
            if source.start is not None or source.end is not None:
                raise invalid(
                    f"{source.where}: a list of frames has no clock: leave start and end out",
                    source.where,
                )
            urls = tuple(urls[i] for i in video.spread(len(urls), frames))
        files, hashes = [], []
        room = self._settings.max_media_bytes
        try:
            for url in urls:
                file = await self._open(url, source)
                if source.frames or source.kind == "image":
                    # Read at once: hundreds of frames would be as many open files.
                    file = await self._blocking(lambda file=file, most=room: _read(file, most))
                    room -= len(file)
                    if room < 0:
                        raise self._too_large(source.where)
                files.append(file)
                hashes.append(await self._blocking(lambda file=file: self._hash(file)))
        except BaseException:
            Fetched(source, tuple(files), frames, None).close()
            raise
        shown = frames if source.kind == "video" else 1
        key = source.kind, source.frames, source.start, source.end, shown, *hashes
        return Fetched(source, tuple(files), frames, key)

    async def decode(self, fetched: Fetched) -> np.ndarray:
        """Frames uint8 [F, H, W, 3]; closes the files.

        Raises:
          MediaError: it cannot be decoded as asked.
        """
        return await self._blocking(lambda: self._decode(fetched))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.decoders.close()
        if self._remote is not None:
            await self._remote.close()

    # ---------------------------------------------------------------------------------- fetching

    async def _open(self, url: str, source: Source) -> bytes | BinaryIO:
        where = source.where
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            data = await self._blocking(lambda: self._from_data_url(url, where))
            if source.frames or source.kind == "image":
                return data
            return await self._blocking(lambda: _stored(data))  # every process may read it
        if scheme == "file":
            return self._local.open(url, where)
        if scheme in ("http", "https"):
            if self._remote is None:
                raise ApiError(
                    403,
                    f"{where}: this server fetches nothing from other servers"
                    " (--allow-remote-media); send the file as a data: URL",
                    "remote_media_not_allowed",
                    where,
                )
            return await self._remote.fetch(url, where)
        raise invalid(f"{where}: a URL starts with data:, file:, http: or https:", where)

    def _from_data_url(self, url: str, where: str) -> bytes:
        limit = self._settings.max_media_bytes
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise invalid(f"{where}: a data: URL reads data:TYPE;base64,DATA", where)
        if len(data) * 3 // 4 > limit + 2:  # padding may take two bytes away
            raise self._too_large(where)
        try:
            decoded = binascii.a2b_base64(data, strict_mode=True)
        except ValueError as error:  # also of characters that are not ASCII
            raise invalid(f"{where}: its base64 cannot be read: {error}", where) from error
        if len(decoded) > limit:
            raise self._too_large(where)
        return decoded

    def _too_large(self, where: str) -> ApiError:
        limit = self._settings.max_media_bytes
        return ApiError(413, f"{where}: is larger than {limit} bytes", "media_too_large", where)

    def _hash(self, file: bytes | BinaryIO) -> bytes:
        if isinstance(file, bytes):
            return hashlib.sha256(file).digest()
        status = os.fstat(file.fileno())
        # A temporary file's numbers are used again: only files with a name are remembered.
        stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        known = self._hashes.get(stamp) if status.st_nlink else None
        if known is None:
            file.seek(0)
            known = hashlib.file_digest(cast(Any, file), "sha256").digest()
            if status.st_nlink:
                while len(self._hashes) >= _REMEMBERED:
                    self._hashes.pop(next(iter(self._hashes)), None)
                self._hashes[stamp] = known
        return known

    # ---------------------------------------------------------------------------------- decoding

    def _decode(self, fetched: Fetched) -> np.ndarray:
        source = fetched.source
        kind = "image" if source.frames else source.kind
        policy = dataclasses.replace(self._data.frames, max_frames=fetched.frames)
        seconds, pixels = self._settings.decode_seconds, self._settings.max_pixels
        decode_seconds = self._metrics.decode_seconds
        with contextlib.ExitStack() as ended:
            ended.callback(fetched.close)
            media = []
            for file in fetched.files:
                medium = Media(kind, source.where, source.start, source.end, data=file)
                frames = self.decoders.sample(
                    medium, policy, self._size, seconds, max_pixels=pixels
                )
                ended.callback(lambda frames=frames: decode_seconds.inc(frames.seconds))
                ended.callback(frames.close)
                media.append(frames)
            return np.concatenate([chunk for frames in media for chunk in frames])

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


def _stored(data: bytes) -> BinaryIO:
    """A file without a name."""
    file = tempfile.TemporaryFile()
    file.write(data)
    file.flush()
    return cast(BinaryIO, file)


def _read(file: bytes | BinaryIO, most: int) -> bytes:
    """What is in a file, but not much more than `most` bytes; closes it."""
    if isinstance(file, bytes):
        return file
    with file:
        return file.read(most + 1)
