"""`Client`: sends many requests at once, retries each, caches the answers, and stays within a budget."""

import hashlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.errors import UsageError
from llava_jax.openai_client import wire
from llava_jax.openai_client.cache import Cache
from llava_jax.openai_client.post import Poster
from llava_jax.openai_client.wire import Answer, AskError, Endpoint, Failure, Request

_LONGEST_BACKOFF_SECS = 60.0


@dataclass(frozen=True)
class Budget:
    """The limit for all requests of a cache file together, earlier runs included; None is no limit.

    An attempt that broke off counts as what it may have been billed, by an estimate that is rather too high. Prices are
    dollars for a million tokens, as providers print them.
    """

    max_tokens: int | None = None
    max_usd: float | int | None = None
    usd_per_million_in: float | int = 0.0
    usd_per_million_out: float | int = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name}={value}: want 0 or more")
        if self.max_usd is not None and not (self.usd_per_million_in or self.usd_per_million_out):
            raise UsageError(f"max_usd={self.max_usd} without prices: give usd_per_million_in and usd_per_million_out")

    def usd(self, tokens_in: int, tokens_out: int) -> float:
        """The price of so many tokens."""
        return (tokens_in * self.usd_per_million_in + tokens_out * self.usd_per_million_out) / 1e6

    def allows(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether so many tokens in all stay within the budget."""
        if self.max_tokens is not None and tokens_in + tokens_out > self.max_tokens:
            return False
        return self.max_usd is None or self.usd(tokens_in, tokens_out) <= self.max_usd


class Usage(NamedTuple):
    """Counts, tokens and money of a client so far.

    asked: requests sent to the server; cached: found in the cache; failed: without an answer; retries: further
    attempts; unsure: attempts that broke off and may have been billed, also those of earlier runs, and what was in
    flight when one of them was killed; tokens and usd: all that the answers in the cache took, `earlier_usd` of it
    before this client; unsure_in, unsure_out, unsure_usd: what `unsure` may have been billed, beside these.
    """

    asked: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    unsure: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    earlier_usd: float = 0.0
    unsure_in: int = 0
    unsure_out: int = 0
    unsure_usd: float = 0.0

    def __str__(self) -> str:
        return (f"{self.asked:,} asked, {self.cached:,} from the cache, {self.failed:,} failed, {self.retries:,} "
                f"retries, {self.unsure:,} broken off that may be billed (${self.unsure_usd:.4f} at most); "
                f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out, ${self.usd:.4f} "
                f"(${self.earlier_usd:.4f} of it before)")  # fmt: skip


class Client:
    """Requests in, answers out; as a context manager it closes the cache file at its end.

        with Client(Endpoint("http://localhost:8000/v1", "my-model"), "answers.jsonl") as client:
            print(client.ask([{"role": "user", "content": "Is it raining?"}], temperature=0).text)

    Raises:
      ValueError: the cache is in use by another process or damaged, or the key cannot be sent.
    """

    def __init__(
        self, endpoint: Endpoint, cache: str | os.PathLike | None = None, budget: Budget | None = None
    ) -> None:
        endpoint.key()
        self.endpoint, self.budget = endpoint, budget or Budget()
        self._lock, self._reserved, self._stop_reason = threading.RLock(), (0, 0), ""
        self._cache, self._usage = None, Usage()
        if cache is not None:
            self._cache = Cache(Path(cache))
            tokens, unsure = self._cache.tokens, self._cache.unsure_tokens
            usd = self.budget.usd(*tokens)
            self._usage = Usage(0, 0, 0, 0, self._cache.unsure, *tokens, usd, usd, *unsure, self.budget.usd(*unsure))
        self._poster = Poster(endpoint.concurrency)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections and frees the cache for others."""
        self._poster.close()
        if self._cache:
            self._cache.close()

    @property
    def usage(self) -> Usage:
        """Counts, tokens and money so far."""
        return self._usage

    def ask(
        self, messages: Sequence[dict[str, Any]], *, temperature: float | int | None = None,
        top_p: float | int | None = None, max_tokens: int | None = None, seed: int | None = None,
        stop: tuple[str, ...] = (), choice: int = 0,
    ) -> Answer:  # fmt: skip
        """One answer; fields as `Request`'s.

        Raises:
          AskError: none after all retries, or the budget is spent.
        """
        request = Request(messages, temperature, top_p, max_tokens, seed, stop, choice)
        ((_, outcome),) = self.ask_many([request])
        if isinstance(outcome, Failure):
            raise AskError(outcome.reason)
        return outcome

    def ask_many(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        """(index, outcome) of every request as they complete, at most `concurrency` at once.

        Requests are taken one by one as there is room for them. One that fails is a Failure and does not affect the
        others; of equal ones in flight one is sent. If the caller stops early, those in flight are waited for and
        cached. Once the budget is spent, or the key or the address is refused, nothing more is sent: what is not in
        the cache is a Failure that says so.
        """
        flight: dict[str, tuple[Future, list[int]]] = {}
        closing = threading.Event()
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            try:
                for index, request in enumerate(requests):
                    key = self.key(request)
                    if key in flight:
                        flight[key][1].append(index)
                        continue
                    if answer := self._cached_answer(key):
                        yield index, answer
                        continue
                    while len(flight) == self.endpoint.concurrency or flight and not self._has_room(request):
                        yield from self._collect(flight)
                    if refusal := self._refusal(request):
                        yield index, refusal
                        continue
                    flight[key] = (pool.submit(self._send, key, request, closing), [index])
                while flight:
                    yield from self._collect(flight)
            finally:
                closing.set()

    def key(self, request: Request) -> str:
        """The request's name in the cache: sha256 of address, model, messages, sampling and choice."""
        body = wire.body(self.endpoint, request)
        parts = {"base_url": self.endpoint.base_url, "body": body, "choice": request.choice}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _cached_answer(self, key: str) -> Answer | None:
        answer = self._cache.get(key) if self._cache else None
        if answer:
            self._count(cached=1)
        return answer

    def _collect(self, flight: dict[str, tuple[Future, list[int]]]) -> Iterator[tuple[int, Answer | Failure]]:
        """Waits for at least one request, and removes the completed ones from `flight`."""
        done_futures, _ = wait([future for future, _ in flight.values()], return_when=FIRST_COMPLETED)
        for key in [key for key, (future, _) in flight.items() if future in done_futures]:
            future, (first, *others) = flight.pop(key)
            outcome = future.result()
            yield first, outcome
            for index in others:
                self._count(**{"failed" if isinstance(outcome, Failure) else "cached": 1})
                yield index, outcome if isinstance(outcome, Failure) else replace(outcome, cached=True)

    def _affordable(self, tokens: tuple[int, int] = (0, 0)) -> bool:
        """Whether `tokens` fit into the budget beside those in flight and those that may have been billed."""
        usage = self._usage
        sums = zip((usage.tokens_in, usage.tokens_out), (usage.unsure_in, usage.unsure_out), self._reserved, tokens)
        return self.budget.allows(*map(sum, sums))

    def _has_room(self, request: Request) -> bool:
        """Whether `_refusal` can decide now: the budget has room for it, or nothing more is sent anyway."""
        return bool(self._stop_reason) or self._affordable(wire.estimate(request))

    def _refusal(self, request: Request) -> Failure | None:
        """Why nothing more may be sent; None, and the budget reserves the request's estimate."""
        with self._lock:
            if not self._has_room(request):
                self._stop_reason = f"the budget has no room for another request; spent so far: {self._usage}; raise it"
            if self._stop_reason:
                self._count(failed=1)
                return Failure(self._stop_reason, fatal=True)
            self._reserve(wire.estimate(request), 1)
        return None

    def _reserve(self, tokens: tuple[int, int], sign: int) -> None:
        with self._lock:
            self._reserved = (self._reserved[0] + sign * tokens[0], self._reserved[1] + sign * tokens[1])

    def _count(self, **increments: int | float) -> None:
        with self._lock:
            old = self._usage._asdict()
            self._usage = self._usage._replace(**{name: old[name] + value for name, value in increments.items()})

    def _send(self, key: str, request: Request, closing: threading.Event) -> Answer | Failure:
        """Sends a request, and writes its outcome to the cache before it returns it."""
        tokens = wire.estimate(request)
        try:
            if self._cache:
                self._cache.record_sent(key, int(time.time()), tokens)
            outcome = self._attempts(key, request, closing)
            if isinstance(outcome, Failure):
                self._record_failure(key, outcome)
            else:
                self._record_answer(key, outcome)
        finally:
            self._reserve(tokens, -1)
        return outcome

    def _record_failure(self, key: str, failure: Failure) -> None:
        self._count(asked=1, failed=1)
        if failure.fatal:
            self._stop_reason = failure.reason
        if self._cache:
            self._cache.record_failure(key, failure.reason)

    def _record_answer(self, key: str, answer: Answer) -> None:
        if self._cache:
            self._cache.put(key, self.endpoint.model, answer)
        tokens = answer.tokens_in, answer.tokens_out
        self._count(asked=1, tokens_in=tokens[0], tokens_out=tokens[1], usd=self.budget.usd(*tokens))

    def _attempts(self, key: str, request: Request, closing: threading.Event) -> Answer | Failure:
        retries = self.endpoint.retries
        for attempt in range(1, retries + 2):
            outcome, retry_secs, unsure = wire.exchange(self._poster, self.endpoint, request)
            self._count(retries=int(attempt > 1))
            if unsure:
                self._record_unsure(key, wire.estimate(request))
            if isinstance(outcome, Answer) or retry_secs is None:
                return outcome
            if not self._affordable():
                return replace(outcome, reason=f"{outcome.reason} (the budget has no room for another attempt)")
            backoff = min(self.endpoint.backoff_secs * 2 ** (attempt - 1), _LONGEST_BACKOFF_SECS)
            # Random, so that requests that failed together do not come back together.
            if attempt <= retries and closing.wait(max(retry_secs, backoff * random.uniform(0.5, 1))):
                break
        # A transient status is fatal only if the retries did not help.
        return replace(outcome, reason=f"{outcome.reason} (after {attempt} attempts)",
                       fatal=outcome.fatal and attempt > 1)  # fmt: skip

    def _record_unsure(self, key: str, tokens: tuple[int, int]) -> None:
        """Counts an attempt that the server may bill, though no answer came."""
        if self._cache:
            self._cache.record_unsure(key, tokens)
        self._count(unsure=1, unsure_in=tokens[0], unsure_out=tokens[1], unsure_usd=self.budget.usd(*tokens))
