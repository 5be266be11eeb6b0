"""Answers in OpenAI's JSON: whole, or as the chunks of a stream; of chat and of text completions."""

import functools
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.generate.scheduler import Token, Update
from llava_jax.prompt.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One of the answers to a request, as far as it has come."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    ended_by: str = ""
    reused: int = 0

    def add(self, update: Update) -> None:
        self.pieces.append(update.piece)
        self.tokens += update.tokens
        self.ended_by, self.reused = update.ended_by, update.reused


@dataclass(frozen=True)
class Wire:
    """What of a request decides the form of its responses.

    chat: of a chat or of a text completion. logprobs: whether they are wanted. ids: whether token ids are.
    usage: whether a stream ends with its usage.
    """

    model: str
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool
    ids: bool
    usage: bool
    prompt_ids: Sequence[int]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of a response."""
        bodies = [self._choice(index, one) for index, one in enumerate(choices)]
        body = self._frame("chat.completion", bodies) | {"usage": self.count(choices)}
        return body | ({"prompt_token_ids": list(self.prompt_ids)} if self.ids else {})

    def first(self, choices: int) -> list[bytes]:
        """The events before the first id."""
        more = {"prompt_token_ids": list(self.prompt_ids)} if self.ids else {}
        if not self.chat:
            return [self._event([], more)] if more else []
        roles = [{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                 for i in range(choices)]  # fmt: skip
        return [self._event(roles, more)]

    def chunk(self, index: int, update: Update) -> bytes:
        """The event of an update; empty where there is nothing to show."""
        if not (update.piece or update.ended_by or (update.tokens and (self.ids or self.logprobs))):
            return b""
        choice = {
            "index": index, "logprobs": self._logprobs(update.tokens) if self.logprobs else None,
            "finish_reason": update.ended_by or None,
        }  # fmt: skip
        choice |= {"delta": {"content": update.piece}} if self.chat else {"text": update.piece}
        return self._event([choice | self._ids(update.tokens)])

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The events after the last id."""
        usage = self._event([], {"usage": self.count(choices)}) if self.usage else b""
        return usage + DONE

    def count(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """OpenAI's usage."""
        prompt, new = len(self.prompt_ids), sum(len(one.tokens) for one in choices)
        reused = max(one.reused for one in choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": reused}}  # fmt: skip

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model,
                "choices": choices}  # fmt: skip

    def _event(self, choices: list[Any], more: dict[str, Any] | None = None) -> bytes:
        body = self._frame("chat.completion.chunk", choices) | ({"usage": None} if self.usage else {}) | (more or {})
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    def _choice(self, index: int, one: Choice) -> dict[str, Any]:
        text = "".join(one.pieces)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        logprobs = self._logprobs(one.tokens) if self.logprobs else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": one.ended_by} | self._ids(one.tokens)

    def _ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": [one.id for one in tokens]} if self.ids else {}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._token(one.id, one.logp) | {
                "top_logprobs": [self._token(*likely) for likely in one.likeliest]} for one in tokens],
                "refusal": None}  # fmt: skip
        words = [token_text(self.tokenizer, one.id) for one in tokens]
        tops = [{token_text(self.tokenizer, token): logp for token, logp in one.likeliest} for one in tokens]
        offsets = list(itertools.accumulate(map(len, words[:-1]), initial=0)) if words else []
        return {"tokens": words, "token_logprobs": [one.logp for one in tokens], "top_logprobs": tops,
                "text_offset": offsets}  # fmt: skip

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8", "replace"))}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text that it stands in; of a part of a character, its name in the vocabulary."""
    anchor = _anchor(tokenizer)
    before = tokenizer.decode([anchor], skip_special=False)
    text = tokenizer.decode([anchor, token], skip_special=False).removeprefix(before)
    return tokenizer.piece(token) if "\ufffd" in text or not text else text


@functools.lru_cache(maxsize=4)
def _anchor(tokenizer: Tokenizer) -> int:
    return tokenizer.encode("a", False)[-1]
