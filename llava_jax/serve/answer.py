"""One request from its body to its answer: read in the pool, answered by the worker, given up if its client goes."""

import asyncio
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.generate.pages import Prompt
from llava_jax.generate.sampling import Sampling
from llava_jax.generate.scheduler import Job, Update
from llava_jax.prompt.encode import Format, encode
from llava_jax.serve import fields, messages
from llava_jax.serve.fetcher import Fetcher
from llava_jax.serve.fields import Refused
from llava_jax.serve.guards import Lease, Load
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.wire import Choice, Wire, token_text
from llava_jax.serve.worker import Ended, Stream, Worker

NEW_TOKENS = 512  # of an answer at most, where nobody says; as in `Assistant.reply`
READERS = 2  # threads that read bodies and decode pictures


@dataclass(frozen=True)
class Service:
    """What all requests share.

    name: of the model. slots: answers at once. positions: of prompt and answer together. pool: reads bodies and decodes
    pictures. video_pool: one thread, so that a video never keeps other requests waiting. fetcher: of pictures by
    address; None: there are none.
    """

    name: str
    format: Format
    slots: int
    positions: int
    worker: Worker
    load: Load
    metrics: Metrics
    pool: ThreadPoolExecutor
    video_pool: ThreadPoolExecutor
    fetcher: Fetcher | None


@dataclass(frozen=True)
class Query:
    """A request that has been read: the values of its fields and its prompt; pictures are there and not yet open."""

    chat: bool
    values: dict[str, Any]
    source: messages.Chat | Prompt
    tokens: int
    limit: int


