"""The client against a server that fails in every way: nothing lost, nothing paid twice, and the key nowhere."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from llava_jax.openai_client import Answer, AskError, Budget, Client, Endpoint, Failure, Request
from tests.fake_openai import REFUSALS, FakeOpenAI, always, first, words

CANARY = "sk-canary-3f9a1c77"
FAULTS = [*REFUSALS, "truncated", "dropped", "timeout", "length", "no usage", "echo answer"]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)


def endpoint(server, **changes):
    return replace(Endpoint(server.url, "tiny", timeout_secs=20, retries=3, backoff_secs=0.01), **changes)


def user(text):
    return [{"role": "user", "content": text}]


def echo(body):
    return f"You said {body['messages'][-1]['content']}"


def test_an_answer_comes_with_its_reason_and_what_it_took():
    with FakeOpenAI(echo) as server, Client(endpoint(server)) as client:
        answer = client.ask(user("one two three"), temperature=0, max_tokens=7, seed=5, stop=("#",))
        assert answer == Answer("You said one two three", "stop", 3, 5)
        assert server.bodies == [{"model": "tiny", "messages": user("one two three"), "temperature": 0.0,
                                  "max_tokens": 7, "seed": 5, "stop": ["#"]}]  # fmt: skip
        assert server.keys == {CANARY}
        assert client.usage[:7] == (1, 0, 0, 0, 0, 3, 5)


def test_the_limit_has_the_name_that_the_server_wants_and_what_is_not_given_is_not_sent():
    with FakeOpenAI() as server, Client(endpoint(server, limit_field="max_completion_tokens")) as client:
        client.ask(user("a"), max_tokens=9)
        assert server.bodies == [{"model": "tiny", "messages": user("a"), "max_completion_tokens": 9}]


@pytest.mark.parametrize("fault", ["429", "500", "503", "broken json", "no choices", "other shape", "truncated",
                                   "dropped", "timeout"])  # fmt: skip
def test_a_fault_that_passes_is_survived(fault):
    limit, server = 2 if fault == "timeout" else 20, FakeOpenAI(echo, first(fault, fault), silence_secs=20)
    with server, Client(endpoint(server, timeout_secs=limit)) as client:
        assert client.ask(user("a")).text == "You said a"
        assert client.usage.retries == 2 and len(server.bodies) == 3
        maybe_billed = {"broken json", "no choices", "other shape", "truncated", "dropped", "timeout"}
        assert client.usage.unsure == (2 if fault in maybe_billed else 0)


def test_a_server_that_asks_for_a_pause_gets_it():
    with FakeOpenAI(echo, first("429 wait")) as server, Client(endpoint(server)) as client:
        start = time.monotonic()
        client.ask(user("a"))
        assert 1.0 <= time.monotonic() - start < 20


def test_what_cannot_pass_is_tried_once_and_what_never_passes_as_often_as_was_asked():
    for fault, message in {"400": "HTTP 400.*messages.0. is wrong", "403": "flagged", "redirect": "HTTP 307"}.items():
        with FakeOpenAI(echo, always(fault)) as server, Client(endpoint(server)) as client:
            with pytest.raises(AskError, match=message):
                client.ask(user("a"))
            assert len(server.bodies) == 1
    with FakeOpenAI(echo, always("500")) as server, Client(endpoint(server)) as client:
        with pytest.raises(AskError, match="HTTP 500.*after 4 attempts"):
            client.ask(user("a"))
        assert len(server.bodies) == 4


def test_one_failure_costs_the_others_nothing():
    def fault(number, body):
        return "400" if body["messages"][0]["content"] == "3" else None

    with FakeOpenAI(echo, fault) as server, Client(endpoint(server)) as client:
        outcomes = dict(client.ask_many(Request(user(str(i))) for i in range(10)))
        assert sorted(outcomes) == list(range(10)) and isinstance(outcomes.pop(3), Failure)
        assert all(answer.text == f"You said {i}" for i, answer in outcomes.items())
        assert client.usage.failed == 1


def test_requests_run_side_by_side_but_never_more_than_was_asked():
    drawn_indices, four = [], threading.Barrier(4)

    def echo_together(body):
        four.wait(60)
        return echo(body)

    def requests():
        for i in range(12):
            drawn_indices.append(i)
            yield Request(user(str(i)))

    with FakeOpenAI(echo_together, latency_secs=0.05) as server, Client(endpoint(server, concurrency=4)) as client:
        outcomes = client.ask_many(requests())
        next(outcomes)
        assert len(drawn_indices) <= 5, "pictures of requests far ahead would fill the memory"
        assert len(list(outcomes)) == 11 and server.most_at_once == 4


@pytest.mark.parametrize("fault", ["refused key", "no model", "quota"])
def test_a_refused_key_ends_all_asking_but_not_what_the_cache_knows(fault, tmp_path):
    with FakeOpenAI(echo) as server, Client(endpoint(server), tmp_path / "c.jsonl") as client:
        client.ask(user("8"))
        server.faults = always(fault)
        outcomes = dict(client.ask_many(Request(user(str(i))) for i in range(50)))
        assert outcomes[8].text == "You said 8" and all(isinstance(outcomes[i], Failure) for i in range(8))
        assert all(outcomes[i].fatal for i in range(50) if i != 8)
        attempts = 1 + client.endpoint.retries if fault == "no model" else 1  # a gateway's 404 may pass
        assert len(server.bodies) <= 1 + client.endpoint.concurrency * attempts


def test_the_cache_bills_nothing_twice(tmp_path):
    requests = [Request(user(str(i)), temperature=0.7) for i in range(20)]
    with FakeOpenAI(echo) as server:
        for run in range(2):
            with Client(endpoint(server), tmp_path / "deep" / "cache.jsonl") as client:
                outcomes = dict(client.ask_many(requests))
                assert all(outcomes[i].text == f"You said {i}" and outcomes[i].cached == bool(run) for i in range(20))
                assert client.usage[:3] == ((0, 20, 0) if run else (20, 0, 0))
                assert client.usage[5:7] == (20, 60), "tokens of earlier runs count"
        assert len(server.bodies) == 20


def test_the_cache_distinguishes_all_that_could_change_an_answer_and_repeats(tmp_path):
    base = Request(user("a"), temperature=0)
    requests = [base, replace(base, messages=user("b")), replace(base, temperature=1), replace(base, seed=1),
                replace(base, max_tokens=5), replace(base, top_p=0.5), replace(base, stop=("x",)),
                replace(base, choice=1)]  # fmt: skip
    endpoints = [Endpoint("http://a/v1", "m"), Endpoint("http://b/v1", "m"), Endpoint("http://a/v1", "n")]
    keys = {Client(endpoint).key(request) for endpoint in endpoints for request in requests}
    assert len(keys) == len(requests) * len(endpoints)
    assert Client(endpoints[0]).key(base) == Client(Endpoint("http://a/v1/", "m", retries=9)).key(base)
    assert Client(endpoints[0]).key(base) == Client(endpoints[0]).key(replace(base, temperature=0.0))


def test_equal_requests_in_flight_are_sent_once():
    with FakeOpenAI(echo, latency_secs=0.1) as server, Client(endpoint(server)) as client:
        outcomes = dict(client.ask_many([Request(user("a"))] * 5))
        assert len(server.bodies) == 1 and sorted(outcomes) == [0, 1, 2, 3, 4]
        assert sum(answer.cached for answer in outcomes.values()) == 4


@pytest.mark.parametrize("torn", ['{"key": "abc", "text": "half a', '{"key": "abc", "sent"', "{", '{"key": "abc"}'])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path, torn):
    path = tmp_path / "cache.jsonl"
    with FakeOpenAI(echo) as server:
        with Client(endpoint(server), path) as client:
            client.ask(user("a"))
        whole = path.read_bytes()
        path.write_bytes(whole + torn.encode())
        with Client(endpoint(server), path) as client:
            assert client.ask(user("a")).cached and client.ask(user("b")).text == "You said b"
        assert path.read_bytes().startswith(whole) and all(map(json.loads, path.read_text().splitlines()))
        with Client(endpoint(server), path) as client:
            assert client.ask(user("b")).cached
        assert len(server.bodies) == 2


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "cache.jsonl"
    with FakeOpenAI(echo) as server:
        with Client(endpoint(server), path) as client:
            client.ask(user("a"))
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
        with Client(endpoint(server), path) as client:
            assert client.ask(user("a")).cached and not client.ask(user("b")).cached
        assert all(map(json.loads, path.read_text().splitlines()))


def test_a_file_that_is_no_cache_is_left_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(ValueError, match="records.jsonl:1: no line of a cache"):
        Client(Endpoint("http://a/v1", "m"), path)
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n'
    with pytest.raises(ValueError, match="local file"):
        Client(Endpoint("http://a/v1", "m"), "gs://bucket/cache.jsonl")


def test_a_cache_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "cache.jsonl"
    with Client(Endpoint("http://a/v1", "m"), path), pytest.raises(ValueError, match="another process"):
        Client(Endpoint("http://a/v1", "m"), path)
    Client(Endpoint("http://a/v1", "m"), path).close()


def test_a_killed_client_loses_only_what_was_in_flight_and_counts_it(tmp_path):
    script = """
