"""From the messages of a request to the turns of the chat template and the media in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from storm_jax.data.conversation import Kind, Turn
from storm_jax.serving.errors import invalid
from storm_jax.serving.schema import FramesPart, ImageUrlPart, Message, TextPart, VideoUrlPart

# Stands for a medium in a turn's text. It is half of a surrogate pair, which `schema.parse` accepts
# in no text: whatever a client spells, "<video>" too, stays text.
MEDIUM = "\udc00"
PLACEHOLDER = re.compile(MEDIUM)


@dataclass(frozen=True)
class Source:
    """A medium as a request names it.

    Attributes:
      where: the place in the request, for errors.
      kind: what it is shown as.
      urls: one, or those of the frames of a video in order.
      frames: whether `urls` are the frames of a video.
      start, end: of the clip, seconds; None: the whole.
    """

    where: str
    kind: Kind
    urls: tuple[str, ...]
    frames: bool = False
    start: float | None = None
    end: float | None = None


def read(messages: Sequence[Message]) -> tuple[list[Turn], list[Source]]:
    """Turns, with MEDIUM where a medium stands, and the media in that order.

    Parts of a message are joined by line breaks, as texts and media are in training.

    Raises:
      ApiError: 400; media in a turn that is not the user's.
    """
    turns: list[Turn] = []
    sources: list[Source] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            turns.append(Turn(role, message.content))
            continue
        texts = []
        for j, part in enumerate(message.content):
            place = f"{where}.content[{j}]"
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            if role != "user":
                raise invalid(f"{place}: only users' messages show media, not {role}'s", place)
            sources.append(_source(part, place))
            texts.append(MEDIUM)
        turns.append(Turn(role, "\n".join(texts)))
    return turns, sources


def _source(part: VideoUrlPart | ImageUrlPart | FramesPart, where: str) -> Source:
    match part:
        case ImageUrlPart():
            return Source(where, "image", (part.image_url.url,))
        case FramesPart():
            return Source(where, "video", tuple(part.video), frames=True)
        case VideoUrlPart(video_url=video):
            # Frames as vLLM's clients send them: JPEG files in base64, with commas between.
            head, comma, data = video.url.partition(",")
            if head.startswith("data:video/jpeg;") and comma:
                urls = tuple(f"data:image/jpeg;base64,{frame}" for frame in data.split(","))
                return Source(where, "video", urls, True, video.start, video.end)
            return Source(where, "video", (video.url,), False, video.start, video.end)