class Answer:
    """The answers to one request, under way. stream: whether they are wanted as they come."""

    def __init__(self, service: Service, query: Query, prompt: Prompt, arrival: float) -> None:
        values, words = query.values, service.format.tokenizer
        logprobs = values["logprobs"] is not None and values["logprobs"] is not False
        self._service, self._prompt, self._arrival = service, prompt, arrival
        self.stream = values["stream"]
        self.wire = Wire(service.name, words, query.chat, logprobs, values["return_token_ids"],
                         values["stream_options"], prompt.tokens.tolist())  # fmt: skip
        self.choices = [Choice() for _ in range(values["n"])]
        self._updates: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()
        self._streams = [service.worker.submit(job, Stream(self._updates, index))
                         for index, job in enumerate(_jobs(service, query, prompt))]  # fmt: skip

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Each update as it comes, with the number of its choice. Raises Ended."""
        first = True
        while not all(choice.ended_by for choice in self.choices):
            index, update = await self._updates.get()
            if update is None:
                raise Ended
            if first:
                self._service.metrics.first_token(time.monotonic() - self._arrival)
            first = False
            self.choices[index].add(update)
            yield index, update

    async def whole(self) -> dict[str, Any]:
        """The body of the response, when all is there. Raises Ended."""
        async for _ in self.updates():
            pass
        return self.wire.whole(self.choices)

    async def events(self) -> AsyncIterator[bytes]:
        """The events of the response, as they come."""
        try:
            for event in self.wire.first(len(self.choices)):
                yield event
            async for index, update in self.updates():
                if event := self.wire.chunk(index, update):
                    yield event
            yield self.wire.last(self.choices)
        except Ended:
            yield b"data: " + json.dumps(unavailable().body()).encode() + b"\n\n"

    def close(self) -> None:
        """Frees what has not ended, and counts."""
        for stream in self._streams:
            self._service.worker.cancel(stream)
        generated = sum(len(choice.tokens) for choice in self.choices)
        reused = max(choice.reused for choice in self.choices)
        self._service.metrics.tokens(len(self._prompt.tokens), reused, generated)


def unavailable() -> Refused:
    """Where the server does not answer yet, or no more."""
    return Refused("the server is not ready: it compiles, or it ends", status=503, code="unavailable", retry_secs=5)


def _jobs(service: Service, query: Query, prompt: Prompt) -> Iterator[Job]:
    values = query.values
    seed = secrets.randbits(32) if values["seed"] is None else values["seed"]
    top = values["top_logprobs"] if query.chat else values["logprobs"] or 0
    stops = (service.format.template.stops if query.chat else ()) + values["stop"]
    sampling = Sampling(values["temperature"], values["top_p"], values["top_k"])
    for index in range(values["n"]):
        draws = replace(sampling, seed=(seed + index) % 2**32)
        yield Job(prompt, query.limit, draws, stops, top, continues=not query.chat)


async def opened(service: Service, chat: bool, body: bytes, lease: Lease, arrival: float) -> Answer:
    """The answer to a body, under way.

    Raises:
      Refused: names the field, or the server is full (429). Ended.
    """
    query = await read(service, chat, body, lease)
    lease.take("requests", query.values["n"] - 1)
    lease.take("tokens", query.tokens + query.limit * query.values["n"])
    prompt = query.source
    if isinstance(prompt, messages.Chat):
        run = asyncio.get_running_loop().run_in_executor
        prompt = await run(service.pool, messages.prompt, prompt, service.format)
    lease.give_back("bytes")
    return Answer(service, query, prompt, arrival)


async def read(service: Service, chat: bool, body: bytes, lease: Lease) -> Query:
    """The request in a body.

    Pictures by address are fetched, and count as a part of the body; videos are decoded, as their length is that of the
    prompt. Raises Refused.
    """
    run = asyncio.get_running_loop().run_in_executor
    values, source = await run(service.pool, _parsed, service, chat, body)
    if isinstance(source, messages.Chat):
        if service.fetcher is not None and (urls := source.urls()):
            source = source.with_fetched(await service.fetcher.fetch(urls, functools.partial(lease.take, "bytes")))
        if source.has_video:
            source = await run(service.video_pool, messages.opened, source, service.format)
        tokens = await run(service.pool, messages.length, source, service.format, service.positions)
    else:
        tokens = len(source.tokens)
    most = values["max_tokens"]
    if chat and values["max_completion_tokens"] is not None:
        most = values["max_completion_tokens"]
    limit = min(NEW_TOKENS if most is None else most, service.positions - tokens)
    return Query(chat, values, source, tokens, limit)


def _parsed(service: Service, chat: bool, body: bytes) -> tuple[dict[str, Any], messages.Chat | Prompt]:
    """The values of a body's fields, and its prompt."""
    values = fields.read(body, fields.CHAT, "messages") if chat else fields.read(body, fields.TEXT, "prompt")
    if values["model"] not in (None, service.name):
        raise Refused(f"model={values['model'][: fields.SHOWN]!r}: this server has {service.name!r}", "model", 404,
                      "model_not_found")  # fmt: skip
    if chat:
        source = messages.read(values["messages"], service.fetcher)
    else:
        source = messages.raw_prompt(values["prompt"], service.format, service.positions)
    return values | {"messages": None}, source


async def prompt_parts(service: Service, body: bytes, lease: Lease) -> dict[str, Any]:
    """The prompt of a chat's body as the model reads it: ids, their texts, and where pictures stand. Raises Refused."""
    query = await read(service, True, body, lease)
    return await asyncio.get_running_loop().run_in_executor(service.pool, _parts, service, query.source)


def _parts(service: Service, chat: messages.Chat) -> dict[str, Any]:
    example = encode(chat.conversation, service.format, reply=True, open_images=False)
    starts = {span.start: span.length for span in example.image_spans}
    parts, at = list[dict[str, Any]](), 0
    while at < len(example.tokens):
        if at in starts:
            parts.append({"image": {"start": at, "length": starts[at]}})
            at += starts[at]
        else:
            token = int(example.tokens[at])
            parts.append({"id": token, "text": token_text(service.format.tokenizer, token)})
            at += 1
    return {"object": "prompt", "model": service.name, "tokens": len(example.tokens), "positions": service.positions,
            "ids": example.tokens.tolist(), "parts": parts}  # fmt: skip
