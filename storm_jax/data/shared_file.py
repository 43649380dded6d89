"""A file that one process has open, for another one to read."""

import contextlib
import os
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class SharedFile:
    """Stands for an open file in a message to a process of the same user on the same machine.

    Attributes:
      path: under /proc; the very file, also where it has no name or another one has it by now.
    """

    path: str

    def open(self) -> BinaryIO:
        """The file, at its beginning; its owner must still have it open."""
        return open(self.path, "rb")


def shared(file: BinaryIO) -> SharedFile | bytes:
    """The open file, or its bytes where there is no /proc or the file is not the system's."""
    with contextlib.suppress(OSError):
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        if os.path.exists(path):
            return SharedFile(path)
    file.seek(0)
    return file.read()
