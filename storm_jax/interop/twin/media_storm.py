"""Media as users of the processor give them, and what becomes of them: turns, frames, pixels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from storm_jax.data.conversation import Kind, Media, Role, Turn
from storm_jax.data.video import MediaError, sample, sample_images
from storm_jax.frames import FrameConfig

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Medium:
    """A video or an image of a call: a path, a file's bytes or pictures, and the clip of it."""

    kind: Kind
    source: Any
    start: float | None = None  # seconds; None: from the first frame
    end: float | None = None


def assign(kind: Kind, given: Any, texts: Sequence[str]) -> list[Medium]:
    """The media of one kind in the order of their placeholders.

    Args:
      given: None, one medium, a list of all, or a list that holds a list for each text.
      texts: the prompts of a batch.

    Raises:
      ValueError: not as many media as placeholders, or something that is no medium.
    """
    if given is None:
        items = []
    elif isinstance(given, (list, tuple)) and not _is_video(kind, given):
        items = list(given)
    else:
        items = [given]
    wanted, found = [text.count(f"<{kind}>") for text in texts], None
    if any(_is_list(kind, item) for item in items):
        if not all(_is_list(kind, item) for item in items):
            raise ValueError(f"{kind}s mixes media and lists of media: give one or the other")
        found = [len(own) for own in items]
        items = [item for own in items for item in own]
    if len(items) != sum(wanted) or found not in (None, wanted):
        raise ValueError(
            f"the texts hold {_count(wanted)} <{kind}>, but {_count(found or [len(items)])}"
            f" {kind}s are given: write <{kind}> once for each"
        )
    return [_medium(kind, item) for item in items]


def _count(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers)) or "0"


def _is_video(kind: Kind, item: Any) -> bool:
    """Whether a list is one video in memory."""
    return kind == "video" and len(item) > 0 and _is_picture(item[0])


def _is_list(kind: Kind, item: Any) -> bool:
    return isinstance(item, (list, tuple)) and not _is_video(kind, item)


def _is_picture(item: Any) -> bool:
    return hasattr(item, "convert") or getattr(item, "ndim", 0) == 3


def _medium(kind: Kind, item: Any) -> Medium:
    """A medium from what stands for it, or from a mapping that also names a clip of it."""
    if not isinstance(item, Mapping):
        return Medium(kind, item)
    sources = (kind, "path", "url")
    known = ("type", *sources, "start", "end") if kind == "video" else ("type", *sources)
    if unknown := sorted(set(item) - set(known)):
        raise ValueError(f"{kind} with unknown fields {unknown}; known are {', '.join(known)}")
    given = [item[key] for key in sources if item.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"{kind} part with {len(given)} media: give one of {', '.join(sources)}")
    for key in ("start", "end"):
        if not isinstance(item.get(key), (int, float, type(None))):
            raise ValueError(f"{key}={item[key]!r} must be a number of seconds")
    return Medium(kind, given[0], item.get("start"), item.get("end"))


def read_chat(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Medium]]:
    """A chat as turns with a placeholder for each medium, and the media in this order.

    Raises:
      ValueError: an unknown role or part, a part without its medium, a medium that is not shown by
        the user (as in training data), or a text that spells a placeholder.
    """
    turns: list[Turn] = []
    media: list[Medium] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise ValueError(f"a message of role {role!r}; known are {', '.join(_ROLES)}")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"a message whose content is {content!r}: a text or a list of parts")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = ""
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                if "<video>" in part["text"] or "<image>" in part["text"]:
                    raise ValueError(
                        f"the text {part['text'][:60]!r} spells a placeholder: give the medium as"
                        ' a part of its own, {"type": "video", "path": ...}'
                    )
                said += part["text"]
            elif kind in ("video", "image"):
                if role != "user":
                    raise ValueError(f"{kind} in a message of the {role}: only users show media")
                said += f"<{kind}>"
                media.append(_medium(kind, part))
            else:
                raise ValueError(
                    f"a part {str(part)[:80]}: type text with a text, image and video are read"
                )
        turns.append(Turn(cast(Role, role), said))
    return turns, media


def load(medium: Medium, policy: FrameConfig, size: int, timeout: float) -> np.ndarray:
    """The frames of a medium under the policy.

    Args:
      size: side of the square frames, pixels.
      timeout: seconds that a file may take.

    Returns:
      uint8 [F, size, size, 3].

    Raises:
      MediaError: it cannot be read, or holds no frame.
      ValueError: it is of no type that is read.
    """
    source, clip = medium.source, (medium.start, medium.end)
    if isinstance(source, (bytes, bytearray)):
        file = Media(medium.kind, f"<{len(source)} bytes>", *clip, data=bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        path = os.fspath(source).removeprefix("file://")
        if path.startswith(("http://", "https://", "data:")):
            raise MediaError(path[:80], "is not a local path; download it first")
        file = Media(medium.kind, path, *clip)
    else:
        if clip != (None, None):
            raise ValueError("start and end need a video file, not pictures in memory")
        return sample_images(_pictures(medium), policy, size)
    return sample(file, policy, size, timeout)[0]


def _pictures(medium: Medium) -> list[np.ndarray]:
    """Pictures in memory as uint8 [H, W, 3] each."""
    source = [medium.source] if medium.kind == "image" else medium.source
    if not hasattr(source, "__len__") or hasattr(source, "convert"):
        raise ValueError(f"a video cannot be read from a {type(source).__name__}")
    if len(source) == 0:
        raise MediaError("video in memory", "holds no frame")
    images = []
    for image in source:
        if hasattr(image, "convert"):
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image).convert("RGB")  # as files are turned upright
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(
                f"a picture of type {type(image).__name__}, {array.dtype} {list(array.shape)}:"
                " uint8 [H, W, 3] is read, for videos [F, H, W, 3]"
            )
        images.append(array)
    return images


def normalise(media: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [F, H, W, 3] each as one float32 [all F, 3, H, W] in [-1, 1].

    The trainer computes (2x - 255) * (1 / 255) too: the sum is exact, and one product follows.
    """
    height, width = media[0].shape[1:3]
    out = np.empty((sum(map(len, media)), 3, height, width), np.float32)
    start = 0
    for frames in media:
        out[start : start + len(frames)] = frames.transpose(0, 3, 1, 2)
        start += len(frames)
    out *= 2
    out -= 255
    out *= np.float32(1 / 255)
    return out
