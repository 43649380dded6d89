"""From a chat request to the stream of its answer, without HTTP."""

import asyncio
import contextlib
import copy
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from storm_jax.config import RunConfig
from storm_jax.data import text
from storm_jax.data.conversation import Turn
from storm_jax.data.video import MediaError
from storm_jax.inference.engine import ContextError
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.temporal_sampling import sampled
from storm_jax.serving import conversation
from storm_jax.serving.answers import Usage
from storm_jax.serving.conversation import Source
from storm_jax.serving.errors import ApiError, invalid
from storm_jax.serving.media import MediaReader
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.scheduler import Delta, EngineFailed, Generation, Scheduler
from storm_jax.serving.schema import ChatRequest
from storm_jax.serving.settings import Settings
from storm_jax.serving.visual_cache import VisualCache

T = TypeVar("T")

# Longer texts are refused before they are tokenized: no tokenizer makes a token of so many
# characters of real text.
_CHARACTERS_A_TOKEN = 32


class Chat:
    """Answers requests with one scheduler. Used from the thread of one event loop."""

    def __init__(
        self,
        settings: Settings,
        config: RunConfig,
        tokenizer,
        scheduler: Scheduler,
        context: int,
        reader: MediaReader,
        metrics: Metrics,
    ):
        """
        Args:
          config: of the checkpoint.
          tokenizer: is copied, for the scheduler uses it too and tokenizers are for one thread.
          context: positions of a slot, for prompt and answer together.
        """
        self._settings, self._config, self._context = settings, config, context
        self._scheduler, self._reader, self._metrics = scheduler, reader, metrics
        self._tokenizer = copy.deepcopy(tokenizer)
        self._stop_tokens = text.stop_tokens(tokenizer, config.data.chat_template)
        self._cache = VisualCache(settings.cache_bytes, metrics)
        self._encoding = asyncio.Semaphore(settings.decoders)  # decoded media in host memory
        self._prompts = ThreadPoolExecutor(1, "prompts")  # the tokenizer is not for several

    @contextlib.asynccontextmanager
    async def answer(
        self, request: ChatRequest, usage: Usage
    ) -> AsyncGenerator[AsyncIterator[Delta]]:
        """A context with an answer that has begun; leaving it early frees the slot.

        Args:
          usage: is filled in as things become known.

        Raises:
          ApiError: why the request cannot be answered.
        """
        turns, sources = conversation.read(request.messages)
        self._check(request, turns, sources)
        began = time.perf_counter()
        frames = request.frames or self._settings.max_frames
        visuals, keys = await self._visuals(sources, frames, usage)
        usage.media_seconds = time.perf_counter() - began
        visuals, tokens = await self._blocking(lambda: self._prompt(request, turns, visuals))
        keys = [(key, request.temporal_sampling) for key in keys]
        new_tokens = self._new_tokens(request.new_tokens, len(tokens), visuals)
        usage.prompt_tokens, usage.media = len(tokens), len(visuals)
        for visual in visuals:
            usage.visual_tokens += visual.count
            usage.mixed_tokens += visual.mixed
            usage.frames += visual.frames
        seed = secrets.randbits(31) if request.seed is None else request.seed % 2**31
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=request.temperature or 0.0,
            top_k=request.top_k or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            seed=seed,
            stop_tokens=self._stop_tokens,
        )
        generated = self._generate(tokens, visuals, keys, sampling, request.stop_strings, usage)
        async with contextlib.aclosing(generated):
            first = await anext(generated)  # admission, and with it every reason to refuse

            async def deltas() -> AsyncIterator[Delta]:
                yield first
                async for delta in generated:
                    yield delta

            yield deltas()

    async def close(self) -> None:
        self._prompts.shutdown(wait=False, cancel_futures=True)
        await self._reader.close()

    def _check(self, request: ChatRequest, turns: list[Turn], sources: list[Source]) -> None:
        settings = self._settings
        if request.model != settings.model:
            raise ApiError(
                404,
                f"model {request.model[:80]!r} is not served here, only {settings.model!r}",
                "model_not_found",
                "model",
            )
        if len(sources) > settings.max_media:
            raise invalid(
                f"{len(sources)} media in one request: at most {settings.max_media} are taken",
                "messages",
            )
        if (request.frames or 1) > settings.max_frames:
            raise invalid(
                f"frames={request.frames}: at most {settings.max_frames} are taken", "frames"
            )
        trained = self._config.model.reduction.temporal_sampling
        if request.temporal_sampling and request.temporal_sampling % trained:
            raise invalid(
                f"temporal_sampling={request.temporal_sampling} is no multiple of {trained},"
                " which is what this server samples with",
                "temporal_sampling",
            )
        characters = sum(len(turn.text) for turn in turns)
        if characters > _CHARACTERS_A_TOKEN * self._context:
            raise invalid(
                f"the texts have {characters} characters, far too many for a context of"
                f" {self._context} tokens",
                "messages",
                "context_length_exceeded",
            )

    async def _visuals(
        self, sources: list[Source], frames: int, usage: Usage
    ) -> tuple[list[Visual], list[Hashable]]:
        """The media, encoded side by side, and their keys."""
        tasks = [asyncio.create_task(self._visual(source, frames)) for source in sources]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        usage.cached = sum(cached for _, _, cached in results)
        return [visual for visual, _, _ in results], [key for _, key, _ in results]

    async def _visual(self, source: Source, frames: int) -> tuple[Visual, Hashable, bool]:
        try:
            fetched = await self._reader.fetch(source, frames)

            async def make() -> Visual:
                async with self._encoding:
                    decoded = await self._reader.decode(fetched)
                    return await asyncio.wrap_future(self._scheduler.encode(decoded))

            visual, cached = await self._cache.get(fetched.key, make)
            # Not after an error: someone else may wait for what is decoded from these files.
            fetched.close()
            return visual, fetched.key, cached
        except MediaError as error:
            self._metrics.media_errors.inc()
            raise invalid(
                f"{source.where}: {error.reason}", source.where, "invalid_media"
            ) from error

    def _prompt(
        self, request: ChatRequest, turns: list[Turn], visuals: list[Visual]
    ) -> tuple[list[Visual], np.ndarray]:
        """The media as the request wants to see them, and the tokens; on the prompts' thread."""
        model = self._config.model
        every = (request.temporal_sampling or 1) // model.reduction.temporal_sampling
        if every > 1:
            visuals = [sampled(visual, model.group_tokens, every) for visual in visuals]
        try:
            tokens = text.encode_prompt(
                self._tokenizer,
                self._config.data.chat_template,
                turns,
                [visual.count for visual in visuals],
                conversation.PLACEHOLDER,
            )
        except text.TemplateError as error:
            raise invalid(f"messages: {error}", "messages") from error
        return visuals, tokens

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._prompts, call)

    def _new_tokens(self, asked: int | None, prompt: int, visuals: list[Visual]) -> int:
        room = self._context - prompt
        new = asked or min(self._settings.max_tokens, max(room, 1))
        if new > room:
            visual = sum(v.count for v in visuals)
            raise _too_long(
                f"{prompt + new} tokens are needed ({prompt} of the prompt, {visual} of them"
                f" visual, and {new} of the answer), {self._context} are available"
            )
        return new

    async def _generate(
        self,
        tokens: np.ndarray,
        visuals: list[Visual],
        keys: Sequence[Hashable],
        sampling: Sampling,
        stop: tuple[str, ...],
        usage: Usage,
    ) -> AsyncGenerator[Delta]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def deliver(item: Delta | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the reader
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        generation = Generation(tokens, tuple(visuals), keys, sampling, stop, deliver)
        visuals.clear()  # else they would stay on the device until the answer ends
        finished = False
        try:
            self._scheduler.submit(generation)
            while not finished:
                match await arrived.get():
                    case Delta() as delta:
                        usage.reused_tokens = generation.reused
                        usage.count(delta.tokens)
                        finished = bool(delta.finish)
                        yield delta
                    case ContextError() as error:
                        finished = True
                        raise _too_long(
                            f"{error.needed} tokens are needed, {error.available} are available"
                        )
                    case error:
                        finished = True
                        raise error
        finally:
            if not finished:
                self._scheduler.cancel(generation)


def _too_long(counts: str) -> ApiError:
    return invalid(
        f"the request is too long for the context: {counts}; take fewer frames, shorten the texts"
        " or lower max_tokens",
        "messages",
        "context_length_exceeded",
    )


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error that is not its own."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFailed):
        return ApiError(503, f"{error}; try again later", "unavailable", retry_after=10)
    return ApiError(500, "the server failed on this request; its log says why", "internal_error")
