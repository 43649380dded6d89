"""Files of this machine that clients may name: those under the folders that were allowed."""

import os
import stat
from collections.abc import Sequence
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from storm_jax.serving.errors import ApiError, invalid


class LocalFiles:
    """Opens files below the allowed folders, and nothing else.

    A path is resolved first, symbolic links and ".." included, and must then lie in an allowed
    folder. What was resolved is opened folder by folder without following links, so that a link
    put there in between does not lead out either.
    """

    def __init__(self, folders: Sequence[str]):
        """`folders` are absolute or relative to the working directory; none allows nothing."""
        self._folders = [os.path.realpath(folder) for folder in folders]

    def resolve(self, url: str, where: str) -> str:
        """The path that a file: URL means, links followed.

        Raises:
          ApiError: 400 not a local path; 403 outside of the allowed folders, whether it exists
            there or not.
        """
        parts = urlsplit(url)
        path = unquote(parts.path)
        if (
            parts.scheme != "file"
            or parts.netloc not in ("", "localhost")
            or parts.query
            or parts.fragment
            or not path.startswith("/")
            or "\0" in path
        ):
            raise invalid(f"{where}: a local file is file:///PATH, with nothing behind it", where)
        resolved = os.path.realpath(path)
        if self._folder_of(resolved) is None:
            raise ApiError(
                403,
                f"{where}: the file is not under a folder that --allowed-media-path gives",
                "file_not_allowed",
                where,
            )
        return resolved

    def open(self, url: str, where: str) -> BinaryIO:
        """The file that a file: URL means, for reading.

        Raises:
          ApiError: as `resolve`; 404 there is none, or it cannot be read; 400 no regular file.
        """
        path = self.resolve(url, where)
        folder = self._folder_of(path)
        names = os.path.relpath(path, folder).split(os.sep)
        try:
            at = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name in names:
                    # Not waiting: opening a pipe would block until someone writes to it.
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                    inner = os.open(name, flags, dir_fd=at)
                    os.close(at)
                    at = inner
                if not stat.S_ISREG(os.fstat(at).st_mode):
                    raise invalid(f"{where}: is no regular file", where)
                return os.fdopen(os.dup(at), "rb")
            finally:
                os.close(at)
        except OSError as error:
            raise ApiError(
                404,
                f"{where}: the file cannot be opened: {error.strerror}",
                "file_not_found",
                where,
            ) from error

    def _folder_of(self, resolved: str) -> str | None:
        for folder in self._folders:
            if os.path.commonpath([folder, resolved]) == folder:
                return folder
        return None
