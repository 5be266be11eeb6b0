"""One HTTP POST whose time and size are bounded whatever the server does; `wire` interprets the bytes."""

import asyncio
import http.cookiejar
import logging
import threading
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2

from llava_jax.errors import UsageError

MAX_BODY_BYTES = 4 << 20  # decoded; an answer of 4,096 tokens takes about 20 kB
_GZIP = zlib.MAX_WBITS + 16  # zlib's number for gzip's header and no other


class Response(NamedTuple):
    """A whole response; content is decoded."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class NoResponse(Exception):
    """There is no whole response. sent: the request had begun to leave, so the server may bill it."""

    def __init__(self, reason: str, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Poster:
    """Connections to servers, for any number of threads.

    A thread of its own runs an event loop: there alone a deadline covers all of an exchange, where a blocking client
    measures the silence between two bytes.

    Raises:
      UsageError: a proxy or certificate that the environment names cannot be used.
    """

    def __init__(self, idle_connections: int) -> None:
        for library in ("httpx2", "httpcore2"):  # their debug lines hold a response's headers, with a key it may echo
            logging.getLogger(library).setLevel(logging.WARNING)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=idle_connections)
        # Without cookies: a broken one would be sent back, and spoil the requests to come.
        cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        try:
            self._http = httpx2.AsyncClient(timeout=None, limits=limits, cookies=cookies)
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise UsageError(f"the variables of the environment that name proxies or certificates (HTTP_PROXY, "
                             f"ALL_PROXY, SSL_CERT_FILE ...): {error}") from None  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai_client", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the connections."""
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def post(self, url: str, content: bytes, headers: Mapping[str, str], limit_secs: float | int) -> Response:
        """The response to JSON `content`, whole within `limit_secs` from now.

        Raises:
          NoResponse: it is not, or is no HTTP, or its body is longer than MAX_BODY_BYTES.
        """
        return asyncio.run_coroutine_threadsafe(self._post(url, content, headers, limit_secs), self._loop).result()

    async def _post(self, url: str, content: bytes, headers: Mapping[str, str], limit_secs: float | int) -> Response:
        sent = False

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal sent
            sent = sent or event.endswith("send_request_headers.started")

        defaults = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        try:
            async with asyncio.timeout(limit_secs), self._http.stream(
                "POST", url, content=content, headers={**defaults, **headers}, extensions={"trace": trace}
            ) as response:  # fmt: skip
                return Response(response.status_code, response.headers, await _body(response))
        except TimeoutError:
            raise NoResponse(f"no whole answer within {limit_secs:g} s", sent) from None
        except (httpx2.HTTPError, OSError, ValueError) as error:  # ValueError: headers that its parts cannot read
            raise NoResponse(f"{type(error).__name__}: {error}", sent) from None


async def _body(response: httpx2.Response) -> bytes:
    """The decoded body; httpx2's own decoder would unpack a whole bomb at once."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise NoResponse(f"content-encoding {coding!r} where gzip was asked for", sent=True)
    unpacker, body = zlib.decompressobj(_GZIP), bytearray()
    async for piece in response.aiter_raw():
        try:
            body += unpacker.decompress(piece, MAX_BODY_BYTES + 1 - len(body)) if coding == "gzip" else piece
        except zlib.error as error:
            raise NoResponse(f"damaged gzip: {error}", sent=True) from None
        if len(body) > MAX_BODY_BYTES:
            raise NoResponse(f"the answer is longer than {MAX_BODY_BYTES >> 20} MiB", sent=True)
    return bytes(body)
