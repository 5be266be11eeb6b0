"""Bad input: each body of a table is a 4xx of OpenAI's shape that names the field, and the next request is answered."""

import base64
import io
import json
import struct
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.serve.running import POSITIONS, part, running, user

HELLO = {"role": "user", "content": "Hello"}


def chat(**fields) -> dict:
    return {"messages": [HELLO], "max_tokens": 1, **fields}


def message(content, role="user") -> dict:
    return chat(messages=[{"role": role, "content": content}])


def shown(url) -> dict:
    return message([{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}])


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is of this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


URL = "messages[0].content[1].image_url.url"
# body -> the field that the answer names
CHAT = [
    ({}, "messages"),
    ([], "body"), ("text", "body"), (5, "body"), (None, "body"), (True, "body"),
    (chat(messages=[]), "messages"), (chat(messages={}), "messages"), (chat(messages="Hello"), "messages"),
    (chat(messages=["Hello"]), "messages[0]"), (chat(messages=[None]), "messages[0]"),
    (chat(messages=[HELLO] * 1001), "messages"),
    (chat(messages=[{}]), "messages[0].role"), (message("Hello", "tool"), "messages[0].role"),
    (message("Hello", 7), "messages[0].role"), (message("Hello", ["user"]), "messages[0].role"),
    (chat(messages=[HELLO, {"role": "system", "content": "Be brief."}]), "messages[1].role"),
    (chat(messages=[HELLO, HELLO]), "messages"), (message("Hello", "assistant"), "messages"),
    (chat(messages=[HELLO, {"role": "assistant", "content": "Hi."}]), "messages"),
    (message(None), "messages[0].content"), (message(5), "messages[0].content"), (message({}), "messages[0].content"),
    (message([5]), "messages[0].content[0]"), (message([{}]), "messages[0].content[0]"),
    (message([{"type": "text"}]), "messages[0].content[0].text"),
    (message([{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    (message([{"type": "input_audio"}]), "messages[0].content[0]"),
    (message([{"type": ["text"]}]), "messages[0].content[0]"),
    (message([part()], "assistant"), "messages[0].content[0]"), (message([part()], "system"), "messages[0].content[0]"),
    (chat(messages=[user(part(), "<image>")]), "messages[0].content"),
    (message("\ud800"), "messages[0].content"),
    (message("word " * 40 * POSITIONS), "messages"), (message("word " * POSITIONS), "messages"),
    (chat(messages=[user(*[part()] * 120)]), "messages"), (chat(messages=[user(*[part()] * 600)]), "messages"),
    (message([{"type": "image_url"}]), "messages[0].content[0].image_url"),
    (message([{"type": "image_url", "image_url": "a"}]), "messages[0].content[0].image_url"),
    (message([{"type": "image_url", "image_url": {"url": 5}}]), "messages[0].content[0].image_url"),
    (shown(""), URL), (shown("picture.png"), URL), (shown("http://localhost/a.png"), URL),
    (shown("https://example.com/a.png"), URL), (shown("HTTPS://example.com/a.png"), URL),
    (shown("file:///etc/passwd"), URL), (shown("gs://bucket/a.png"), URL), (shown("/etc/passwd"), URL),
    (shown("data:image/png,abc"), URL), (shown("data:text/plain;base64,YQ=="), URL), (shown("data:;base64,YQ=="), URL),
    (shown("data:image/png;base64,%%%"), URL), (shown("data:image/png;base64,YQ"), URL), (shown(data(b"")), URL),
    (shown(data(b"not a picture")), URL), (shown(data(b"<svg/>", "image/svg+xml")), URL),
    (shown(data(png()[:40])), URL), (shown(data(png((60, 60))[:-40])), URL),
    (shown(data(header(0, 5))), URL), (shown(data(header(50_000, 50_000))), URL),
    (shown(data(header(5000, 5000))), URL),
    (shown(data(png((1, 5000)))), URL), (shown(data(header(2**31 - 1, 2**31 - 1))), URL),
    (chat(model="gpt-4o"), "model"), (chat(model=5), "model"), (chat(model=""), "model"),
    (chat(n=0), "n"), (chat(n=17), "n"), (chat(n=10**9), "n"), (chat(n=1.5), "n"), (chat(n=True), "n"),
    (chat(temperature=-1), "temperature"), (chat(temperature=2.1), "temperature"),
    (chat(temperature="1"), "temperature"), (chat(temperature=10**400), "temperature"),
    (chat(temperature=[1]), "temperature"), (chat(temperature=True), "temperature"),
    (chat(top_p=0), "top_p"), (chat(top_p=1.1), "top_p"), (chat(top_k=-1), "top_k"), (chat(top_k=2**31), "top_k"),
    (chat(seed=-1), "seed"), (chat(seed=2**32), "seed"), (chat(seed=1.0), "seed"),
    (chat(max_tokens=0), "max_tokens"), (chat(max_tokens=-5), "max_tokens"), (chat(max_tokens="9"), "max_tokens"),
    (chat(max_tokens=2**31), "max_tokens"), (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(stop=5), "stop"), (chat(stop=""), "stop"), (chat(stop=["a", 5]), "stop[1]"), (chat(stop=["a"] * 17), "stop"),
    (chat(stop="a" * 201), "stop"), (chat(stream="yes"), "stream"), (chat(stream=1), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options=5), "stream_options"),
    (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat(logprobs=3), "logprobs"), (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(top_logprobs=2), "top_logprobs"), (chat(return_token_ids="yes"), "return_token_ids"),
    (chat(frequency_penalty=0.5), "frequency_penalty"), (chat(presence_penalty=-1), "presence_penalty"),
    (chat(logit_bias={"5": 1}), "logit_bias"), (chat(tools=[{}]), "tools"),
    (chat(response_format={"type": "json_object"}), "response_format"),
    (chat(repetition_penalty=1.1), "repetition_penalty"),
    (chat(tool_choice="required"), "tool_choice"), (chat(modalities=["audio"]), "modalities"),
    (chat(audio={}), "audio"),
]  # fmt: skip
TEXT = [
    ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": ["a"]}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": "a " * POSITIONS}, "prompt"), ({"prompt": "a" * 40 * POSITIONS}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"), ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "echo": True}, "echo"), ({"prompt": "a", "best_of": 3}, "best_of"), ({"prompt": "a", "n": 0}, "n"),
]  # fmt: skip
RAW = [b"", b"{", b"\xff\xfe", b'{"messages": NaN}', b'{"n": Infinity, "messages": []}', b"[" * 100_000,
       b'{"n": ' + b"9" * 5000 + b"}", b'{"a": [' + b"[]," * 300_000 + b"[]]}",
       b'{"temperature": 1e999, "messages": []}',
       b"null"]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with running() as one:
        yield one


def named(response) -> str | None:
    assert 400 <= response.status_code < 500, response.request.content[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600
    assert error["param"] is None or error["param"].partition(".")[0].partition("[")[0] in error["message"]
    return error["param"]


def test_each_bad_body_is_a_4xx_that_names_its_field_and_leaves_nothing_behind(served):
    paths = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
    found = [(path, body, name, named(served.post(path, content=json.dumps(body).encode())))
             for path, table in paths for body, name in table]  # fmt: skip
    wrong = [(path, json.dumps(body)[:200], name, field) for path, body, name, field in found if field != name]
    assert not wrong, wrong
    assert len(found) >= 100
    assert served.chat(chat()).status_code == 200 and served.idle()


def test_what_is_no_json_is_refused(served):
    assert {named(served.post("/v1/chat/completions", content=body)) for body in RAW} <= {"body", "temperature"}


def test_a_body_of_another_type_or_route_or_method_is_refused(served):
    url = served.url + "/v1/chat/completions"
    form = httpx2.post(url, content=b"{}", headers={"Content-Type": "text/plain"})
    assert form.status_code == 415 and "application/json" in form.json()["error"]["message"]
    assert httpx2.get(url).status_code == 405 and named(httpx2.get(url)) is None
    assert httpx2.post(served.url + "/v1/engines").status_code == 404
    assert named(httpx2.get(served.url + "/v1/models/gpt-4o")) == "model"


def test_fields_that_nobody_knows_and_null_are_passed_over(served):
    assert served.chat(chat(user="me", store=True, metadata={"a": "b"}, n=None, stop=None, seed=None, tools=None,
                            frequency_penalty=0.0, logit_bias={}, response_format={"type": "text"})).status_code == 200


def test_more_ids_than_the_model_has_room_for_are_as_many_as_it_has(served):
    found = served.chat(chat(max_tokens=10**6, temperature=0)).json()
    assert found["usage"]["total_tokens"] <= POSITIONS
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
