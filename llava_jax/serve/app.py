"""The routes of the server, and its life from the first connection to the last."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llava_jax.serve import answer
from llava_jax.serve.answer import Answer, Service, unavailable
from llava_jax.serve.fields import Refused
from llava_jax.serve.guards import Gone, Guard, Lease, read_body, refusal, unless_gone
from llava_jax.serve.worker import Ended

Endpoint = Callable[[Request], Awaitable[Response]]
# The page's script and styles are in it; it may connect to this server alone, and show the pictures that this fetches.
_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src {}; "
           "media-src data:; "
           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip

_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer"}  # fmt: skip


class Events(Response):
    """An answer as server-sent events; it is closed when it ends or the client goes."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, answer: Answer, cleanup: contextlib.ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._answer, self._cleanup = request, answer, cleanup

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._cleanup, contextlib.suppress(Gone):
            await unless_gone(self._request, self._send(send))

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._answer.events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def app(service: Service, key: bytes | None, hosts: tuple[str, ...] | None, on_failure: Callable[[], None]) -> Any:
    """The ASGI application. key, hosts: as for `Guard`. on_failure: called when the worker has died by an error."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop(), on_failure)
        yield
        await asyncio.to_thread(service.worker.stop)
        for pool in (service.pool, service.video_pool):
            pool.shutdown(cancel_futures=True)
        if service.fetcher is not None:
            await service.fetcher.close()

    routes = [
        Route("/", _page(service)),
        Route("/healthz", _health),
        Route("/readyz", _ready(service)),
        Route("/metrics", _metrics(service)),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _models(service)),
        Route("/v1/chat/completions", _completions(service, chat=True), methods=["POST"]),
        Route("/v1/completions", _completions(service, chat=False), methods=["POST"]),
        Route("/v1/prompt", _prompt(service), methods=["POST"]),
    ]
    handlers = {HTTPException: _no_route, Refused: _refused, Ended: _ended, Gone: _gone, Exception: _fault}
    return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), key, hosts,
                 service.metrics.response)  # fmt: skip


def _page(service: Service) -> Endpoint:
    policy = _POLICY.format(" ".join(["data:", "blob:", *_origins(service)]))

    async def page(request: Request) -> Response:
        text = resources.files("llava_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_HEADERS | {"Content-Security-Policy": policy})

    return page


def _origins(service: Service) -> list[str]:
    """The hosts whose pictures may be shown by their address."""
    return [] if service.fetcher is None else [f"{host.scheme}://{host.netloc}" for host in service.fetcher.hosts]


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok\n")


def _ready(service: Service) -> Endpoint:
    async def ready(request: Request) -> Response:
        if not service.worker.answers:
            return PlainTextResponse("not ready\n", 503)
        return PlainTextResponse("ready\n")

    return ready


def _metrics(service: Service) -> Endpoint:
    async def metrics(request: Request) -> Response:
        load = service.load.now
        gauges = {"slots": service.slots, "slots_active": service.worker.active, "requests_open": load["requests"],
                  "tokens_open": load["tokens"]}  # fmt: skip
        return PlainTextResponse(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    return metrics


def _models(service: Service) -> Endpoint:
    kinds = ["text", "image"] + ["video"] * (service.format.video is not None)
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "llava_jax",
             "max_model_len": service.positions, "input_modalities": kinds,
             "picture_hosts": _origins(service)}  # fmt: skip

    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        if name not in (None, service.name):
            raise Refused(f"model={name!r}: this server has {service.name!r}", "model", 404, "model_not_found")
        return JSONResponse({"object": "list", "data": [model]} if name is None else model)

    return models


def _prompt(service: Service) -> Endpoint:
    async def prompt(request: Request) -> Response:
        with contextlib.ExitStack() as stack:
            body, lease = await read_body(request, lambda: _entered(service, stack))
            return JSONResponse(await unless_gone(request, answer.prompt_parts(service, body, lease)))

    return prompt


def _completions(service: Service, chat: bool) -> Endpoint:
    async def completions(request: Request) -> Response:
        arrival = time.monotonic()
        with contextlib.ExitStack() as stack:
            body, lease = await read_body(request, lambda: _entered(service, stack))
            answered = await unless_gone(request, answer.opened(service, chat, body, lease, arrival))
            stack.callback(answered.close)
            if answered.stream:
                return Events(request, answered, stack.pop_all())
            return JSONResponse(await unless_gone(request, answered.whole()))

    return completions


def _entered(service: Service, stack: contextlib.ExitStack) -> Lease:
    if not service.worker.ready:
        raise unavailable()
    return stack.enter_context(service.load.entered())


async def _no_route(request: Request, error: HTTPException) -> Response:
    return refusal(Refused(f"{request.method} {request.url.path[:60]}: {error.detail}", status=error.status_code))


async def _refused(request: Request, error: Refused) -> Response:
    return refusal(error)


async def _ended(request: Request, error: Ended) -> Response:
    return refusal(unavailable())


async def _gone(request: Request, error: Gone) -> Response:
    return Response(status_code=408)  # nobody reads it


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of this program, whose traceback goes to the log."""
    return refusal(Refused("the server failed on this request", status=500, code="fault"))
