"""The answer file and the scorer: what is wrong is named by its id, and nothing is scored as wrong in silence."""

import json
import os
import subprocess
import sys

import pytest

from llava_jax.errors import DataError
from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answers
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import BadBenchmark, load_questions, resolve_options

ROWS = [
    {"id": "1", "image": "a.jpg", "question": "What is it?", "answer": "a cat", "category": "things"},
    {"id": 2, "question": "How many?", "answer": ["two", "2 cats"], "category": "numbers"},
    {"id": "3", "question": "Which?", "choices": ["dog", "cat"], "answer": "B", "category": "things"},
    {"id": "4", "question": "Which?", "choices": ["dog", "cat"], "answer": "A", "category": "things"},
]


def bench(folder, rows=ROWS, tail=""):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.jpg").touch()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def load(folder, **more):
    benchmark = get("custom")
    return load_questions(benchmark, folder, resolve_options(benchmark, ["match=normalised"]), **more)


def answered(path, texts, tail=""):
    path.write_text("".join(answers.line(Answer(identity, text, "m")) for identity, text in texts) + tail)
    return path


GOOD = [("1", "Cat."), ("2", "two"), ("3", "B. cat"), ("4", "B")]


def scored(folder, path, **more):
    benchmark = get("custom")
    options = resolve_options(benchmark, ["match=normalised"])
    return scores.score(benchmark, load(folder)[0], [path], options, **more)


def test_answers_become_numbers_by_category(tmp_path):
    result = scored(bench(tmp_path), answered(tmp_path / "a.jsonl", GOOD))
    assert {name: round(value.mean, 2) for name, value in result.numbers.items()} == {
        "accuracy": 75, "numbers": 100, "things": 66.67,
    }  # fmt: skip
    assert (result.model, result.questions, result.findings) == ("m", 4, ())


def test_every_fault_of_a_benchmark_file_is_named_with_its_id(tmp_path):
    rows = [
        *ROWS,
        {"id": "missing", "image": "gone.jpg", "question": "?", "answer": "x"},
        {"id": "1", "question": "Again?", "answer": "x"},
        {"id": "empty", "question": "?", "answer": " "},
        {"id": "letter", "question": "?", "choices": ["a", "b"], "answer": "C"},
    ]
    bench(tmp_path, rows, tail='{"id": "cut", "question": "Wh')
    with pytest.raises(BadBenchmark) as caught:
        load(tmp_path, images=True)
    message = str(caught.value)
    for identity, kind in (("missing", "missing_image"), ("1", "duplicate_id"), ("empty", "empty_truth"),
                           ("letter", "wrong_truth"), ("cut", "truncated_line")):  # fmt: skip
        assert f"id={identity!r} {kind}: " in message
    assert "5 faults" in message


def test_every_fault_of_an_answer_file_is_named_and_stops_the_scoring(tmp_path):
    bench(tmp_path)
    path = answered(tmp_path / "a.jsonl", [("1", "cat"), ("1", "dog"), ("3", "B"), ("9", "x")],
                    tail='{"question_id": "4", "te')  # fmt: skip
    with pytest.raises(DataError) as caught:
        scored(tmp_path, path)
    for text in ("id='1' duplicate_id: an earlier row answers it, with another text", "id='9' unknown_id",
                 "id='2' missing_answer", "id='4' truncated_line", "--allow-faults"):  # fmt: skip
        assert text in str(caught.value)
    result = scored(tmp_path, path, allow_faults=True)
    assert result.numbers["accuracy"].mean == 50
    assert {(fault.id, fault.kind) for fault in result.findings} == {
        ("1", "duplicate_id"), ("9", "unknown_id"), ("2", "missing_answer"), ("4", "missing_answer"),
        ("4", "truncated_line"),
    }  # fmt: skip


def test_a_models_failings_are_scored_and_named(tmp_path):
    bench(tmp_path)
    path = answered(tmp_path / "a.jsonl", [("1", "cat"), ("2", " "), ("3", "C"), ("4", "the first")])
    result = scored(tmp_path, path)
    assert result.numbers["accuracy"].mean == 25
    assert [(fault.id, fault.kind) for fault in result.findings] == [
        ("2", "empty_answer"), ("3", "wrong_letter"), ("4", "unparsed"),
    ]  # fmt: skip
    assert all(f"id='{identity}'" in scores.text(result) for identity in "234")


def test_a_picture_that_was_missing_is_a_fault_of_the_score_too(tmp_path):
    bench(tmp_path)
    row = Answer("1", "", "m", metadata={"fault": "missing_image", "detail": "a.jpg does not exist"})
    path = answered(tmp_path / "a.jsonl", GOOD[1:], tail=answers.line(row))
    with pytest.raises(DataError, match="id='1' missing_image: a.jpg does not exist"):
        scored(tmp_path, path)


