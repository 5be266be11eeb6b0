"""Each benchmark's own rule on strings and small tables whose numbers were worked out by hand."""

import base64
import csv
import io
import json
import re
import zipfile
from xml.etree import ElementTree

import pytest
from etils import epath

from llava_jax.errors import DataError
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.benchmarks import mmbench, mme, pope, vqa
from llava_jax.evaluate.benchmarks.all import BENCHMARKS, get
from llava_jax.evaluate.questions import Question, load_questions, resolve_options


def load(name, folder, *options):
    benchmark = get(name)
    resolved = resolve_options(benchmark, options)
    return benchmark, load_questions(benchmark, folder, resolved)[0], resolved


def put(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- VQA

# Recorded from the reference's normaliser.
NORMALISED = {
    "Yes.": "yes", "Two dogs": "2 dogs", "A cat, a dog": "cat dog", "1,000": "1000", "none": "0", "it's": "it 's",
    "U.S.A.": "usa", "3.5": "3.5", "the end...": "end", "dont": "don't", "New-York": "new york",
    "left/right": "left right", "50 %": "50 %", "10:30 a.m.": "10:30 am", "a  b": "b",
}  # fmt: skip


@pytest.mark.parametrize("text", NORMALISED)
def test_an_answer_is_normalised_as_evalai_does(text):
    assert vqa.normalised(text) == NORMALISED[text]


def test_contractions_are_mended_wherever_an_apostrophe_is_missing():
    for text, fixed in {"couldnt've": "couldn't've", "couldn'tve": "couldn't've", "twas": "'twas", "shes": "shes",
                        "yall'd've": "y'all'd've", "somebody'd": "somebodyd"}.items():  # fmt: skip
        assert vqa.normalised(text) == fixed


def test_only_32_dots_are_removed():
    assert vqa.normalised("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize("people, mark", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_with_ten_people(people, mark):
    others = ["Two"] * people + [f"other {i}" for i in range(10 - people)]
    assert vqa.agreement("2", others) == pytest.approx(mark)


def test_vqav2_asks_and_submits_and_scores_where_truth_is_public(tmp_path):
    questions_json = {"questions": [{"question_id": 5, "image_id": 42, "question": "How many?"}]}
    put(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json", questions_json)
    put(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", questions_json)
    all_questions = {"questions": [questions_json["questions"][0] | {"question_id": 4}, *questions_json["questions"]]}
    put(tmp_path, "v2_OpenEnded_mscoco_test2015_questions.json", all_questions)
    truth = {"question_id": 5, "answer_type": "number", "answers": [{"answer": "2"}] * 3 + [{"answer": "3"}] * 7}
    put(tmp_path, "v2_mscoco_val2014_annotations.json", {"annotations": [truth]})
    benchmark, questions, options = load("vqav2", tmp_path)
    assert questions == [Question("5", "How many?\nAnswer the question using a single word or phrase.",
                                  ("COCO_test2015_000000000042.jpg",))]  # fmt: skip
    files = benchmark.submit(epath.Path(tmp_path), questions, {"5": "Two."}, options)
    whole = [{"question_id": 4, "answer": ""}, {"question_id": 5, "answer": "2"}]
    assert json.loads(files["vqav2_test-dev2015.json"]) == whole
    benchmark, questions, options = load("vqav2", tmp_path, "split=val2014")
    score = benchmark.score(questions, {"5": "two"}, options)
    assert score.numbers == pytest.approx({"accuracy": 90, "number": 90})


def test_annotations_of_another_shape_are_refused_by_row_and_field(tmp_path):
    questions_json = {"questions": [{"question_id": 1, "image_id": 2, "question": "What?"}]}
    put(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", questions_json)
    put(tmp_path, "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": [{}]}]})
    with pytest.raises(DataError, match=r"annotations\[0\]: answers: answer is missing"):
        load("vqav2", tmp_path, "split=val2014")


@pytest.mark.parametrize("name, file, content, message", [
    ("mmvet", "mm-vet.json", [], "mm-vet.json: JSON of type list: want dict"),
    ("gqa", "testdev_balanced_questions.json", [], "type list: want dict"),
    ("vizwiz", "test.json", 5, "type int: want list"),
    ("seed", "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": [
        {"question_id": 1, "data_type": "image", "data_id": "1", "question_type_id": 2, "question": "What?"}
        | {f"choice_{letter}": "a" for letter in "abcd"}]}, "questions[0]: question_type_id=2: want one of"),
])  # fmt: skip
def test_a_file_of_another_shape_is_refused(tmp_path, name, file, content, message):
    put(tmp_path, file, content)
    with pytest.raises(DataError, match=re.escape(message)):
        load(name, tmp_path)


def test_vizwiz_asks_for_unanswerable_and_keeps_ids_by_picture(tmp_path):
    put(tmp_path, "test.json", [{"image": "VizWiz_test_1.jpg", "question": "What?"}])
    benchmark, questions, options = load("vizwiz", tmp_path)
    assert "'Unanswerable'" in questions[0].text
    files = benchmark.submit(epath.Path(tmp_path), questions, {"VizWiz_test_1.jpg": "A can"}, options)
    assert json.loads(files["vizwiz_test.json"]) == [{"image": "VizWiz_test_1.jpg", "answer": "can"}]


def test_textvqa_takes_the_ocr_lines_by_picture_and_question(tmp_path):
    row = {"question_id": 1, "image_id": "ab", "question": "What brand?", "answers": ["x"] * 10}
    put(tmp_path, "TextVQA_0.5.1_val.json", {"data": [row]})
    put(tmp_path, "llava_textvqa_val_v051_ocr.jsonl", lines([{"question_id": "ab", "text": "what brand?\nReference"}]))
    benchmark, questions, options = load("textvqa", tmp_path)
    assert (questions[0].text, questions[0].images) == ("what brand?\nReference", ("ab.jpg",))
    assert benchmark.score(questions, {"1": "X."}, options).numbers == {"accuracy": 100}
    put(tmp_path, "llava_textvqa_val_v051_ocr.jsonl", lines([{"question_id": "cd", "text": "What brand?"}]))
    with pytest.raises(DataError, match="no question 'What brand[?]' about ab"):
        load("textvqa", tmp_path)


# ---- yes or no


@pytest.mark.parametrize("text, yes", [
    ("No", False), ("No.", False), ("no", False), ("There is not a dog.", False), ("Yes, but no cat", False),
    ("NO", True), ("None", True), ("No\n", True), ("There isn't a dog", True), ("Yes. Not sure", True),
])  # fmt: skip
def test_pope_reads_yes_and_no_as_the_reference_does(text, yes):
    assert pope.says_yes(text) is yes


def test_pope_numbers_by_hand(tmp_path):
    for kind in pope.KINDS:
        rows = [{"question_id": i, "image": "a.jpg", "text": "Is it?", "label": "yes" if i < 2 else "no"}
                for i in range(4)]  # fmt: skip
        put(tmp_path, f"coco_pope_{kind}.json", lines(rows))
    benchmark, questions, options = load("pope", tmp_path)
    given = {question.id: "yes" for question in questions} | {"random/3": "no", "popular/0": "no"}
    given.pop("adversarial/2")  # a missing answer is wrong: counted as the false yes
    score = benchmark.score(questions, given, options)
    assert score.numbers["random precision"] == pytest.approx(200 / 3)
    assert score.numbers["random F1"] == pytest.approx(80)
    assert score.numbers["popular F1"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5) * 100)
    assert score.numbers["adversarial accuracy"] == 50
    assert score.numbers["F1"] == pytest.approx(sum(score.numbers[f"{kind} F1"] for kind in pope.KINDS) / 3)


