"""The API with OpenAI's own client: what it answers is what `Assistant` answers, whole, streamed, and in company."""

import concurrent.futures
import functools
import re
from pathlib import Path

import httpx2
import pytest

from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import encode
from tests.generate import tiny
from tests.serve.running import Running, part, running, user

NEW = 10


@pytest.fixture(scope="module")
def served():
    with running() as one:
        yield one


@functools.cache
def assistant() -> Assistant:
    return tiny.assistant(slots=1)


def ask(served: Running, *messages, **fields):
    fields = {"max_tokens": NEW, "temperature": 0, "extra_body": {"return_token_ids": True}, **fields}
    return served.client().chat.completions.create(model="llava-jax", messages=list(messages), **fields)


def test_an_answer_has_the_ids_text_and_usage_of_the_assistant(served):
    reply = assistant().reply(tiny.question("What is it?"), NEW)
    for message in (user(part(), "What is it?"), user("What is it?", part())):  # of one picture, LLaVA's order
        found = ask(served, message)
        assert found.choices[0].message.content == reply.text
        assert found.choices[0].token_ids == list(reply.ids)
        expected = encode(tiny.question("What is it?"), assistant().format, reply=True).tokens.tolist()
        assert found.prompt_token_ids == expected
        assert found.choices[0].finish_reason == reply.ended_by
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (reply.prompt_tokens, len(reply.ids))


def test_pictures_stand_in_place_and_a_system_text_replaces_the_templates(served):
    turns = (Turn("user", "First\n<image>\nthen\n<image>"), Turn("assistant", "Yes."), Turn("user", "Why?"))
    pictures = (tiny.picture(0), tiny.picture(1))
    reply = assistant().reply(Conversation(turns, pictures, system="Be brief.", images_in_place=True), NEW)
    found = ask(served, {"role": "system", "content": "Be brief."}, user("First", part(0), "then", part(1)),
                {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"})  # fmt: skip
    assert found.choices[0].token_ids == list(reply.ids)
    assert found.usage.prompt_tokens == reply.prompt_tokens


def test_a_stream_adds_up_to_the_answer_and_ends_with_its_usage(served):
    whole = ask(served, user(part(), "What is it?"))
    chunks = list(ask(served, user(part(), "What is it?"), stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    ids = [token for chunk in chunks for choice in chunk.choices for token in (choice.model_extra or {}).get(
        "token_ids", [])]  # fmt: skip
    assert text == whole.choices[0].message.content and ids == whole.choices[0].token_ids
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_seeds_temperatures_and_several_choices_draw_as_the_assistant_does(served):
    found = ask(served, user(part(), "What is it?"), n=3, seed=5, temperature=1.0, top_p=0.9,
                extra_body={"return_token_ids": True, "top_k": 40})  # fmt: skip
    expected = [assistant().reply(tiny.question("What is it?"), NEW, 1.0, 0.9, 40, 5 + i).ids for i in range(3)]
    assert [tuple(choice.token_ids) for choice in found.choices] == expected
    assert len({choice.message.content for choice in found.choices}) > 1
    unseeded = {ask(served, user("Hello"), temperature=1.0).choices[0].message.content for _ in range(3)}
    assert len(unseeded) > 1


def test_a_stop_string_ends_the_answer_before_it(served):
    text = ask(served, user(part(), "What is it?")).choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    found = ask(served, user(part(), "What is it?"), stop=[stop, "no part of it"])
    assert found.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert found.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_the_likeliest_tokens(served):
    found = ask(served, user(part(), "What is it?"), logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
        assert [one.logprob for one in token.top_logprobs] == sorted(one.logprob for one in token.top_logprobs)[::-1]
        assert len(token.top_logprobs) == 3


def test_a_text_completion_goes_on_from_the_raw_prompt(served):
    client = served.client()
    found = client.completions.create(model="llava-jax", prompt="The cat", max_tokens=NEW, temperature=0, logprobs=2,
                                      extra_body={"return_token_ids": True})  # fmt: skip
    words = assistant().format.tokenizer
    ids = [words.bos_id, *words.encode("The cat", False)]
    assert found.prompt_token_ids == ids and found.usage.prompt_tokens == len(ids)
    assert words.decode([*ids, *found.choices[0].token_ids]) == "The cat" + found.choices[0].text
    logprobs = found.choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(found.choices[0].token_ids)
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    pieces = client.completions.create(model="llava-jax", prompt="The cat", max_tokens=NEW, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == found.choices[0].text


def test_answers_in_company_are_those_alone_bit_for_bit(served):
    def one(number: int):
        found = ask(served, user(part(number % 3), f"What is number {number}?"), logprobs=True, top_logprobs=2,
                    seed=number, temperature=float(number % 2))  # fmt: skip
        return found.choices[0].message.content, found.choices[0].token_ids, found.choices[0].logprobs.model_dump()

    alone = [one(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == alone


def test_models_health_metrics_and_the_prompt_are_shown(served):
    assert [model.id for model in served.client().models.list()] == ["llava-jax"]
    assert served.client().models.retrieve("llava-jax").max_model_len == served.service.positions
    assert [httpx2.get(served.url + path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    text = httpx2.get(served.url + "/metrics").text
    assert "llava_jax_slots 4" in text and 'llava_jax_requests_total{status="200"}' in text
    shown = served.post("/v1/prompt", {"messages": [user(part(), "What is it?")]}).json()
    example = encode(tiny.question("What is it?"), assistant().format, reply=True)
    assert shown["ids"] == example.tokens.tolist()
    span = example.image_spans[0]
    assert {"image": {"start": span.start, "length": span.length}} in shown["parts"]
    assert served.idle()


def test_the_script_of_the_readme_runs(served, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("### Serve")[1]
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "http://127.0.0.1:8000" in script
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("photo.jpg")
    exec(script.replace("http://127.0.0.1:8000", served.url), {})
    picture = (tmp_path / "photo.jpg").read_bytes()
    conversation = Conversation((Turn("user", "<image>\nWhat is unusual here?"),), (picture,))
    assert capsys.readouterr().out == assistant().reply(conversation, 100).text
