"""What a request's body may hold: one table of fields for each route, and the errors of OpenAI's shape."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llava_jax.errors import UsageError

MAX_BODY_BYTES = 20_000_000
MAX_VALUES = 200_000  # values of a JSON body; a million empty lists would take 60 MB
SHOWN = 60  # characters of a wrong value that a message repeats


class Refused(UsageError):
    """A request that is not answered.

    field: what of the body is wrong. status: of the response. code: for programs. retry_secs: when to try again.
    """

    def __init__(
        self, message: str, field: str | None = None, status: int = 400, code: str | None = None,
        retry_secs: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.field, self.status, self.code, self.retry_secs = field, status, code, retry_secs

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
                 503: "server_error"}  # fmt: skip
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def refuse(name: str, value: Any, wish: str) -> NoReturn:
    """Raises Refused for the value of a field."""
    shown = repr(value) if len(repr(value)) <= SHOWN else repr(value)[:SHOWN] + "..."
    raise Refused(f"{name}={shown}: want {wish}", name)


@dataclass(frozen=True)
class Field:
    """One field. read: the value that the program takes, or an error. default: where it is left out or null."""

    read: Callable[[str, Any], Any]
    default: Any = None


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def _number(low: float | int, high: float | int, without_low: bool = False) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        fits = type(value) in (int, float) and low <= value <= high  # neither NaN nor a whole number beyond a float
        if not fits or (without_low and value == low):
            refuse(name, value, f"a number {'above' if without_low else 'from'} {low} {'up ' * without_low}to {high}")
        return float(value)

    return read


def _of(kind: type, wish: str) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if type(value) is not kind:
            refuse(name, value, wish)
        return value

    return read


text, flag = _of(str, "a text"), _of(bool, "true or false")


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    wish = "a text of 1 to 200 characters, or a list of at most 16"
    if type(stops) is not list or len(stops) > 16:
        refuse(name, value, wish)
    for index, stop in enumerate(stops):
        if type(stop) is not str or not 1 <= len(stop) <= 200:
            refuse(name if isinstance(value, str) else f"{name}[{index}]", stop, wish)
    return tuple(stops)


def _stream_options(name: str, value: Any) -> bool:
    _of(dict, 'an object such as {"include_usage": true}')(name, value)
    return flag(f"{name}.include_usage", value.get("include_usage", False))


def _only(*neutral: Any) -> Field:
    """Of a field that changes answers in a way that this server has not: it may say that it does not."""

    def read(name: str, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in (*neutral, *map(float, _whole_of(neutral)))):
            refuse(name, value, f"{' or '.join([*map(json.dumps, neutral), 'nothing'])}: this server does not have it")

    return Field(read)


def _whole_of(values: Sequence[Any]) -> list[int]:
    return [value for value in values if type(value) is int]


_COMMON = {
    "model": Field(text),
    "stream": Field(flag, False),
    "stream_options": Field(_stream_options, False),
    "n": Field(_whole(1, 16), 1),
    "seed": Field(_whole(0, 2**32 - 1)),
    "temperature": Field(_number(0, 2), 1.0),
    "top_p": Field(_number(0, 1, without_low=True), 1.0),
    "top_k": Field(_whole(0, 2**31 - 1), 0),
    "stop": Field(_stops, ()),
    "max_tokens": Field(_whole(1, 2**31 - 1)),
    "return_token_ids": Field(flag, False),
    "frequency_penalty": _only(0),
    "presence_penalty": _only(0),
    "repetition_penalty": _only(1),
    "min_p": _only(0),
    "logit_bias": _only({}),
    "ignore_eos": _only(False),
    "min_tokens": _only(0),
}
CHAT = _COMMON | {
    "messages": Field(_of(list, "a list of messages")),
    "max_completion_tokens": Field(_whole(1, 2**31 - 1)),
    "logprobs": Field(flag, False),
    "top_logprobs": Field(_whole(0, 20), 0),
    "tools": _only([]),
    "functions": _only([]),
    "tool_choice": _only("none", "auto"),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    "audio": _only(),
}
TEXT = _COMMON | {
    "prompt": Field(text),
    "logprobs": Field(_whole(0, 20)),
    "echo": _only(False),
    "suffix": _only(""),
    "best_of": _only(1),
}


def read(body: bytes, table: Mapping[str, Field], required: str) -> dict[str, Any]:
    """The values of a table's fields in a JSON body; fields that the table does not know are ignored.

    Raises:
      Refused: names the field.
    """
    content = _json(body)
    if type(content) is not dict:
        raise Refused(f"the body is a JSON {type(content).__name__}: want an object", "body")
    values = {
        name: one.default if content.get(name) is None else one.read(name, content[name]) for name, one in table.items()
    }
    if values[required] is None:
        raise Refused(f"{required} is missing from the body", required)
    if content.get("stream_options") is not None and not values["stream"]:
        raise Refused("stream_options: want it with stream=true only", "stream_options")
    if values.get("top_logprobs") and not values["logprobs"]:
        raise Refused("top_logprobs: want it with logprobs=true only", "top_logprobs")
    return values


def _json(body: bytes) -> Any:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise Refused(f"the body holds more than {MAX_VALUES} values: want fewer", "body")
    try:
        return json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON that can be read ({str(error)[:200]})", "body") from None
