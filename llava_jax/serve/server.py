"""The model of a checkpoint as a service, and uvicorn around it, which ends by SIGTERM with all answers given."""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from llava_jax import compilations, errors
from llava_jax.generate import batching, scheduler
from llava_jax.generate.assistant import Assistant
from llava_jax.serve import fetcher
from llava_jax.serve.answer import READERS, Service
from llava_jax.serve.app import app
from llava_jax.serve.guards import Load, Protocol
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.worker import Worker

SWITCH_SECS = 0.0005  # that a thread may keep the interpreter: connections shall not wait for the model's thread
QUEUE_ROWS = 4  # positions that open requests may ask for together, in full rows for each slot


def service(args: argparse.Namespace, name: str) -> Service:
    """The service of a checkpoint; nothing is compiled yet. Raises as `Assistant.open`, and UsageError where the model
    cannot be served or a host of pictures has no name."""
    hosts = fetcher.hosts(args.picture_hosts) if args.picture_hosts else ()
    compilations.keep()
    mesh = batching.one_copy()
    assistant = Assistant.open(args.checkpoint, 1, args.dtype, args.step, args.template, mesh, args.weights)
    return of_assistant(assistant, name, args.slots, args.queue, args.positions, hosts)


def of_assistant(assistant: Assistant, name: str, slots: int, queue: int, most_positions: int,
                 hosts: Sequence[fetcher.Host] = ()) -> Service:  # fmt: skip
    """The service of a model in memory. hosts: that pictures may be fetched from."""
    positions = batching.positions(assistant.model, most_positions, scheduler.reading()[1])
    ready = scheduler.of_assistant(assistant, slots, positions)
    load = Load(slots + queue, QUEUE_ROWS * slots * positions)
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
    videos = ThreadPoolExecutor(1, thread_name_prefix="videos")
    pictures = fetcher.Fetcher(hosts) if hosts else None
    return Service(name, assistant.format, slots, positions, Worker(ready), load, Metrics(), pool, videos, pictures)


def config(application: object, drain_secs: int) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        application, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, log_level="error",
        server_header=False, timeout_graceful_shutdown=drain_secs, proxy_headers=False,
    )  # fmt: skip


def run(service: Service, listener: socket.socket, key: bytes | None, hosts: tuple[str, ...] | None,
        drain_secs: int) -> int:  # fmt: skip
    """Answers until SIGTERM or SIGINT, then until what is under way is answered. Returns the exit code."""

    def on_failure() -> None:
        server.should_exit = True

    server = uvicorn.Server(config(app(service, key, hosts, on_failure), drain_secs))
    sys.setswitchinterval(SWITCH_SECS)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:  # uvicorn sets handlers of its own, and raises what it got again for these
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if service.worker.failed:
        print("serve: the model's thread has failed (see above); the server ends", file=sys.stderr, flush=True)
        return errors.CRASHED
    return errors.DONE
