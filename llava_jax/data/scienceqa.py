"""ScienceQA's files, and a problem in every input and output format that LLaVA was trained and asked in.

Both `data prepare scienceqa` and the benchmark read problems here, so what is asked is what was trained.
Source: lupantech/ScienceQA README.md @ 2cbf831 (the files); haotian-liu/LLaVA scripts/convert_sqa_to_llava.py and
convert_sqa_to_llava_base_prompt.py @ c121f04 (the formats).
"""

from dataclasses import dataclass
from typing import Any

from etils import epath

from llava_jax import files
from llava_jax.data.files import field, read_json
from llava_jax.errors import DataError, UsageError

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
LETTERS = "ABCDE"  # no problem has more choices
NO_CONTEXT = "N/A"
# What follows each letter, in order: Q question, C context, M choices; L lecture, E explanation (upper bounds only).
INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
# A answer, L lecture, E explanation (the solution), P the answer set apart by "###".
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
FORMATS = tuple(f"{given}-{wanted}" for given in INPUTS for wanted in OUTPUTS)
# LLaVA's AL gives the solution and its AE the lecture; released models were trained on that.
_AFTER_ANSWER = {"A": "", "AL": "E", "AE": "L", "ALE": "LE", "AEL": "EL"}


@dataclass(frozen=True)
class Problem:
    """One problem. answer: index into choices; image: file name, or None; hint, lecture, solution: "" where none."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    grade: str
    subject: str
    topic: str
    lecture: str
    solution: str
    split: str

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


def read(directory: epath.PathLike) -> dict[str, Problem]:
    """{id: problem} of `directory`/problems.json.

    Raises:
      DataError: the file is missing, is cut short, or a problem has another shape; names the problem.
    """
    path = epath.Path(directory) / PROBLEMS
    raw = _json(path)
    if not isinstance(raw, dict) or not raw:
        raise DataError(f"{path}: want an object {{id: problem}}")
    return {identity: _problem(identity, row, path) for identity, row in raw.items()}


def read_split(directory: epath.PathLike, split: str, problems: dict[str, Problem]) -> list[Problem]:
    """The problems of one split of `directory`/pid_splits.json, in its order.

    Raises:
      DataError: there is no such split, or problems.json lacks one of its ids.
    """
    path = epath.Path(directory) / SPLITS
    splits = _json(path)
    if not isinstance(splits, dict) or split not in splits:
        found = ", ".join(splits) if isinstance(splits, dict) else type(splits).__name__
        raise DataError(f"{path}: no split {split!r}; it has {found}")
    ids = [str(identity) for identity in field(splits, split, list, str(path))]
    lost = [identity for identity in ids if identity not in problems]
    if lost:
        raise DataError(f"{path}: {len(lost)} ids of {split} are not in {PROBLEMS}: {', '.join(lost[:10])}")
    return [problems[identity] for identity in ids]


def texts(problem: Problem, format: str) -> tuple[str, str]:
    """(what is asked, what is answered) in a format such as "QCM-LEA"; blanks are treated as LLaVA treats them.

    Raises:
      ValueError: an unknown format.
    """
    check_format(format)
    given, _, wanted = format.partition("-")
    parts = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {problem.hint.strip() or NO_CONTEXT}",
        "M": "Options: " + " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem.choices)),
    }
    reasons = "".join(letter for letter in given if letter in "LE")
    lines = [_because(problem, reasons) if letter in "LE" else parts[letter]
             for letter in given.replace("LE", "L")]  # fmt: skip
    asked = _tidy("\n".join(lines))
    # As in LLaVA, where lecture and solution are both empty LEA begins with a blank.
    return _bare(asked, "Question: "), _bare(_tidy(_answered(problem, wanted)), "Answer: ")


def record(problem: Problem, format: str) -> dict[str, Any]:
    """The problem as a LLaVA JSON record; its picture lies in images/SPLIT, the folder that `image` is relative to."""
    asked, answered = texts(problem, format)
    made: dict[str, Any] = {"id": problem.id}
    if problem.image is not None:
        made["image"] = f"{problem.id}/{problem.image}"
        asked += "\n<image>"
    return made | {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}


def check_format(format: str) -> None:
    """Raises ValueError if there is no such format."""
    if format not in FORMATS:
        raise UsageError(f"ScienceQA format {format!r}: want INPUT-OUTPUT with INPUT one of {', '.join(INPUTS)} and "
                         f"OUTPUT one of {', '.join(OUTPUTS)}")  # fmt: skip


def _answered(problem: Problem, wanted: str) -> str:
    lecture, solution = _restored(problem.lecture), _restored(problem.solution)
    reasons = {"L": lecture, "E": solution}
    sentence = f"The answer is {problem.letter}."
    if wanted == "LEPA":
        named = (("LECTURE", lecture), ("SOLUTION", solution))
        return "".join(f"{name}: {text}\n" for name, text in named if text.strip()) + f"###\nANSWER: {problem.letter}."
    if wanted in _AFTER_ANSWER:
        after = " ".join(reasons[letter] for letter in _AFTER_ANSWER[wanted])
        return f"Answer: {sentence} BECAUSE: {after}" if _AFTER_ANSWER[wanted] else f"Answer: {sentence}"
    before = " ".join(reasons[letter] for letter in wanted.removesuffix("A"))
    return f"Answer: {before} {sentence}"


def _because(problem: Problem, reasons: str) -> str:
    text = {"L": problem.lecture, "E": problem.solution}
    return "BECAUSE: " + " ".join(_restored(text[letter]) for letter in reasons)


def _tidy(text: str) -> str:
    """Double blanks become single ones, once; a reason that is empty goes with its header (all of them, if last)."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _bare(text: str, header: str) -> str:
    """Without the header that the text begins with, and then, as LLaVA does it, without any other of its kind."""
    return text.replace(header, "") if text.startswith(header) else text


def _restored(text: str) -> str:
    return text.replace("\\n", "\n")


def _json(path: epath.Path) -> Any:
    if not files.exists(path):
        raise DataError(f"{path} does not exist: it is one of the files that lupantech/ScienceQA's tools/download.sh "
                        "and data/scienceqa provide")  # fmt: skip
    return read_json(path)


def _problem(identity: str, row: Any, path: epath.Path) -> Problem:
    kinds = {"question": str, "choices": list, "answer": int, "hint": str, "grade": str, "subject": str,
             "lecture": str, "solution": str, "split": str}  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise DataError(f"{path}: problem {identity!r}: {name}: want {kind.__name__}")
    choices, answer = tuple(map(str, row["choices"])), row["answer"]
    if not 1 <= len(choices) <= len(LETTERS) or not 0 <= answer < len(choices):
        raise DataError(f"{path}: problem {identity!r}: answer {answer} is none of its {len(choices)} choices (want 0 "
                        f"to {len(choices) - 1}, and at most {len(LETTERS)} choices)")  # fmt: skip
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise DataError(f"{path}: problem {identity!r}: image: want a file name or null")
    return Problem(
        identity, row["question"], choices, answer, row["hint"], image or None, row["grade"], row["subject"],
        str(row.get("topic", "")), row["lecture"], row["solution"], row["split"],
    )  # fmt: skip
