"""MMBench and MMBench-CN: lettered choices, asked once or in every rotation, and the sheet for the server.

Source: haotian-liu/LLaVA llava/eval/model_vqa_mmbench.py and scripts/convert_mmbench_for_submission.py @ c121f04.
Rows of one question have indices that differ by millions; it is solved if every rotation is.
"""

import base64
import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from xml.sax.saxutils import escape

from etils import epath

from llava_jax.data.files import read_text
from llava_jax.errors import DataError
from llava_jax.evaluate.questions import (
    LETTER,
    LETTERS,
    Answers,
    Benchmark,
    Fault,
    Need,
    Options,
    Question,
    ReadResult,
    Score,
    bad_benchmark,
    percent,
    with_choices,
)  # fmt: skip

FILES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}
DEMANDS = {"mmbench": LETTER, "mmbench_cn": "请直接回答选项字母。"}
ROTATION = 1_000_000  # between the indices of one question's rotations
NONE = ("", "nan", "none")  # what an absent choice or hint is written as
# Of the sheet that LLaVA uploads: the prediction's column, and the columns of the table that it lacks.
_PREDICTION = 6
_OMITTED_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category")


def letter(text: str) -> str:
    """The letter of "B", "B." or "B. Paris"; "" for any other text (the server has a language model read those)."""
    stripped = text.strip()
    return stripped[0] if stripped[:1] in tuple(LETTERS) and (len(stripped) == 1 or stripped[1] == ".") else ""


def score(questions: Sequence[Question], answers: Answers, options: Options) -> Score:
    """Percent of questions that are solved in all their rotations, in the first one, and by category."""
    letters = {identity: letter(text) for identity, text in answers.items()}
    right = {question.id: letters.get(question.id) == question.truth for question in questions}
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(int(question.id) % ROTATION, []).append(question)
    solved = {base: all(right[q.id] for q in members) for base, members in groups.items()}
    firsts = [members[0] for members in groups.values()]
    numbers = {"circular": percent(sum(solved.values()), len(groups)),
               "vanilla": percent(sum(right[q.id] for q in firsts), len(firsts))}  # fmt: skip
    for kind in sorted({question.kind for question in questions}):
        inside = [base for base, members in groups.items() if members[0].kind == kind]
        numbers[kind] = percent(sum(solved[base] for base in inside), len(inside))
    findings = [fault for question in questions if question.id in answers and answers[question.id].strip()
                for fault in _failings(question, letters[question.id], answers[question.id])]  # fmt: skip
    counts = {"circular of": len(groups), "vanilla of": len(groups), "rows": len(questions)}
    return Score(numbers, "circular", counts, tuple(findings))


def _failings(question: Question, choice: str, text: str) -> list[Fault]:
    if not choice:
        return [Fault("unparsed", question.id, f"no letter in {text[:60]!r}")]
    if choice not in LETTERS[: question.choices]:
        return [Fault("wrong_letter", question.id, f"{choice} is none of its {question.choices} choices")]
    return []


def _read(name: str, root: epath.Path, options: Options) -> ReadResult:
    rows = _rows(root / FILES[name])
    pictures = {row["index"]: row["image"] for row in rows}
    questions, faults = [], []
    for row in rows:
        # A picture that an earlier row holds is written as that row's index.
        data = pictures[row["image"]] if row["image"] in pictures else row["image"]
        picture = _decode(data)
        if picture is None:
            faults.append(Fault("missing_image", row["index"], f"image={data[:60]!r} is neither base64 nor an index"))
            continue
        choices = [row[letter] for letter in "ABCD" if letter in row]
        choices = choices[: next((i for i, text in enumerate(choices) if text.lower() in NONE), len(choices))]
        truth = None if row.get("answer", "").lower() in NONE else row["answer"]
        rounds = len(choices) if options["rounds"] == "all" else 1
        questions += [_question(name, row, picture, choices, truth, rotation) for rotation in range(rounds)]
    return questions, faults


