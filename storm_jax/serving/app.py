"""The web application: chat completions, models, health, metrics, and a page to try them."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Generator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from storm_jax.serving import schema
from storm_jax.serving.answers import DONE, Answer, Usage, event
from storm_jax.serving.chat import Chat, as_api_error
from storm_jax.serving.connections import ClientGone, attended, discard_body, read_body
from storm_jax.serving.errors import ApiError
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.scheduler import Scheduler
from storm_jax.serving.schema import ChatRequest
from storm_jax.serving.settings import Settings

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("page.html")
_LINGER = 10.0  # seconds that a client may go on sending a body that was refused
# Nothing from elsewhere runs on the page or is shown by it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self';"
    " img-src data: blob:; media-src data: blob:; frame-ancestors 'none'; base-uri 'none'"
)


def build(settings: Settings, scheduler: Scheduler, chat: Chat, metrics: Metrics) -> FastAPI:
    """The application; when it ends, it closes `chat` and `scheduler`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await chat.close()
        await asyncio.to_thread(scheduler.close)

    # The pages that FastAPI makes of a schema load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def _refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def _no_such_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}"
        refused = ApiError(error.status_code, message, HTTPStatus(error.status_code).name.lower())
        return JSONResponse(refused.body(), error.status_code, error.headers)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> Response:
        if scheduler.failure is not None:
            error = f"{type(scheduler.failure).__name__}: {scheduler.failure}"
            return JSONResponse({"status": "failed", "error": error}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def numbers(request: Request) -> Response:
        _authorise(settings, request)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    started = int(time.time())
    model = {"id": settings.model, "object": "model", "created": started, "owned_by": "storm_jax"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authorise(settings, request)
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        _authorise(settings, request)
        if name != settings.model:
            raise ApiError(404, f"model {name[:80]!r} is not served here", "model_not_found")
        return JSONResponse(model)

    completions = _Completions(settings, chat, metrics)
    app.router.routes.append(Route("/v1/chat/completions", completions, methods=["POST"]))
    return app


def _authorise(settings: Settings, request: Request) -> None:
    if not settings.api_key:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(key.encode(), settings.api_key.encode())
    if kind.lower() != "bearer" or not right:
        raise ApiError(
            401, "the API key is missing or wrong: Authorization: Bearer KEY", "invalid_api_key"
        )


def _require_json(request: Request) -> None:
    """Other pages in a user's browser can send anything but this without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"Content-Type is {kind[:40]!r}, not application/json", "unsupported_media_type"
        )


class _Sender:
    """`send` of a response that may turn out to be an error before it has begun, or after."""

    def __init__(self, send: Send):
        self._send = send
        self.status = 0  # 0: nothing was sent

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def start(self, content_type: str) -> None:
        headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
        await self({"type": "http.response.start", "status": 200, "headers": headers})

    async def body(self, data: bytes, more: bool) -> None:
        await self({"type": "http.response.body", "body": data, "more_body": more})


class _Completions:
    """POST /v1/chat/completions, as an ASGI application: it watches the client while it works."""

    def __init__(self, settings: Settings, chat: Chat, metrics: Metrics):
        self._settings, self._chat, self._metrics = settings, chat, metrics
        self._open = 0  # requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sender = _Sender(send)
        usage = Usage()
        began = time.perf_counter()
        read = False  # the whole body
        status = "499"  # as nginx has it: the client was gone
        try:
            _authorise(self._settings, request)
            _require_json(request)
            with self._place():
                body = await read_body(
                    request.headers,
                    receive,
                    self._settings.max_body_bytes,
                    self._settings.receive_seconds,
                )
                read = True
                usage.arrived = time.perf_counter()
                asked = schema.parse(body)
                del body  # `asked` has it
                work = self._answer(asked, sender, usage)
                await attended(work, receive, self._settings.request_seconds)
            status = str(sender.status)
        except ClientGone:
            pass
        except TimeoutError:
            seconds = self._settings.request_seconds
            error = ApiError(503, f"took longer than {seconds:g} s", "timeout", retry_after=10)
            status = await self._refuse(error, sender, receive, read)
        except asyncio.CancelledError:  # by uvicorn, when the time for running requests is over
            error = ApiError(503, "the server is going down", "unavailable", retry_after=10)
            status = await self._refuse(error, sender, receive, read=True)
        except Exception as caught:
            error = as_api_error(caught)
            if error.status == 500:
                _log.exception("a request failed")
            status = await self._refuse(error, sender, receive, read)
        finally:
            self._note(status, usage, time.perf_counter() - began)

    @contextlib.contextmanager
    def _place(self) -> Generator[None]:
        limit = self._settings.max_requests
        if self._open >= limit:
            raise ApiError(
                429, f"{limit} requests are being answered already", "too_many_requests", None, 1
            )
        self._open += 1
        self._metrics.open.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)

    async def _answer(self, asked: ChatRequest, sender: _Sender, usage: Usage) -> None:
        answer = Answer(self._settings.model)
        async with self._chat.answer(asked, usage) as deltas:
            if not asked.stream:
                texts, finish = [], ""
                async for delta in deltas:
                    texts.append(delta.text)
                    finish = delta.finish
                await sender.start("application/json")
                await sender.body(_json(answer.whole("".join(texts), finish, usage)), more=False)
                return
            await sender.start("text/event-stream; charset=utf-8")
            await sender.body(event(answer.first()), more=True)
            finish = ""
            async for delta in deltas:
                if delta.text:
                    await sender.body(event(answer.text(delta.text)), more=True)
                finish = delta.finish
        end = event(answer.last(finish))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            end += event(answer.usage(usage))
        await sender.body(end + DONE, more=False)

    async def _refuse(self, error: ApiError, sender: _Sender, receive: Receive, read: bool) -> str:
        """Tells the client, in whatever state its response is; returns the status for metrics."""
        if sender.status:  # in the middle of a stream
            await sender.body(event(error.body()) + DONE, more=False)
            return str(error.status)
        body = _json(error.body())
        headers = {
            **error.headers(), "content-type": "application/json", "content-length": str(len(body)),
        }  # fmt: skip
        if not read:
            headers["connection"] = "close"
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await sender({"type": "http.response.start", "status": error.status, "headers": raw})
        await sender.body(body, more=not read)
        if not read:
            await discard_body(receive, _LINGER)
            await sender.body(b"", more=False)
        return str(error.status)

    def _note(self, status: str, usage: Usage, seconds: float) -> None:
        self._metrics.requests.labels(status).inc()
        self._metrics.seconds.observe(seconds)
        if usage.first_token_seconds is not None:
            self._metrics.first_token.observe(usage.first_token_seconds)
        if usage.token_seconds is not None:
            self._metrics.token_seconds.observe(usage.token_seconds)


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
