"""A local server of /v1/chat/completions with configurable faults.

`with FakeOpenAI(lambda body: "Yes.", faults=first("429", "500")) as server:` and then `Endpoint(server.url, "any")`.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# status, body, headers of plain refusals; {key} is what the client sent, as careless servers echo it
REFUSALS = {
    "429": (429, '{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "429 wait": (429, '{"error": {"message": "slow down"}}', {"Retry-After": "1"}),
    "quota": (429, '{"error": {"code": "insufficient_quota", "message": "pay first"}}', {}),
    "500": (500, "<html>oops</html>", {}),
    "503": (503, "", {}),
    "504": (504, "", {}),
    "escapes": (500, "\x1b[31mred\x07 \x9b2J", {}),
    "400": (400, '{"error": {"message": "messages[0] is wrong"}}', {}),
    "400 echo": (400, '{"error": {"message": "bad header Bearer {key} in ' + "x" * 270 + ' {key}"}}', {}),
    "500 echo": (500, "crashed while reading {key}", {"X-Echo": "{key}"}),
    "refused key": (401, '{"error": {"message": "Incorrect API key provided: {key}"}}', {}),
    "403": (403, '{"error": {"message": "flagged"}}', {}),
    "no model": (404, '{"error": {"message": "no such model"}}', {}),
    "redirect": (307, "", {"Location": "http://elsewhere.invalid/v1"}),
    # Status 200, and yet no answer.
    "broken json": (200, '{"choices": [{"message": {"content": "half', {}),
    "no choices": (200, '{"choices": []}', {}),
    "other shape": (200, '["hello"]', {}),
}
# Further faults: "truncated" (fewer bytes than announced), "dropped" (no response), "timeout" (silence of
# `silence_secs`), "length" (a cut answer), "no usage" (an answer without token counts), "echo answer" (the key in it).

Fault = Callable[[int, dict[str, Any]], str | None]


def first(*faults: str) -> Fault:
    """Every request meets these faults in its first attempts, then succeeds."""
    attempts: Counter[str] = Counter()
    lock = threading.Lock()

    def fault(number: int, body: dict[str, Any]) -> str | None:
        name = json.dumps(body, sort_keys=True)
        with lock:
            attempts[name] += 1
            return faults[attempts[name] - 1] if attempts[name] <= len(faults) else None

    return fault


def in_turn(*faults: str | None) -> Fault:
    """The n-th arrival meets the n-th fault (None: it is answered); later ones are answered."""
    return lambda number, body: faults[number] if number < len(faults) else None


def always(fault: str) -> Fault:
    """Every arrival meets this fault."""
    return lambda number, body: fault


class FakeOpenAI:
    """answer: the text for a posted body. latency_secs: before each answer.

    bodies: every posted body in the order of arrival; answered: those that got an answer (they are billed).
    most_at_once: the highest number of requests that were open together. tokens: words of the messages and the answer.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = lambda body: "Fine.",
        faults: Fault = lambda number, body: None,
        latency_secs: float = 0.0,
        silence_secs: float = 1.0,
    ) -> None:
        self.answer, self.faults, self.latency_secs, self.silence_secs = answer, faults, latency_secs, silence_secs
        self.bodies: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.open = self.most_at_once = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "FakeOpenAI":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here, before or within their request: only other errors are news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | json.JSONDecodeError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a second one waits 40 ms for the first one's receipt
    fake: FakeOpenAI

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        fake = self.fake
        with fake.lock:
            number = len(fake.bodies)
            fake.bodies.append(body)
            fake.keys.add(key)
            fake.open += 1
            fake.most_at_once = max(fake.most_at_once, fake.open)
        try:
            self._respond(body, key, "no model" if self.path != "/v1/chat/completions" else fake.faults(number, body))
        except (BrokenPipeError, ConnectionResetError):  # the client was killed, or tired of waiting
            self.close_connection = True
        finally:
            with fake.lock:
                fake.open -= 1

    def _respond(self, body: dict[str, Any], key: str, fault: str | None) -> None:
        if fault in REFUSALS:
            status, text, headers = REFUSALS[fault]
            filled = {name: value.replace("{key}", key) for name, value in headers.items()}
            return self._send(status, text.replace("{key}", key).encode(), filled)
        if fault == "dropped":
            self.close_connection = True
            return None
        time.sleep(self.fake.silence_secs if fault == "timeout" else self.fake.latency_secs)
        text = self.fake.answer(body)
        completion = {
            "choices": [{"index": 0, "finish_reason": "length" if fault == "length" else "stop", "message": {
                "role": "assistant", "content": f"{text} {key}" if fault == "echo answer" else text}}],
            "usage": {"prompt_tokens": words(body), "completion_tokens": len(text.split())},
        }  # fmt: skip
        if fault == "no usage":
            completion["usage"] = None
        with self.fake.lock:
            self.fake.answered.append(body)
        content = json.dumps(completion).encode()
        if fault == "truncated":
            self.close_connection = True
            return self._send(200, content[: len(content) // 2], {"Content-Length": str(len(content))})
        return self._send(200, content, {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (defaults | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


def words(body: dict[str, Any]) -> int:
    """What this server counts as prompt tokens: the words of all text."""
    parts = [message["content"] for message in body["messages"]]
    texts = [part if isinstance(part, str) else " ".join(p.get("text", "") for p in part) for part in parts]
    return sum(len(text.split()) for text in texts)
