"""Custom questions: a JSON lines file with the right answers.

    {"id": "1", "image": "cat.jpg", "question": "What is it?", "answer": "a cat", "category": "animals"}
    {"id": "2", "image": "cat.jpg", "question": "Which one?", "choices": ["a dog", "a cat"], "answer": "B"}

They are lines of DATA/questions.jsonl; pictures lie in DATA/images. `answer` may be a list of right ones; without any,
the questions can be asked and not scored. `image`, `category` and `choices` may be left out, `image` may be a list.
`video` names videos in the same way, files or folders of frames; they are shown after the pictures.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from llava_jax.data.files import field
from llava_jax.errors import DataError
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
    ReadResult,
    Score,
    lines,
    percent,
    with_choices,
)  # fmt: skip
from llava_jax.prompt.conversation import Video

_FILE = "questions.jsonl"
# How a text without choices is compared with the truth.
RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda text, truth: text.strip() == truth.strip(),
    "normalised": lambda text, truth: normalised(text) == normalised(truth),  # case, articles, punctuation
    "contains": lambda text, truth: normalised(truth) in normalised(text),
}


# Letters that stand alone, and are neither an article nor a pronoun: "B", "(B)", not the first of "A cat", "I see".
_SINGLE_LETTER = re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI])\s+\w)")
# Where one of them is an answer: in brackets, at the very beginning, or after a word that announces it.
_ANSWER_PATTERNS = (
    re.compile(r"\(([A-Z])\)"), re.compile(r"^\W*([A-Z])(?=[).:,;*]|\s*$|\s*\n)"),
    re.compile(r"(?i:\b(?:answer|option|choice|letter)\b(?:\s+(?:is|would\s+be))?)[\s:=\"'*(]*([A-Z])(?=\W*$|[).:,;*\n])"),
)  # fmt: skip


def lenient_letter(text: str, choices: Sequence[str]) -> str:
    """The one letter that a text answers with, or the letter of the choice that it repeats; "" for neither.

        "B" "b" "(B)" "B)" "Answer: B" "The answer is B." "a cat" -> B    "A cat", "I think so", "B or C" -> ""

    Ours: no benchmark's rule; its numbers compare with those of the same rule only.
    """
    bare = text.strip().strip("().*\"' ")
    if bare.upper() in tuple(LETTERS):
        return bare.upper()
    repeated = {LETTERS[index] for index, choice in enumerate(choices) if normalised(choice) == normalised(text)}
    if normalised(text) and len(repeated) == 1:
        return repeated.pop()
    letters = {match for pattern in _ANSWER_PATTERNS for match in pattern.findall(text.strip())}
    return letters.pop() if len(letters) == 1 and letters == set(_SINGLE_LETTER.findall(text)) else ""


# How a letter is read out of an answer to a question with choices.
LETTER_RULES: dict[str, Callable[[str, Sequence[str]], str]] = {
    "strict": lambda text, choices: letter(text), "lenient": lenient_letter,
}  # fmt: skip


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Percent of right answers, in all and by category."""
    rule, read = RULES[options["match"]], LETTER_RULES[options["letters"]]
    hint = "; --option letters=lenient reads more ways to name one" if options["letters"] == "strict" else ""
    right, findings = {}, []
    for question in questions:
        text = answers.get(question.id, "")
        if not question.choices:
            right[question.id] = bool(text.strip()) and any(rule(text, truth) for truth in question.truth)
            continue
        choice = read(text, dict(question.facts or {})["choices"])
        right[question.id] = choice == question.truth
        if text.strip() and not choice:
            findings.append(Fault("unparsed", question.id, f"no letter in {text[:60]!r}{hint}"))
        elif choice and choice not in LETTERS[: question.choices]:
            findings.append(Fault("wrong_letter", question.id, f"{choice} is none of its {question.choices} choices"))
    kinds = sorted({question.kind for question in questions} - {""})
    groups = {"accuracy": list(questions)} | {kind: [q for q in questions if q.kind == kind] for kind in kinds}
    numbers = {name: percent(sum(right[q.id] for q in members), len(members)) for name, members in groups.items()}
    return Score(numbers, "accuracy", {f"{name} of": len(members) for name, members in groups.items()}, tuple(findings))


def _read(root: epath.Path, options: Options) -> ReadResult:
    rows, faults = lines(root / _FILE)
    questions = []
    for where, row in rows:
        question = _question(row, where)
        if not question.choices and not all(truth.strip() for truth in question.truth or ()):
            faults.append(Fault("empty_truth", question.id, "its right answer is empty", where))
        questions.append(question)
    return questions, faults


def _question(row: Any, where: str) -> Question:
    key = "question_id" if isinstance(row, dict) and "question_id" in row else "id"
    identity = str(field(row, key, (str, int), where))
    text = field(row, "text" if "text" in row else "question", str, where)
    videos = map(Video, _texts(row.get("video", []), "video", where))
    images = (*_texts(row.get("image", []), "image", where), *videos)
    choices = _texts(field(row, "choices", list, where), "choices", where) if "choices" in row else []
    if len(choices) > len(LETTERS):
        raise DataError(f"{where}: {len(choices)} choices: want at most {len(LETTERS)}, a letter for each")
    truth = None
    if "answer" in row:
        answer = field(row, "answer", (str, list), where)
        truth = answer if choices else tuple(_texts(answer, "answer", where))
    return Question(identity, with_choices(text, choices) if choices else text, images, str(row.get("category", "")),
                    len(choices), truth, {"choices": choices})  # fmt: skip


def _texts(value: Any, name: str, where: str) -> list[str]:
    """A text, or a list of texts, as a list."""
    texts = value if isinstance(value, list) else [value]
    return [field({name: text}, name, str, where) for text in texts]


BENCHMARK = Benchmark(
    "custom", "own questions", "images",
    (Need(_FILE, "you, pictures in images/: see llava_jax/evaluate/benchmarks/custom.py"),),
    _read, score, tokens=128, options={"match": tuple(RULES), "letters": tuple(LETTER_RULES)},
)  # fmt: skip
