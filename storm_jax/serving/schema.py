"""The body of a chat completion: OpenAI's fields that mean something here, and some of our own.

Types are strict ("0.5" is no number), unknown fields are refused, and so are OpenAI's fields whose
values ask for something that is not offered; each refusal names the field.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from storm_jax.serving.errors import ApiError, invalid

_MAX_LIST = 4096  # elements of any list in a request


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class VideoUrl(_Strict):
    """A video; or "data:video/jpeg;base64,A,B,C", frames one by one, or a folder of frames."""

    url: str
    start: float | None = Field(None, ge=0)  # seconds
    end: float | None = Field(None, gt=0)


class VideoUrlPart(_Strict):
    type: Literal["video_url"]
    video_url: VideoUrl


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # every image is seen in one size


class ImageUrlPart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class FramesPart(_Strict):
    """A video as a list of pictures in order."""

    type: Literal["video"]
    video: list[str] = Field(min_length=1, max_length=_MAX_LIST)  # URLs


# Tags start with "~", so that they can be told from fields in the place that an error names.
def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"~{kind}"


def _string_or_list(value: Any) -> str:
    return {str: "~string", list: "~parts"}.get(type(value), "~neither")


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[VideoUrlPart, Tag("~video_url")]
    | Annotated[ImageUrlPart, Tag("~image_url")]
    | Annotated[FramesPart, Tag("~video")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message="a part is an object whose type is text, video_url, image_url or"
        " video (a list of frames)",
    ),
]

Content = Annotated[
    Annotated[str, Tag("~string")]
    | Annotated[list[Part], Field(min_length=1, max_length=_MAX_LIST), Tag("~parts")],
    Discriminator(
        _string_or_list,
        custom_error_type="content_type",
        custom_error_message="content is a string or a list of parts",
    ),
]


Stop = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[str], Tag("~parts")],
    Discriminator(
        _string_or_list,
        custom_error_type="stop_type",
        custom_error_message="stop is a string or a list of strings",
    ),
]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None  # the chat templates have no place for it
    # What OpenAI's client sends along when it returns an answer to the conversation.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=_MAX_LIST)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # its newer name
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    # Not OpenAI's.
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frames: int | None = Field(None, ge=1)  # of each video, at most
    temporal_sampling: int | None = Field(None, ge=1)  # keep every so many pooled frames
    # OpenAI's, taken where they ask for nothing; see _NEUTRAL.
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# Field: the values that ask for nothing, and what may help whoever asks for something.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer a request: send the request several times, its videos are kept"),
    "logprobs": ((False,), "probabilities are not returned"),
    "top_logprobs": ((0,), "probabilities are not returned"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "it is not offered"),
    "tools": (([],), "the model calls no tools"),
    "tool_choice": (("none", "auto"), "the model calls no tools"),
    "store": ((False,), "nothing is stored"),
}
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256  # characters


def parse(body: bytes) -> ChatRequest:
    """A request from its JSON.

    Raises:
      ApiError: 400; malformed JSON, or the first field that is wrong.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refusal(error) from error
    for name, (neutral, remedy) in _NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise invalid(f"{name}={str(value)[:80]}: {remedy}", name, "unsupported_value")
    both = request.max_tokens, request.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise invalid(
            f"max_tokens={both[0]} and max_completion_tokens={both[1]} mean the same: give one",
            "max_tokens",
        )
    stops = request.stop_strings
    if len(stops) > _MAX_STOPS or any(not 0 < len(s) <= _MAX_STOP_LENGTH for s in stops):
        raise invalid(
            f"stop takes up to {_MAX_STOPS} strings of 1 to {_MAX_STOP_LENGTH} characters", "stop"
        )
    return request


def _refusal(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    where = ""
    for step in first["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif not step.startswith("~"):
            where += f".{step}" if where else step
    if first["type"] == "extra_forbidden":
        return invalid(f"{where}: there is no such field here", where, "unknown_parameter")
    given = "" if first["type"] == "missing" else f" (got {_shown(first['input'])})"
    return invalid(f"{where or 'the body'}: {first['msg']}{given}", where or None)


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