@pytest.mark.parametrize("text, expected", [("Yes", "yes"), ("no.", "no"), ("Yes, it", "yes"), ("The", "other"),
                                            ("Not", "no"), ("It is no", "other"), ("", "other")])  # fmt: skip
def test_mme_reads_the_first_four_letters(text, expected):
    assert mme.verdict(text) == expected


def test_mme_adds_answers_and_whole_pictures(tmp_path):
    root = tmp_path / "MME_Benchmark_release_version"
    for kind in (*mme.PERCEPTION, *mme.COGNITION):
        put(root, f"{kind}/1.txt", "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n")
        put(root, f"{kind}/1.jpg", "")
    put(root, "artwork/questions_answers_YN/2.txt", "Really?\tYes\nIs it?\tNo")  # the folder of its own wins
    put(root, "artwork/images/2.png", "")
    benchmark, questions, options = load("mme", tmp_path)
    assert len(questions) == 28 and questions[0].text == "Is it?\nAnswer the question using a single word or phrase."
    assert {q.images[0] for q in questions if q.kind == "artwork"} == {"artwork/images/2.png"}
    predictions = {q.id: "yes" if q.id.endswith("#0") or q.kind == "count" else "no" for q in questions}
    score = benchmark.score(questions, predictions, options)
    assert (score.numbers["count"], score.numbers["scene"]) == (50, 200)
    assert (score.numbers["perception"], score.numbers["cognition"]) == (9 * 200 + 50, 800)
    put(root, "count/1.txt", "Is it?")
    with pytest.raises(DataError, match="count/1#0"):
        load("mme", tmp_path)


