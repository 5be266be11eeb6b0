"""Your own questions: a JSON lines file with the answers that you hold for right.

    {"id": "1", "image": "cat.jpg", "question": "What is it?", "answer": "a cat", "category": "animals"}
    {"id": "2", "image": "cat.jpg", "question": "Which one?", "choices": ["a dog", "a cat"], "answer": "B"}

`answer` may be a list of right ones; `image`, `category` and `choices` may be left out, `image` may be a list.
"""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from llava_jax.data.files import field
from llava_jax.evaluate.benchmarks.mmbench import letter
from llava_jax.evaluate.benchmarks.vqa import normalised
from llava_jax.evaluate.questions import (
    LETTERS,
    Answers,
    Benchmark,
    Fault,
    Need,
    Options,
    Question,
    Read,
    Score,
    lines,
    percent,
    with_choices,
)  # fmt: skip

_FILE = "questions.jsonl"
# How a text without choices is compared with the truth.
RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda text, truth: text.strip() == truth.strip(),
    "normalised": lambda text, truth: normalised(text) == normalised(truth),  # case, articles, punctuation
    "contains": lambda text, truth: normalised(truth) in normalised(text),
}


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Percent of right answers, in all and by category."""
    rule = RULES[options["match"]]
    right, findings = {}, []
    for question in questions:
        text = answers.get(question.id, "")
        if not question.choices:
            right[question.id] = bool(text.strip()) and any(rule(text, one) for one in question.truth)
            continue
        given = letter(text)
        right[question.id] = given == question.truth
        if text.strip() and not given:
            findings.append(Fault("unparsed", question.id, f"no letter in {text[:60]!r}"))
        elif given and given not in LETTERS[: question.choices]:
            findings.append(Fault("wrong_letter", question.id, f"{given} is none of its {question.choices} choices"))
    kinds = sorted({question.kind for question in questions} - {""})
    groups = {"accuracy": list(questions)} | {kind: [q for q in questions if q.kind == kind] for kind in kinds}
    numbers = {name: percent(sum(right[q.id] for q in members), len(members)) for name, members in groups.items()}
    return Score(numbers, "accuracy", {f"{name} of": len(members) for name, members in groups.items()}, tuple(findings))


def _read(root: epath.Path, options: Options) -> Read:
    rows, faults = lines(root / _FILE)
    made = []
    for where, row in rows:
        question = _question(row, where)
        if not question.choices and not all(one.strip() for one in question.truth):
            faults.append(Fault("empty_truth", question.id, "its right answer is empty", where))
        made.append(question)
    return made, faults


def _question(row: Any, where: str) -> Question:
    key = "question_id" if isinstance(row, dict) and "question_id" in row else "id"
    identity = str(field(row, key, (str, int), where))
    text = field(row, "text" if "text" in row else "question", str, where)
    images = row.get("image", [])
    images = tuple(images) if isinstance(images, list) else (images,)
    if not all(isinstance(image, str) for image in images):
        field({"image": None}, "image", str, f"{where} id={identity!r}")
    choices = field(row, "choices", list, where) if "choices" in row else []
    answer = field(row, "answer", (str, list), where)
    truth = answer if choices else tuple(answer) if isinstance(answer, list) else (answer,)
    return Question(identity, with_choices(text, choices) if choices else text, images, str(row.get("category", "")),
                    len(choices), truth)  # fmt: skip


BENCHMARK = Benchmark(
    "custom", "own questions", "images", (Need(_FILE, "you: see the beginning of evaluate/benchmarks/custom.py"),),
    _read, score, tokens=128, options={"match": tuple(RULES)},
)  # fmt: skip
