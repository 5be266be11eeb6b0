"""A server that misbehaves costs the one request that met it: not the run, the memory or the terminal."""

import gzip
import json
import os
import re
import socket
import threading
import time
import tracemalloc
import zlib

import pytest

from llava_jax.errors import UsageError
from llava_jax.openai_client import Answer, AskError, Budget, Client, Endpoint, Failure, Request, wire
from llava_jax.openai_client.post import MAX_BODY_BYTES
from tests.fake_openai import FakeOpenAI, always, in_turn

KEY = "sk-CANARY123"
DEEP = b"[" * 100_000
GOOD = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1}}  # fmt: skip
OK = json.dumps(GOOD).encode()


def http(status=b"200 OK", body=OK, head=b"", length=None):
    length = len(body) if length is None else length
    # The server closes after each answer. One that does not say so may be asked again on a connection that is gone.
    return b"HTTP/1.1 %s\r\n%sConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (status, head, length, body)


def answer(**changes):
    return http(body=json.dumps(GOOD | changes).encode())


def choice(content, reason="stop"):
    return answer(choices=[{"message": {"content": content}, "finish_reason": reason}])


def with_token_count(number):
    return http(body=OK.replace(b'"completion_tokens": 1', b'"completion_tokens": ' + number))


def rate_limit(head, status=b"429 X"):
    return http(status, b"{}", head)


def gzip_response(body, head=b"Content-Encoding: gzip\r\n"):
    return http(head=head, body=body)


def bomb(megabytes):
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(megabytes)), packer.flush()])


