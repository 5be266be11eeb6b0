"""MiniGPT-4's second stage data: describe, continue where the answer is short, correct, filter, review, export.

Each step reads the file of the one before and writes its own in one piece; the cache holds the answers, so a step that
was killed and is run again requests only the rest.

Source: arXiv:2304.10592, section 3.2.
"""

import base64
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.datagen import files, rules
from llava_jax.datagen.files import field
from llava_jax.datagen.generate import draw, record
from llava_jax.datagen.parsing import Pair
from llava_jax.errors import DataError, MissingFile, Unreachable
from llava_jax.files import is_bucket, is_dir, listed
from llava_jax.openai_client import Answer, Client, Failure, Request
from llava_jax.prompt.images import encode_jpeg, open_image, to_pixels

DESCRIBED, CORRECTED, FILTERED, REVIEW = "described.jsonl", "corrected.jsonl", "filtered.jsonl", "review"
PICTURE_PIXELS = 768  # of a side, where an endpoint sees
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

Report = Callable[[int, dict[str, int]], None]  # (how many are done, counts)
Start = Callable[[str, int], Report]  # (name and size of some work) -> its Report
# A describer: all dialogues at once, each user, assistant, ..., user -> (index, outcome).
Ask = Callable[[Iterable[tuple[str, Sequence[str]]]], Iterator[tuple[int, Answer | Failure]]]


class Prompts(NamedTuple):
    """The describer's prompts: the first one, and the one that follows a short answer."""

    describe: str
    go_on: str


def pictures(folder: epath.PathLike) -> list[str]:
    """Paths of the picture files in a folder and below, relative to it, sorted.

    Raises:
      FileNotFoundError: no such folder, or no picture in it. DataError: two have one name but for the suffix.
    """
    root = epath.Path(folder)
    if not is_dir(root):
        raise MissingFile(f"images {str(root)!r}: no such folder")
    paths = sorted(str(path.relative_to(root)) for path in _walk(root) if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise MissingFile(f"images {str(root)!r}: no picture in it ({', '.join(SUFFIXES)})")
    names: dict[str, str] = {}
    for path in paths:
        if names.setdefault(Path(path).stem, path) != path:
            raise DataError(f"images {str(root)!r}: {names[Path(path).stem]!r} and {path!r} would both be image_id "
                            f"{Path(path).stem!r}: rename one")  # fmt: skip
    return paths


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its folders; epath's glob knows no `**`."""
    for path in listed(folder):
        # In a bucket each check costs requests: the suffix alone decides that a path is a picture.
        if path.suffix.lower() in SUFFIXES and is_bucket(path) or not is_dir(path):
            yield path
        else:
            yield from _walk(path)


def unreadable(paths: Sequence[str], images: epath.PathLike) -> list[dict[str, Any]]:
    """Rows {image_id, image, unanswered} of the pictures that do not open, so that the others are described."""
    rows = []
    for path in paths:
        try:
            open_image(path, images)
        except Unreachable:  # no fault of the picture's
            raise
        except (ValueError, OSError) as error:
            rows.append({"image_id": Path(path).stem, "image": path, "unanswered": str(error)})
    return rows


# ---- describe


def describe(paths: Sequence[str], ask: Ask, prompts: Prompts, short_tokens: int, start: Start) -> list[dict[str, Any]]:
    """Rows {image_id, image, first, tokens, second, text} or {image_id, image, unanswered}, in the paths' order.

    An answer of at most `short_tokens` tokens is continued, once; text is both joined by a blank.
    """
    first = _collect(ask((path, (prompts.describe,)) for path in paths), start("describe", len(paths)))
    short = [i for i, outcome in first.items() if isinstance(outcome, Answer) and outcome.tokens_out <= short_tokens]
    short.sort()
    dialogues = ((paths[i], (prompts.describe, first[i].text, prompts.go_on)) for i in short)
    second = {short[i]: outcome for i, outcome in _collect(ask(dialogues), start("continue", len(short))).items()}
    rows = []
    for i, path in enumerate(paths):
        row = {"image_id": Path(path).stem, "image": path}
        failure = next((result for result in (first[i], second.get(i)) if isinstance(result, Failure)), None)
        if failure:
            rows.append(row | {"unanswered": failure.reason})
            continue
        continuation = second[i].text if i in second else None
        text = " ".join(f"{first[i].text} {continuation or ''}".split())
        rows.append(row | {"first": first[i].text, "tokens": first[i].tokens_out, "second": continuation, "text": text})
    return rows


def _collect(outcomes: Iterator[tuple[int, Answer | Failure]], report: Report) -> dict[int, Answer | Failure]:
    by_index: dict[int, Answer | Failure] = {}
    failures = 0
    for index, outcome in outcomes:
        by_index[index] = outcome
        failures += isinstance(outcome, Failure)
        report(len(by_index), {"answered": len(by_index) - failures, "unanswered": failures})
    return by_index


def endpoint_describer(client: Client, images: epath.PathLike, temperature: float | None, max_tokens: int) -> Ask:
    """A describer behind an OpenAI-compatible endpoint that sees pictures, sent as JPEG data URLs.

    The picture is scaled down to PICTURE_PIXELS a side and precedes the first text.
    """

    def request(path: str, dialogue: Sequence[str]) -> Request:
        jpeg = base64.b64encode(_small(images, path, PICTURE_PIXELS)).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(dialogue)]
        messages[0]["content"] = [image, {"type": "text", "text": dialogue[0]}]
        return Request(messages, temperature=temperature, max_tokens=max_tokens)

    return lambda dialogues: client.ask_many(request(path, dialogue) for path, dialogue in dialogues)


