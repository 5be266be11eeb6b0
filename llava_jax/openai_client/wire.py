"""One exchange with an OpenAI-compatible server: the request, the response, and whether another attempt may help.

The key is read from the environment when a request is sent; it is in no object that is printed, and it is removed from
every text of the server, so no log line, error, cache or report can hold it.
"""

import email.utils
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

from llava_jax.errors import UsageError
from llava_jax.openai_client.post import NoResponse, Poster, Response

KEY_VARIABLE = "OPENAI_API_KEY"
_TRANSIENT = (404, 408, 409, 425, 429)  # and every 5xx
# Key, address or model: no other request would fare better; 403 may be about one text. A gateway may answer 404 for a
# while, so it is also in _RETRIED.
_FATAL = (401, 404)
_UNSURE = (504, 524)  # a gateway stopped waiting; the server behind it may have answered all the same
_PICTURE_TOKENS = 1500  # for estimates only; high for one picture of 1,024 pixels a side
_ANSWER_TOKENS = 1024  # the same, where a request has no max_tokens
_BYTES_PER_TOKEN = 3  # the same: English has about four, Chinese three
_MAX_ANSWER_TOKENS = 10_000_000  # of one answer; a server that counts more counts wrongly
_MAX_CHARACTERS = 300  # of a server's message


class AskError(ValueError):
    """A request has no answer; the message is the reason, without the key."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, with its timeouts and retries.

    base_url: up to and with the version, "https://api.openai.com/v1"; requests go to base_url/chat/completions.
    timeout_secs: of one attempt, from the connection to the last byte, and of a pause that the server asks for.
    retries: after the first attempt. concurrency: requests at once.
    backoff_secs: before the first retry; doubled for each further one, times a random half to whole.
    limit_field: what the server calls the limit of an answer; newer OpenAI models want "max_completion_tokens".
    key_variable: the environment variable with the key; unset or empty, no key is sent (local servers want none).
    """

    base_url: str
    model: str
    timeout_secs: float | int = 120.0
    retries: int = 5
    concurrency: int = 8
    backoff_secs: float | int = 1.0
    limit_field: str = "max_tokens"
    key_variable: str = KEY_VARIABLE

    def __post_init__(self) -> None:
        if "@" in self.base_url.partition("://")[2].partition("/")[0] or "?" in self.base_url:
            raise UsageError(f"base_url holds more than a place (not shown): put the key into ${self.key_variable}")
        try:
            parts, host = urlsplit(self.base_url), httpx2.URL(self.base_url).host
            fits = parts.scheme in ("http", "https") and host and parts.port != 0
        except (httpx2.InvalidURL, ValueError) as error:
            raise UsageError(f"base_url={self.base_url!r}: {error}: want http(s)://HOST[:PORT]/v1") from None
        if not fits:
            raise UsageError(f"base_url={self.base_url!r}: want http(s)://HOST[:PORT]/v1")
        if not self.model:
            raise UsageError("model='': want the name that the server knows the model by")
        for name, least in {"timeout_secs": 0.001, "retries": 0, "concurrency": 1, "backoff_secs": 0}.items():
            value = asdict(self)[name]
            if not math.isfinite(value) or value < least:
                raise UsageError(f"{name}={value}: want at least {least}")
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))

    def key(self) -> str:
        """The key, "" if there is none.

        Raises:
          ValueError: it holds what no key does (the HTTP library would print it in its own complaint).
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UsageError(f"${self.key_variable}: holds characters that no key has (not shown): set it again")
        return key


@dataclass(frozen=True)
class Request:
    """One question. messages: {"role", "content"} objects; content is text, or parts with pictures as data URLs.

    A field that is None is not sent: the server's default holds. choice: distinguishes repeats in the cache.
    """

    messages: Sequence[dict[str, Any]]
    temperature: float | int | None = None
    top_p: float | int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    choice: int = 0

    def __post_init__(self) -> None:
        for name, least in {"temperature": 0, "top_p": 0, "max_tokens": 1}.items():
            value = vars(self)[name]
            if value is not None and not (math.isfinite(value) and value >= least):
                raise UsageError(f"{name}={value}: want at least {least}")


@dataclass(frozen=True)
class Answer:
    """The server's answer. finish_reason: "stop" is whole, "length" truncated. cached: not billed again."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cached: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer. fatal: no other request would have one (budget, key, address)."""

    reason: str
    fatal: bool = False