NO_ANSWER, RATE_LIMITED, PROTOCOL_ERROR = "no answer of this protocol", "HTTP 429", "RemoteProtocolError"
# What a server sends -> what the failure says, or the answer's text after "=".
FAULTS = {
    "good": (http(), "=fine"),
    "429 without a pause": (rate_limit(b""), RATE_LIMITED),
    "pause of 30 years": (rate_limit(b"Retry-After: 1000000000\r\n"), RATE_LIMITED),
    "pause of 5,000 digits": (rate_limit(b"Retry-After: " + b"9" * 5000 + b"\r\n"), RATE_LIMITED),
    "pause below 0": (rate_limit(b"Retry-After: -5\r\n"), RATE_LIMITED),
    "pause nan": (rate_limit(b"Retry-After: nan\r\n"), RATE_LIMITED),
    "pause in Arabic digits": (rate_limit("Retry-After: ٣\r\n".encode()), RATE_LIMITED),
    "pause superscript": (rate_limit(b"Retry-After: \xb2\r\n"), RATE_LIMITED),
    "pause until the past": (rate_limit(b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n"), RATE_LIMITED),
    "pause until no date": (rate_limit(b"Retry-After: Wed, 99 Foo 99999 99:99:99\r\n"), RATE_LIMITED),
    "pause until the year 99999999": (rate_limit(b"Retry-After: Wed, 21 Oct 99999999 07:28:00 GMT\r\n"), RATE_LIMITED),
    "pause in a zone of 9 digits": (rate_limit(b"Retry-After: Wed, 21 Oct 2015 07:28:00 +999999999\r\n"), RATE_LIMITED),
    "two pauses": (rate_limit(b"Retry-After: 0\r\nRetry-After: 1e999\r\n"), RATE_LIMITED),
    "error as 200": (http(body=b'{"error": {"message": "overloaded"}}'), NO_ANSWER),
    "html as 200": (http(body=b"<html>"), NO_ANSWER),
    "nothing as 200": (http(body=b""), NO_ANSWER),
    "null": (http(body=b"null"), NO_ANSWER),
    "list": (http(body=b"[]"), NO_ANSWER),
    "number": (http(body=b"7"), NO_ANSWER),
    "deep": (http(body=DEEP), NO_ANSWER),
    "deep within": (http(body=OK.replace(b'"fine"', DEEP)), NO_ANSWER),
    "no choices": (answer(choices=[]), NO_ANSWER),
    "choices by name": (answer(choices={"0": 1}), NO_ANSWER),
    "choice is a text": (answer(choices=["fine"]), NO_ANSWER),
    "no message": (answer(choices=[{"finish_reason": "stop"}]), NO_ANSWER),
    "content null": (choice(None, None), "="),
    "content list": (choice([{"type": "text", "text": "x"}]), NO_ANSWER),
    "content number": (choice(7), NO_ANSWER),
    "reason list": (choice("fine", ["stop"]), NO_ANSWER),
    "reason half a character": (choice("fine", "\ud800"), "=fine"),
    "reason with escapes": (choice("fine", "\x1b[31m" + "x" * 5000), "=fine"),
    "content half a character": (choice("\ud800"), r"=\?"),
    "usage list": (answer(usage=[1]), NO_ANSWER),
    "usage null": (answer(usage=None), "=fine"),
    "tokens as text": (with_token_count(b'"1"'), NO_ANSWER),
    "tokens below 0": (with_token_count(b"-1"), NO_ANSWER),
    "tokens true": (with_token_count(b"true"), NO_ANSWER),
    "tokens 1.5": (with_token_count(b"1.5"), NO_ANSWER),
    "tokens NaN": (with_token_count(b"NaN"), NO_ANSWER),
    "tokens 1e400": (with_token_count(b"1e400"), NO_ANSWER),
    "tokens of 4,000 digits": (with_token_count(b"9" * 4000), NO_ANSWER),
    "tokens of 5,000 digits": (with_token_count(b"9" * 5000), NO_ANSWER),
    "latin-1": (http(body=OK.replace(b"fine", b"\xe9")), NO_ANSWER),
    "utf-16": (http(body=json.dumps(GOOD).encode("utf-16")), "=fine"),
    "charset nonsense": (http(head=b"Content-Type: text/x; charset=zlib_codec\r\n", body=b"{"), NO_ANSWER),
    "truncated": (http(length=len(OK) + 50), f"{PROTOCOL_ERROR}.*without sending complete"),
    "longer than it says": (http(length=10), NO_ANSWER),
    "length of 5,000 digits": (http(head=b"Content-Length: " + b"9" * 5000 + b"\r\n"), PROTOCOL_ERROR),
    "two lengths": (http(head=b"Content-Length: 1\r\n"), PROTOCOL_ERROR),
    "length below 0": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", PROTOCOL_ERROR),
    "gzip": (gzip_response(gzip.compress(OK)), "=fine"),
    "gzip that is none": (gzip_response(OK), "damaged gzip"),
    "gzip cut short": (gzip_response(gzip.compress(OK)[:20]), NO_ANSWER),
    "large gzip": (gzip_response(gzip.compress(bytes(3_000_000))), NO_ANSWER),
    "gzip bomb": (gzip_response(bomb(300)), "longer than 4 MiB"),
    "unknown coding": (gzip_response(OK, b"Content-Encoding: br\r\n"), "content-encoding 'br'"),
    "bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", PROTOCOL_ERROR),
    "chunk of 5,000 digits": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"F" * 5000, PROTOCOL_ERROR),
    "not http": (b"SSH-2.0-x\r\n", PROTOCOL_ERROR),
    "status 99999": (http(b"99999 X"), PROTOCOL_ERROR),
    "status 999": (http(b"999 X", b"odd"), "HTTP 999: odd"),
    "status of letters": (http(b"abc X"), PROTOCOL_ERROR),
    "204": (b"HTTP/1.1 204 X\r\n\r\n", "HTTP 204"),
    "redirect": (http(b"302 X", b"", b"Location: http://127.0.0.1:1/\r\n"), "HTTP 302"),
    "key echo with escapes": (http(b"500 X", b"bad key sk-CANARY123 \x1b[31m\x9b2J\x07\n"), r"bad key \[key\] \[31m"),
    "escapes in a header": (http(b"500 \x1b[31m", b"x", b"X: \x1b[31m\r\n"), "Error|HTTP 500"),
    "cookie of escapes": (http(head=b"Set-Cookie: a=\xff\x01; Domain=127.0.0.1\r\n"), "=fine|Error"),
    "413": (http(b"413 X", b"big"), "HTTP 413: big"),
    "403 of 10 MB": (http(b"403 X", b"x" * 10_000_000), "longer than 4 MiB"),
    "huge header": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000_000 + b"\r\n\r\n", PROTOCOL_ERROR),
    "100 without end": (b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, PROTOCOL_ERROR),
    "close": (b"", PROTOCOL_ERROR),
    "silence": ("silence", "no whole answer within"),
    "drip of the body": ("drip of the body", "no whole answer within"),
    "drip of headers": ("drip of headers", "no whole answer within"),
    "endless": ("endless", "longer than 4 MiB"),
}  # fmt: skip
SLOW = {"silence": b"", "drip of the body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        "drip of headers": b"HTTP/1.1 200 OK\r\n", "endless": b"HTTP/1.1 200 OK\r\n\r\n"}  # fmt: skip
DRIPS = {"silence": b"", "drip of the body": b" ", "drip of headers": b"X: y\r\n", "endless": bytes(1 << 20)}


class RawServer:
    """Sends bytes of `fault` to a request that holds "bad", and a good answer to others."""

    def __init__(self, fault):
        self.fault, self.stop, self.hits, self.sent_bytes = fault, threading.Event(), 0, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _accept(self):
        while not self.stop.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection:
            try:
                head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
                length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
                while len(body) < length:
                    body += connection.recv(65536)
                if b"bad" not in body:
                    return connection.sendall(http())
                self.hits += 1
                connection.sendall(SLOW.get(self.fault, self.fault))
                while self.fault in SLOW and not self.stop.wait(0 if self.fault == "endless" else 0.1):
                    connection.sendall(DRIPS[self.fault])
                    self.sent_bytes += len(DRIPS[self.fault])
            except OSError:  # the client had enough
                pass


def chat_request(text, **settings):
    return Request([{"role": "user", "content": text}], max_tokens=5, **settings)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_the_request_that_met_it_and_nothing_else(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fault, expected = FAULTS[name]
    patience = 1.5 if fault in SLOW and fault != "endless" or "pause" in name else 20
    with RawServer(fault) as server:
        endpoint = Endpoint(server.url, "m", timeout_secs=patience, retries=1, backoff_secs=0.01)
        start = time.monotonic()
        with Client(endpoint, tmp_path / "c.jsonl") as client:
            requests = [chat_request("one"), chat_request("bad"), chat_request("two"), chat_request("bad", choice=1)]
            outcomes = dict(client.ask_many(requests))
        assert time.monotonic() - start < 60
        assert [outcomes[index].text for index in (0, 2)] == ["fine", "fine"]
        for outcome in (outcomes[1], outcomes[3]):
            if isinstance(outcome, Answer):
                assert re.fullmatch(expected, f"={outcome.text}") and len(outcome.finish_reason) <= 300
            else:
                assert re.search(expected, outcome.reason) and len(outcome.reason) < 400 and not outcome.fatal
        assert server.hits <= 4
        # The kernel's buffers take tens of MiB a connection beside what is read; 20 s without an end are gigabytes.
        assert server.sent_bytes <= server.hits * 16 * MAX_BODY_BYTES, "an endless answer is not read to its end"
    texts = [(tmp_path / "c.jsonl").read_text(), *map(repr, outcomes.values()), str(client.usage), *capsys.readouterr()]
    reasons = [result.reason if isinstance(result, Failure) else result.finish_reason for result in outcomes.values()]
    assert all("CANARY" not in text for text in texts) and all(text.isprintable() for text in reasons)
    with Client(endpoint, tmp_path / "c.jsonl") as client:
        assert client.usage.tokens_in >= 2


def test_there_are_sixty_faults():
    assert len(FAULTS) >= 60


@pytest.mark.parametrize("name", ["gzip bomb", "endless"])
def test_an_answer_takes_a_few_megabytes_of_memory_at_most(name):
    with RawServer(FAULTS[name][0]) as server:
        client = Client(Endpoint(server.url, "m", timeout_secs=20, retries=0))
        client.ask([{"role": "user", "content": "warm up"}])
        tracemalloc.start()
        try:
            with client, pytest.raises(AskError, match="longer than 4 MiB"):
                client.ask([{"role": "user", "content": "bad"}])
            # The server of this test, in the same process, holds pieces of 1 MiB too.
            assert tracemalloc.get_traced_memory()[1] < 6 * MAX_BODY_BYTES
        finally:
            tracemalloc.stop()


# ---- what a failure does to the run


def test_a_question_that_cannot_be_encoded_fails_alone_and_gives_its_budget_back(tmp_path):
    texts = ["fine", json.loads('"bad \\ud83d half"'), "also fine"]
    requests = [Request([{"role": "user", "content": text}], max_tokens=10) for text in texts]
    estimate = sum(sum(wire.estimate(request)) for request in requests)
    with FakeOpenAI(lambda body: "Yes.") as server:
        endpoint = Endpoint(server.url, "m", concurrency=1)
        # Room for two of the three estimates, once what was held for the second is free again.
        with Client(endpoint, tmp_path / "c.jsonl", Budget(max_tokens=estimate * 2 // 3 + 1)) as client:
            outcomes = dict(client.ask_many(requests))
        assert [outcomes[index].text for index in (0, 2)] == ["Yes.", "Yes."]
        assert "cannot be sent" in outcomes[1].reason and not outcomes[1].fatal
        assert len(server.bodies) == 2 and client.usage.unsure == 0 and client.usage.failed == 1


def test_a_gateways_404_that_passes_does_not_end_the_run():
    with FakeOpenAI(lambda body: "Yes.", in_turn("no model", None, "no model")) as server:
        with Client(Endpoint(server.url, "m", concurrency=1, backoff_secs=0.01)) as client:
            outcomes = dict(client.ask_many(chat_request(str(i)) for i in range(5)))
        assert all(isinstance(outcome, Answer) for outcome in outcomes.values())
        assert client.usage.retries == 2
    with FakeOpenAI(lambda body: "Yes.", in_turn("no model")) as server:
        with Client(Endpoint(server.url, "m", concurrency=1, retries=0)) as client:
            outcomes = dict(client.ask_many(chat_request(str(i)) for i in range(3)))
        assert not outcomes[0].fatal and outcomes[1].text == outcomes[2].text == "Yes."


def test_a_404_that_stays_ends_the_run():
    with FakeOpenAI(faults=always("no model")) as server:
        with Client(Endpoint(server.url, "m", concurrency=1, retries=2, backoff_secs=0.01)) as client:
            outcomes = dict(client.ask_many(chat_request(str(i)) for i in range(9)))
        assert all(outcome.fatal and "check key, base_url and model" in outcome.reason
                   for outcome in outcomes.values()) and len(server.bodies) == 3  # fmt: skip


@pytest.mark.parametrize("fault", ["timeout", "dropped", "truncated", "broken json", "504"])
def test_attempts_that_may_have_been_billed_count_against_the_budget(fault, tmp_path):
    """Six attempts of 12 + 5 tokens at most would be 102; the budget has room for three."""
    budget = Budget(max_tokens=3 * sum(wire.estimate(chat_request("x" * 20))))
    patience = 1 if fault == "timeout" else 20
    with FakeOpenAI(faults=always(fault), silence_secs=20) as server:
        endpoint = Endpoint(server.url, "m", timeout_secs=patience, backoff_secs=0.01, concurrency=1)
        with Client(endpoint, tmp_path / "c.jsonl", budget) as client:
            outcomes = dict(client.ask_many(chat_request("x" * 20, choice=i) for i in range(3)))
        assert len(server.bodies) == 3 and client.usage.unsure == 3
        assert "no room for another attempt" in outcomes[0].reason
        assert all(outcomes[i].fatal and "no room for another request" in outcomes[i].reason for i in (1, 2))
        assert "3 broken off that may be billed" in str(client.usage)
        with Client(endpoint, tmp_path / "c.jsonl", budget) as client:  # a new run has no new budget
            assert (client.usage.unsure, client.usage.unsure_in, client.usage.unsure_out) == (3, 33, 15)
            assert dict(client.ask_many([chat_request("y" * 20)]))[0].fatal
        assert len(server.bodies) == 3


def test_money_that_may_have_been_billed_is_shown_and_counted(tmp_path):
    budget = Budget(None, 1.0, usd_per_million_in=1000, usd_per_million_out=10_000)
    with FakeOpenAI(lambda body: "Yes.", in_turn("dropped")) as server:
        with Client(Endpoint(server.url, "m", backoff_secs=0.01), tmp_path / "c.jsonl", budget) as client:
            client.ask([{"role": "user", "content": "x" * 20}], max_tokens=5)
    assert client.usage.unsure_usd == pytest.approx((11 * 1000 + 5 * 10_000) / 1e6)
    assert client.usage.usd == pytest.approx((1 * 1000 + 1 * 10_000) / 1e6)
    assert "($0.0610 at most)" in str(client.usage)


def test_what_was_in_flight_at_a_kill_counts_by_its_estimate(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"key": "a", "sent": 1, "tokens_in": 100, "tokens_out": 50}, {"key": "b", "sent": 1},
            {"key": "c", "sent": 1, "tokens_in": 7, "tokens_out": 7}, {"key": "c", "failed": "HTTP 400"}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Client(Endpoint("http://a/v1", "m"), path, Budget(max_tokens=150)) as client:
        assert client.usage.unsure == 2 and (client.usage.unsure_in, client.usage.unsure_out) == (100, 50)
        assert dict(client.ask_many([chat_request("x")]))[0].fatal


# ---- the cache's own file


@pytest.mark.parametrize("line", [
    "[" * 100_000, '{"key": ["a"], "sent": 1}', '{"key": "a", "text": 1, "finish_reason": "", "tokens_in": 1, '
    '"tokens_out": 1}', '{"key": "a", "text": "", "finish_reason": "", "tokens_in": "1", "tokens_out": 1}',
    '{"key": "a", "text": "", "finish_reason": "", "tokens_in": ' + "9" * 400 + ', "tokens_out": 1}',
    '{"key": "a", "failed": ["x"]}', '{"key": "a", "sent": null}', "null", "7", '"key"', "\x00", '{"key": "\xff"',
])  # fmt: skip
def test_a_damaged_line_of_the_cache_is_named_in_one_line(line, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(f'{line}\n{{"key": "b", "sent": 1}}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.jsonl:1: no line of a cache") as caught:
        Client(Endpoint("http://a/v1", "m"), path)
    assert "\n" not in str(caught.value)
    assert os.path.getsize(path) > len(line), "and left alone"


@pytest.mark.parametrize("changes, message", [
    ({"base_url": "http://[::1"}, "base_url"), ({"base_url": "http://a:99999/v1"}, "base_url"),
    ({"base_url": "http://"}, "base_url"), ({"base_url": "http://user:sk-CANARY@[::1/v1"}, "OPENAI_API_KEY"),
    ({"timeout_secs": float("nan")}, "timeout_secs=nan"), ({"backoff_secs": float("inf")}, "backoff_secs=inf"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"base_url": "http://a/v1", "model": "m"} | changes)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("name, value", [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "http://[::1"),
                                         ("HTTP_PROXY", "ftp://x"), ("SSL_CERT_FILE", "/nowhere")])  # fmt: skip
def test_an_environment_that_cannot_be_used_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE"):
        Client(Endpoint("http://a/v1", "m"))


@pytest.mark.parametrize("settings", [{"temperature": float("nan")}, {"temperature": -1}, {"max_tokens": 0},
                                      {"top_p": float("inf")}])  # fmt: skip
def test_a_request_that_no_json_can_hold_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        Request([], **settings)


@pytest.mark.parametrize("prices", [{"max_usd": -1.0}, {"usd_per_million_in": float("nan")}, {"max_tokens": -5}])
def test_a_budget_without_meaning_is_refused(prices):
    with pytest.raises(ValueError, match=f"{next(iter(prices))}="):
        Budget(**prices)
