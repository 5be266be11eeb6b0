"""An internet of one server: names resolve as a test says, connections are counted and end at a loopback address."""

import asyncio
import contextlib
import http.server
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.generate import tiny

HOST, PUBLIC = "pictures.example.com", "93.184.216.34"


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    tiny.picture(seed).save(out, "PNG")
    return out.getvalue()


@dataclass
class Web:
    """addresses: what each name resolves to, one list a lookup, the last one for ever. dialled: addresses.

    pages: what answers at a path. seen: the path and the Host header of each request.
    """

    port: int
    addresses: dict[str, list[list[str]]] = field(default_factory=lambda: {HOST: [[PUBLIC]]})
    dialled: list[tuple[str, int]] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    pages: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def shows(self, path: str, content: bytes, status: int = 200, **headers: str) -> None:
        """Puts a page of this content at a path."""

        def page(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        self.pages[path] = page


@contextlib.contextmanager
def web(patch: pytest.MonkeyPatch, certificate: Path | None = None) -> Iterator[Web]:
    """The internet, while it lasts; over TLS if there is a certificate with its key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            one.seen.append((self.path, self.headers["Host"]))
            with contextlib.suppress(ConnectionError):
                one.pages[self.path](self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that hangs up
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    one = Web(server.server_port)
    real_lookup, loop = socket.getaddrinfo, asyncio.selector_events.BaseSelectorEventLoop
    real_connect = loop.sock_connect

    def lookup(name, port, *more):
        if name not in one.addresses:
            return real_lookup(name, port, *more)
        one.lookups.append(name)
        answers = one.addresses[name]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    async def connect(self, sock, address):
        one.dialled.append(address[:2])
        return await real_connect(self, sock, ("127.0.0.1", server.server_port))

    patch.setattr(socket, "getaddrinfo", lookup)
    patch.setattr(loop, "sock_connect", connect)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield one
    finally:
        server.shutdown()
        server.server_close()
