"""LLaVA-Bench: requests with the reference first, scores read strictly or tolerantly, and ratios of means."""

import json
import random
import re
from pathlib import Path

import pytest

from llava_jax.errors import DataError
from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answers, judge
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks import llava_bench
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import load_questions, resolve_options
from tests.fake_openai import FakeOpenAI, always

PICTURES = ("a.jpg", "b.jpg")
RULES = {f"{family}{kind}": {"role": "Assistant", "prompt": f"Judge {family}{kind}."}
         for family in ("", "llava_bench_") for kind in llava_bench.KINDS}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    """Six questions about two pictures, in files whose orders differ."""
    rows = [{"question_id": 3 * i + j, "image": image, "text": f"Q{3 * i + j}?", "category": kind}
            for i, image in enumerate(PICTURES) for j, kind in enumerate(llava_bench.KINDS)]  # fmt: skip
    references = [{"question_id": row["question_id"], "text": f"R{row['question_id']}", "category": row["category"]}
                  for row in rows]  # fmt: skip
    random.Random(0).shuffle(references)
    contexts = [
        {
            "id": image,
            "image": image,
            "captions": [f"One {image}.", "Two."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.25, 1.0, 0.5]}],
        }
        for image in PICTURES[::-1]
    ]
    for name, lines in (("qa90_questions", rows), ("qa90_gpt4_answer", references),
                        ("caps_boxes_coco2014_val_80", contexts)):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "rule.json").write_text(json.dumps(RULES))
    answers.write(tmp_path / "answers.jsonl", [Answer(str(i), f"C{i}", "llava") for i in range(6)])
    return tmp_path


def load(folder):
    return load_questions(get("llava_bench_coco"), folder, {})[0]


def test_a_request_shows_context_question_reference_candidate_and_rule_in_order(bench):
    text = llava_bench.request_text(load(bench)[1], "C1", RULES["detail"])
    assert text == (
        "[Context]\nOne a.jpg.\nTwo.\n\ncat: [0.1, 0.25, 1.0, 0.5]\n\n[Question]\nQ1?\n\n"
        "[Assistant 1]\nR1\n\n[End of Assistant 1]\n\n[Assistant 2]\nC1\n\n[End of Assistant 2]\n\n"
        "[System]\nJudge detail.\n\n"
    )


