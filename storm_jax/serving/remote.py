"""Media from other servers: only from public addresses, and never more than was agreed.

A name is resolved once, every address that it has must be public, and the connection goes to one
of the addresses that were looked at, so that a name server cannot change its mind in between. A
redirect starts anew. Odd spellings (2130706433, 0177.0.0.1, ::ffff:127.0.0.1) need no rules of
their own: what counts is the address that they resolve to.
"""

import asyncio
import contextlib
import ipaddress
import socket
import tempfile
from collections.abc import Callable
from typing import BinaryIO

import httpx2

from storm_jax.serving.errors import ApiError, invalid

_MAX_REDIRECTS = 5

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet, wrapped IPv4 addresses included."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64 or address in _COMPATIBLE:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # deprecated spelling of IPv4 addresses


class Remote:
    """Fetches media over HTTP and HTTPS."""

    def __init__(
        self, max_bytes: int, seconds: float, allowed: Callable[[Address], bool] = is_public
    ):
        """
        Args:
          max_bytes: of one medium.
          seconds: for one medium, from looking up its name to its last byte.
          allowed: which addresses may be connected to.
        """
        self._max_bytes, self._seconds = max_bytes, seconds
        self._client = httpx2.AsyncClient(
            transport=_Checked(allowed),
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            timeout=seconds,
            trust_env=False,  # a proxy would resolve names by itself
            headers={"Accept-Encoding": "identity", "User-Agent": "storm_jax"},
        )

    async def fetch(self, url: str, where: str) -> BinaryIO:
        """A temporary file with what is at `url`; it is gone when it is closed.

        Raises:
          ApiError: 403 an address that is not public; 413 too large; 400 everything else.
        """
        with contextlib.ExitStack() as on_error:
            file = tempfile.TemporaryFile()
            on_error.callback(file.close)
            try:
                async with asyncio.timeout(self._seconds):
                    await self._copy(url, file, where)
            except TimeoutError as error:
                raise self._failed(where, f"took longer than {self._seconds:g} s") from error
            except _NotAllowed as error:
                raise ApiError(403, f"{where}: {error}", "address_not_allowed", where) from error
            # ValueError: of a length that is no number.
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                raise self._failed(where, f"failed with {type(error).__name__}") from error
            on_error.pop_all()
        file.seek(0)
        return file

    async def _copy(self, url: str, file: BinaryIO, where: str) -> None:
        async with self._client.stream("GET", url) as response:
            if response.status_code != 200:
                raise self._failed(where, f"was answered with status {response.status_code}")
            if int(response.headers.get("content-length", "0")) > self._max_bytes:
                raise self._too_large(where)
            async for chunk in response.aiter_raw():
                file.write(chunk)
                if file.tell() > self._max_bytes:
                    raise self._too_large(where)

    async def close(self) -> None:
        await self._client.aclose()

    def _failed(self, where: str, what: str) -> ApiError:
        return invalid(f"{where}: fetching it {what}", where, "media_fetch_failed")

    def _too_large(self, where: str) -> ApiError:
        return ApiError(
            413, f"{where}: is larger than {self._max_bytes} bytes", "media_too_large", where
        )


class _NotAllowed(Exception):
    """An address that is not connected to; no error of httpx2, whose errors are failures."""


class _Checked(httpx2.AsyncBaseTransport):
    """Connects to an address that was checked, and asks it for the name that was given."""

    def __init__(self, allowed: Callable[[Address], bool]):
        self._allowed = allowed
        # Connections are not kept: they are found again by address, whatever name they are for.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._inner = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise _NotAllowed("only http:// and https://, without a user's name, are fetched")
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        if port > 65535:
            raise httpx2.InvalidURL(f"port {port}")
        checked = httpx2.Request(
            request.method,
            url.copy_with(host=await self._address(url.host, port)),
            headers=request.headers,  # "Host" names the host as it was given
            extensions={**request.extensions, "sni_hostname": url.raw_host.decode("ascii")},
        )
        return await self._inner.handle_async_request(checked)

    async def _address(self, host: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx2.ConnectError(f"{host} cannot be resolved") from error
        addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
        for address in addresses:
            if not self._allowed(ipaddress.ip_address(address)):
                raise _NotAllowed(f"{host} is not a public address")
        return addresses[0]

    async def aclose(self) -> None:
        await self._inner.aclose()
