"""Own questions: letters read strictly or leniently, questions without a truth, and POPE's answers of LLaVA's own."""

import json

import pytest
from PIL import Image

from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answers
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.benchmarks.custom import lenient_letter
from llava_jax.evaluate.questions import load_questions
from tests.generate import tiny

CHOICES = ["a dog", "a cat", "a bird"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*args):
    return command.main([str(arg) for arg in args])


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B)", "B"), ("b)", "B"), ("**B**", "B"), ("B. a cat", "B"),
    ("B: a cat", "B"), ("Answer: B", "B"), ("ANSWER:\nB", "B"), ("The answer is B.", "B"), ("Option B", "B"),
    ("The correct answer is (B) a cat.", "B"), ("The answer is B, as a dog barks.", "B"), ("B\nIt purrs.", "B"),
    ("a cat", "B"), ("A cat", "B"), ("The cat.", "B"), ("C", "C"), ("A", "A"), ("(A)", "A"), ("The answer is A.", "A"),
    ("D", "D"), ("The answer is D.", "D"),
    ("A small cat", ""), ("The answer is A cat", ""), ("I think so", ""), ("I see A dog", ""), ("B or C", ""),
    ("A or B", ""), ("B, C", ""), ("(A) or (B)", ""), ("It has vitamin C.", ""), ("Both", ""), ("", ""), (" ", ""),
    ("A dog or a cat", ""), ("It's B-like", ""),
])  # fmt: skip
def test_a_lenient_letter_stands_alone_in_a_place_of_an_answer(text, letter):
    assert lenient_letter(text, CHOICES) == letter


def test_a_text_that_is_two_choices_names_none():
    assert lenient_letter("a cat", ["a cat", "the cat", "a dog"]) == ""


def test_custom_choices_are_parsed_strictly_or_leniently(tmp_path, capsys):
    """Case 10: eight ways to answer, of which seven mean B."""
    row = {"question": "Which animal?", "choices": CHOICES, "answer": "B"}
    write(tmp_path / "questions.jsonl", [{"id": str(i), **row} for i in range(8)])
    texts = ("B", "B. a cat", "(B)", "B)", "Answer: B", "The answer is B.", "a cat", "C")
    path = write(tmp_path / "a.jsonl", [{"question_id": str(i), "text": text} for i, text in enumerate(texts)])
    options = ("score", "--benchmark", "custom", "--data", tmp_path, path)
    assert run(*options) == 0
    strict = capsys.readouterr().out
    assert "* accuracy    25.00   of 8" in strict and "5 unparsed" in strict and "letters=strict" in strict
    assert "id='2' unparsed: no letter in '(B)'; --option letters=lenient reads more ways to name one" in strict
    assert run(*options, "--option", "letters=lenient", "--out", tmp_path / "s.json") == 0
    lenient = capsys.readouterr().out
    assert "* accuracy    87.50   of 8" in lenient and "(match=exact, letters=lenient)" in lenient
    assert run("report", tmp_path / "s.json", "--out", tmp_path / "out") == 0
    assert "letters=lenient" in (tmp_path / "out" / "report.md").read_text()


# ---- questions without a truth


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


def test_pictures_without_a_truth_are_answered_and_not_scored(tmp_path, checkpoint, capsys):
    """Case 16."""
    (tmp_path / "images").mkdir()
    for name in ("red", "green"):
        Image.new("RGB", (24, 24), name).save(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path / "questions.jsonl", [{"id": str(i), "image": f"{name}.jpg", "question": "Describe the picture."}
                                         for i, name in enumerate(("red", "green"))])  # fmt: skip
    options = ("--benchmark", "custom", "--data", tmp_path)
    out = tmp_path / "a.jsonl"
    assert run("answer", *options, "--checkpoint", checkpoint, "--max-new-tokens", 3, "--slots", 2, "--out", out) == 0
    assert [row.id for row in answers.read([out]).answers] == ["0", "1"]
    capsys.readouterr()
    assert run("score", *options, out) == 65
    assert capsys.readouterr().err == ("evaluate: custom: no truth for 2 questions, '0' the first: give each an answer "
                                       "to be scored\n")  # fmt: skip