# ---- letters


def tsv(folder, rows, name="mmbench"):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"],
                            delimiter="\t")  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    put(folder, mmbench.FILES[name], out.getvalue())


PICTURE = base64.b64encode(bytes(range(100))).decode()
ROW = {"index": "7", "question": "Which?", "hint": "nan", "A": "cat", "B": "dog", "C": "nan", "D": "nan", "answer": "A",
       "category": "pets", "image": PICTURE}  # fmt: skip


def test_mmbench_asks_all_rotations_and_solves_only_all(tmp_path):
    tsv(tmp_path, [ROW, ROW | {"index": "8", "hint": "Look.", "answer": "B"}])
    benchmark, questions, options = load("mmbench", tmp_path, "rounds=all")
    assert [(q.id, q.truth) for q in questions] == [("7", "A"), ("1000007", "B"), ("8", "B"), ("1000008", "A")]
    assert questions[0].text.startswith("Which?\nA. cat\nB. dog\nAnswer with")
    assert questions[3].text.startswith("Look.\nWhich?\nA. dog\nB. cat\n")
    assert questions[0].images == (bytes(range(100)),)
    score = benchmark.score(questions, {"7": "A", "1000007": "B.", "8": "B", "1000008": "B. cat"}, options)
    assert score.numbers == {"circular": 50, "vanilla": 100, "pets": 50}


def test_mmbench_keeps_the_rotations_of_a_file_and_finds_their_pictures(tmp_path):
    tsv(tmp_path, [ROW, ROW | {"index": "1000007", "A": "dog", "B": "cat", "answer": "B", "image": "7"}], "mmbench_cn")
    benchmark, questions, options = load("mmbench_cn", tmp_path)
    assert [q.id for q in questions] == ["7", "1000007"] and questions[1].images == questions[0].images
    assert questions[0].text.endswith("请直接回答选项字母。")
    score = benchmark.score(questions, {"7": "E", "1000007": "perhaps"}, options)
    assert [(fault.id, fault.kind) for fault in score.findings] == [("7", "wrong_letter"), ("1000007", "unparsed")]


def test_mmbench_names_a_lost_picture_and_a_cut_row(tmp_path):
    tsv(tmp_path, [ROW | {"image": "9"}])
    with pytest.raises(DataError, match="id='7' missing_image"):
        load("mmbench", tmp_path)
    put(tmp_path, mmbench.FILES["mmbench"], "index\tquestion\tA\tB\tanswer\timage\n7\tWhi")
    with pytest.raises(DataError, match="id='7' truncated_line"):
        load("mmbench", tmp_path)