def test_in_the_wild_joins_contexts_of_one_or_several_sentences(tmp_path):
    files = {
        "questions": [{"question_id": i, "image": f"00{i}.jpg", "text": "?", "category": "conv"} for i in (1, 2)],
        "context": [{"id": "1", "image": "001.jpg", "caption": "Alone."},
                    {"id": "2", "image": "002.jpg", "caption": ["One.", "Two."]}],
        "answers_gpt4": [{"question_id": i, "text": "R"} for i in (2, 1)],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, _ = load_questions(get("llava_bench_wild"), tmp_path, {})
    assert [question.facts["context"] for question in questions] == ["Alone.", "One.\nTwo."]
    assert {llava_bench.rule_name(question) for question in questions} == {"llava_bench_conv"}
    assert questions[0].images == ("001.jpg",)


@pytest.mark.parametrize("review, strict, tolerant", [
    ("8 7", (8, 7), (8, 7)), ("8,7\nBecause", (8, 7), (8, 7)), ("8, 7", None, (8, 7)), ("8 7 ", None, (8, 7)),
    (" 8 7", None, (8, 7)), ("8\t7", None, (8, 7)), ("8/10 7/10", None, (8, 7)), ("8.5 7", (8.5, 7), (8.5, 7)),
    ("Assistant 1: 8, Assistant 2: 7", None, (8, 7)), ("\n9 10\nx", None, (9, 10)), ("8 7 9", None, None),
    ("8", None, None), ("", None, None), ("no\n8 7", None, None), ("80 70", (80, 70), None),
])  # fmt: skip
def test_scores_are_read_strictly_as_the_reference_or_tolerantly(review, strict, tolerant):
    assert llava_bench.strict_scores(review) == strict
    assert llava_bench.tolerant_scores(review) == tolerant


# conv: 8 6 and 8 8; detail: 9 6 and unreadable; complex: 10 9 and 5 6.
REVIEWS = {"0": "8 6\nx", "3": "8 8", "1": "9 6", "4": "Both are good.", "2": "10 9", "5": "5 6"}


def test_a_hand_made_review_file_scores_what_was_worked_out(bench):
    answers.write(bench / "reviews.jsonl", [Answer(i, text, "judge") for i, text in REVIEWS.items()])
    benchmark = get("llava_bench_coco")
    options = resolve_options(benchmark, [])
    result = scores.score(benchmark, load(bench), [bench / "reviews.jsonl"], options)
    numbers = {name: round(value.mean, 4) for name, value in result.numbers.items()}
    assert numbers["conv"] == 87.5  # 14 / 16
    assert numbers["detail"] == 66.6667  # 6 / 9, the unreadable one left out
    assert numbers["complex"] == 100  # 15 / 15: a ratio of means, not the mean 105 of ratios
    assert numbers["all"] == 87.5  # 35 / 40
    assert (numbers["all reference x10"], numbers["all candidate x10"]) == (80, 70)
    assert [(fault.id, fault.kind) for fault in result.findings] == [("4", "unparsed")]
    compat = scores.score(benchmark, load(bench), [bench / "reviews.jsonl"], options | {"compat": "true"})
    assert compat.numbers["detail"].mean == pytest.approx(100 * 2.5 / 4)  # (6 - 1) / (9 - 1)
    assert compat.numbers["all"].mean == pytest.approx(100 * 5.667 / 6.5)  # 34 / 6 and 39 / 6, to three decimals
    assert compat.counts["detail failed"] == 1


def run(*args):
    return command.main([str(arg) for arg in args])


def judge_words(bench, server, *words):
    return ("judge", "--benchmark", "llava_bench_coco", "--data", bench, "--answers", bench / "answers.jsonl",
            "--rules", bench / "rule.json", "--base-url", server.url, "--model", "judge", "--out",
            bench / "reviews.jsonl", *words)  # fmt: skip


def test_the_judge_is_asked_three_times_and_the_score_has_a_mean_and_a_deviation(bench, capsys):
    seen = []

    def answer(body):
        seen.append(body["messages"][1]["content"])
        return "8 6" if seen.count(seen[-1]) % 2 else "8 8"

    with FakeOpenAI(answer) as server:
        assert run(*judge_words(bench, server, "--repeats", 3, "--concurrency", 1)) == 0
        assert len(server.answered) == 18
        body = server.answered[0]
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0.2, 1024, "judge")
        assert run(*judge_words(bench, server, "--repeats", 3)) == 0
        assert len(server.answered) == 18  # the second start bills nothing again
    capsys.readouterr()
    assert run("score", "--benchmark", "llava_bench_coco", "--data", bench, bench / "reviews.jsonl") == 0
    # 75, 100, 75: mean 83.33, sample deviation 14.43
    assert "83.33 ± 14.43   of 6" in capsys.readouterr().out


def test_an_unreadable_review_is_asked_for_again_then_kept_and_counted(bench):
    def answer(body):
        return "Fine." if "Q4?" in body["messages"][1]["content"] else "7 7"

    with FakeOpenAI(answer) as server:
        assert run(*judge_words(bench, server, "--attempts", 3)) == 0
        assert len(server.answered) == 5 + 3
    rows = {row.id: row for row in answers.read([bench / "reviews.jsonl"]).answers}
    assert (rows["4"].text, rows["4"].metadata["attempts"], rows["0"].metadata["attempts"]) == ("Fine.", 3, 1)


def test_a_review_that_never_came_is_named_and_not_scored(bench, capsys):
    with FakeOpenAI(faults=always("400")) as server:
        assert run(*judge_words(bench, server)) == 65
    assert "id='0' repeat 0 not_answered: HTTP 400" in capsys.readouterr().out
    assert run("score", "--benchmark", "llava_bench_coco", "--data", bench, bench / "reviews.jsonl") == 65
    assert "id='0' not_answered" in capsys.readouterr().err