def _small(images: epath.PathLike, path: str, side: int) -> bytes:
    picture = open_image(path, images)
    picture.thumbnail((side, side))
    return encode_jpeg(np.asarray(picture))


# ---- correct, filter


def correct(
    client: Client, rows: Sequence[dict[str, Any]], instruction: str, max_tokens: int, temperature: float, start: Start
) -> list[dict[str, Any]]:
    """The described rows with `corrected` (the model's text, truncated or not) and `finish`, or `unanswered`."""
    answered = [row for row in rows if "unanswered" not in row]
    dialogues = ([{"role": "user", "content": f"{instruction}\n{row['text']}"}] for row in answered)
    requests = (Request(messages, temperature=temperature, max_tokens=max_tokens) for messages in dialogues)
    outcomes = _collect(client.ask_many(requests), start("correct", len(answered)))
    corrected_rows = []
    for i, row in enumerate(answered):
        outcome = outcomes[i]
        if isinstance(outcome, Failure):
            corrected_rows.append({"image_id": row["image_id"], "image": row["image"], "unanswered": outcome.reason})
        else:
            corrected_rows.append(row | {"corrected": " ".join(outcome.text.split()), "finish": outcome.finish_reason})
    return corrected_rows


def apply_rules(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The corrected rows with `dropped`: the rule that refuses it, or None: it goes to the review."""
    texts: set[str] = set()
    checked = []
    for row in (row for row in rows if "unanswered" not in row):
        reason = "unfinished" if row["finish"] != "stop" else rules.refusal(row["text"], row["corrected"])
        if reason is None and row["corrected"] in texts:
            reason = rules.DUPLICATE
        texts.add(row["corrected"])
        checked.append(row | {"dropped": reason})
    return checked


# ---- review, export


def decisions(paths: Iterable[epath.PathLike]) -> dict[str, dict[str, Any]]:
    """{image_id: {action, caption}} of decision files; of two decisions about a picture the later one counts.

    Raises:
      DataError: an unknown action, or an edit without a caption; names the row.
    """
    by_id = {}
    for path in paths:
        for where, row in files.read_rows(path):
            action = field(row, where, "action", str, "accept, edit or reject")
            if action not in ("accept", "edit", "reject"):
                raise DataError(f"{where}: action={action!r}: want accept, edit or reject")
            if action == "edit" and not field(row, where, "caption", str, "the new text").strip():
                raise DataError(f"{where}: an edit with an empty caption: reject it, or give the text")
            by_id[field(row, where, "image_id", str, "a text")] = row
    return by_id


def select(
    rows: Sequence[dict[str, Any]], decisions: dict[str, dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows {image_id, image, caption} to export, and counts of all rows by decision.

    decisions: None selects every row that no rule dropped, without a review.

    Raises:
      DataError: a decision about a picture that is not there, or was dropped.
    """
    open_rows = {row["image_id"]: row for row in rows if row["dropped"] is None}
    unknown = [identity for identity in decisions or {} if identity not in open_rows]
    if unknown:
        raise DataError(f"decision about image_id {unknown[0]!r}: not one of the {len(open_rows)} to be decided")
    counts = {"dropped": len(rows) - len(open_rows), "accept": 0, "edit": 0, "reject": 0, "undecided": 0}
    selection = []
    for identity, row in open_rows.items():
        decision = {"action": "accept"} if decisions is None else decisions.get(identity, {"action": "undecided"})
        counts[decision["action"]] += 1
        if decision["action"] in ("accept", "edit"):
            caption = " ".join(decision["caption"].split()) if decision["action"] == "edit" else row["corrected"]
            selection.append({"image_id": identity, "image": row["image"], "caption": caption})
    return selection, counts


def export(out: Path, selection: Sequence[dict[str, Any]], images: epath.PathLike, instructions: Sequence[str],
           seed: int) -> None:  # fmt: skip
    """Writes what MiniGPT-4 and what LLaVA read: filter_cap.json with image/ID.jpg, and llava.json over the same files.

    In llava.json each caption answers one of the instructions, drawn. Source: Vision-CAIR/MiniGPT-4
    dataset/README_2_STAGE.md and minigpt4/datasets/datasets/cc_sbu_dataset.py @ d94738a (the layout).
    """
    (out / "image").mkdir(parents=True, exist_ok=True)
    records = []
    for row in selection:
        name = f"image/{row['image_id']}.jpg"
        _copy(images, row["image"], out / name)
        turns = [Pair(draw(instructions, seed, row["image_id"], "question"), row["caption"])]
        records.append(record(row["image_id"], name, turns, seed))
    annotations = [{"image_id": row["image_id"], "caption": row["caption"]} for row in selection]
    files.write_json(out / "filter_cap.json", {"annotations": annotations})
    files.write_json(out / "llava.json", records)


def _copy(images: epath.PathLike, path: str, target: Path) -> None:
    """JPEG files as they are, others as JPEG."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg") and not is_bucket(images):
        shutil.copyfile(Path(images) / path, target)
    else:
        target.write_bytes(encode_jpeg(np.asarray(open_image(path, images)), quality=95))


def thumbnail(images: epath.PathLike, path: str, side: int = 320) -> str:
    """A picture as a data URL, for the review page."""
    jpeg = encode_jpeg(to_pixels(open_image(path, images), side, "pad"), quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
