"""The cache of answers: a file of JSON lines that survives kill -9, and the only log that a run resumes from.

Each request writes {"key", "sent"} before it is sent and its answer, or {"key", "failed"}, after, and {"key", "unsure"}
for each attempt between that broke off. A request without an outcome was in flight when a run was killed.
"""

import collections
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from llava_jax.errors import UsageError
from llava_jax.openai_client.wire import Answer

_FIELDS = ("text", "finish_reason", "tokens_in", "tokens_out")
# The kinds of lines: their fields besides `key`. Older files have "sent" alone.
_KINDS = (
    {"sent": int, "tokens_in": int, "tokens_out": int}, {"unsure": int, "tokens_in": int, "tokens_out": int},
    {"failed": str}, {"text": str, "finish_reason": str, "tokens_in": int, "tokens_out": int}, {"sent": int},
)  # fmt: skip
_MAX_NUMBER = 1 << 53  # of a number in a line


class Cache:
    """Answers by key in a local file that one process at a time may open.

    tokens: of the answers in the file when it was opened, in and out. unsure: attempts that may have been
    billed without an answer, those in flight at a kill included; unsure_tokens: by the estimates of their requests.

    Raises:
      ValueError: the file is in use, or a line before the last is no line of a cache; names file and line.
    """

    def __init__(self, path: Path) -> None:
        if "://" in str(path) or ":/" in str(path):
            raise UsageError(f"cache {str(path)!r}: want a local file, for it is locked and appended to")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.tokens, self.unsure, self.unsure_tokens = path, (0, 0), 0, (0, 0)
        self._lock, self._offsets = threading.Lock(), {}  # key -> (offset, bytes) of its answer's line
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(f"cache {path}: another process is writing it: wait, or name another file") from None
        except ValueError:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Frees the file for others."""
        os.close(self._file)

    def get(self, key: str) -> Answer | None:
        """The answer of this key."""
        position = self._offsets.get(key)
        if position is None:
            return None
        row = json.loads(os.pread(self._file, position[1], position[0]))
        return Answer(*(row[name] for name in _FIELDS), cached=True)

    def record_sent(self, key: str, when: int, tokens: tuple[int, int]) -> None:
        """Records that a request is sent; when: Unix seconds; tokens: those it may be billed, in and out."""
        self._append({"key": key, "sent": when, "tokens_in": tokens[0], "tokens_out": tokens[1]})

    def record_unsure(self, key: str, tokens: tuple[int, int]) -> None:
        """Records that an attempt broke off where the server may bill it."""
        self._append({"key": key, "unsure": 1, "tokens_in": tokens[0], "tokens_out": tokens[1]})

    def record_failure(self, key: str, reason: str) -> None:
        """Records that a request has no answer; a later run sends it again."""
        self._append({"key": key, "failed": reason})

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Writes an answer; when this returns it is on the disk."""
        fields = (answer.text, answer.finish_reason, answer.tokens_in, answer.tokens_out)
        position = self._append({"key": key, "model": model, **dict(zip(_FIELDS, fields))})
        os.fsync(self._file)
        with self._lock:
            self._offsets[key] = position

    def _append(self, row: dict[str, Any]) -> tuple[int, int]:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock:
            start = os.lseek(self._file, 0, os.SEEK_END)
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:  # a full disk: no other thread is to write after half a line
                os.ftruncate(self._file, start)
                raise
        return start, len(line)

    def _read(self) -> None:
        """Indexes the file; cuts off a last line that a kill truncated, and ends one that lacks only its line end."""
        offset, complete = 0, True
        in_flight: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # key -> estimates of what was sent
        answer_tokens, unsure_tokens = list[tuple[int, int]](), list[tuple[int, int]]()
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                row, complete = _parse(line), line.endswith(b"\n")
                if row is None and complete:
                    raise UsageError(f"cache {self.path}:{number}: no line of a cache: is this the right file? "
                                     "If it was damaged, take the line out")  # fmt: skip
                if row is None:
                    os.ftruncate(self._file, offset)
                    complete = True
                    break
                key, tokens = row["key"], (row.get("tokens_in", 0), row.get("tokens_out", 0))
                if "sent" in row:
                    in_flight[key].append(tokens)
                elif "unsure" in row:
                    unsure_tokens.append(tokens)
                elif in_flight[key]:
                    in_flight[key].pop()
                if "text" in row:
                    self._offsets[key] = (offset, len(line))
                    answer_tokens.append(tokens)
                offset += len(line)
        if not complete:
            os.write(self._file, b"\n")
        unsure_tokens += [tokens for estimates in in_flight.values() for tokens in estimates]
        self.tokens, self.unsure, self.unsure_tokens = _sum(answer_tokens), len(unsure_tokens), _sum(unsure_tokens)


def _sum(tokens: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(one for one, _ in tokens), sum(one for _, one in tokens)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of one of `_KINDS`, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return None
    fits = any(all(type(row.get(name)) is kind for name, kind in fields.items()) for fields in _KINDS)
    numbers = (value for value in row.values() if type(value) is int)
    return row if fits and all(0 <= number < _MAX_NUMBER for number in numbers) else None
