"""MM-Vet: open questions that its own GPT-4 grader judges; here are the questions and the file for that grader.

Source: haotian-liu/LLaVA scripts/convert_mmvet_for_eval.py @ c121f04.
"""

import json
from collections.abc import Sequence

from etils import epath

from llava_jax.data.files import field, read_json, texts
from llava_jax.evaluate.questions import Answers, Benchmark, Need, Options, Question, ReadResult

_FILE = "mm-vet.json"


def _read(root: epath.Path, options: Options) -> ReadResult:
    questions = []
    for identity, row in read_json(root / _FILE, dict).items():
        where = f"{_FILE}: {identity!r}"
        questions.append(Question(identity, field(row, "question", str, where), (field(row, "imagename", str, where),),
                                  "+".join(texts(row, "capability", where))))  # fmt: skip
    return questions, []


def _upload(root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options) -> dict[str, bytes]:
    return {"mmvet.json": json.dumps({q.id: answers[q.id] for q in questions}, ensure_ascii=False, indent=1).encode()}


BENCHMARK = Benchmark(
    "mmvet", "MM-Vet", "images",
    (
        Need(_FILE, "github.com/yuweihao/MM-Vet, release v1: mm-vet.zip"),
        Need("images", "github.com/yuweihao/MM-Vet, release v1: mm-vet.zip", pictures=True),
    ),
    _read, None, _upload, tokens=1024,
)  # fmt: skip
