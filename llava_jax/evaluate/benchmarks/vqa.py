"""Short answers judged by ten people: VQAv2, VizWiz and TextVQA, with EvalAI's normalisation of answers.

Source: the rules of EvalAI's VQA evaluation as LLaVA applies them, haotian-liu/LLaVA llava/eval/m4c_evaluator.py and
scripts/convert_vqav2_for_submission.py, convert_vizwiz_for_submission.py @ c121f04.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llava_jax.data.files import field, read_json, texts
from llava_jax.errors import DataError
from llava_jax.evaluate.questions import (
    SHORT,
    Answers,
    Benchmark,
    Need,
    Options,
    Question,
    ReadResult,
    Score,
    percent,
    sound_lines,
)  # fmt: skip

# The normal forms of contractions; any one apostrophe may be missing ("couldnt've", "couldn'tve").
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
_CONTRACTION_FIXES = {form[:index] + form[index + 1 :]: form
                      for form in _CONTRACTIONS for index, letter in enumerate(form) if letter == "'"}  # fmt: skip
_CONTRACTION_FIXES["somebody'd"] = "somebodyd"  # the official table has it the wrong way round
_NUMBERS = {word: str(number) for number, word in
            enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Meant to spare decimals by what precedes the dot; as written it spares a dot before a digit.
_DOT = re.compile(r"\.(?!\d)")
_DOTS_REMOVED = 32  # the official code passes re.UNICODE (32) where a count is expected
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def normalised(answer: str) -> str:
    """The answer as EvalAI compares it.

    "Two dogs" -> "2 dogs"   "A cat, a dog" -> "cat dog"   "it's" -> "it 's"   "New-York" -> "new york"
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in _PUNCTUATION:
        next_to_blank = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if next_to_blank else " ")
    words = [_NUMBERS.get(word, word) for word in _DOT.sub("", bare, count=_DOTS_REMOVED).split()]
    return " ".join(_CONTRACTION_FIXES.get(word, word) for word in words if word not in _ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """The agreement of an answer with those of people, 0 to 1; of ten people, 3 who agree make 0.9, 4 make 1.

    The mean over all choices of all but one person of min(1, how many of them agree / 3).
    """
    text, others = normalised(answer), [normalised(other) for other in people]
    matches = others.count(text)
    marks = [min(1.0, (matches - (other == text)) / 3) for other in others]
    return sum(marks) / len(marks) if marks else 0.0


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Mean agreement in percent, in all and by type of answer where the annotations know it."""
    marks = {q.id: agreement(answers.get(q.id, ""), q.truth) if q.id in answers else 0.0 for q in questions}
    kinds = sorted({question.kind for question in questions} - {""})
    groups = {"accuracy": list(questions)} | {kind: [q for q in questions if q.kind == kind] for kind in kinds}
    numbers = {name: percent(sum(marks[q.id] for q in members), len(members)) for name, members in groups.items()}
    return Score(numbers, "accuracy", {f"{name} of": len(members) for name, members in groups.items()})


def _people(row: Any, where: str) -> list[str]:
    """The answers of all people."""
    return [field(answer, "answer", str, f"{where}: answers") for answer in field(row, "answers", list, where)]


def _vqav2_questions(split: str) -> str:
    return f"v2_OpenEnded_mscoco_{split}_questions.json"


def _vqav2(root: epath.Path, options: Options) -> ReadResult:
    split = options["split"]
    name = _vqav2_questions(split)
    rows = field(read_json(root / name), "questions", list, name)
    truths = {}
    if split == "val2014":
        path = root / "v2_mscoco_val2014_annotations.json"
        for number, row in enumerate(field(read_json(path), "annotations", list, str(path))):
            where = f"{path}: annotations[{number}]"
            truth = _people(row, where), field(row, "answer_type", str, where)
            truths[field(row, "question_id", int, where)] = truth
    folder = "test2015" if split.startswith("test") else split
    questions = []
    for number, row in enumerate(rows):
        where = f"{name}[{number}]"
        identity, image = field(row, "question_id", int, where), field(row, "image_id", int, where)
        truth, kind = truths.get(identity, (None, ""))
        questions.append(Question(str(identity), f"{field(row, 'question', str, where)}\n{SHORT}",
                                  (f"COCO_{folder}_{image:012}.jpg",), kind, 0, truth))  # fmt: skip
    return questions, []


def _vqav2_files(
    root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options
) -> dict[str, bytes]:
    """EvalAI requires an answer to every question of test2015; those that are not in test-dev2015 get an empty one."""
    name = _vqav2_questions("test2015" if options["split"].startswith("test") else options["split"])
    questions_json = field(read_json(root / name), "questions", list, name)
    ids = [field(row, "question_id", int, f"{name}[{number}]") for number, row in enumerate(questions_json)]
    rows = [{"question_id": identity, "answer": normalised(answers.get(str(identity), ""))} for identity in ids]
    return {f"vqav2_{options['split']}.json": json.dumps(rows).encode()}


def _vizwiz(root: epath.Path, options: Options) -> ReadResult:
    name = f"{options['split']}.json"
    questions = []
    for number, row in enumerate(read_json(root / name, list)):
        where = f"{name}[{number}]"
        image = field(row, "image", str, where)
        people = _people(row, where) if "answers" in row else None
        text = f"{field(row, 'question', str, where)}\n{UNANSWERABLE}\n{SHORT}"
        questions.append(Question(image, text, (image,), str(row.get("answer_type", "")) if people else "", 0, people))
    return questions, []


def _vizwiz_files(
    root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options
) -> dict[str, bytes]:
    rows = [{"image": q.id, "answer": normalised(answers[q.id])} for q in questions]
    return {f"vizwiz_{options['split']}.json": json.dumps(rows).encode()}


def _textvqa(root: epath.Path, options: Options) -> ReadResult:
    """With ocr=true the questions hold LLaVA's "Reference OCR token:" line, which its file alone has."""
    name = "TextVQA_0.5.1_val.json"
    rows = field(read_json(root / name), "data", list, name)
    lines = _ocr_lines(root) if options["ocr"] == "true" else {}
    questions = []
    for number, row in enumerate(rows):
        where = f"{name}[{number}]"
        image, question = field(row, "image_id", str, where), field(row, "question", str, where)
        text = f"{question}\n{SHORT}"
        if options["ocr"] == "true":
            key = (image, question.lower())
            if key not in lines:
                raise DataError(f"{where}: llava_textvqa_val_v051_ocr.jsonl has no question {question!r} about {image}")
            text = lines[key]
        questions.append(Question(str(field(row, "question_id", int, where)), text, (f"{image}.jpg",), "", 0,
                                  texts(row, "answers", where)))  # fmt: skip
    return questions, []


def _ocr_lines(root: epath.Path) -> Mapping[tuple[str, str], str]:
    rows: list[tuple[str, Any]] = sound_lines(root / "llava_textvqa_val_v051_ocr.jsonl")
    texts = [(field(row, "question_id", str, where), field(row, "text", str, where)) for where, row in rows]
    return {(image, _question_line(text).lower()): text for image, text in texts}


def _question_line(text: str) -> str:
    first, _, rest = text.partition("\n")
    return rest.split("\n")[0] if first.startswith("Reference OCR token:") else first


_EVAL_ZIP = "eval.zip, linked in haotian-liu/LLaVA docs/Evaluation.md"
VQAV2 = Benchmark(
    "vqav2", "VQAv2", "images",
    (
        *(Need(_vqav2_questions(split), "visualqa.org/download.html", f"split={split}")
          for split in ("test-dev2015", "test2015", "val2014")),
        Need(_vqav2_questions("test2015"), "visualqa.org/download.html; for --submission", "split=test-dev2015"),
        Need("v2_mscoco_val2014_annotations.json", "visualqa.org/download.html", "split=val2014"),
        Need("images", "images.cocodataset.org/zips/SPLIT.zip: COCO_SPLIT_000000000000.jpg", pictures=True),
    ),
    _vqav2, score, _vqav2_files, options={"split": ("test-dev2015", "test2015", "val2014")},
)  # fmt: skip
VIZWIZ = Benchmark(
    "vizwiz", "VizWiz", "images",
    (
        *(Need(f"{split}.json", "vizwiz.org/tasks-and-datasets/vqa: Annotations.zip", f"split={split}")
          for split in ("test", "val")),
        Need("images", "vizwiz.org/tasks-and-datasets/vqa: the split's images", pictures=True),
    ),
    _vizwiz, score, _vizwiz_files, options={"split": ("test", "val")},
)  # fmt: skip
TEXTVQA = Benchmark(
    "textvqa", "TextVQA", "train_images",
    (
        Need("TextVQA_0.5.1_val.json", "textvqa.org/dataset"),
        Need("llava_textvqa_val_v051_ocr.jsonl", _EVAL_ZIP, "ocr=true"),
        Need("train_images", "textvqa.org/dataset: train_val_images.zip", pictures=True),
    ),
    _textvqa, score, options={"ocr": ("true", "false"), "split": ("val",)},
)  # fmt: skip
