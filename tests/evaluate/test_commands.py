"""From answer files to an ensemble, a score and a report, through the commands."""

import csv
import json
import sys

import pytest

from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answers, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import Fault
from llava_jax.evaluate.score import Result, Value
from tests.evaluate.test_scienceqa import PROBLEM, write
from tests.fake_openai import FakeOpenAI


def run(*args):
    return command.main([str(arg) for arg in args])


@pytest.fixture
def bench(tmp_path):
    """Four problems whose answer is B; LLaVA is right on 0 and 1, GPT-4 on 0 and 2 and silent on 3."""
    problems = {str(i): PROBLEM | {"question": f"Problem {i}?"} for i in range(4)}
    write(tmp_path, problems, test=tuple(problems))
    letters_by_side = {"ours": "BBAA", "gpt4": "BAB?"}
    for name, letters in letters_by_side.items():
        rows = [Answer(str(i), f"Well. The answer is {letter}." if letter != "?" else "Hm.", name)
                for i, letter in enumerate(letters)]  # fmt: skip
        answers.write(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def ensemble(bench, way, *args):
    return run("ensemble", way, "--data", bench, "--ours", bench / "ours.jsonl", "--gpt4", bench / "gpt4.jsonl",
               "--out", bench / f"{way}.jsonl", *args)  # fmt: skip


def accuracy(bench, name):
    options = ("--benchmark", "scienceqa", "--data", bench)
    assert run("score", *options, bench / f"{name}.jsonl", "--out", bench / f"{name}.json", "--name", name) == 0
    return scores.from_json(bench / f"{name}.json")[1].numbers["Avg"].mean


def test_complement_and_judge_make_answer_files_that_score(bench, capsys):
    assert ensemble(bench, "complement") == 0
    assert "3 answers of gpt4, 1 answers of ours" in capsys.readouterr().out

    def judge(body):
        return "B is right. The answer is B." if "Problem 2" in body["messages"][1]["content"] else "Both, perhaps."

    with FakeOpenAI(judge) as server:
        endpoint = ("--base-url", server.url, "--model", "judge")
        assert ensemble(bench, "judge", *endpoint) == 0
        assert len(server.answered) == 3  # 0 is not disputed
        assert ensemble(bench, "judge", *endpoint) == 0
        assert len(server.answered) == 3  # and nothing is billed twice
    accuracies = {name: accuracy(bench, name) for name in ("ours", "gpt4", "complement", "judge")}
    assert accuracies == {"ours": 50, "gpt4": 50, "complement": 50, "judge": 75}
    expected = (bench / "judge.jsonl").read_text()
    assert ensemble(bench, "judge", "--requery", bench / "judge.jsonl.requery") == 0
    assert (bench / "judge.jsonl").read_text() == expected


def test_an_ensemble_wants_every_answer_of_both(bench, capsys):
    lines = (bench / "gpt4.jsonl").read_text().splitlines(keepends=True)
    (bench / "gpt4.jsonl").write_text("".join(lines[:-1]))
    assert ensemble(bench, "complement") == 65
    assert "id='3' missing_answer" in capsys.readouterr().err
    (bench / "gpt4.jsonl").write_text("".join(lines))
    assert ensemble(bench, "judge") == 64
    assert "--base-url" in capsys.readouterr().err


def result(model, mean, benchmark="pope", sd=0.0, findings=()):
    numbers = {"F1": Value(mean, sd)}
    return Result(benchmark, benchmark.upper(), model, {}, 10, 2 if sd else 1, numbers, "F1", {}, findings)


def test_a_report_has_rows_for_runs_and_published_ones(tmp_path):
    results = {"a": result("a", 80), "b": result("b", 81.5, sd=0.25, findings=(Fault("unparsed", "7", "x"),)),
               "c": result("a", 60, "gqa")}  # fmt: skip
    for name, run_result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(scores.to_json(run_result, "a" if name == "c" else name)))
    files = [tmp_path / f"{name}.json" for name in results]
    assert run("report", *files, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert any(line.split() == "| a | 80.00 | 60.00 |".split() for line in page)
    assert any(line.split() == "| b | 81.50 ± 0.25 | |".split() for line in page)
    assert any(line.split() == "| LLaVA-1.5-7B (published) | 85.90 |".split() for line in page)
    assert any(line.split() == "| b | **81.50 ± 0.25** |".split() for line in page)
    assert ("- b: 10 questions, mean and sample standard deviation of 2 repeats, 1 unparsed, counted as wrong" in page)


def test_a_report_is_csv_and_latex_too(tmp_path):
    numbers = {"F1": Value(80, 0.25), "random F1": Value(70, 0), "open": Value(0, 0)}
    odd = result('50% & "a_b" {x}\\~^#$', 80.0, sd=0.25)._replace(numbers=numbers, counts={"open of": 0})
    for name, one in {"a": odd, "b": result("b", 60, "gqa")}.items():
        scores.write(tmp_path / f"{name}.json", one)
    assert run("report", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "out") == 0
    rows = list(csv.reader((tmp_path / "out" / "report.csv").open(newline="")))
    assert rows[0] == ["benchmark", "run", "published", "column", "mean", "sd", "repeats"]
    assert ["pope", odd.model, "0", "F1", "80.0000", "0.2500", "2"] in rows
    assert ["pope", odd.model, "0", "open", "", "", "2"] in rows
    assert ["pope", "LLaVA-1.5-7B (published)", "1", "F1", "85.9", "", ""] in rows
    assert ["gqa", "b", "0", "F1", "60.0000", "0.0000", "1"] in rows
    text = (tmp_path / "out" / "report.tex").read_text()
    name = r"""50\% \& "a\_b" \{x\}\textbackslash{}\textasciitilde{}\textasciicircum{}\#\$"""
    assert rf"{name} & \textbf{{80.00 $\pm$ 0.25}} & 70.00 $\pm$ 0.00 & - \\" in text.splitlines()
    assert r"LLaVA-1.5-7B (published) & 85.90 &  &  \\" in text.splitlines()
    assert text.count(r"\begin{tabular}{lrrr}") == 1 and text.count(r"\begin{tabular}{lr}") == 1
    assert text.count("\\begin") == text.count("\\end") == 2


def test_differences_are_computed_not_copied():
    rows = [("best", result("", 90.92)), ("last layer", result("", 89.96))]
    assert report.differences(rows).splitlines()[3].split() == "| last layer | 89.96 (-0.96) |".split()


def test_published_rows_have_the_columns_of_their_benchmarks(bench):
    accuracy(bench, "ours")
    columns = set(scores.from_json(bench / "ours.json")[1].numbers)
    for row in report.PUBLISHED["scienceqa"]:
        assert set(row.numbers) == columns


def test_plots_want_matplotlib_and_say_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(scores.to_json(result("a", 80), "a")))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("report", tmp_path / "a.json", "--out", tmp_path / "out", "--plots", "png") == 64
    assert 'pip install ".[report]"' in capsys.readouterr().err


@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot_shows_every_run(tmp_path, kind, start):
    pytest.importorskip("matplotlib")
    rows = [("ours", result("a", 80, sd=1.0)), ("theirs", result("b", 70))]
    assert report.plot(rows, report.PUBLISHED["pope"], kind).startswith(start)


def test_a_file_that_is_no_score_is_named(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert run("report", tmp_path / "a.json", "--out", tmp_path / "out") == 65
    assert "not a file that `score --out` wrote" in capsys.readouterr().err