@pytest.mark.parametrize("row, message", [
    ({"id": "1"}, "question is missing: want str"), ({"question": "?"}, "id is missing: want str or int"),
    ({"id": "1", "question": "?", "answer": 7}, "answer='7': want str or list"),
    ({"id": "1", "question": "?", "choices": ["x"] * 27}, "27 choices: want at most 26"),
    (["1"], "want an object with id"),
])  # fmt: skip
def test_a_question_of_another_shape_is_refused_by_line_and_field(row, message, tmp_path):
    write(tmp_path / "questions.jsonl", [row])
    with pytest.raises(ValueError, match=r"questions\.jsonl:1: .*" + message):
        load_questions(get("custom"), tmp_path, {})


# ---- POPE


@pytest.fixture
def pope(tmp_path):
    """Case 11: four questions of each kind, and LLaVA's own numbers over all kinds, in another order."""
    llava = []
    for kind in ("adversarial", "popular", "random"):
        rows = [{"question_id": i + 1, "image": "COCO_val2014_1.jpg", "text": f"Is there a thing{i} in the image?",
                 "label": "no" if i % 2 else "yes"} for i in range(4)]  # fmt: skip
        write(tmp_path / f"coco_pope_{kind}.json", rows)
        llava += [row | {"category": kind, "text": f"{row['text']}\nAnswer the question using a single word."}
                  for row in rows]  # fmt: skip
    for number, row in enumerate(llava):
        row["question_id"] = number
    write(tmp_path / "llava_questions.jsonl", llava)
    return write(tmp_path / "a.jsonl", [{"question_id": row["question_id"], "prompt": row["text"], "model_id": "m",
                                         "text": row["label"].title(), "metadata": {}} for row in llava])  # fmt: skip


def test_answers_with_llavas_own_ids_are_scored_by_its_file_of_questions(pope, capsys):
    options = ("score", "--benchmark", "pope", "--data", pope.parent, pope)
    assert run(*options) == 65
    error = capsys.readouterr().err
    assert "ids of pope are KIND/NUMBER, such as random/1" in error and "--option questions=" in error
    assert "its ids are such as 'random/1'" in error
    assert run(*options, "--option", f"questions={pope.parent / 'llava_questions.jsonl'}") == 0
    assert "* F1                      100.00   of 12" in capsys.readouterr().out


def test_a_question_that_llavas_file_lacks_keeps_its_id_and_is_missed(pope, capsys):
    path = pope.parent / "llava_questions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    words = ("score", "--benchmark", "pope", "--data", pope.parent, pope, "--option")
    assert run(*words, f"questions={path}") == 65
    error = capsys.readouterr().err
    assert "id='11' unknown_id" in error and "id='random/4' missing_answer" in error
    assert run(*words, "questions=nowhere.jsonl") == 64
    assert "nowhere.jsonl: no such file; LLaVA's own is llava_pope_test.jsonl" in capsys.readouterr().err


# ---- names


@pytest.mark.parametrize("name, known", [("scienceQA", "scienceqa"), ("POPE", "pope"), ("MM-Vet", "mmvet"),
                                         ("LLaVA-Bench-Wild", "llava_bench_wild"), ("VQAv2", "vqav2")])  # fmt: skip
def test_a_benchmark_is_found_by_its_name_in_any_case(name, known):
    assert get(name).name == known


@pytest.mark.parametrize("words", [("scienceQA",), ("--benchmark", "ScienceQA"), ("science_qa",)])
def test_list_takes_the_name_either_way(words, capsys):
    assert run("list", *words) == 0
    assert capsys.readouterr().out.startswith("ScienceQA: --data DIR holds")


def test_a_name_that_is_none_is_answered_with_the_nearest(capsys):
    assert run("list", "sciencqa") == 64
    error = capsys.readouterr().err
    assert "did you mean scienceqa?" in error and error.count("\n") == 1
    assert run("list", "pope", "--benchmark", "pope") == 64
    assert run("score", "--benchmark", "text-vq", "--data", "x", "y") == 64
    assert "did you mean textvqa?" in capsys.readouterr().err