def _decode(data: str) -> bytes | None:
    """The picture in a cell, or None: a cell so short is the index of another row, which is not there."""
    try:
        return base64.b64decode(data) or None if len(data) >= 64 else None
    except ValueError:
        return None


def _question(
    name: str, row: Mapping[str, str], image: bytes, choices: Sequence[str], truth: str | None, rotation: int
) -> Question:
    """Rotation r lists the choices from the r-th on, so the right letter moves up by r."""
    rotated = [*choices[rotation:], *choices[:rotation]]
    if truth is not None and truth in LETTERS[: len(choices)]:
        truth = LETTERS[(LETTERS.index(truth) - rotation) % len(choices)]
    hint = "" if row.get("hint", "").lower() in NONE else row["hint"] + "\n"
    text = with_choices(hint + row["question"], rotated, DEMANDS[name])
    facts = {"row": {key: row[key] for key in row if key not in _OMITTED_COLUMNS}, "turned": rotated}
    identity = str(int(row["index"]) + rotation * ROTATION)
    return Question(identity, text, (image,), row.get("category", ""), len(choices), truth, facts)


def _rows(path: epath.Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 28)  # a cell holds a picture
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    except csv.Error as error:
        raise DataError(f"{path}: no table of tab-separated cells: {error}") from None
    faults = []
    for number, row in enumerate(rows, 2):
        truncated = None in row or None in row.values()
        if truncated or not {"index", "question", "image", "A"} <= set(row) or not row["index"].isdecimal():
            faults.append(Fault("truncated_line", str(row.get("index")), "a cell is missing", f"{path}: row {number}"))
    if faults:
        raise bad_benchmark(str(path), faults)
    return rows


def _sheet_of(root: epath.Path, questions: Sequence[Question], answers: Answers, options: Options) -> dict[str, bytes]:
    """The upload: the table's columns with rotated choices in their new places, and the prediction as the seventh."""
    header = [*dict(questions[0].facts or {})["row"]]
    table = [[*header[:_PREDICTION], "prediction", *header[_PREDICTION:]]]
    for question in questions:
        facts = dict(question.facts or {})
        row = facts["row"] | {letter: text for letter, text in zip("ABCD", facts["turned"])} | {"index": question.id}
        if question.truth is not None:
            row["answer"] = question.truth
        cells = [row[name] for name in header]
        table.append([*cells[:_PREDICTION], answers[question.id], *cells[_PREDICTION:]])
    return {"mmbench.xlsx": sheet(table)}


def sheet(table: Sequence[Sequence[str]]) -> bytes:
    """An .xlsx file with one sheet of text cells."""
    office = "http://schemas.openxmlformats.org"
    lines = ["".join(f'<c t="inlineStr"><is><t xml:space="preserve">{_cell(text)}</t></is></c>' for text in row)
             for row in table]  # fmt: skip
    rows = "".join(f'<row r="{number}">{line}</row>' for number, line in enumerate(lines, 1))
    main, relations = f"{office}/spreadsheetml/2006/main", f"{office}/officeDocument/2006/relationships"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{office}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": _relation(office, f"{relations}/officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": _relation(office, f"{relations}/worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData></worksheet>',
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(zipfile.ZipInfo(name), f'<?xml version="1.0" encoding="UTF-8"?>{text}')
    return out.getvalue()


def _relation(office: str, kind: str, target: str) -> str:
    return (f'<Relationships xmlns="{office}/package/2006/relationships">'
            f'<Relationship Id="rId1" Type="{kind}" Target="{target}"/></Relationships>')  # fmt: skip


def _cell(text: str) -> str:
    """XML holds no control characters but these three."""
    return escape("".join(letter for letter in text if letter >= " " or letter in "\t\n\r"))


MMBENCH, MMBENCH_CN = (
    Benchmark(
        name, title, "",
        (Need(FILES[name], f"download.openmmlab.com/mmclassification/datasets/mmbench/{FILES[name]}"),),
        partial(_read, name), score, _sheet_of, options={"rounds": ("file", "all")},
    )
    for name, title in (("mmbench", "MMBench"), ("mmbench_cn", "MMBench-CN"))
)  # fmt: skip
