"""The objects of OpenAI's API that an answer is sent in."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Usage:
    """What a request took; times in seconds.

    Attributes:
      mixed: visual tokens before reduction.
      cached: media that were encoded before this request.
      reused_tokens: of the prompt, that an earlier answer had left in the cache.
      arrived: `time.perf_counter()` when the body was there.
    """

    prompt_tokens: int = 0
    visual_tokens: int = 0
    mixed_tokens: int = 0
    frames: int = 0
    media: int = 0
    cached: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    media_seconds: float = 0.0
    arrived: float = field(default_factory=time.perf_counter)
    first: float | None = None  # perf_counter of the first token
    last: float | None = None  # and of the last one
    first_tokens: int = 0  # that came with the first one

    def count(self, tokens: int) -> None:
        """Takes note of tokens that have just come."""
        if not tokens:
            return
        self.last = time.perf_counter()
        if self.first is None:
            self.first, self.first_tokens = self.last, tokens
        self.answer_tokens += tokens

    @property
    def first_token_seconds(self) -> float | None:
        return None if self.first is None else self.first - self.arrived

    @property
    def token_seconds(self) -> float | None:
        """Mean time of a token after the first ones; None: there are none."""
        more = self.answer_tokens - self.first_tokens
        if self.first is None or self.last is None or not more:
            return None
        return (self.last - self.first) / more

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's fields, and ours under "storm"."""
        each = self.token_seconds
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused_tokens},
            "storm": {
                "media": self.media,
                "media_cached": self.cached,
                "frames": self.frames,
                "mixed_tokens": self.mixed_tokens,
                "visual_tokens": self.visual_tokens,
                "media_seconds": round(self.media_seconds, 4),
                "first_token_seconds": _rounded(self.first_token_seconds),
                "tokens_per_second": _rounded(1 / each if each else None),
            },
        }


class Answer:
    """One answer, whole or in chunks."""

    def __init__(self, model: str):
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """A chat completion."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage.as_dict(),
        }

    def first(self) -> dict[str, Any]:
        """The chunk before all text."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def text(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None)

    def last(self, finish: str) -> dict[str, Any]:
        return self._chunk({}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that follows the last one where a client asked for it."""
        return {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage.as_dict(),
        }

    def _chunk(self, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"  # the event that ends a stream


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
