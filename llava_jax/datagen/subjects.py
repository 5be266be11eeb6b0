"""The text that stands for a picture: captions, and boxes with names, from COCO or from the user's records."""

import collections
from typing import Any, NamedTuple

from etils import epath

from llava_jax.datagen.files import brief, encodable, field, image_path, read_json, read_rows
from llava_jax.errors import DataError

_MAX_PIXELS = 1 << 30  # of a side


class Box(NamedTuple):
    """An object and its bounds: left, top, right, bottom as shares of width and height, from the upper left."""

    category: str
    bounds: tuple[float, float, float, float]


class Subject(NamedTuple):
    """One picture. id: of the record to be made; image: path relative to the image folder."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


def context(subject: Subject, boxes: bool) -> str:
    """The text that stands for a picture: captions, one a line, and with `boxes` an empty line and the things.

        A dog on a sofa.
        A brown dog rests.

        dog: [0.25, 0.401, 0.7, 1.0]

    Source: the file formats of haotian-liu/LLaVA playground/data/prompts @ c121f04.
    """
    captions = "\n".join(caption.strip() for caption in subject.captions)
    if not boxes or not subject.boxes:
        return captions
    objects = [f"{box.category}: {[round(float(bound), 3) for bound in box.bounds]}" for box in subject.boxes]
    return captions + "\n\n" + "\n".join(objects)


def from_records(path: epath.PathLike) -> list[Subject]:
    """Subjects of a JSON list or JSON lines.

        {"id": "7", "image": "7.jpg", "captions": ["A cat."], "boxes": [{"category": "cat", "bbox": [0.1, 0, 0.5, 1]}]}

    `caption` with one text stands for `captions`; `boxes` may be left out or be called `instances`, as in LLaVA-Bench.

    Raises:
      FileNotFoundError: no such file. DataError: a field is missing or wrong, an id occurs twice; names the row.
    """
    subjects = []
    for where, row in read_rows(path):
        identity = field(row, where, "id", str | int, "a text or a number")
        if not encodable(str(identity)):
            raise DataError(f"{where}: id={identity!r}: half a character, which no file can hold")
        boxes = field({"boxes": row.get("instances", []), **row}, where, "boxes", list, "a list of boxes")
        parsed_boxes = tuple(_box(box, f"{where}: boxes[{index}]") for index, box in enumerate(boxes))
        subjects.append(Subject(str(identity), image_path(row, where), _captions(row, where), parsed_boxes))
    if not subjects:
        raise DataError(f"{path}: holds no records")
    _check_ids(subjects, str(path))
    return subjects


def from_coco(captions: epath.PathLike, instances: epath.PathLike | None = None, crowds: bool = False) -> list[Subject]:
    """Subjects of COCO's annotation files, in the order of the captions file's images; those without one are left out.

    instances: its boxes, in the file's order. crowds: also those that stand for a group (iscrowd); what LLaVA did with
      them is not known.

    Raises:
      FileNotFoundError: no such file. DataError: the file is no COCO annotation file; names the row.
    """
    annotations = _coco(captions, "captions_train2017.json")
    texts: dict[int, list[str]] = collections.defaultdict(list)
    for where, row in _rows(annotations, "annotations", captions):
        texts[field(row, where, "image_id", int, "a number")].append(field(row, where, "caption", str, "a text"))
    boxes = {} if instances is None else _instances(instances, crowds)
    subjects = []
    for where, row in _rows(annotations, "images", captions):
        number = field(row, where, "id", int, "a number")
        image = image_path(row, where, "file_name")
        image_captions = tuple(" ".join(text.split()) for text in texts.get(number, []) if text.strip())
        if image_captions:
            subjects.append(Subject(f"{number:012}", image, image_captions, tuple(boxes.get(number, ()))))
    if not subjects:
        raise DataError(f"{captions}: no image has a caption")
    _check_ids(subjects, str(captions))
    return subjects


def _instances(path: epath.PathLike, crowds: bool) -> dict[int, list[Box]]:
    annotations = _coco(path, "instances_train2017.json")
    names = {field(row, where, "id", int, "a number"): field(row, where, "name", str, "a text")
             for where, row in _rows(annotations, "categories", path)}  # fmt: skip
    sizes = {field(row, where, "id", int, "a number"): tuple(field(row, where, side, int, "pixels, at least 1") for side
             in ("width", "height")) for where, row in _rows(annotations, "images", path)}  # fmt: skip
    boxes: dict[int, list[Box]] = collections.defaultdict(list)
    for where, row in _rows(annotations, "annotations", path):
        image = field(row, where, "image_id", int, "a number")
        category = field(row, where, "category_id", int, "a number")
        if image not in sizes or min(sizes[image]) < 1 or max(sizes[image]) > _MAX_PIXELS:
            raise DataError(f"{where}: image_id={image}: want one of the file's images, with width and height")
        if category not in names:
            raise DataError(f"{where}: category_id={category}: want one of the file's {len(names)} categories")
        if row.get("iscrowd") and not crowds:
            continue
        width, height = sizes[image]
        left, top, box_width, box_height = _four(row, where)
        edges = (left / width, top / height, (left + box_width) / width, (top + box_height) / height)
        boxes[image].append(Box(names[category], tuple(min(max(edge, 0.0), 1.0) for edge in edges)))
    return boxes


def _coco(path: epath.PathLike, example: str) -> dict[str, Any]:
    annotations = read_json(path)
    if not isinstance(annotations, dict) or not {"images", "annotations"} <= annotations.keys():
        raise DataError(f"{path}: want COCO's object with 'images' and 'annotations', as in {example}; own records are "
                        "given with --records")  # fmt: skip
    return annotations


def _rows(annotations: dict[str, Any], name: str, path: epath.PathLike) -> list[tuple[str, dict[str, Any]]]:
    values = field(annotations, str(path), name, list, "a list")
    rows = [(f"{path}: {name}[{index}]", row) for index, row in enumerate(values)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: {brief(row)}: want an object")
    return rows


def _captions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    captions = [row["caption"]] if "captions" not in row and "caption" in row else row.get("captions")
    if not (isinstance(captions, list) and captions
            and all(isinstance(text, str) and text.strip() for text in captions)):  # fmt: skip
        raise DataError(f"{where}: captions={brief(captions)}: want a list of texts, at least one, none empty")
    return tuple(" ".join(text.split()) for text in captions)


def _box(box: Any, where: str) -> Box:
    if not isinstance(box, dict):
        raise DataError(f"{where}: {brief(box)}: want an object with 'category' and 'bbox'")
    bounds = _four(box, where)
    left, top, right, bottom = bounds
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise DataError(f"{where}: bbox={list(bounds)}: want left, top, right, bottom between 0 and 1: divide "
                        "pixels by the picture's width and height")  # fmt: skip
    return Box(field(box, where, "category", str, "a text"), bounds)


def _four(row: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    edges = field(row, where, "bbox", list, "four numbers")
    if len(edges) != 4 or not all(type(edge) in (int, float) and abs(edge) <= _MAX_PIXELS for edge in edges):
        raise DataError(f"{where}: bbox={brief(edges)}: want four numbers")
    return tuple(float(edge) for edge in edges)


def _check_ids(subjects: list[Subject], path: str) -> None:
    counts = collections.Counter(subject.id for subject in subjects)
    duplicates = [identity for identity, count in counts.items() if count > 1]
    if duplicates:
        raise DataError(f"{path}: {len(duplicates)} ids occur more than once, {duplicates[0]!r} the first: make them "
                        "different, as random choices and exports are keyed by the id")  # fmt: skip
