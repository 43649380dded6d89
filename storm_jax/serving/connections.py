"""Reading requests from clients that may be slow, hostile or gone."""

import asyncio
import socket
import struct
from collections.abc import Awaitable
from typing import Any

from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from storm_jax.serving.errors import ApiError


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP connection, closed when the client neither sends nor reads for too long.

    uvicorn itself waits without end for the head of a request and for a client that does not read.
    """

    head_seconds = 15.0  # until the head of a request has come
    stall_seconds = 30.0  # that the client may leave the buffer of what is sent to it full

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stalled: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stall_seconds, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _cut(self) -> None:
        # Else the kernel would keep what was sent, and wait on for the client to read it.
        now = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.transport.abort()

    def _await_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        answered = self.cycle

        def close_if_idle() -> None:
            if self.cycle is answered:
                self.transport.abort()

        self._head = self.loop.call_later(self.head_seconds, close_if_idle)


async def read_body(headers: Any, receive: Receive, max_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Args:
      headers: of the request; a length that is too large there is refused at once.

    Raises:
      ApiError: 413 larger than `max_bytes`; 408 took longer than `seconds`; 400 the client left.
    """
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes", "request_too_large", None
    )
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before its request was there", "left")
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(
            408, f"the body took longer than {seconds:g} s to arrive", "request_too_slow"
        ) from error


async def discard_body(receive: Receive, seconds: float) -> None:
    """Reads on and forgets what comes, so that a client in the middle of sending sees the answer.

    Closing a connection with unread data in it would take the answer back.
    """
    try:
        async with asyncio.timeout(seconds):
            while (message := await receive())["type"] != "http.disconnect":
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class ClientGone(Exception):
    """The client has closed its connection."""


async def attended(work: Awaitable[None], receive: Receive, seconds: float) -> None:
    """Awaits `work`, but no longer than `seconds` and than the client is there.

    Args:
      receive: of a request whose body has been read.

    Raises:
      ClientGone: the client left; the work was cancelled.
      TimeoutError: it took too long; likewise.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        elif leaving.done():
            raise ClientGone
        else:
            raise TimeoutError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
