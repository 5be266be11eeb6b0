"""Answers from a checkpoint and from an endpoint: the same in any batch, on any host, and after any kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answer, answers
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import load_questions
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt import templates
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import encode, marked
from tests.fake_openai import FakeOpenAI, always, first
from tests.generate import tiny
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
QUESTIONS = 5
NEW = 8
SLOTS = 2  # one size everywhere, so that each shape is compiled once


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five questions, all but one about a picture."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "images").mkdir()
    rows = []
    for number in range(QUESTIONS):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
        image = {} if number == 3 else {"image": f"{number}.png"}
        rows.append({"id": f"q{number}", "question": "Why? " * (1 + number), "answer": "so"} | image)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


def run(*args):
    return command.main([str(arg) for arg in args])


def ask(data, checkpoint, out, *args):
    return run("answer", "--benchmark", "custom", "--data", data, "--checkpoint", checkpoint, "--out", out,
               "--max-new-tokens", NEW, "--slots", SLOTS, "--name", "tiny", *args)  # fmt: skip


@pytest.fixture(scope="module")
def one_host_file(data, checkpoint, tmp_path_factory):
    """The answers of one host."""
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert ask(data, checkpoint, out) == 0
    return out


def test_an_answer_is_what_the_assistant_says_to_that_question_alone(data, checkpoint, one_host_file):
    assistant = Assistant.open(checkpoint, SLOTS)
    rows = answers.read([one_host_file]).answers
    assert [row.id for row in rows] == [f"q{number}" for number in range(QUESTIONS)]
    questions = load_questions(get("custom"), data, {"match": "exact"})[0]
    for row, question in zip(rows, questions):
        reply = assistant.reply(answer.conversation(question), NEW, image_root=data / "images")
        assert (row.text, row.metadata["ended_by"], row.model) == (reply.text, reply.ended_by, "tiny")
    assert len({row.text for row in rows}) == QUESTIONS


def test_two_hosts_merged_are_one_host_to_the_byte_and_in_score(data, checkpoint, one_host_file, tmp_path, capsys):
    options = ("--benchmark", "custom", "--data", data)
    for host in (1, 0):
        assert ask(data, checkpoint, tmp_path / "a.jsonl", "--hosts", 2, "--host", host) == 0
    shards = [tmp_path / f"a-0000{host}-of-00002.jsonl" for host in (0, 1)]
    assert run("merge", *options, *shards, "--out", tmp_path / "merged.jsonl") == 0
    assert (tmp_path / "merged.jsonl").read_bytes() == one_host_file.read_bytes()
    capsys.readouterr()
    outputs = []
    for files in (shards, [one_host_file]):
        assert run("score", *options, *files) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def pair(*args):
    """Two processes of two devices each, started with the same words: [(exit code, what it printed)]."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": "2",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}  # fmt: skip
    processes = [subprocess.Popen([sys.executable, "-m", "tests.evaluate.pair", *map(str, args)], text=True, cwd=ROOT,
                                  env=os.environ | settings | {"JAX_PROCESS_ID": str(number)},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for number in range(2)]  # fmt: skip
    outs = [process.communicate(timeout=900)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, outs)]


