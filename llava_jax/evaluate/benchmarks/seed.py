"""SEED-Bench: four choices about a picture or the middle frame of a video; only the bare letter is right.

Source: haotian-liu/LLaVA scripts/convert_seed_for_submission.py @ c121f04.
"""

import json
from collections.abc import Sequence

from etils import epath

from llava_jax.data.files import field, read_json
from llava_jax.errors import DataError
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
    percent,
    with_choices,
)  # fmt: skip

_FILE = "SEED-Bench.json"
_FOLDERS = {"image": "SEED-Bench-image", "video": "SEED-Bench-video-image"}


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Percent of right letters: in all, about pictures, about videos, and for each kind of question."""
    right = {q.id: answers.get(q.id) == q.truth for q in questions}
    media = {name: [q for q in questions if dict(q.facts or {})["medium"] == name] for name in _FOLDERS}
    kinds = {kind: [q for q in questions if q.kind == kind] for kind in dict.fromkeys(q.kind for q in questions)}
    groups = {"all": list(questions)} | media | kinds
    numbers = {name: percent(sum(right[q.id] for q in members), len(members)) for name, members in groups.items()}
    findings = []
    for question in questions:
        text = answers.get(question.id, "")
        if text.strip() and text not in tuple(LETTERS):
            findings.append(Fault("unparsed", question.id, f"{text[:60]!r} is no single letter"))
        elif text.strip() and text not in LETTERS[: question.choices]:
            findings.append(Fault("wrong_letter", question.id, f"{text} is none of its {question.choices} choices"))
    return Score(numbers, "all", {f"{name} of": len(members) for name, members in groups.items()}, tuple(findings))


def _read(root: epath.Path, options: Options) -> ReadResult:
    contents = read_json(root / _FILE)
    kinds = field(contents, "question_type", dict, _FILE)
    names = {field(kinds, name, int, f"{_FILE}: question_type"): name for name in kinds}
    questions = []
    for index, row in enumerate(field(contents, "questions", list, _FILE)):
        where = f"{_FILE}: questions[{index}]"
        medium, identity = field(row, "data_type", str, where), str(field(row, "question_id", (str, int), where))
        if medium not in _FOLDERS:
            raise DataError(f"{where}: data_type={medium!r}: want one of {', '.join(_FOLDERS)}")
        choices = [field(row, f"choice_{letter}", str, where) for letter in "abcd"]
        file = field(row, "data_id", str, where) if medium == "image" else f"{identity}.png"
        number = field(row, "question_type_id", int, where)
        if number not in names:
            raise DataError(f"{where}: question_type_id={number}: want one of question_type, {sorted(names)}")
        kind = names[number]
        questions.append(Question(
            identity, with_choices(field(row, "question", str, where), choices), (f"{_FOLDERS[medium]}/{file}",), kind,
            len(choices), field(row, "answer", str, where), {"medium": medium},
        ))  # fmt: skip
    return questions, []


def _upload(root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options) -> dict[str, bytes]:
    rows = [json.dumps({"question_id": q.id, "prediction": answers[q.id]}) + "\n" for q in questions]
    return {"seed.jsonl": "".join(rows).encode()}


BENCHMARK = Benchmark(
    "seed", "SEED-Bench", "",
    (
        Need(_FILE, "huggingface.co/datasets/AILab-CVC/SEED-Bench"),
        Need(_FOLDERS["image"], "huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench-image.zip", pictures=True),
        Need(_FOLDERS["video"], "the middle frame of each video of github.com/AILab-CVC/SEED-Bench DATASET.md, as "
             "QUESTION_ID.png", pictures=True),
    ),
    _read, score, _upload,
)  # fmt: skip
