"""The cache of answers: a file of JSON lines that survives kill -9, and the only log a run needs to go on from.

Each request writes {"key", "sent"} before it leaves and its answer, or {"key", "failed"}, after; what was sent and
never came back was in flight when a run was killed, and is counted.
"""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from llava_jax.errors import UsageError
from llava_jax.openai_client.wire import Answer

_FIELDS = ("text", "finish_reason", "tokens_in", "tokens_out")


class Cache:
    """Answers by key in a local file that one process at a time may open.

    lost: requests that earlier runs sent and of which nothing is known: they may have been billed.
    tokens_in, tokens_out: what the answers in the file took when it was opened.

    Raises:
      ValueError: the file is in use, or a line before the last is no line of a cache; names file and line.
    """

    def __init__(self, path: Path) -> None:
        if "://" in str(path) or ":/" in str(path):
            raise UsageError(f"cache {str(path)!r}: want a local file, for it is locked and appended to")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lost, self.tokens_in, self.tokens_out = path, 0, 0, 0
        self._lock, self._places = threading.Lock(), {}  # key -> (offset, bytes) of its answer's line
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
        place = self._places.get(key)
        if place is None:
            return None
        told = json.loads(os.pread(self._file, place[1], place[0]))
        return Answer(*(told[name] for name in _FIELDS), cached=True)

    def sent(self, key: str, when: int) -> None:
        """Notes that a request leaves; when: Unix seconds."""
        self._append({"key": key, "sent": when})

    def failed(self, key: str, reason: str) -> None:
        """Notes that a request came back without an answer; it will be asked again."""
        self._append({"key": key, "failed": reason})

    def keep(self, key: str, model: str, answer: Answer) -> None:
        """Writes an answer; when this returns it is on the disk."""
        fields = (answer.text, answer.finish_reason, answer.tokens_in, answer.tokens_out)
        place = self._append({"key": key, "model": model, **dict(zip(_FIELDS, fields))})
        os.fsync(self._file)
        with self._lock:
            self._places[key] = place

    def _append(self, told: dict[str, Any]) -> tuple[int, int]:
        line = (json.dumps(told, ensure_ascii=False) + "\n").encode()
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
        """Indexes the file; a last line that was torn by a kill is cut off, one that only lacks its end gets it."""
        place, sent, back, whole = 0, 0, 0, True
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                told, whole = _parsed(line), line.endswith(b"\n")
                if told is None and whole:
                    raise UsageError(f"cache {self.path}:{number}: no line of a cache: is this the right file? "
                                     "If it was damaged, take the line out")  # fmt: skip
                if told is None:
                    os.ftruncate(self._file, place)
                    whole = True
                    break
                sent, back = sent + ("sent" in told), back + ("sent" not in told)
                if "text" in told:
                    self._places[told["key"]] = (place, len(line))
                    self.tokens_in += told["tokens_in"]
                    self.tokens_out += told["tokens_out"]
                place += len(line)
        if not whole:
            os.write(self._file, b"\n")
        self.lost = max(0, sent - back)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """One of the three kinds of lines, or None."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    if not isinstance(told, dict) or "key" not in told:
        return None
    return told if {"sent"} <= told.keys() or {"failed"} <= told.keys() or {*_FIELDS} <= told.keys() else None
