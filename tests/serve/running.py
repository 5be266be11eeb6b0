"""A server of the tiny model in this process, on a free port."""

import asyncio
import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

from llava_jax.serve import server
from llava_jax.serve.answer import Service
from llava_jax.serve.app import app
from tests.generate import tiny

KEY = b"a key that is long"
HOSTS = ("127.0.0.1",)
POSITIONS = 512


@dataclass(frozen=True)
class Running:
    """A server that answers. url: without /v1."""

    service: Service
    url: str
    uvicorn: uvicorn.Server

    def post(self, path: str, body: Any = None, **fields: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=120, **fields) if "content" not in fields else (
            httpx2.post(self.url + path, timeout=120, headers={"Content-Type": "application/json"}, **fields))

    def chat(self, body: dict[str, Any]) -> httpx2.Response:
        return self.post("/v1/chat/completions", body)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=120, max_retries=0)

    def idle(self, secs: float = 30.0) -> bool:
        """Whether nothing is under way any more, within so many seconds."""
        end = time.monotonic() + secs
        while time.monotonic() < end:
            if self.service.worker.active == 0 and not any(self.service.load.now.values()):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(slots: int = 4, queue: int = 32, key: bytes | None = None, make: Any = None,
            assistant: Any = None) -> Iterator[Running]:  # fmt: skip
    """A server; `make` changes its service before it starts. assistant: whose model it is; None: the tiny one."""
    service = server.of_assistant(assistant or tiny.assistant(), "llava-jax", slots, queue, POSITIONS)
    service = make(service) if make else service
    listener = socket.create_server(("127.0.0.1", 0))
    hosts = None if key else HOSTS
    web = uvicorn.Server(server.config(app(service, key, hosts, lambda: None), 10))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve([listener])), daemon=True)
    thread.start()
    try:
        for _ in range(3000):
            if service.worker.ready or service.worker.failed:
                break
            time.sleep(0.1)
        assert service.worker.ready
        yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}", web)
    finally:
        web.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def spawned(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of the tiny model by its own command; see `by_command`."""
    tiny.save(folder / "model")
    with by_command(folder / "model", "--positions", str(POSITIONS), *arguments) as one:
        yield one


@contextlib.contextmanager
def by_command(checkpoint: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of a checkpoint, once it is ready: its address, and its process. It is killed at the end."""
    command = [sys.executable, "-m", "llava_jax.serve", "--checkpoint", str(checkpoint), "--port", "0", *arguments]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    try:
        process.stdout.readline()
        url = process.stdout.readline().split()[1]
        while httpx2.get(url + "/readyz", timeout=30).status_code != 200:
            time.sleep(0.2)
        yield url, process
    finally:
        process.kill()
        process.wait()


def data_url(seed: int = 0, size: tuple[int, int] | None = None) -> str:
    """A picture of `tiny.picture` as a data: URL."""
    out = io.BytesIO()
    picture = tiny.picture(seed)
    (picture.resize(size) if size else picture).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def part(seed: int = 0) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(seed)}}


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user: texts and parts."""
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return {"role": "user", "content": parts}