import sys
from llava_jax.openai_client import Client, Endpoint, Request
client = Client(Endpoint(sys.argv[1], "tiny", concurrency=4), sys.argv[2])
for index, answer in client.ask_many(Request([{"role": "user", "content": str(i)}]) for i in range(40)):
    print(index, flush=True)
"""
    path = tmp_path / "cache.jsonl"
    with FakeOpenAI(echo, latency_secs=0.05) as server:
        child = subprocess.Popen([sys.executable, "-c", script, server.url, str(path)], stdout=subprocess.PIPE)
        for _ in range(10):
            child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        with Client(endpoint(server), path) as client:
            assert client.usage.unsure <= 4
            outcomes = dict(client.ask_many(Request(user(str(i))) for i in range(40)))
            assert all(outcomes[i].text == f"You said {i}" for i in range(40)) and client.usage.cached >= 10
            # A request may be noted and not have reached the server yet when the kill comes.
            assert 40 <= len(server.bodies) <= 40 + client.usage.unsure
            assert client.usage.tokens_out == 40 * 3


def test_stopping_early_keeps_what_was_paid_for(tmp_path):
    with FakeOpenAI(echo, latency_secs=0.05) as server:
        with Client(endpoint(server, concurrency=4), tmp_path / "c.jsonl") as client:
            for _ in client.ask_many(Request(user(str(i))) for i in range(40)):
                break
        total = len(server.bodies)
        assert total <= 8
        with Client(endpoint(server), tmp_path / "c.jsonl") as client:
            assert client.usage.unsure == 0
            assert sum(answer.cached for _, answer in client.ask_many(Request(user(str(i))) for i in range(8))) == total


def test_stopping_early_does_not_wait_for_retries():
    def fault(number, body):
        return "500" if body["messages"][0]["content"] == "0" else None

    with FakeOpenAI(echo, fault) as server, Client(endpoint(server, backoff_secs=60)) as client:
        start = time.monotonic()
        for index, _ in client.ask_many(Request(user(str(i))) for i in range(2)):
            assert index == 1
            break
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("budget", [Budget(max_tokens=120), Budget(None, 0.000120, 1, 1)])
def test_a_budget_is_never_overrun_and_says_what_was_spent(tmp_path, budget):
    requests = [Request(user("word " * 10 + str(i)), max_tokens=12) for i in range(20)]
    with FakeOpenAI(lambda body: "one two", latency_secs=0.01) as server:
        with Client(endpoint(server), tmp_path / "c.jsonl", budget) as client:
            outcomes = dict(client.ask_many(requests))
            failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
            assert len(outcomes) == 20 and 12 <= len(failures) < 18
            assert all(failure.fatal and "tokens in" in failure.reason and "$" in failure.reason
                       for failure in failures)  # fmt: skip
            assert sum(words(body) + 2 for body in server.answered) <= 120
            assert client.usage.tokens_in + client.usage.tokens_out == 13 * len(server.answered)
        with Client(endpoint(server), tmp_path / "c.jsonl", budget) as client:
            second_outcomes = dict(client.ask_many(requests))
            assert sum(isinstance(outcome, Answer) for outcome in second_outcomes.values()) == 20 - len(failures)
            assert client.usage.asked == 0, "a new run has no new budget"
        with Client(endpoint(server), tmp_path / "c.jsonl") as client:
            assert all(isinstance(outcome, Answer) for _, outcome in client.ask_many(requests))
        assert len(server.bodies) == 20


def test_a_server_that_counts_nothing_is_billed_by_an_estimate():
    with FakeOpenAI(echo, always("no usage")) as server, Client(endpoint(server)) as client:
        answer = client.ask(user("word " * 60))
        assert 60 <= answer.tokens_in <= 150 and 50 <= answer.tokens_out <= 150


def test_pictures_travel_as_data_urls_and_count_in_the_budget():
    parts = [{"type": "text", "text": "What is it?"},
             {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + "A" * 100_000}}]  # fmt: skip
    messages = [{"role": "user", "content": parts}]
    with FakeOpenAI() as server, Client(endpoint(server), budget=Budget(max_tokens=3000)) as client:
        assert client.ask(messages, max_tokens=20).text == "Fine." and server.bodies[0]["messages"] == messages
    with FakeOpenAI() as server, Client(endpoint(server), budget=Budget(max_tokens=1000)) as client:
        with pytest.raises(AskError, match="budget"):
            client.ask(messages, max_tokens=20)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_key_is_nowhere(fault, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    path, texts = tmp_path / "cache.jsonl", []
    with FakeOpenAI(echo, always(fault), silence_secs=20) as server:
        with Client(endpoint(server, retries=1, timeout_secs=0.5 if fault == "timeout" else 20), path) as client:
            try:
                texts.append(repr(client.ask(user("a"))))
            except AskError as error:
                texts += [repr(error), str(error), repr(error.__cause__), repr(error.__context__)]
            texts += [repr(client.endpoint), str(client.endpoint), str(client.usage), repr(vars(client))]
        assert server.keys == {CANARY}, "it was sent, though"
    texts += [path.read_text(), *(record.getMessage() for record in caplog.records), *capsys.readouterr()]
    kinds = [set(json.loads(line)) & {"sent", "unsure", "failed", "text"} for line in path.read_text().splitlines()]
    assert len([kind for kind in kinds if kind != {"unsure"}]) == 2 and not any(CANARY in text for text in texts)
    assert not any(CANARY[:12] in text for text in texts), "nor a half of it"


def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(monkeypatch):
    for bad in (f"{CANARY}\nX: y", f"{CANARY} b", f"{CANARY}é"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
            Client(Endpoint("http://a/v1", "m"))
        assert CANARY not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\n")  # as `export OPENAI_API_KEY=$(cat file)` may leave it
    Client(Endpoint("http://a/v1", "m"))


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeOpenAI() as server, Client(endpoint(server)) as client:
        client.ask(user("a"))
        assert server.keys == {""}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base_url": "localhost:8000"}, "want http"),
        ({"base_url": "http://host:port/v1"}, "host:port"),
        ({"base_url": f"https://user:{CANARY}@host/v1"}, "OPENAI_API_KEY"),
        ({"base_url": f"https://host/v1?key={CANARY}"}, "OPENAI_API_KEY"),
        ({"model": ""}, "model"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"base_url": "http://a/v1", "model": "m"} | fields)
    assert CANARY not in str(caught.value)


def test_money_needs_prices():
    with pytest.raises(ValueError, match="usd_per_million"):
        Budget(max_usd=1.0)
    assert Budget(None, 5, 2.5, 10).usd(1000, 100) == pytest.approx(0.0035)


def test_nobody_answers_at_a_closed_port():
    with FakeOpenAI() as server:
        url = server.url
    with Client(Endpoint(url, "m", retries=1, backoff_secs=0)) as client:
        with pytest.raises(AskError, match="ConnectError.*after 2 attempts"):
            client.ask(user("a"))
        assert client.usage.unsure == 0, "nothing was sent, so nothing was billed"


def test_threads_may_share_a_client(tmp_path):
    with FakeOpenAI(echo) as server, Client(endpoint(server), tmp_path / "c.jsonl") as client:
        threads = [threading.Thread(target=client.ask, args=(user(str(i)),)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.usage.asked == 16 and client.usage.tokens_out == 48


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path, write = tmp_path / "c.jsonl", os.write

    def full(file, content):
        if b"sent" in content:
            return write(file, content)
        if len(content) < 40:
            raise OSError(28, "No space left on device")
        return write(file, content[:-30])

    with FakeOpenAI(echo) as server, Client(endpoint(server), path) as client:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            client.ask(user("a"))
        monkeypatch.undo()
        assert len(path.read_text().splitlines()) == 1
    with Client(Endpoint("http://a/v1", "m"), path) as client:
        assert client.usage.unsure == 1