def test_the_sheet_for_mmbench_holds_the_table_and_the_predictions(tmp_path):
    tsv(tmp_path, [ROW | {"question": "a < b & \x07c?"}])
    benchmark, questions, options = load("mmbench", tmp_path)
    archive = zipfile.ZipFile(
        io.BytesIO(benchmark.submit(epath.Path(tmp_path), questions, {"7": "A"}, options)["mmbench.xlsx"])
    )
    for name in archive.namelist():
        ElementTree.fromstring(archive.read(name))
    cells = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml")).iter()
    texts = [cell.text or "" for cell in cells if cell.tag.endswith("}t")]
    assert texts == ["index", "question", "A", "B", "C", "D", "prediction", "answer",
                     "7", "a < b & c?", "cat", "dog", "nan", "nan", "A", "A"]  # fmt: skip


def test_seed_wants_the_bare_letter_and_knows_pictures_from_videos(tmp_path):
    row = {"answer": "B", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "data_id": "p",
           "data_type": "image", "question": "How many?", "question_id": "1", "question_type_id": 5}  # fmt: skip
    video = row | {"data_type": "video", "data_id": "v.mp4", "question_id": "2", "question_type_id": 10}
    contents = {"questions": [row, video], "question_type": {"Instances Counting": 5, "Action Recognition": 10}}
    put(tmp_path, "SEED-Bench.json", contents)
    for folder in ("SEED-Bench-image", "SEED-Bench-video-image"):
        (tmp_path / folder).mkdir()
    benchmark, questions, options = load("seed", tmp_path)
    assert [q.images[0] for q in questions] == ["SEED-Bench-image/p", "SEED-Bench-video-image/2.png"]
    score = benchmark.score(questions, {"1": "B", "2": "B."}, options)
    assert score.numbers == {"all": 50, "image": 100, "video": 0, "Instances Counting": 100, "Action Recognition": 0}
    assert [fault.kind for fault in score.findings] == ["unparsed"]


def test_gqa_compares_without_case_and_last_dot(tmp_path):
    rows = {"1": {"question": "Is it?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
            "2": {"question": "What?", "imageId": "n2", "answer": "cat", "types": {"structural": "query"}}}  # fmt: skip
    put(tmp_path, "testdev_balanced_questions.json", rows)
    benchmark, questions, options = load("gqa", tmp_path)
    score = benchmark.score(questions, {"1": "Yes.", "2": "a cat"}, options)
    assert score.numbers == {"accuracy": 50, "binary": 100, "open": 0}
    rows.pop("2")
    put(tmp_path, "testdev_balanced_questions.json", rows)
    put(tmp_path, "a.jsonl", lines([{"question_id": "1", "text": "no"}]))
    result = scores.score(benchmark, load("gqa", tmp_path)[1], [tmp_path / "a.jsonl"], options)
    cells = {name: scores.cell_text(result, name) for name in result.numbers}
    assert cells == {"accuracy": "0.00", "binary": "0.00", "open": "-"}, "a split that is empty has no number"
    files = benchmark.submit(epath.Path(tmp_path), questions, {"1": "Yes.", "2": "A cat"}, options)
    assert json.loads(files["testdev_balanced_predictions.json"])[1] == {"questionId": "2", "prediction": "a cat"}


def test_mmvet_is_left_to_its_own_grader(tmp_path):
    put(tmp_path, "mm-vet.json", {"v1_0": {"imagename": "a.png", "question": "Why?", "capability": ["ocr", "math"]}})
    benchmark, questions, options = load("mmvet", tmp_path)
    assert benchmark.score is None
    assert json.loads(benchmark.submit(epath.Path(tmp_path), questions, {"v1_0": "So."}, options)["mmvet.json"]) == {
        "v1_0": "So."
    }


def test_every_benchmark_says_what_it_needs():
    assert len(BENCHMARKS) == 14
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.needs and (benchmark.score or benchmark.submit)
        options = resolve_options(benchmark, [])
        for need in benchmark.needs:
            option, equals, value = need.only.partition("=")
            assert not equals or value in benchmark.options[option]
        with pytest.raises(DataError, match="lacks"):
            load_questions(benchmark, "/nowhere", options)
