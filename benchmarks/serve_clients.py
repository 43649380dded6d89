"""Clients that ask a server about videos and images, again as soon as they are answered."""

import asyncio
import base64
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2
import numpy as np

_LEAVES = 0.05  # share of the requests whose client does not wait for the end, if it is streamed
_PATIENCE = 0.5  # seconds for which these wait at most


@dataclass
class Load:
    """What the clients met."""

    whole: list[float] = field(default_factory=list)  # seconds of each request
    first: list[float] = field(default_factory=list)  # to its first token
    answer_tokens: int = 0
    prompt_tokens: int = 0
    frames: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)


class Questions:
    """Requests at random: media, lengths, streamed or not."""

    def __init__(
        self, media: list[tuple[str, bytes]], model: str, tokens: tuple[int, int], fresh: int
    ):
        self._media, self._model, self._tokens, self._fresh = media, model, tokens, fresh
        self._asked = 0

    def next(self, rng: random.Random) -> dict:
        kind, data = rng.choice(self._media)
        self._asked += 1
        if self._fresh and self._asked % self._fresh == 0:
            # A box that players pass over (mp4), or what stands behind a picture's end.
            data += b"\0\0\0\x0cfree" + self._asked.to_bytes(4, "big")
        url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        question = {"type": "text", "text": rng.choice(["What?", "Tell me what happens here."])}
        stream = rng.random() < 0.7
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": [part, question]}],
            "max_tokens": rng.randint(*self._tokens),
            "temperature": rng.choice([0.0, 1.0]),
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }


async def ask(http: httpx2.AsyncClient, body: dict, leave: float | None, load: Load) -> None:
    """One request, and what came of it.

    Args:
      leave: seconds behind the head of a streamed answer after which the client goes away. It does
        not wait for text, of which random weights and a tokenizer of bytes give none.
    """
    began = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode()[:200]
                load.errors.append(f"{answer.status_code}: {text}")
                return
            if not body["stream"]:
                usage = json.loads(await answer.aread())["usage"]
            else:
                usage = None
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        load.errors.append(chunk["error"]["message"])
                        return
                    if leave is not None:
                        await asyncio.sleep(leave)
                        load.left += 1
                        return
                    usage = chunk.get("usage") or usage
                if usage is None:
                    load.errors.append("a stream without an end")
                    return
    except httpx2.HTTPError as error:
        load.errors.append(f"{type(error).__name__}: {error}")
        return
    load.whole.append(time.perf_counter() - began)
    load.answer_tokens += usage["completion_tokens"]
    load.prompt_tokens += usage["prompt_tokens"]
    load.frames += usage["storm"]["frames"]
    if usage["storm"]["first_token_seconds"] is not None:
        load.first.append(usage["storm"]["first_token_seconds"])


async def under_load(
    http: httpx2.AsyncClient,
    questions: Questions,
    clients: int,
    goes_on: Callable[[], bool],
    seed: int,
    load: Load,
) -> float:
    """Runs clients while `goes_on`, and adds what they meet to `load`.

    Returns:
      Seconds to the last answer.
    """

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while goes_on():
            leaves = clients > 1 and rng.random() < _LEAVES
            leave = rng.uniform(0, _PATIENCE) if leaves else None
            errors = len(load.errors)
            await ask(http, questions.next(rng), leave, load)
            if len(load.errors) > errors:
                await asyncio.sleep(1)  # a server that has gone is not asked a thousand times

    began = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    return time.perf_counter() - began


def for_seconds(seconds: float) -> Callable[[], bool]:
    ends = time.perf_counter() + seconds
    return lambda: time.perf_counter() < ends


def summary(load: Load, seconds: float) -> dict:
    def percentiles(values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        shares = (50, 90, 95, 99, 100)
        return {
            f"p{p}": round(float(v), 4)
            for p, v in zip(shares, np.percentile(values, shares), strict=True)
        }

    return {
        "seconds": round(seconds, 1),
        "answered": len(load.whole),
        "left_by_the_client": load.left,
        "errors": len(load.errors),
        "first_errors": load.errors[:5],
        "requests_per_second": round(len(load.whole) / seconds, 3),
        "answer_tokens_per_second": round(load.answer_tokens / seconds, 2),
        "prompt_tokens_per_second": round(load.prompt_tokens / seconds, 2),
        "frames_per_second": round(load.frames / seconds, 2),
        "first_token_seconds": percentiles(load.first),
        "request_seconds": percentiles(load.whole),
    }
