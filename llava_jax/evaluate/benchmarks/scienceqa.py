"""ScienceQA: multiple choice with lectures, broken down by subject, context and grade as in the published tables.

Source: haotian-liu/LLaVA llava/eval/eval_science_qa.py @ c121f04 (the parser), lupantech/ScienceQA
tools/evaluate_acc.py @ 2cbf831 (the breakdown).
"""

import re
from collections.abc import Callable, Sequence

from etils import epath

from llava_jax.data import scienceqa as files
from llava_jax.evaluate.questions import (
    LETTER,
    LETTERS,
    Answers,
    Benchmark,
    Fault,
    Need,
    Options,
    Question,
    ReadResult,
    Score,
    percent,
)  # fmt: skip

FAILED = ""  # no letter could be read
SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the dot stands for any character, as in the reference
SPLITS = ("test", "val", "train", "minitest", "minival", "minitrain", "trainval")
CONTEXT = {"TXT": lambda facts: bool(facts["hint"]), "IMG": lambda facts: facts["image"],
           "NO": lambda facts: not facts["hint"] and not facts["image"]}  # fmt: skip
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
PRIMARY_GRADES = tuple(f"grade{number}" for number in range(1, 7))
REPOSITORY = "github.com/lupantech/ScienceQA"


def sentence_letter(text: str) -> str:
    """The letter of the only "The answer is X." of the text; `FAILED` if there is none, or more than one."""
    letters = SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else FAILED


def letter(text: str) -> str:
    """The letter that a text answers with, or `FAILED`.

        "A" -> A    "A. Paris" -> A    "... The answer is B." -> B    "A." "(A)" "b" "The answer is B" -> FAILED

    Three cases, in order: the text is one of A to E; it begins with a letter, a dot and a blank; it holds exactly
    one "The answer is X." (any character may stand for the last dot, but one must).
    """
    if text in tuple(files.LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    return sentence_letter(text)


def breakdown(questions: Sequence[Question], right: Callable[[Question], bool]) -> Score:
    """The nine columns of the published tables, in percent, with their denominators.

    A problem may have both a text and a picture as context, so TXT, IMG and NO add up to more than all.
    """
    groups = {
        **{name: [q for q in questions if _facts(q)["subject"] == subject] for name, subject in SUBJECTS.items()},
        **{name: [q for q in questions if applies(_facts(q))] for name, applies in CONTEXT.items()},
        "G1-6": [q for q in questions if _facts(q)["grade"] in PRIMARY_GRADES],
        "G7-12": [q for q in questions if _facts(q)["grade"] not in PRIMARY_GRADES],
        "Avg": list(questions),
    }
    correct = {name: sum(map(right, members)) for name, members in groups.items()}
    numbers = {name: percent(correct[name], len(members)) for name, members in groups.items()}
    counts = {f"{name} {label}": number for name, members in groups.items()
              for label, number in (("right", correct[name]), ("of", len(members)))}  # fmt: skip
    return Score(numbers, "Avg", counts)


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """The breakdown; a text without a letter, or with one beyond the choices, is wrong and a finding.

    Differs from LLaVA: the IMG column counts all problems with a picture, there those predictions whose prompt
    shows one.
    """
    letters = {identity: letter(text) for identity, text in answers.items()}
    result = breakdown(questions, lambda question: letters.get(question.id, FAILED) == question.truth)
    return result._replace(findings=tuple(_findings(questions, answers, letters)))


def _findings(questions: Sequence[Question], answers: Answers, letters: dict[str, str]) -> list[Fault]:
    findings = []
    for question in questions:
        choice = letters.get(question.id, FAILED)
        if question.id in answers and answers[question.id].strip() and choice == FAILED:
            sentences = len(SENTENCE.findall(answers[question.id]))
            findings.append(Fault("unparsed", question.id, f"{sentences} times 'The answer is X.' in "
                                  f"{answers[question.id][:60]!r}"))  # fmt: skip
        elif choice != FAILED and choice not in LETTERS[: question.choices]:
            findings.append(Fault("wrong_letter", question.id, f"{choice} is none of its {question.choices} choices"))
    return findings


def question(problem: files.Problem, format: str, ask_letter: bool, split: str) -> Question:
    """The problem as it is asked in a format; `ask_letter` adds LLaVA-1.5's demand for the letter alone."""
    text = files.texts(problem, format)[0] + (f"\n{LETTER}" if ask_letter else "")
    # problem.split is train, val or test for the mini splits too, and names the folder of its picture
    images = (f"{problem.split}/{problem.id}/{problem.image}",) if problem.image else ()
    facts = {"subject": problem.subject, "grade": problem.grade, "hint": bool(problem.hint), "topic": problem.topic,
             "image": problem.image is not None, "split": split, "choices": problem.choices,
             "context": problem.hint, "question": problem.question}  # fmt: skip
    return Question(problem.id, text, images, problem.subject, len(problem.choices), problem.letter, facts)


def _read(root: epath.Path, options: Options) -> ReadResult:
    problems = files.read(root)
    split_problems = files.read_split(root, options["split"], problems)
    ask_letter = options["letter"] == "true"
    return [question(problem, options["format"], ask_letter, options["split"]) for problem in split_problems], []


def _facts(question: Question) -> dict:
    assert question.facts is not None
    return dict(question.facts)


BENCHMARK = Benchmark(
    "scienceqa", "ScienceQA", "images",
    (
        Need(files.PROBLEMS, f"{REPOSITORY}, data/scienceqa/problems.json"),
        Need(files.SPLITS, f"{REPOSITORY}, data/scienceqa/pid_splits.json"),
        Need("images", f"{REPOSITORY}, tools/download.sh: SPLIT/ID/image.png", pictures=True),
    ),
    _read, score, tokens=1024,
    options={"format": ("QCM-LEA", *(one for one in files.FORMATS if one != "QCM-LEA")), "letter": ("false", "true"),
             "split": SPLITS},
)  # fmt: skip
