"""What conversations are made of: media and turns."""

from dataclasses import dataclass, field
from typing import BinaryIO, Literal

Kind = Literal["video", "image"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Media:
    """A video or an image of a conversation."""

    kind: Kind
    path: str  # joined with the media root; a file, or a folder of frames
    start: float | None = None  # seconds; None: from the first frame
    end: float | None = None  # seconds; None: to the last frame
    # The file, where it does not lie at `path`, which then only names it: its bytes, or a binary
    # file that is open and seekable.
    data: bytes | BinaryIO | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Turn:
    """What one side says; placeholders stand where the media belong."""

    role: Role
    text: str
