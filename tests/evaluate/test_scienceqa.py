"""ScienceQA: every string that the parser must read or refuse, every format, and the published tables' breakdown."""

import itertools
import json

import pytest

from llava_jax.data import scienceqa as files
from llava_jax.errors import DataError
from llava_jax.evaluate import ensemble
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks import scienceqa
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import Question, load_questions, resolve_options

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
OF = dict(zip(COLUMNS, (2252, 889, 1100, 2046, 2017, 1435, 2724, 1517, 4241)))
# Published percentages as the integers that they come from; the last number of each is the published average.
# Source: research on the tables of arXiv 2304.08485: each cell is the only integer that rounds to it.
ROWS = {
    "GPT-3.5": (1681, 620, 836, 1523, 1357, 1111, 2092, 1045, 3137, 73.97),
    "GPT-3.5 CoT": (1699, 630, 859, 1528, 1360, 1147, 2131, 1057, 3188, 75.17),
    "LLaMA-Adapter": (1900, 785, 928, 1713, 1620, 1247, 2338, 1275, 3613, 85.19),
    "MM-CoT base": (1971, 686, 944, 1798, 1672, 1246, 2306, 1295, 3601, 84.91),
    "MM-CoT large": (2160, 729, 999, 1949, 1791, 1333, 2518, 1370, 3888, 91.68),
    "GPT-4": (1893, 653, 961, 1675, 1427, 1302, 2307, 1200, 3507, 82.69),
    "LLaVA": (2035, 853, 968, 1831, 1775, 1301, 2477, 1379, 3856, 90.92),
    "LLaVA + complement": (2035, 849, 974, 1822, 1771, 1307, 2512, 1346, 3858, 90.97),
    "LLaVA + judge": (2062, 860, 1002, 1854, 1795, 1342, 2526, 1398, 3924, 92.53),
}
PERCENT = {
    "GPT-4": (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69),
    "LLaVA": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaVA + complement": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "LLaVA + judge": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
}
SUBJECTS = ("natural science", "social science", "language science")
PROBLEM = {"question": "Which is it?", "choices": ["a tern", "an owl"], "answer": 1, "hint": "Look  here.",
           "image": "image.png", "grade": "grade3", "subject": "natural science", "topic": "birds",
           "lecture": "Birds\\nfly.", "solution": "It hoots.", "split": "test"}  # fmt: skip


def laid(groups: dict, is_right: bool) -> list:
    """Each group's name as often as it has right, or wrong, answers; groups: {name: (right, all)}."""
    return [name for name, (right, of) in groups.items() for _ in range(right if is_right else of - right)]


def table(row: tuple) -> tuple[list[Question], dict[str, bool]]:
    """4,241 questions with the published denominators, of which as many are right in each group as the row says.

    Subject, context and grade are laid out independently: first the right ones of each group, then the wrong ones.
    """
    right, of = dict(zip(COLUMNS, row)), OF
    context = {  # (hint, image): TXT and IMG overlap in 1,257 questions
        (True, True): of["TXT"] + of["IMG"] + of["NO"] - of["Avg"],
    }
    context[True, False] = of["TXT"] - context[True, True]
    context[False, True] = of["IMG"] - context[True, True]
    context[False, False] = of["NO"]
    both_right = right["TXT"] + right["IMG"] + right["NO"] - right["Avg"]
    context_right = {(True, True): both_right, (True, False): right["TXT"] - both_right,
                     (False, True): right["IMG"] - both_right, (False, False): right["NO"]}  # fmt: skip
    subject = dict(zip(SUBJECTS, COLUMNS[:3]))
    questions, truth = [], {}
    for is_right in (True, False):
        columns = (
            laid({s: (right[c], of[c]) for s, c in subject.items()}, is_right),
            laid({key: (context_right[key], context[key]) for key in context}, is_right),
            laid({grade: (right[c], of[c]) for grade, c in (("grade4", "G1-6"), ("grade10", "G7-12"))}, is_right),
        )
        for s, (hint, image), grade in zip(*columns, strict=True):
            identity = str(len(questions))
            questions.append(Question(identity, "?", (), s, 3, "B", {"subject": s, "hint": hint, "image": image,
                                                                     "grade": grade}))  # fmt: skip
            truth[identity] = is_right
    return questions, truth


