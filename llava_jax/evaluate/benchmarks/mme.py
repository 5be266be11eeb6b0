"""MME: two yes-or-no questions about each picture, in ten kinds of perception and four of cognition.

A kind's score, at most 200, is the share of right answers plus the share of pictures with both right, in percent.
Source: the official calculation.py of BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation).

Other programs differ. lmms-eval 0.7.3 (tasks/mme/utils.py) first takes away blanks around the text and all dots, and
"y" and "n" alone count. VLMEvalKit @ e8e78f0 (dataset/utils/yorn.py): an answer is the word "yes" without "no" anywhere
in the text, or the other way round; all others are asked of a judge if there is one. Scores and sums are the same.
"""

from collections.abc import Iterator, Sequence

from etils import epath

from llava_jax.data.files import read_text
from llava_jax.errors import DataError
from llava_jax.evaluate.questions import (
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
)  # fmt: skip

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_DEMAND = "Please answer yes or no."  # LLaVA's questions end with its own demand instead
_FOLDER = "MME_Benchmark_release_version"


def verdict(text: str) -> str:
    """What the first four letters hold: "yes" before "no", or else "other", which is wrong."""
    start = text.lower() if text.lower() in ("yes", "no") else text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """The sums over perception and over cognition, and the score of each kind."""
    verdicts = {identity: verdict(text) for identity, text in answers.items()}
    right = {q.id: verdicts.get(q.id) == q.truth for q in questions}
    numbers, counts = {}, {}
    for kind in (*PERCEPTION, *COGNITION):
        members = [question for question in questions if question.kind == kind]
        pictures: dict[object, list[bool]] = {}
        for question in members:
            pictures.setdefault(question.images, []).append(right[question.id])
        both = sum(all(marks) for marks in pictures.values())
        numbers[kind] = percent(sum(right[q.id] for q in members), len(members)) + percent(both, len(pictures))
        counts[f"{kind} of"] = len(members)
    sums = {"perception": sum(numbers[kind] for kind in PERCEPTION),
            "cognition": sum(numbers[kind] for kind in COGNITION)}  # fmt: skip
    findings = [Fault("unparsed", q.id, f"neither yes nor no at the start of {answers[q.id][:60]!r}")
                for q in questions if verdicts.get(q.id) == "other" and answers[q.id].strip()]  # fmt: skip
    return Score(sums | numbers, "perception", counts, tuple(findings))


def _read(root: epath.Path, options: Options) -> ReadResult:
    questions: list[Question] = []
    faults: list[Fault] = []
    for kind in (*PERCEPTION, *COGNITION):
        folder = root / _FOLDER / kind
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist: {_FOLDER} holds a folder for each of its 14 kinds")
        for path in sorted(_texts(folder)):
            image = _picture(folder, path.stem)
            if image is None:
                faults.append(Fault("missing_image", f"{kind}/{path.stem}", f"no picture named so in {folder}"))
            for number, line in enumerate(read_text(path).splitlines()):
                identity = f"{kind}/{path.stem}#{number}"
                question, tab, truth = line.rstrip("\n").partition("\t")
                if truth.strip().lower() not in ("yes", "no"):
                    kind_of_fault = "wrong_truth" if tab else "truncated_line"
                    faults.append(Fault(kind_of_fault, identity, f"{line[:60]!r}: want QUESTION<tab>Yes|No", str(path)))
                elif image is not None:
                    text = f"{question.replace(_DEMAND, '').strip()}\n{SHORT}"
                    questions.append(Question(identity, text, (image,), kind, 0, truth.strip().lower()))
    return questions, faults


def _texts(folder: epath.Path) -> Iterator[epath.Path]:
    """Some kinds keep questions and pictures in folders of their own, others side by side."""
    inside = folder / "questions_answers_YN"
    return (path for path in (inside if inside.is_dir() else folder).iterdir() if path.suffix == ".txt")


def _picture(folder: epath.Path, stem: str) -> str | None:
    stems = [folder / "images" / stem, folder / stem]
    paths = [stem_path.with_name(stem_path.name + end) for stem_path in stems for end in (".jpg", ".png")]
    return next((f"{folder.name}/{path.relative_to(folder)}" for path in paths if path.exists()), None)


BENCHMARK = Benchmark(
    "mme", "MME", _FOLDER,
    (Need(_FOLDER, "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation: KIND/..."),),
    _read, score,
)  # fmt: skip
