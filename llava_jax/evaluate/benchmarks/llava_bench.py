"""LLaVA-Bench, COCO and In-the-Wild: open questions whose answers a judge scores against a reference's.

`answer` asks them, `judge` has a model review the answers, and `score` reads the reviews: its input here is the
judge's texts, not the answers. Source: haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py,
eval_gpt_review_visual.py and summarize_gpt_review.py @ c121f04.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llava_jax.data.files import field, texts
from llava_jax.evaluate.questions import (
    Answers,
    Benchmark,
    Fault,
    Need,
    Options,
    Question,
    ReadResult,
    Score,
    sound_lines,
)

KINDS = ("conv", "detail", "complex")
COCO_PREFIX = "COCO_val2014_"  # of the picture files; the questions' names lack it
FAILED = (-1.0, -1.0)  # what LLaVA enters into its means for a review without two scores
# What becomes of a review without scores, by compat.
LACKING = ("left out of the means", "-1 and -1 in the means where there is a review, else left out")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_OUT_OF = re.compile(r"\s*/\s*10\b")
RANGE = (0.0, 10.0)  # rules ask for 1 to 10; some judges give 0


def strict_scores(review: str) -> tuple[float, float] | None:
    """The two scores as LLaVA reads them: the first line is two numbers with one blank or comma between; else None."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return None
    return first, second


def tolerant_scores(review: str) -> tuple[float, float] | None:
    """The two numbers of the first line with words, if it holds exactly two from 0 to 10; else None.

        "8 7" "8, 7" "8/10 7/10" "Assistant 1: 8, Assistant 2: 7" -> (8, 7)

    Names such as "Assistant 1" and "/10" are no scores.
    """
    line = next((line for line in review.splitlines() if line.strip()), "")
    line = _OUT_OF.sub(" ", re.sub(r"(?i)\b(assistant|answer|model|score)\s*#?[12]\b", " ", line))
    numbers = [float(text) for text in _NUMBER.findall(line)]
    if len(numbers) != 2 or not all(RANGE[0] <= number <= RANGE[1] for number in numbers):
        return None
    return numbers[0], numbers[1]


READERS = {"tolerant": tolerant_scores, "strict": strict_scores}


def score(questions: Sequence[Question], reviews: Answers, options: Options) -> Score:
    """Relative scores: 100 times the candidate's mean over the reference's (a ratio of means), by kind and in all.

    Also both means times 10. A review without two scores is left out and is a finding, as is one that is not there.
    Differs from LLaVA: there the first counts as -1 for both and means are rounded to 3 decimals first, which
    compat=true does too.
    """
    compat = options["compat"] == "true"
    read = READERS["strict" if compat else options["parse"]]
    pairs = {question.id: read(reviews[question.id]) for question in questions if question.id in reviews}
    findings = [Fault("unparsed", identity, f"no two scores in {reviews[identity][:60]!r}")
                for identity, pair in pairs.items() if pair is None and reviews[identity].strip()]  # fmt: skip
    numbers, counts = {}, {}
    for name in ("all", *KINDS):
        members = [pairs[q.id] for q in questions if q.id in pairs and name in ("all", q.kind)]
        scores = [pair or FAILED for pair in members if pair or compat]
        means = [statistics.fmean(column) for column in zip(*scores)] if scores else [0.0, 0.0]
        reference, candidate = [round(mean, 3) for mean in means] if compat else means
        numbers |= {name: 100 * candidate / reference if reference else 0.0,
                    f"{name} reference x10": 10 * reference, f"{name} candidate x10": 10 * candidate}  # fmt: skip
        counts |= {f"{name} of": len(scores), f"{name} failed": sum(pair is None for pair in members)}
    return Score(numbers, "all", counts, tuple(findings), LACKING[compat])


def request_text(question: Question, candidate: str, rule: Mapping[str, str]) -> str:
    """What the judge reads: context, question, the reference's answer first, the candidate's second, and the rule.

    rule: {"role", "prompt"}, as in the original's rule.json.
    """
    facts = dict(question.facts or {})
    blocks = [f"[Context]\n{facts['context']}", f"[Question]\n{question.text}"]
    for number, text in ((1, question.truth), (2, candidate)):
        name = f"{rule['role']} {number}"
        blocks.append(f"[{name}]\n{text}\n\n[End of {name}]")
    return "".join(f"{block}\n\n" for block in (*blocks, f"[System]\n{rule['prompt']}"))