@pytest.mark.parametrize("name", ROWS)
def test_the_breakdown_reproduces_a_published_row_from_4241_answers(name):
    questions, right = table(ROWS[name])
    answers = {identity: "The answer is B." if is_right else "The answer is A." for identity, is_right in right.items()}
    result = scienceqa.score(questions, answers, {})
    assert {column: result.counts[f"{column} of"] for column in COLUMNS} == OF
    assert tuple(result.counts[f"{column} right"] for column in COLUMNS) == ROWS[name][:9]
    assert round(result.numbers["Avg"], 2) == ROWS[name][9]
    assert not result.findings
    if name in PERCENT:
        assert tuple(round(result.numbers[column], 2) for column in COLUMNS) == PERCENT[name]


@pytest.mark.parametrize("text, letter", [
    ("A", "A"), ("E", "E"), ("A. foo", "A"), ("B. x", "B"), ("The answer is B.", "B"), ("So. The answer is C!", "C"),
    ("LECTURE: x\n The answer is D.", "D"), ("F. none", "F"),
    ("A.", ""), ("The answer is B", ""), ("(A)", ""), ("b", ""), ("ANSWER: A.", ""), ("", ""), ("F", ""), (" A", ""),
    ("The answer is A. The answer is A.", ""), ("the answer is A.", ""), ("The answer is a.", ""),
])  # fmt: skip
def test_the_parser_reads_three_forms_and_refuses_the_rest(text, letter):
    assert scienceqa.letter(text) == letter


def test_what_the_model_failed_to_say_is_wrong_and_named():
    questions = [Question(str(i), "?", (), "", 2, "A", {"subject": SUBJECTS[0], "hint": False, "image": False,
                                                        "grade": "grade1"}) for i in range(4)]  # fmt: skip
    result = scienceqa.score(questions, {"0": "A", "1": "D", "2": "perhaps A", "3": ""}, {})
    assert result.numbers["Avg"] == 25
    assert [(fault.id, fault.kind) for fault in result.findings] == [("1", "wrong_letter"), ("2", "unparsed")]


def write(folder, problems=None, test=("7",)):
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps({"7": PROBLEM} if problems is None else problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(test)}))
    return folder


GOLDENS = {
    "QCM-LEA": ("Which is it?\nContext: Look here.\nOptions: (A) a tern (B) an owl",
                "Birds\nfly. It hoots. The answer is B."),
    "CQM-A": ("Context: Look here.\nQuestion: Which is it?\nOptions: (A) a tern (B) an owl", "The answer is B."),
    "QCM-ALE": (None, "The answer is B. BECAUSE: Birds\nfly. It hoots."),
    "QCM-AEL": (None, "The answer is B. BECAUSE: It hoots. Birds\nfly."),
    "QCM-AL": (None, "The answer is B. BECAUSE: It hoots."),  # swapped in the reference
    "QCM-AE": (None, "The answer is B. BECAUSE: Birds\nfly."),
    "QCM-LA": (None, "Birds\nfly. The answer is B."),
    "QCM-EA": (None, "It hoots. The answer is B."),
    "QCM-ELA": (None, "It hoots. Birds\nfly. The answer is B."),
    "QCM-LEPA": (None, "LECTURE: Birds\nfly.\nSOLUTION: It hoots.\n###\nANSWER: B."),
    "QCMLE-A": ("Which is it?\nContext: Look here.\nOptions: (A) a tern (B) an owl\nBECAUSE: Birds\nfly. It hoots.",
                None),
    "QCEM-A": ("Which is it?\nContext: Look here.\nBECAUSE: It hoots.\nOptions: (A) a tern (B) an owl", None),
}  # fmt: skip


@pytest.mark.parametrize("format", GOLDENS)
def test_a_problem_is_asked_and_answered_as_the_reference_does(tmp_path, format):
    problem = files.read(write(tmp_path))["7"]
    for text, expected in zip(files.texts(problem, format), GOLDENS[format]):
        assert expected is None or text == expected


def test_empty_parts_leave_no_trace_but_the_references_own(tmp_path):
    bare = PROBLEM | {"hint": " ", "lecture": "", "solution": "", "image": None}
    problem = files.read(write(tmp_path, {"7": bare}))["7"]
    assert files.texts(problem, "QCM-LEPA") == ("Which is it?\nContext: N/A\nOptions: (A) a tern (B) an owl",
                                                "###\nANSWER: B.")  # fmt: skip
    assert files.texts(problem, "QCM-ALE")[1] == "The answer is B."
    assert files.texts(problem, "QCML-A")[0].endswith("(B) an owl")
    assert files.texts(problem, "QCM-LEA")[1] == " The answer is B."  # the reference's blank


