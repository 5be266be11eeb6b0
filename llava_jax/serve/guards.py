"""What stands between a connection and a route: the key, the host's name, bodies that are counted while they come, and
clients that are slow or gone."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import h11
from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_jax.serve.fields import MAX_BODY_BYTES, Refused

T = TypeVar("T")
BODY_SECS, ALL_BODY_SECS = 10.0, 60.0  # between two pieces of a body, and for all of it
SEND_SECS = 30.0  # that a client may leave a piece of an answer unread
IDLE_SECS = 15.0  # a connection without a request, or that closes, ends after one to two times this
HEALTH = ("/healthz", "/readyz")
MAX_BODIES_BYTES = 256_000_000  # of all bodies that are being read or prepared


class Gone(Exception):
    """The client has closed its connection."""


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which ends connections that send no request, whose headers come byte by byte, or whose client
    does not take in the rest of a last response, and whose errors have the form of all others."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._before: Any = self  # what the last look found
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing():
            now = self.transport  # the client has not taken in the rest
        elif self.cycle is None or self.cycle.response_complete:
            now = self.cycle  # no request
        else:
            now = self
        if now is not self and now is self._before:
            self.transport.abort()
            return
        self._before = now
        self.loop.call_later(IDLE_SECS, self._look)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP in the form of all errors, where uvicorn sends a text."""
        message = "the request is no HTTP/1.1 that can be read: its head, the length of its body or a chunk is damaged"
        response = refusal(Refused(message, "body"))
        head = h11.Response(status_code=400, headers=[*response.raw_headers, (b"connection", b"close")])
        for event in (head, h11.Data(data=response.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class Guard:
    """The first to see a request: an unknown host or key goes no further, whatever the route.

    key: None lets everybody in. hosts: names that this server goes by where it has no key, or a page of the internet
    whose name was made to point here could use it; None: any.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], key: bytes | None, hosts: Sequence[str] | None,
        count: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._app, self._key, self._hosts, self._count = app, key, hosts, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def timed_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            async with asyncio.timeout(SEND_SECS):
                await send(message)

        headers = dict(scope["headers"])
        app = self._app if scope["path"] in HEALTH else self._refusal(headers) or self._app
        with contextlib.suppress(TimeoutError):  # uvicorn closes what is not answered to its end
            await app(scope, receive, timed_send)

    def _refusal(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self._key is not None:
            if not _has_key(headers.get(b"authorization", b""), self._key):
                message = "the API key is missing or wrong: want Authorization: Bearer KEY (in a browser, the password)"
                return refusal(Refused(message, status=401, code="invalid_api_key"))
        elif self._hosts is not None and _host_name(headers.get(b"host", b"")) not in self._hosts:
            message = f"this server goes by {', '.join(self._hosts)}: use one of them, or start it with --api-key-file"
            return refusal(Refused(message, status=403, code="unknown_host"))
        return None


def _has_key(header: bytes, key: bytes) -> bool:
    """Whether a header holds the key, as a bearer's token or as the password that a browser asks for."""
    kind, _, secret = header.partition(b" ")
    secret = secret.strip()
    if kind.lower() == b"basic":
        with contextlib.suppress(binascii.Error, ValueError):
            secret = base64.b64decode(secret, validate=True).partition(b":")[2]
    return kind.lower() in (b"basic", b"bearer") and hmac.compare_digest(secret, key)


def _host_name(header: bytes) -> str:
    """The name in a Host header, without the port."""
    name = header.decode("latin-1").lower()
    return name.partition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]


def refusal(error: Refused) -> JSONResponse:
    """The response of an error."""
    headers = {} if error.retry_secs is None else {"Retry-After": str(error.retry_secs)}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="llava_jax: the key is the password", charset="UTF-8"'
    return JSONResponse(error.body(), error.status, headers)


class Load:
    """What is under way, with its limits: requests, the positions that they ask for, and bytes of their bodies."""

    def __init__(self, most_requests: int, most_tokens: int) -> None:
        self.most = {"requests": most_requests, "tokens": most_tokens, "bytes": MAX_BODIES_BYTES}
        self.now = dict.fromkeys(self.most, 0)

    @contextlib.contextmanager
    def entered(self) -> Iterator["Lease"]:
        """A lease of one request; what it takes is given back at the end."""
        lease = Lease(self)
        try:
            lease.take("requests", 1)
            yield lease
        finally:
            lease.give_back()

    def full(self, kind: str, amount: int) -> bool:
        return self.now[kind] + amount > self.most[kind]


class Lease:
    """What a request has taken of a `Load`."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._taken = dict.fromkeys(load.now, 0)

    def take(self, kind: str, amount: int) -> None:
        """Takes more. Raises Refused: 429 while the server is full, 400 where it can never fit."""
        total, most = self._taken[kind] + amount, self._load.most[kind]
        if total > most:
            raise Refused(f"n: {total:,} {kind} are more than the {most:,} of all requests together: lower n or "
                          "max_tokens", "n")  # fmt: skip
        if self._load.full(kind, amount):
            raise Refused("the server is busy: try again", status=429, code="overloaded", retry_secs=1)
        self._load.now[kind] += amount
        self._taken[kind] += amount

    def give_back(self, *kinds: str) -> None:
        """Gives back what it has taken of some kinds, or of all."""
        for kind in kinds or self._taken:
            self._load.now[kind] -= self._taken[kind]
            self._taken[kind] = 0


async def read_body(request: Request, enter: Callable[[], Lease]) -> tuple[bytes, Lease]:
    """The body of a request, counted while it comes, and the request's lease.

    What is refused is taken in and forgotten: a response that is sent before is lost when the connection ends.

    Args:
      enter: the lease of this request, or why it gets none.

    Raises:
      Refused: as `enter`; or it is too long, too slow, or no JSON by its own word (a page of another site can send
        anything else). Gone.
    """
    body, size, more, deadline = bytearray(), 0, True, time.monotonic() + ALL_BODY_SECS
    refused: Refused | None = None
    try:
        lease = enter()
        _check_type(request)
    except Refused as error:
        refused = error
    while more and size <= 2 * MAX_BODY_BYTES:
        message = await _receive(request, deadline)
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        try:
            if refused is None:
                _check_size(size)
                lease.take("bytes", len(piece))
                body += piece
        except Refused as error:
            refused, body = error, bytearray()
    if refused is not None:
        raise refused
    return bytes(body), lease


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(f"Content-Type {kind[:60]!r}: want application/json", status=415)


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise Refused(f"the body is longer than {MAX_BODY_BYTES:,} bytes: send smaller pictures", "body", 413)


async def _receive(request: Request, deadline: float) -> Any:
    try:
        async with asyncio.timeout(max(0.0, min(BODY_SECS, deadline - time.monotonic()))):
            message = await request.receive()
    except TimeoutError:
        raise Refused(f"the body did not come within {BODY_SECS:g} s a piece and {ALL_BODY_SECS:g} s in all", "body",
                      408) from None  # fmt: skip
    if message["type"] == "http.disconnect":
        raise Gone
    return message


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises Gone. The body must have been read."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