def test_a_score_of_reviews_names_the_candidate_not_the_judge(bench, capsys):
    """Users' D12."""
    with FakeOpenAI(lambda body: "8 6") as server:
        assert run(*judge_words(bench, server)) == 0
    capsys.readouterr()
    place = ("--benchmark", "llava_bench_coco", "--data", bench, bench / "reviews.jsonl")
    assert run("score", *place, "--out", bench / "s.json") == 0
    assert "6 questions, model llava (" in capsys.readouterr().out
    assert run("report", bench / "s.json", "--out", bench / "out") == 0
    lines = (bench / "out" / "report.md").read_text().splitlines()
    assert any(line.startswith("| llava ") for line in lines) and not any(line.startswith("| judge") for line in lines)


@pytest.mark.parametrize("compat, lacking", [("false", "left out of the means"), ("true", "-1 and -1 in the means")])
def test_reviews_without_scores_are_counted_in_one_way(bench, compat, lacking, capsys):
    """Users' D13: they were "counted as wrong" and "left out of the means" in the same lines."""
    rows = [Answer(i, text, "judge") for i, text in REVIEWS.items() if i != "5"]
    answers.write(bench / "reviews.jsonl", [*rows, Answer("5", "", "judge")])
    words = ("--benchmark", "llava_bench_coco", "--data", bench, bench / "reviews.jsonl", "--option")
    assert run("score", *words, f"compat={compat}") == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [line for line in lines if line.startswith("1 ")]
    assert [line.split()[1] for line in kinds] == ["empty_answer:", "unparsed:"]
    assert all(lacking in line for line in kinds) and "wrong" not in "".join(lines)


def test_a_kind_that_no_review_is_of_has_no_number(bench, capsys):
    answers.write(bench / "reviews.jsonl", [Answer(i, REVIEWS[i], "judge") for i in "03"])
    words = ("--benchmark", "llava_bench_coco", "--data", bench, bench / "reviews.jsonl", "--allow-faults")
    assert run("score", *words) == 0
    assert re.search(r"\n  detail +-   of 0\n", capsys.readouterr().out)


def test_references_and_contexts_that_do_not_join_are_named(bench):
    path = bench / "qa90_gpt4_answer.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]) + '{"question_id": 77, "text": "R"}\n')
    (bench / "caps_boxes_coco2014_val_80.jsonl").write_text("")
    with pytest.raises(DataError, match="id='77' unknown_id") as caught:
        load(bench)
    assert "missing_answer" in str(caught.value) and "no context is about a.jpg" in str(caught.value)


def test_rules_without_a_kind_are_refused(bench):
    (bench / "rule.json").write_text(json.dumps({"conv": RULES["conv"], "detail": {"prompt": "x"}}))
    with pytest.raises(DataError, match="rule 'complex'"):
        judge.rules(bench / "rule.json", load(bench))


def test_the_real_files_join_and_make_90_requests_with_the_reference_first(shared, capsys, tmp_path):
    folder: Path = shared / "data" / "llava_bench"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the published files of LLaVA-Bench (COCO)")
    questions = load(folder)
    assert [question.kind for question in questions] == list(llava_bench.KINDS) * 30
    assert len({question.images for question in questions}) == 30
    answers.write(tmp_path / "a.jsonl", [Answer(question.id, f"<{question.id}>") for question in questions])
    assert run("judge", "--benchmark", "llava_bench_coco", "--data", folder, "--answers", tmp_path / "a.jsonl",
               "--rules", folder / "rule.json", "--dry-run", "--out", tmp_path / "r.jsonl") == 0  # fmt: skip
    requests = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(requests) == 90
    references = {}
    for line in (folder / "qa90_gpt4_answer.jsonl").read_text().splitlines():
        row = json.loads(line)
        references[str(row["question_id"])] = row["text"]
    rules = json.loads((folder / "rule.json").read_text())
    for request, question in zip(requests, questions):
        words = request["messages"][1]["content"]
        candidate = words.index(f"[Assistant 2]\n<{question.id}>")
        assert 0 < words.index("[Context]\n") + 1 < words.index(f"[Question]\n{question.text}")
        assert words.index(f"[Assistant 1]\n{references[question.id]}") < candidate
        assert words.index(rules[question.kind]["prompt"]) > candidate
    assert (folder / "caps_boxes_coco2014_val_80.jsonl").read_text().count("\n") >= 79
