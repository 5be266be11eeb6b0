"""GQA: questions about scene graphs; an answer is right if it is the truth, but for case and a dot at its end.

Source: the official eval.py (accuracy, binary, open) and haotian-liu/LLaVA scripts/convert_gqa_for_eval.py @ c121f04.
"""

import json
from collections.abc import Sequence

from etils import epath

from llava_jax.data.files import field, read_json
from llava_jax.evaluate.questions import SHORT, Answers, Benchmark, Need, Options, Question, ReadResult, Score, percent

KINDS = ("binary", "open")


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Share of right answers in percent, in all and of questions that can be answered by yes or no, or cannot."""
    right = {q.id: answers.get(q.id, "").rstrip(".").lower() == q.truth for q in questions}
    groups = {"accuracy": list(questions)} | {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    numbers = {name: percent(sum(right[q.id] for q in members), len(members)) for name, members in groups.items()}
    return Score(numbers, "accuracy", {f"{name} of": len(members) for name, members in groups.items()})


def _upload(root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options) -> dict[str, bytes]:
    """What the official eval.py reads."""
    rows = [{"questionId": q.id, "prediction": answers[q.id].rstrip(".").lower()} for q in questions]
    return {f"{options['split']}_predictions.json": json.dumps(rows).encode()}


def _read(root: epath.Path, options: Options) -> ReadResult:
    name = f"{options['split']}_questions.json"
    questions = []
    for identity, row in read_json(root / name, dict).items():
        where = f"{name}: question {identity!r}"
        structure = field(field(row, "types", dict, where), "structural", str, where)
        questions.append(Question(
            identity, f"{field(row, 'question', str, where)}\n{SHORT}", (f"{field(row, 'imageId', str, where)}.jpg",),
            "open" if structure == "query" else "binary", 0, field(row, "answer", str, where),
        ))  # fmt: skip
    return questions, []


BENCHMARK = Benchmark(
    "gqa", "GQA", "images",
    (
        *(Need(f"{split}_questions.json", "cs.stanford.edu/people/dorarad/gqa/download.html", f"split={split}")
          for split in ("testdev_balanced", "val_balanced")),
        Need("images", "cs.stanford.edu/people/dorarad/gqa/download.html: images.zip", pictures=True),
    ),
    _read, score, _upload, options={"split": ("testdev_balanced", "val_balanced")},
)  # fmt: skip