def rule_name(question: Question) -> str:
    """The question's key in the file of rules."""
    return str(dict(question.facts or {})["rule"])


def _coco(root: epath.Path, options: Options) -> ReadResult:
    contexts = {}
    for where, row in sound_lines(root / "caps_boxes_coco2014_val_80.jsonl"):
        captions = "\n".join(texts(row, "captions", where))
        boxes = "\n".join(f"{field(instance, 'category', str, where)}: {field(instance, 'bbox', list, where)}"
                          for instance in field(row, "instances", list, where))  # fmt: skip
        contexts[field(row, "image", str, where)] = f"{captions}\n\n{boxes}"
    return _join(root / "qa90_questions.jsonl", root / "qa90_gpt4_answer.jsonl", contexts, "", COCO_PREFIX)


def _wild(root: epath.Path, options: Options) -> ReadResult:
    contexts = {}
    for where, row in sound_lines(root / "context.jsonl"):
        caption = field(row, "caption", (str, list), where)
        text = caption if isinstance(caption, str) else "\n".join(texts(row, "caption", where))
        contexts[field(row, "image", str, where)] = text
    return _join(root / "questions.jsonl", root / "answers_gpt4.jsonl", contexts, "llava_bench_", "")


def _join(
    questions_path: epath.Path, answers_path: epath.Path, contexts: Mapping[str, str], rule: str, image_prefix: str
) -> ReadResult:
    """Questions with their reference answers and contexts, joined by id and by picture, whatever the files' order."""
    references: dict[str, Any] = {}
    faults = []
    for where, row in sound_lines(answers_path):
        identity = str(field(row, "question_id", (str, int), where))
        if identity in references:
            faults.append(Fault("duplicate_id", identity, "an earlier reference answers it", where))
        references.setdefault(identity, field(row, "text", str, where))
    questions = []
    for where, row in sound_lines(questions_path):
        identity, image = str(field(row, "question_id", (str, int), where)), field(row, "image", str, where)
        if identity not in references:
            faults.append(Fault("missing_answer", identity, f"{answers_path} has no reference answer", where))
        if image not in contexts:
            faults.append(Fault("bad_shape", identity, f"no context is about {image}", where))
        kind = field(row, "category", str, where)
        facts = {"context": contexts.get(image, ""), "rule": rule + kind}
        text = field(row, "text", str, where)
        questions.append(Question(identity, text, (image_prefix + image,), kind, 0, references.get(identity), facts))
    unmatched = sorted(set(references) - {question.id for question in questions})
    faults += [Fault("unknown_id", identity, f"{questions_path} asks no such question", str(answers_path))
               for identity in unmatched]  # fmt: skip
    return questions, faults


_PLAYGROUND = "github.com/haotian-liu/LLaVA, playground/data/coco2014_val_qa_eval"
_WILD = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_OPTIONS = {"parse": tuple(READERS), "compat": ("false", "true")}
COCO = Benchmark(
    "llava_bench_coco", "LLaVA-Bench (COCO)", "val2014",
    (
        Need("qa90_questions.jsonl", _PLAYGROUND),
        Need("qa90_gpt4_answer.jsonl", _PLAYGROUND),
        Need("caps_boxes_coco2014_val_80.jsonl", "github.com/haotian-liu/LLaVA, llava/eval/table"),
        Need("val2014", "images.cocodataset.org/zips/val2014.zip: COCO_val2014_000000000000.jpg", pictures=True),
    ),
    _coco, score, tokens=1024, options=_OPTIONS,
)  # fmt: skip
WILD = Benchmark(
    "llava_bench_wild", "LLaVA-Bench (In-the-Wild)", "images",
    (
        *(Need(name, _WILD) for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")),
        Need("images", _WILD, pictures=True),
    ),
    _wild, score, tokens=1024, options=_OPTIONS,
)  # fmt: skip