def test_answer_files_of_the_reference_are_read(tmp_path):
    row = {"question_id": 2, "prompt": "How many?", "text": "two", "answer_id": "x", "model_id": "llava"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert answers.read([tmp_path / "a.jsonl"]).answers == (Answer("2", "two", "llava", "How many?"),)


@pytest.mark.parametrize("row", ['["2"]', '{"text": "x"}', '{"question_id": 1}', '{"question_id": 1, "text": 3}',
                                 '{"question_id": 1, "text": "", "metadata": {"fault": "odd"}}'])  # fmt: skip
def test_a_row_of_another_shape_is_a_fault(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    found = answers.read([tmp_path / "a.jsonl"])
    assert not found.answers and found.faults[0].kind == "bad_shape"


def test_repeats_give_a_mean_and_a_sample_deviation(tmp_path):
    bench(tmp_path)
    rows = [Answer(identity, text if repeat else "no", "m", metadata={"repeat": repeat})
            for repeat in range(2) for identity, text in GOOD]  # fmt: skip
    answers.write(tmp_path / "a.jsonl", rows)
    result = scored(tmp_path, tmp_path / "a.jsonl")
    assert result.repeats == 2
    assert result.numbers["accuracy"] == pytest.approx((37.5, 75 / 2**0.5))


def test_merged_shards_are_one_hosts_file(tmp_path):
    questions, _ = load(bench(tmp_path))
    answered(tmp_path / "0.jsonl", GOOD[::2])
    answered(tmp_path / "1.jsonl", GOOD[1::2])
    whole = answered(tmp_path / "whole.jsonl", GOOD)
    answers.write(tmp_path / "merged.jsonl", answers.merge(questions, [tmp_path / "1.jsonl", tmp_path / "0.jsonl"]))
    assert (tmp_path / "merged.jsonl").read_text() == whole.read_text()
    with pytest.raises(DataError, match="id='2' missing_answer"):
        answers.merge(questions, [tmp_path / "0.jsonl"])


def test_shards_of_different_runs_do_not_mix(tmp_path):
    question_list, _ = load(bench(tmp_path))
    answers.write(tmp_path / "a.jsonl", [Answer(i, t, metadata={"run": "x"}) for i, t in GOOD[:2]])
    answers.write(tmp_path / "b.jsonl", [Answer(i, t, metadata={"run": "y"}) for i, t in GOOD[2:]])
    with pytest.raises(DataError, match="2 different runs"):
        answers.merge(question_list, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def run(*args):
    return command.main([str(arg) for arg in args])


def test_the_command_scores_and_writes_the_numbers(tmp_path, capsys):
    path = answered(tmp_path / "a.jsonl", GOOD)
    place = ("--benchmark", "custom", "--data", bench(tmp_path), "--option", "match=normalised")
    assert run("score", *place, path, "--out", tmp_path / "s.json", "--name", "ours") == 0
    assert "* accuracy    75.00   of 4" in capsys.readouterr().out
    name, result = scores.from_json(tmp_path / "s.json")
    assert name == "ours" and result == scored(tmp_path, path)


@pytest.mark.parametrize("args, code, message", [
    (("--benchmark", "nope"), 64, "want one of scienceqa"), (("--option", "match=odd"), 64, "exact, normalised"),
    (("--option", "x=1"), 64, "custom knows match=exact|normalised|contains"), (("gone.jsonl",), 65, "does not exist"),
    (("--submission", "out"), 64, "no submission file"), (("--wrong",), 64, "unrecognized arguments"),
])  # fmt: skip
def test_the_command_names_what_is_wrong_and_exits_with_its_code(tmp_path, monkeypatch, capsys, args, code, message):
    monkeypatch.chdir(tmp_path)
    path = answered(tmp_path / "a.jsonl", GOOD)
    named = () if "--benchmark" in args else ("--benchmark", "custom")
    assert run("score", *named, "--data", bench(tmp_path), path, *args) == code
    assert message in capsys.readouterr().err


def test_a_missing_file_of_a_benchmark_is_named_with_its_source(tmp_path, capsys):
    assert run("score", "--benchmark", "textvqa", "--data", tmp_path, tmp_path / "a.jsonl") == 65
    message = capsys.readouterr().err
    assert "TextVQA_0.5.1_val.json    from textvqa.org/dataset" in message and "eval.zip" in message
    assert run("list", "textvqa") == 0
    assert "--option ocr=true|false" in capsys.readouterr().out


def test_scoring_touches_no_accelerator(tmp_path):
    """On a platform that does not exist every use of a device would fail."""
    path = answered(tmp_path / "a.jsonl", GOOD)
    args = ["score", "--benchmark", "custom", "--data", str(bench(tmp_path)), str(path)]
    completed = subprocess.run([sys.executable, "-m", "llava_jax.evaluate", *args], capture_output=True, text=True,
                               env={**os.environ, "JAX_PLATFORMS": "none_such"})  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "accuracy" in completed.stdout