def test_every_format_is_known_and_no_other():
    assert len(files.FORMATS) == 80
    assert len({files.check_format(one) for one in files.FORMATS}) == 1
    for wrong in ("QCM", "QCM-", "AQM-LEA", "QCM-AEP", "qcm-lea"):
        with pytest.raises(ValueError, match="want INPUT-OUTPUT"):
            files.check_format(wrong)


def test_the_benchmark_asks_a_split_with_its_pictures(tmp_path):
    write(tmp_path, {"7": PROBLEM, "8": PROBLEM | {"image": None}}, test=("8", "7"))
    benchmark = get("scienceqa")
    options = resolve_options(benchmark, ["format=CQM-A", "letter=true"])
    questions, _ = load_questions(benchmark, tmp_path, options)
    assert [(question.id, question.images, question.truth, question.choices) for question in questions] == [
        ("8", (), "B", 2), ("7", ("test/7/image.png",), "B", 2),
    ]  # fmt: skip
    assert questions[0].text.endswith("(B) an owl\nAnswer with the option's letter from the given choices directly.")


@pytest.mark.parametrize("damage, message", [
    ({"answer": 2}, "problem '7': answer 2 is none of its 2 choices"), ({"hint": None}, "problem '7': hint: want str"),
    ({"choices": []}, "none of its 0 choices"),
])  # fmt: skip
def test_a_damaged_problem_is_named(tmp_path, damage, message):
    with pytest.raises(DataError, match=message):
        files.read(write(tmp_path, {"7": PROBLEM | damage}))


def test_a_cut_download_and_a_lost_problem_are_named(tmp_path):
    write(tmp_path, test=("7", "9"))
    with pytest.raises(DataError, match="1 ids of test are not in problems.json: 9"):
        files.read_split(tmp_path, "test", files.read(tmp_path))
    with pytest.raises(DataError, match="no split 'dev'; it has test"):
        files.read_split(tmp_path, "dev", {})
    (tmp_path / "problems.json").write_text('{"7": {"question"')
    with pytest.raises(DataError, match="was its download cut short"):
        files.read(tmp_path)


def answer_map(text: str) -> dict[str, Answer]:
    return {"7": Answer("7", text)}


TEXTS = {"A": "The answer is A.", "B": "The answer is B.", "none": "I cannot tell."}


@pytest.mark.parametrize("ours, gpt4", list(itertools.product(TEXTS, TEXTS)))
def test_complement_takes_gpt4_wherever_it_answers(tmp_path, ours, gpt4):
    problem = scienceqa.question(files.read(write(tmp_path))["7"], "QCM-LEA", False, "test")
    joined = ensemble.complement([problem], answer_map(TEXTS[ours]), answer_map(TEXTS[gpt4]))
    expected = {"none": ours}.get(gpt4, gpt4)
    assert joined.answers[0].text == TEXTS[expected]
    assert joined.counts == {"gpt4": int(gpt4 != "none"), "ours": int(gpt4 == "none")}


@pytest.mark.parametrize("ours, gpt4", list(itertools.product(TEXTS, TEXTS)))
@pytest.mark.parametrize("judge", [*TEXTS, None])
def test_judge_decides_where_it_was_asked_and_answers_else_ours_stands(tmp_path, ours, gpt4, judge):
    problem = scienceqa.question(files.read(write(tmp_path))["7"], "QCM-LEA", False, "test")
    disputed = ensemble.disputed_questions([problem], answer_map(TEXTS[ours]), answer_map(TEXTS[gpt4]))
    assert bool(disputed) == (ours != gpt4 or ours == "none")
    judge_answers = {} if judge is None else answer_map(TEXTS[judge])
    combined = ensemble.prefer_judge([problem], answer_map(TEXTS[ours]), judge_answers)
    assert combined.answers[0].text == TEXTS[ours if judge in ("none", None) else judge]


def test_a_letter_alone_of_gpt4_is_no_answer_as_published(tmp_path):
    problem = scienceqa.question(files.read(write(tmp_path))["7"], "QCM-LEA", False, "test")
    assert ensemble.complement([problem], answer_map("B"), answer_map("A")).answers[0].text == "B"


def test_the_judge_reads_the_problem_and_both_answers(tmp_path):
    problem = scienceqa.question(files.read(write(tmp_path))["7"], "QCM-LEA", False, "test")
    text = ensemble.judge_text(problem, "It is A.", "")
    for part in ("Question: Which is it?", "Look  here.", "(B) an owl", "A said:\nIt is A.", "B said:\n(nothing)",
                 '"The answer is X."'):  # fmt: skip
        assert part in text
