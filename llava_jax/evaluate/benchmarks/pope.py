"""POPE: is there such a thing in the picture? Yes or no, over random, popular and adversarial absent things.

Source: haotian-liu/LLaVA llava/eval/eval_pope.py @ c121f04; its rule reads "NO" and "none" as yes.

Other programs differ. lmms-eval 0.7.3 (tasks/pope/utils.py): only a bare "yes" or "no", in any case, can be right, so
"Yes." and "No, there is not" are wrong; another answer to a question whose truth is yes does not lower recall; the yes
ratio is that of the truth, not of the answers; F1 of its task `pope` is of all 9,000 questions, not the mean of three
kinds. VLMEvalKit @ e8e78f0 (dataset/utils/yorn.py): an answer is the word "yes" without "no", or the other way round;
all others are asked of a judge if there is one; no demand for a single word is added to its questions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from etils import epath

from llava_jax.data.files import field
from llava_jax.errors import MissingFile
from llava_jax.evaluate.questions import (
    FILE,
    SHORT,
    Answers,
    Benchmark,
    Fault,
    Need,
    Options,
    Question,
    ReadResult,
    Score,
    percent,
    sound_lines,
)  # fmt: skip

KINDS = ("random", "popular", "adversarial")
_NO = ("No", "not", "no")


class Marks(NamedTuple):
    """Counts of one kind of questions; positive is yes."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int


def says_yes(text: str) -> bool:
    """True unless a word before the first dot is No, not or no.

    "No." "There is not a dog." "Yes, but no cat" say no; "NO" "None" "There isn't a dog" say yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in words for word in _NO)


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """F1, accuracy, precision, recall and share of yes of each kind in percent; F1 is their mean.

    A question without an answer counts as answered wrongly. Differs from LLaVA: answers find their questions by id,
    there by line order; and where no answer or no truth is yes, precision or recall is 0, there a division by zero.
    """
    numbers: dict[str, float] = {}
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in questions)]
    for kind in kinds:
        members = [question for question in questions if question.kind == kind]
        marks = _marks(members, answers)
        precision = percent(marks.true_yes, marks.true_yes + marks.false_yes)
        recall = percent(marks.true_yes, marks.true_yes + marks.false_no)
        numbers |= {
            f"{kind} F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            f"{kind} accuracy": percent(marks.true_yes + marks.true_no, len(members)),
            f"{kind} precision": precision,
            f"{kind} recall": recall,
            f"{kind} yes": percent(marks.true_yes + marks.false_yes, len(members)),
        }
    mean = sum(numbers[f"{kind} F1"] for kind in kinds) / max(1, len(kinds))
    counts = {f"{kind} F1 of": sum(question.kind == kind for question in questions) for kind in kinds}
    return Score({"F1": mean} | numbers, "F1", {"F1 of": len(questions)} | counts)


def _marks(questions: Sequence[Question], answers: Answers) -> Marks:
    pairs = []
    for question in questions:
        truth = question.truth == "yes"
        # an answer that is not there is neither yes nor no: it is wrong
        pairs.append((truth, says_yes(answers[question.id]) if question.id in answers else not truth))
    return Marks(*(pairs.count(pair) for pair in ((True, True), (False, True), (False, False), (True, False))))


def _read(root: epath.Path, options: Options) -> ReadResult:
    questions, faults = [], []
    for kind in KINDS:
        for where, row in sound_lines(root / f"coco_pope_{kind}.json"):
            identity, label = f"{kind}/{field(row, 'question_id', (str, int), where)}", field(row, "label", str, where)
            if label not in ("yes", "no"):
                faults.append(Fault("wrong_truth", identity, f"label {label!r}: want yes or no", where))
            image, text = field(row, "image", str, where), field(row, "text", str, where)
            questions.append(Question(identity, f"{text}\n{SHORT}", (image,), kind, 0, label))
    return _with_file_ids(questions, epath.Path(options["questions"])) if options["questions"] else questions, faults


def _with_file_ids(questions: Sequence[Question], path: epath.Path) -> list[Question]:
    """The questions under the ids of LLaVA's own file, where kind, picture and text are the same.

    Those that are not in the file keep their id, and so are missed when answers to the file's are scored.
    """
    if not path.exists():
        raise MissingFile(f"--option questions={path}: no such file; LLaVA's own is llava_pope_test.jsonl")
    ids: dict[tuple[str, ...], list[str]] = {}
    for where, row in sound_lines(path):
        kind, image, text = (field(row, name, str, where) for name in ("category", "image", "text"))
        identity = str(field(row, "question_id", (str, int), where))
        ids.setdefault((kind, image, text.split("\n")[0]), []).append(identity)
    result = []
    for question in questions:
        matches = ids.get((question.kind, str(question.images[0]), question.text.split("\n")[0]))
        result.append(replace(question, id=matches.pop(0)) if matches else question)
    return result


BENCHMARK = Benchmark(
    "pope", "POPE", "val2014",
    (
        *(Need(f"coco_pope_{kind}.json", "github.com/AoiDragon/POPE, output/coco") for kind in KINDS),
        Need("val2014", "images.cocodataset.org/zips/val2014.zip: COCO_val2014_000000000000.jpg", pictures=True),
    ),
    _read, score, options={"questions": ("", FILE)},
    ids="KIND/NUMBER, such as random/1; for answers with LLaVA's own numbers give the file that these are of: "
        "--option questions=llava_pope_test.jsonl",
)  # fmt: skip