class Exchange(NamedTuple):
    """The outcome of one attempt.

    retry_secs: another attempt may help, after at least so long; None: it would not help.
    unsure: the attempt broke off where it may have been billed.
    """

    outcome: Answer | Failure
    retry_secs: float | None = None
    unsure: bool = False


def body(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    """The JSON object that is posted."""
    fields = {
        "temperature": None if request.temperature is None else float(request.temperature),
        "top_p": None if request.top_p is None else float(request.top_p),
        endpoint.limit_field: request.max_tokens,
        "seed": request.seed,
        "stop": list(request.stop) or None,
    }
    given_fields = {name: value for name, value in fields.items() if value is not None}
    return {"model": endpoint.model, "messages": list(request.messages)} | given_fields


def exchange(poster: Poster, endpoint: Endpoint, request: Request) -> Exchange:
    """Posts a request once."""
    key = endpoint.key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        content = json.dumps(body(endpoint, request), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON may hold half a character, which no request can
        return Exchange(Failure(_printable(f"cannot be sent: {error}", key)))
    try:
        response = poster.post(f"{endpoint.base_url}/chat/completions", content, headers, endpoint.timeout_secs)
    except NoResponse as error:
        return Exchange(Failure(_printable(str(error), key)), 0.0, unsure=error.sent)
    if response.status != 200:
        return _refusal(response, endpoint.timeout_secs, key)
    answer = _answer(response, request, key)
    if answer is None:
        return Exchange(Failure(_printable(f"no answer of this protocol: {_text(response)}", key)), 0.0, unsure=True)
    return Exchange(answer)


def estimate(request: Request) -> tuple[int, int]:
    """(in, out) tokens, rather too many, for a budget that must hold before the answer arrives."""
    length = pictures = 0
    for message in request.messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            length += _length_bytes(part.get("text", "")) + 12  # and what frames a message
            pictures += part["type"] != "text"
    tokens = -(-length // _BYTES_PER_TOKEN) + pictures * _PICTURE_TOKENS
    return tokens, _ANSWER_TOKENS if request.max_tokens is None else request.max_tokens


def _refusal(response: Response, longest_pause_secs: float | int, key: str) -> Exchange:
    """The exchange of a response whose status is not 200."""
    status, text = response.status, _text(response)
    reason = _printable(f"HTTP {status}: {text}", key)
    retry_secs = None
    if status in _TRANSIENT or status >= 500:
        retry_secs = min(_retry_after(response.headers.get("retry-after", "")), longest_pause_secs)
    if "insufficient_quota" in text:
        retry_secs = None
    elif status not in _FATAL:
        return Exchange(Failure(reason), retry_secs, unsure=status in _UNSURE)
    return Exchange(Failure(f"{reason} (check key, base_url and model)", fatal=True), retry_secs)


def _retry_after(header: str) -> float:
    """Seconds; 0 without the header. It holds seconds or a date. Source: RFC 9110, 10.2.3."""
    if header.strip().isdecimal():
        return float(header)
    try:
        parsed_date = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(parsed_date) - time.time()) if parsed_date else 0.0
    except (ValueError, OverflowError):  # no such day, or one that no clock reaches
        return 0.0


def _answer(response: Response, request: Request, key: str) -> Answer | None:
    """The answer in a response of status 200, or None if there is none."""
    try:
        message = json.loads(response.content)
        choice, usage = message["choices"][0], message.get("usage") or {}
        text, reason = choice["message"]["content"] or "", choice["finish_reason"] or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str) or not isinstance(reason, str) or not isinstance(usage, dict):
        return None
    # Servers that count nothing are billed by our estimate, or a budget would never end.
    guesses = {"prompt_tokens": estimate(request)[0], "completion_tokens": -(-_length_bytes(text) // _BYTES_PER_TOKEN)}
    counts = [guess if usage.get(name) is None else usage[name] for name, guess in guesses.items()]
    if not all(type(count) is int and 0 <= count <= _MAX_ANSWER_TOKENS for count in counts):
        return None
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half a character, which no file can
    return Answer(_redact(text, key), _printable(reason, key), *counts)


def _length_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _text(response: Response) -> str:
    return response.content.decode("utf-8", "replace")


def _redact(text: str, key: str) -> str:
    return text.replace(key, "[key]") if key else text


def _printable(text: str, key: str) -> str:
    """One line for terminals and logs: without the key, control characters and what is beyond _SHOWN_CHARACTERS.

    The key is removed before the line is cut, or half of it could stay.
    """
    text = _redact(text, key)[: 10 * _MAX_CHARACTERS]
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."