def test_two_processes_of_one_job_are_one_host_to_the_byte(data, checkpoint, one_host_file, tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    # What a kill has left of an earlier start: question 1 is answered, 3 is cut off.
    lines = one_host_file.read_text().splitlines(keepends=True)
    (tmp_path / "apart-00001-of-00002.jsonl").write_text(lines[1] + lines[3][:30])
    results = pair(data, checkpoint, tmp_path, "--benchmark", "custom", "--max-new-tokens", NEW, "--slots", SLOTS,
                   "--name", "tiny")  # fmt: skip
    assert [code for code, _ in results] == [64, 64], results
    assert (tmp_path / "apart.jsonl").read_bytes() == one_host_file.read_bytes(), results
    assert (tmp_path / "together.jsonl").read_bytes() == one_host_file.read_bytes(), results
    assert not list(tmp_path.glob("together-*"))
    assert "resumes after 1 of 2 answers" in results[1][1] and "5 answers, 0 questions without one" in results[0][1]
    assert "--out mine.jsonl: process 0 does not see what process 1 of 2 writes" in results[0][1]


def test_a_killed_run_goes_on_and_answers_nothing_twice(data, checkpoint, one_host_file, tmp_path, capsys):
    lines = one_host_file.read_text().splitlines(keepends=True)
    out = tmp_path / "answers.jsonl"
    out.write_text("".join(lines[:3]) + lines[3][:30])
    assert ask(data, checkpoint, out) == 0
    assert "resumes after 3 of 5 answers" in capsys.readouterr().out
    assert out.read_bytes() == one_host_file.read_bytes()


def test_answers_of_another_run_are_not_gone_on_with(data, checkpoint, one_host_file, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    out.write_bytes(one_host_file.read_bytes())
    assert ask(data, checkpoint, out, "--seed", 3) == 65
    assert "another run" in capsys.readouterr().err


def test_a_missing_picture_is_named_before_anything_is_answered(data, checkpoint, tmp_path, capsys):
    folder = tmp_path / "bench"
    folder.mkdir()
    rows = [{"id": "ok", "question": "Why?", "answer": "so"},
            {"id": "gone", "image": "gone.png", "question": "Why?", "answer": "so"}]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a.jsonl"
    assert ask(folder, checkpoint, out) == 65
    assert "id='gone' missing_image" in capsys.readouterr().err
    assert not out.exists()
    assert ask(folder, checkpoint, out, "--allow-faults") == 0
    assert "id='gone' missing_image" in capsys.readouterr().out
    options = ("--benchmark", "custom", "--data", folder, out)
    assert run("score", *options) == 65
    assert run("score", *options, "--allow-faults") == 0
    assert "1 missing_image" in capsys.readouterr().out


def test_repeats_are_drawn_anew_and_are_the_same_however_many(data, checkpoint, tmp_path):
    warm = ("--temperature", 1.0)
    assert ask(data, checkpoint, tmp_path / "two.jsonl", *warm, "--repeats", 2) == 0
    assert ask(data, checkpoint, tmp_path / "one.jsonl", *warm) == 0
    two = answers.read([tmp_path / "two.jsonl"]).answers
    assert [(row.id, row.repeat) for row in two][:3] == [("q0", 0), ("q0", 1), ("q1", 0)]
    assert [row.text for row in two[::2]] == [row.text for row in answers.read([tmp_path / "one.jsonl"]).answers]
    assert all(first.text != second.text for first, second in zip(two[::2], two[1::2]))


@pytest.mark.parametrize("args, code, message", [
    (("--repeats", 2), 64, "temperature above 0"), (("--hosts", 2, "--host", 2), 64, "want 0 to 1"),
    (("--template", "odd"), 64, "invalid choice"),
])  # fmt: skip
def test_what_cannot_be_is_refused(data, checkpoint, tmp_path, capsys, args, code, message):
    assert ask(data, checkpoint, tmp_path / "a.jsonl", *args) == code
    assert message in capsys.readouterr().err


def test_what_is_no_checkpoint_has_its_own_code(data, tmp_path):
    assert ask(data, tmp_path, tmp_path / "a.jsonl") == 66


# ---- two passes


def test_a_reply_continues_its_prefix():
    format = tiny.wording(templates.get("v1"))
    prefixed = Conversation((Turn("user", "Why?"),), begun="Because")
    full = Conversation((Turn("user", "Why?"), Turn("assistant", "Because")))
    text = marked(encode(prefixed, format, reply=True), format.tokenizer)
    assert text == marked(encode(full, format), format.tokenizer).replace("⟦ ", "").removesuffix(" </s> ⟧")


def test_two_passes_reason_first_and_then_name_the_answer(data, checkpoint):
    assistant = Assistant.open(checkpoint, SLOTS)
    questions = load_questions(get("custom"), data, {"match": "exact"})[0][2:4]
    settings = answer.Settings(NEW, two_pass=True)
    respond = answer.from_checkpoint(assistant, settings, data / "images")
    for index, response in respond([answer.Job(question, 0) for question in questions]):
        prompt = answer.conversation(questions[index])
        reasons = assistant.reply(prompt, NEW, image_root=data / "images").text.split("###")[0].rstrip()
        prefixed = Conversation(prompt.turns, prompt.images, prompt.id, begun=f"{reasons} ###\nANSWER:")
        second = assistant.reply(prefixed, 64, image_root=data / "images")
        assert response.text == f"{reasons}\n The answer is {second.text}"


def test_answers_heed_a_repetition_penalty_and_files_made_before_there_was_one_go_on(data, checkpoint, tmp_path):
    assert ask(data, checkpoint, tmp_path / "a.jsonl", "--repetition-penalty", 1.5) == 0
    questions, _ = load_questions(get("custom"), data, {"match": "exact"})
    assistant = Assistant.open(checkpoint, SLOTS)
    expected = assistant.replies([answer.conversation(question) for question in questions], NEW,
                                 image_root=data / "images", repetition_penalty=1.5)  # fmt: skip
    assert [row.text for row in answers.read([tmp_path / "a.jsonl"]).answers] == [reply.text for reply in expected]
    before = "9787c9f6985bd730"  # of a version without one
    assert answer.fingerprint(questions, answer.Settings(NEW), {"weights": "w"}) == before
    assert answer.fingerprint(questions, answer.Settings(NEW, repetition_penalty=1.5), {"weights": "w"}) != before


# ---- endpoints


def ask_server(data, server, out, *args):
    return run("answer", "--benchmark", "custom", "--data", data, "--base-url", server.url, "--model", "any",
               "--out", out, "--concurrency", 3, *args)  # fmt: skip


def echo(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else f"{len(content) - 1} pictures"


def test_an_endpoint_sees_pictures_and_words_and_its_answers_are_in_order(data, tmp_path):
    with FakeOpenAI(echo, faults=first("429")) as server:
        assert ask_server(data, server, tmp_path / "a.jsonl", "--system", "Be brief.") == 0
    rows = answers.read([tmp_path / "a.jsonl"]).answers
    assert [row.id for row in rows] == [f"q{number}" for number in range(QUESTIONS)]
    assert [row.text for row in rows[2:4]] == ["1 pictures", "Why? " * 3 + "Why?"]
    body = next(body for body in server.answered if isinstance(body["messages"][1]["content"], list))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (body["temperature"], body["max_tokens"]) == (0.0, 128)


def test_a_failed_request_is_a_named_row_that_the_next_run_asks_again(data, tmp_path, capsys):
    with FakeOpenAI(echo, faults=always("400")) as server:
        assert ask_server(data, server, tmp_path / "a.jsonl") == 65
        assert "id='q3' not_answered: HTTP 400" in capsys.readouterr().out
        assert run("score", "--benchmark", "custom", "--data", data, tmp_path / "a.jsonl") == 65
        server.faults = lambda number, body: None
        assert ask_server(data, server, tmp_path / "a.jsonl") == 0
        assert len(server.answered) == QUESTIONS
    assert run("score", "--benchmark", "custom", "--data", data, tmp_path / "a.jsonl") == 0


@pytest.mark.parametrize("args, message", [
    (["--two-pass"], "two passes want --checkpoint"),
    (["--repetition-penalty", 1.2], "repetition_penalty=1.2 wants --checkpoint"),
])  # fmt: skip
def test_what_a_server_cannot_do_wants_a_checkpoint(data, tmp_path, capsys, args, message):
    with FakeOpenAI(echo) as server:
        assert ask_server(data, server, tmp_path / "a.jsonl", *args) == 64
    assert message in capsys.readouterr().err
