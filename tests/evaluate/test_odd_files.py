"""Files of benchmarks, answers and scores with odd values in every place: they are read, or an error of ours."""

import base64
import json

import pytest
from etils import epath

from llava_jax import errors
from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import load_questions, resolve_options
from tests.evaluate.test_scienceqa import PROBLEM
from tests.odd import TEXTS, changed

PEOPLE = [{"answer": "cat"}] * 10
LETTERED = {f"choice_{letter}": letter for letter in "abcd"}
# benchmark -> (options, {file: value of a .json, or rows of a .jsonl})
FILES = {
    "custom": ([], {"questions.jsonl": [
        {"id": "1", "image": ["a.jpg"], "question": "Which?", "choices": ["a", "b"], "answer": "B", "category": "c"},
        {"id": 2, "question": "What?", "answer": ["x", "y"]}]}),
    "gqa": ([], {"testdev_balanced_questions.json": {
        "1": {"question": "Is it?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}}}}),
    "llava_bench_coco": ([], {
        "qa90_questions.jsonl": [{"question_id": 0, "image": "a.jpg", "text": "What?", "category": "conv"}],
        "qa90_gpt4_answer.jsonl": [{"question_id": 0, "text": "A cat."}],
        "caps_boxes_coco2014_val_80.jsonl": [{"image": "a.jpg", "captions": ["One."], "instances": [
            {"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]}]}),
    "llava_bench_wild": ([], {
        "questions.jsonl": [{"question_id": 0, "image": "a.jpg", "text": "What?", "category": "conv"}],
        "context.jsonl": [{"image": "a.jpg", "caption": ["One.", "Two."]}],
        "answers_gpt4.jsonl": [{"question_id": 0, "text": "A cat."}]}),
    "mmvet": ([], {"mm-vet.json": {"v1_0": {"imagename": "a.png", "question": "Why?", "capability": ["ocr"]}}}),
    "pope": (["questions=llava.jsonl"], {
        **{f"coco_pope_{kind}.json": [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}]
           for kind in ("random", "popular", "adversarial")},
        "llava.jsonl": [{"question_id": 5, "image": "a.jpg", "text": "Is it?\nYes?", "category": "random"}]}),
    "scienceqa": ([], {"problems.json": {"1": PROBLEM}, "pid_splits.json": {"test": ["1"]}}),
    "seed": ([], {"SEED-Bench.json": {"question_type": {"Scene": 1}, "questions": [
        {"question_id": 1, "data_type": "image", "data_id": "1", "question_type_id": 1, "question": "What?",
         "answer": "A", **LETTERED}]}}),
    "textvqa": ([], {
        "TextVQA_0.5.1_val.json": {"data": [
            {"question_id": 1, "image_id": "ab", "question": "What?", "answers": ["x"] * 10}]},
        "llava_textvqa_val_v051_ocr.jsonl": [{"question_id": "ab", "text": "what?\nReference"}]}),
    "vizwiz": (["split=val"], {"val.json": [
        {"image": "a.jpg", "question": "What?", "answers": PEOPLE, "answer_type": "other"}]}),
    "vqav2": (["split=val2014"], {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"question_id": 5, "image_id": 42, "question": "What?"}]},
        "v2_mscoco_val2014_annotations.json": {
            "annotations": [{"question_id": 5, "answer_type": "other", "answers": PEOPLE}]}}),
}  # fmt: skip


def write(folder, name, value):
    if name.endswith(".jsonl") or name.startswith("coco_pope"):
        rows = value if isinstance(value, list) else [value]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (folder / name).write_text(json.dumps(value))


def run(benchmark, folder, options):
    """Loads, scores and submits, as far as the files allow; the message of an error of ours, or ""."""
    try:
        questions, _ = load_questions(benchmark, folder, options, images=False)
        predictions = {question.id: "yes" for question in questions}
        if benchmark.score and all(question.truth is not None for question in questions):
            benchmark.score(questions, predictions, options)
        if benchmark.submit:
            benchmark.submit(epath.Path(folder), questions, predictions, options)
    except (ValueError, OSError) as error:
        if errors.exit_code(error) is None:
            raise
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_an_odd_value_anywhere_in_a_benchmarks_files_is_an_error_of_ours_or_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, files = FILES[name]
    benchmark = get(name)
    options = resolve_options(benchmark, words)
    # The pictures' folders do not exist.
    monkeypatch.setattr("llava_jax.evaluate.questions._active_needs", lambda benchmark, options: ())
    for file, value in files.items():
        write(tmp_path, file, value)
    assert run(benchmark, tmp_path, options) == ""
    count = errors = 0
    for file, value in files.items():
        for other in changed(value):
            write(tmp_path, file, other)
            try:
                errors += bool(run(benchmark, tmp_path, options))
            except Exception as error:
                raise AssertionError(f"{file}: {json.dumps(other)[:400]}") from error
            count += 1
        for text in TEXTS:
            (tmp_path / file).write_text(text)
            run(benchmark, tmp_path, options)
        (tmp_path / file).write_bytes(b"\xff\xfe\x00\x80")
        run(benchmark, tmp_path, options)
        write(tmp_path, file, value)
    assert 0 < errors < count


MME, TSV = "MME_Benchmark_release_version", "mmbench_dev_20230712.tsv"


@pytest.mark.parametrize("data", [
    b"", b"\xff\xfe", b"index\n", b"index\tquestion\tA\tB\tanswer\timage\n\xb2\tq\ta\tb\tA\t" + b"A" * 80,
    "index\tquestion\tA\tB\tanswer\timage\n²\tq\ta\tb\tA\t".encode() + b"A" * 80,
    b"index\tquestion\tA\tB\tanswer\timage\n7\tq\ta\tb\tA\t" + b"A" * 81,
    b"index\tquestion\tA\tB\tanswer\timage\n7\tq\ta\tb\tA\t" + b"?" * 80,
    b"index\tquestion\tA\tB\tanswer\timage\n7\tq\ta\tb\tA\t\x00" + b"A" * 80,
    b"index\tquestion\tA\tB\tanswer\timage\n7\tq\ta\tb\tE\t" + base64.b64encode(bytes(80)),
    b"index\tquestion\tA\tB\tanswer\timage\n7\tq\tnan\tb\tA\t" + base64.b64encode(bytes(80)),
    b'index\tquestion\tA\tB\tanswer\timage\n"7\tq\tnan\tb\tA\t' + base64.b64encode(bytes(80)),
    b"index\tindex\tquestion\tA\timage\n7\t8\tq\ta\t" + base64.b64encode(bytes(80)),
])  # fmt: skip
def test_an_odd_table_is_an_error_of_ours_or_read(data, tmp_path):
    (tmp_path / TSV).write_bytes(data)
    benchmark = get("mmbench")
    run(benchmark, tmp_path, resolve_options(benchmark, []))
    run(benchmark, tmp_path, resolve_options(benchmark, ["rounds=all"]))


def test_mmes_texts_that_are_no_utf8_are_an_error_of_ours(tmp_path):
    from llava_jax.evaluate.benchmarks import mme

    for kind in (*mme.PERCEPTION, *mme.COGNITION):
        (tmp_path / MME / kind).mkdir(parents=True)
        (tmp_path / MME / kind / "1.txt").write_bytes(b"Is it \xe9?\tYes\n")
        (tmp_path / MME / kind / "1.jpg").touch()
    assert "1.txt" in run(get("mme"), tmp_path, {})


# ---- answers


ROW = {"question_id": "1", "prompt": "What?", "text": "x", "model_id": "m", "answer_id": "a",
       "metadata": {"repeat": 0, "run": "r", "fault": "not_answered", "detail": "d", "candidate": "c"}}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    rows = [{"id": "1", "question": "What?", "answer": "x"}, {"id": "2", "question": "What?", "answer": "x"}]
    write(tmp_path, "questions.jsonl", rows)
    (tmp_path / "images").mkdir()
    return tmp_path


def test_odd_values_of_an_answer_file_are_named_in_lines_of_ours(bench, capsys):
    """D5: `metadata.fault` a list was a TypeError."""
    place = ["--benchmark", "custom", "--data", str(bench)]
    good = {"question_id": "2", "text": "x"}
    for row in changed(ROW):
        write(bench, "answers.jsonl", [row, good])
        for words in (["score", *place, "--allow-faults", "--out", str(bench / "s.json")],
                      ["merge", *place, "--out", str(bench / "merged.jsonl")]):  # fmt: skip
            assert command.main([*words, str(bench / "answers.jsonl")]) in (0, 64, 65), json.dumps(row)
            text = capsys.readouterr()
            assert "Traceback" not in text.err
    write(bench, "answers.jsonl", [ROW | {"metadata": {"fault": ["x"]}}, good])
    assert command.main(["score", *place, str(bench / "answers.jsonl")]) == 65
    assert "id='1' bad_shape: metadata: want a number `repeat`, a known `fault`" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, '{"question_id": ' + "[" * 100_000, "\x00", "{}", "", "\ufeff"])
def test_a_damaged_answer_file_is_named_in_lines_of_ours(text, bench, capsys):
    (bench / "answers.jsonl").write_text(text)
    assert command.main(["score", "--benchmark", "custom", "--data", str(bench), str(bench / "answers.jsonl")]) == 65
    assert "answers.jsonl" in capsys.readouterr().err


def test_odd_values_of_a_score_file_are_one_line(bench, capsys):
    write(bench, "answers.jsonl", [{"question_id": i, "text": "x", "model_id": "m"} for i in "12"])
    place = ["--benchmark", "custom", "--data", str(bench), "--out", str(bench / "s.json")]
    assert command.main(["score", *place, str(bench / "answers.jsonl")]) == 0
    score = json.loads((bench / "s.json").read_text())
    score["findings"] = [{"kind": "unparsed", "id": "1", "detail": "x", "where": ""}]
    report = ["report", str(bench / "s.json"), "--out", str(bench / "out")]
    write(bench, "s.json", score)
    assert command.main(report) == 0
    capsys.readouterr()
    for other in [*changed(score), "[" * 100_000]:
        if isinstance(other, str) and len(other) > 1000:
            (bench / "s.json").write_text(other)
        else:
            write(bench, "s.json", other)
        code = command.main(report)
        error = capsys.readouterr().err
        assert code == 0 or (code == 65 and error.count("\n") == 1), json.dumps(other)[:400] + error


def test_rules_of_a_judge_are_read_or_refused_in_one_line(tmp_path, capsys):
    for file, value in FILES["llava_bench_coco"][1].items():
        write(tmp_path, file, value)
    (tmp_path / "val2014").mkdir()
    write(tmp_path, "answers.jsonl", [{"question_id": 0, "text": "x"}])
    rules = {"conv": {"role": "Assistant", "prompt": "Judge."}}
    words = ["judge", "--benchmark", "llava_bench_coco", "--data", str(tmp_path), "--answers",
             str(tmp_path / "answers.jsonl"), "--rules", str(tmp_path / "rule.json"), "--dry-run",
             "--out", "x"]  # fmt: skip
    for value in changed(rules):
        write(tmp_path, "rule.json", value)
        assert command.main(words) in (0, 65)
        assert capsys.readouterr().err.count("\n") <= 1
