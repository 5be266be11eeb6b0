"""Guards: keys, hosts, overload, slow and lost clients, large bodies, shutdown, a model that fails."""

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest

from llava_jax.serve import __main__ as command
from llava_jax.serve import guards, server
from tests.generate import tiny
from tests.ports import free_port
from tests.serve.running import KEY, part, running, spawned, user

LONG = {"messages": [{"role": "user", "content": "Tell me a long story"}], "max_tokens": 400, "temperature": 0,
        "stream": True}  # fmt: skip
ROUTES = [("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/llava-jax"),
          ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/prompt"), ("GET", "/nowhere"),
          ("DELETE", "/v1/models")]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with running(slots=4, queue=4, key=KEY) as one:
        yield one


def headers(key: bytes = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.decode()}", "Content-Type": "application/json"}


def connect(served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx2.URL(served.url).port), timeout=30)


def raw(body: bytes, length: int | None = None) -> bytes:
    lines = [f"{name}: {value}" for name, value in headers().items()]
    lines += ["Host: 127.0.0.1", f"Content-Length: {len(body) if length is None else length}"]
    return ("POST /v1/chat/completions HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + body


def test_every_route_but_health_wants_the_key(served):
    for method, path in ROUTES:
        for header in ({}, {"Authorization": "Bearer wrong key here"}, {"Authorization": KEY.decode()},
                       {"Authorization": "Basic ***"}):  # fmt: skip
            found = httpx2.request(method, served.url + path, headers=header)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key", path
            assert found.headers["www-authenticate"].startswith("Basic")
    assert [httpx2.get(served.url + path).status_code for path in guards.HEALTH] == [200, 200]
    assert httpx2.get(served.url, auth=("anybody", KEY.decode())).status_code == 200
    assert len(served.client(KEY.decode()).models.list().data) == 1
    with pytest.raises(openai.AuthenticationError):
        served.client("another key").models.list()
    paths = {route.path for route in served.uvicorn.config.app._app.routes} - set(guards.HEALTH)
    assert {path.partition("{")[0] for path in paths} <= {path.removesuffix("llava-jax") for _, path in ROUTES} | {
        "/v1/models/"}  # fmt: skip


def test_without_a_key_other_names_of_this_address_are_refused():
    with running(slots=1) as open_one:
        assert httpx2.get(open_one.url + "/v1/models").status_code == 200
        found = httpx2.get(open_one.url + "/v1/models", headers={"Host": "rebound.example:80"})
        assert found.status_code == 403 and found.json()["error"]["code"] == "unknown_host"


def test_more_requests_than_slots_and_queue_are_refused_at_once_and_the_others_are_answered(served):
    body = {**LONG, "stream": False, "max_tokens": 200}  # an answer takes longer than clients take to come
    expected = httpx2.post(served.url + "/v1/chat/completions", json=body, headers=headers(), timeout=60).json()

    def one(_: int):
        start = time.monotonic()
        found = httpx2.post(served.url + "/v1/chat/completions", json=body, headers=headers(), timeout=60)
        return found, time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(one, range(60)))
    statuses = [response.status_code for response, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    for response, _ in found:
        if response.status_code == 200:
            assert response.json()["choices"] == expected["choices"]
        else:
            assert response.headers["retry-after"] == "1" and response.json()["error"]["type"] == "rate_limit_error"
    assert served.idle()


def test_tokens_are_bounded_too(served):
    full = {**LONG, "stream": False, "n": 8}
    assert httpx2.post(served.url + "/v1/chat/completions", json=full, headers=headers(), timeout=60).status_code == 200
    more = {**full, "n": 9}  # with slots and queue there are 8 places: to try again is of no use
    found = httpx2.post(served.url + "/v1/chat/completions", json=more, headers=headers(), timeout=60)
    assert found.status_code == 400 and found.json()["error"]["param"] == "n" and served.idle()


def test_what_has_no_room_now_is_a_429_and_what_never_has_is_a_400():
    load = guards.Load(8, 1000)
    with load.entered() as first, load.entered() as second:
        first.take("tokens", 600)
        for amount, status in ((600, 429), (1001, 400)):
            with pytest.raises(guards.Refused) as found:
                second.take("tokens", amount)
            assert found.value.status == status and (found.value.retry_secs is None) == (status == 400)
        second.take("tokens", 400)
    assert not any(load.now.values())


def test_a_connection_that_closes_has_time_for_its_last_response():
    aborts, looks = [], []
    one = guards.Protocol.__new__(guards.Protocol)
    one.transport = SimpleNamespace(is_closing=lambda: True, abort=lambda: aborts.append(True))
    one.loop, one.cycle, one._before = SimpleNamespace(call_later=lambda *what: looks.append(what)), None, None
    one._look()
    assert not aborts and looks[0][0] == guards.IDLE_SECS
    one._look()
    assert aborts and len(looks) == 1


def test_a_client_that_goes_frees_its_slot_within_a_step(served):
    for cut in (0, 1, 3):
        with httpx2.stream("POST", served.url + "/v1/chat/completions", json=LONG, headers=headers()) as response:
            lines = response.iter_lines()
            for _ in range(cut):
                next(lines)
        assert served.idle()
    for length in (10, 200, 400):  # within the headers, the body, and while it waits for a whole answer
        content = raw(json.dumps({**LONG, "stream": False}).encode())
        with connect(served) as connection:
            connection.sendall(content[:length])
            time.sleep(0.05)
        assert served.idle()
    assert served.service.worker.answers


def test_bodies_are_counted_while_they_come(served, monkeypatch):
    monkeypatch.setattr(guards, "MAX_BODY_BYTES", 10_000)

    def pieces():
        for _ in range(100):
            yield b" " * 1000

    found = httpx2.post(served.url + "/v1/chat/completions", content=pieces(), headers=headers())
    assert found.status_code == 413 and found.json()["error"]["param"] == "body"
    assert served.idle()


BODY = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}'
CHUNKED = (b"Content-Length", b"Transfer-Encoding: chunked\r\nX")
LIES = {
    "shorter": raw(BODY, length=5), "nothing": raw(BODY, length=0), "below nothing": raw(BODY, length=-5),
    "no number": raw(BODY).replace(b"Length: ", b"Length: a"), "beyond numbers": raw(BODY, length=10**30),
    "two lengths": raw(BODY).replace(b"Content-Length", b"Content-Length: 5\r\nContent-Length"),
    "chunk of another length": raw(b"5\r\n" + BODY + b"\r\n0\r\n\r\n").replace(*CHUNKED),
    "chunk of no length": raw(b"zz\r\n" + BODY + b"\r\n0\r\n\r\n").replace(*CHUNKED),
    "packed": raw(BODY).replace(CHUNKED[0], b"Transfer-Encoding: gzip\r\nX"), "no request": b"Hello\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_body_that_lies_about_its_length_is_refused_as_every_error_is(served, lie):
    with connect(served) as connection:
        connection.sendall(LIES[lie].replace(b"Host:", b"Connection: close\r\nHost:"))
        found = b"".join(iter(lambda: connection.recv(10_000), b""))
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["param"] == "body"
    assert served.idle()


def test_a_body_that_ends_before_its_length_frees_all_that_it_took(served):
    with connect(served) as connection:
        connection.sendall(raw(BODY, length=len(BODY) + 1))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"" and served.idle()


def test_slow_clients_are_cut_off_and_others_do_not_notice(served, monkeypatch):
    monkeypatch.setattr(guards, "IDLE_SECS", 0.3)
    monkeypatch.setattr(guards, "BODY_SECS", 0.5)
    silent, headless, bodiless = connect(served), connect(served), connect(served)
    headless.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n")
    bodiless.sendall(raw(b"{", length=100))
    start = time.monotonic()
    assert httpx2.get(served.url + "/v1/models", headers=headers()).status_code == 200
    assert bodiless.recv(100).startswith(b"HTTP/1.1 408")
    for connection in (silent, headless):
        try:
            assert connection.recv(10) == b""
        except ConnectionResetError:
            pass
    assert time.monotonic() - start < 60 and served.idle()


def test_a_client_that_reads_nothing_is_given_up(served, monkeypatch):
    monkeypatch.setattr(guards, "SEND_SECS", 0.3)

    async def never(message: dict) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def one() -> None:
        app = served.uvicorn.config.app
        scope = {"type": "http", "path": "/v1/models", "method": "GET", "headers": [
            (b"authorization", b"Bearer " + KEY)], "query_string": b"", "root_path": ""}  # fmt: skip
        await asyncio.wait_for(app(scope, None, never), 5)

    asyncio.run(one())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the traceback, for the log
def test_a_model_that_fails_ends_the_answers_and_the_server_with_a_line_and_an_exit_code(capsys):
    service = server.of_assistant(tiny.assistant(), "llava-jax", 4, 4, 512)
    make_scheduler, statuses = service.worker._make, []

    def broken():
        scheduler = make_scheduler()
        step = scheduler.step

        def fail():
            if any(len(slot.row.ids) > 4 for slot in scheduler._slots if slot):
                raise RuntimeError("planted")
            return step()

        scheduler.step = fail
        return scheduler

    service.worker._make = broken
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def ask() -> None:
        while httpx2.get(url + "/readyz", timeout=30).status_code != 200:
            time.sleep(0.05)
        body = {**LONG, "stream": False}
        for limit in (2, 400):
            found = httpx2.post(url + "/v1/chat/completions", json={**body, "max_tokens": limit}, timeout=60)
            statuses.append(found.status_code)

    client = threading.Thread(target=ask)
    client.start()
    assert server.run(service, listener, None, None, 10) == 1
    client.join(10)
    assert statuses == [200, 503] and service.worker.failed and not service.worker.answers
    assert capsys.readouterr().err.endswith("the model's thread has failed (see above); the server ends\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 64, "--host 0.0.0.0: other machines could use the model without a key"),
        (["--host", "::"], 64, "want --api-key-file"),
        (["--port", "70000"], 64, "--port 70000: want 0 (any) to 65535"),
        (["--slots", "0"], 64, "--slots=0: want 1 to 1024"),
        (["--api-key-file", "nowhere"], 64, "--api-key-file nowhere: no such file"),
        (["--api-key-file", "short"], 64, "want a key of at least 8"),
        (["--checkpoint", "nowhere"], 66, "nowhere: there is no such checkpoint"),
        (["--picture-hosts", "example.com,localhost"], 64, "--picture-hosts 'localhost': want names such as"),
        (["--checkpoint", "begun"], 66, "begun"),
        (["--host", "256.1.1.1"], 64, "256.1.1.1"),
        (["--weights", "int8", "--checkpoint", "model"], 64, "weights int8: on a CPU"),
    ],
)
def test_what_cannot_be_served_is_one_line_at_start(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "begun" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # a training writes its first step
    defaults = {"--checkpoint": "model", "--port": "0"}
    given = [*(arg for pair in defaults.items() if pair[0] not in arguments for arg in pair), *arguments]
    assert command.main(given) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_several_processes_are_refused_by_each_of_them(tmp_path):
    settings = os.environ | {"LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                             "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}  # fmt: skip
    words = [sys.executable, "-m", "llava_jax.serve", "--checkpoint", str(tmp_path), "--port", "0"]
    both = [subprocess.Popen(words, env=settings | {"JAX_PROCESS_ID": str(number)}, stderr=subprocess.PIPE, text=True)
            for number in range(2)]  # fmt: skip
    for one in both:
        error = one.communicate(timeout=120)[1]
        assert one.returncode == 64 and error.count("\n") == 1
        assert "start one on each host, without LLAVA_JAX_MULTIHOST=1, and a load balancer" in error


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command.main(["--checkpoint", str(tmp_path), "--port", port]) == 64
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_sigterm_gives_the_answers_that_are_under_way_and_exits_0(tmp_path):
    (tmp_path / "model" / "9").mkdir(parents=True)  # what a running training has begun to write
    with spawned(tmp_path, "--slots", "2") as (url, process):
        body = {"messages": [user(part(), "What is it?")], "max_tokens": 300, "temperature": 0}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = [pool.submit(httpx2.post, url + "/v1/chat/completions", json=body, timeout=60) for _ in range(4)]
            while "llava_jax_slots_active 2" not in httpx2.get(url + "/metrics", timeout=30).text:
                assert not all(one.done() for one in found), "all were answered before they were seen"
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answers = [one.result() for one in found]
        assert {one.status_code for one in answers} == {200}
        assert len({json.dumps(one.json()["choices"]) for one in answers}) == 1
        assert process.wait(30) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url + "/healthz")
        error = process.stderr.read()
        assert "compiled 3 of 3: answers" in error and "Traceback" not in error


def test_the_worker_is_not_ready_while_it_is_stuck(served):
    worker = served.service.worker
    assert worker.answers
    worker._step_began = time.monotonic() - 1000
    try:
        assert httpx2.get(served.url + "/readyz").status_code == 503
        assert httpx2.get(served.url + "/healthz").status_code == 200
    finally:
        worker._step_began = None
