"""MiniGPT-4's second stage data: describe, continue where the answer is short, correct, filter, look at it, export.

Each step reads the file of the one before and writes its own whole; what was asked is in its cache, so a killed step is
run again and asks only for the rest.

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
from llava_jax.datagen.generate import drawn, record
from llava_jax.datagen.parsing import Pair
from llava_jax.errors import DataError, MissingFile, Unreachable
from llava_jax.files import is_bucket, is_dir, listed
from llava_jax.openai_client import Answer, Client, Failure, Request
from llava_jax.prompt.images import encode_jpeg, open_image, to_pixels

DESCRIBED, CORRECTED, FILTERED, REVIEW = "described.jsonl", "corrected.jsonl", "filtered.jsonl", "review"
PICTURE_PIXELS = 768  # of a side, where an endpoint sees
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

Say = Callable[[int, dict[str, int]], None]  # hears how many are done, and counts
Start = Callable[[str, int], Say]  # given the name and the size of some work
# What a describer is asked: all dialogues at once; each is user, assistant, ..., user. It gives (index, outcome).
Ask = Callable[[Iterable[tuple[str, Sequence[str]]]], Iterator[tuple[int, Answer | Failure]]]


class Wording(NamedTuple):
    """What the describing model is told, first and if its answer is short."""

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
    found = sorted(str(path.relative_to(root)) for path in _below(root) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise MissingFile(f"images {str(root)!r}: no picture in it ({', '.join(SUFFIXES)})")
    names: dict[str, str] = {}
    for path in found:
        if names.setdefault(Path(path).stem, path) != path:
            raise DataError(f"images {str(root)!r}: {names[Path(path).stem]!r} and {path!r} would both be image_id "
                            f"{Path(path).stem!r}: rename one")  # fmt: skip
    return found


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its folders; epath's glob knows no `**`."""
    for path in listed(folder):
        # In a bucket each question costs requests: what is named as a picture is one.
        if path.suffix.lower() in SUFFIXES and is_bucket(path) or not is_dir(path):
            yield path
        else:
            yield from _below(path)


def unreadable(paths: Sequence[str], images: epath.PathLike) -> list[dict[str, Any]]:
    """Rows {image_id, image, unanswered} of the pictures that do not open; one is to cost the others nothing."""
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


def describe(paths: Sequence[str], ask: Ask, words: Wording, short_tokens: int, start: Start) -> list[dict[str, Any]]:
    """Rows {image_id, image, first, tokens, second, text} or {image_id, image, unanswered}, in the paths' order.

    An answer of at most `short_tokens` tokens is continued, once; text is both joined by a blank.
    """
    first = _collect(ask((path, (words.describe,)) for path in paths), start("describe", len(paths)))
    short = [i for i, outcome in first.items() if isinstance(outcome, Answer) and outcome.tokens_out <= short_tokens]
    short.sort()
    told = ((paths[i], (words.describe, first[i].text, words.go_on)) for i in short)
    second = {short[i]: outcome for i, outcome in _collect(ask(told), start("continue", len(short))).items()}
    rows = []
    for i, path in enumerate(paths):
        about = {"image_id": Path(path).stem, "image": path}
        bad = next((one for one in (first[i], second.get(i)) if isinstance(one, Failure)), None)
        if bad:
            rows.append(about | {"unanswered": bad.reason})
            continue
        more = second[i].text if i in second else None
        text = " ".join(f"{first[i].text} {more or ''}".split())
        rows.append(about | {"first": first[i].text, "tokens": first[i].tokens_out, "second": more, "text": text})
    return rows


def _collect(outcomes: Iterator[tuple[int, Answer | Failure]], say: Say) -> dict[int, Answer | Failure]:
    found: dict[int, Answer | Failure] = {}
    lost = 0
    for index, outcome in outcomes:
        found[index] = outcome
        lost += isinstance(outcome, Failure)
        say(len(found), {"answered": len(found) - lost, "unanswered": lost})
    return found


def endpoint_asks(client: Client, images: epath.PathLike, temperature: float | None, max_tokens: int) -> Ask:
    """A describer behind an OpenAI-compatible endpoint that sees pictures, sent as JPEG data URLs.

    The picture is made no larger than PICTURE_PIXELS a side and is put before the first words.
    """

    def request(path: str, said: Sequence[str]) -> Request:
        jpeg = base64.b64encode(_small(images, path, PICTURE_PIXELS)).decode()
        shown = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        messages[0]["content"] = [shown, {"type": "text", "text": said[0]}]
        return Request(messages, temperature=temperature, max_tokens=max_tokens)

    return lambda dialogues: client.ask_many(request(path, said) for path, said in dialogues)


def _small(images: epath.PathLike, path: str, side: int) -> bytes:
    picture = open_image(path, images)
    picture.thumbnail((side, side))
    return encode_jpeg(np.asarray(picture))


# ---- correct, filter


def correct(
    client: Client, rows: Sequence[dict[str, Any]], instruction: str, max_tokens: int, temperature: float, start: Start
) -> list[dict[str, Any]]:
    """The described rows with `corrected` (the model's text, cut short or not) and `finish`, or `unanswered`."""
    wanted = [row for row in rows if "unanswered" not in row]
    told = ([{"role": "user", "content": f"{instruction}\n{row['text']}"}] for row in wanted)
    asked = (Request(messages, temperature=temperature, max_tokens=max_tokens) for messages in told)
    found = _collect(client.ask_many(asked), start("correct", len(wanted)))
    done = []
    for i, row in enumerate(wanted):
        outcome = found[i]
        if isinstance(outcome, Failure):
            done.append({"image_id": row["image_id"], "image": row["image"], "unanswered": outcome.reason})
        else:
            done.append(row | {"corrected": " ".join(outcome.text.split()), "finish": outcome.finish_reason})
    return done


def filtered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The corrected rows with `dropped`: the rule that refuses it, or None: it is to be looked at."""
    seen: set[str] = set()
    done = []
    for row in (row for row in rows if "unanswered" not in row):
        reason = "unfinished" if row["finish"] != "stop" else rules.refused(row["text"], row["corrected"])
        if reason is None and row["corrected"] in seen:
            reason = rules.DUPLICATE
        seen.add(row["corrected"])
        done.append(row | {"dropped": reason})
    return done


# ---- review, export


def decisions(paths: Iterable[epath.PathLike]) -> dict[str, dict[str, Any]]:
    """{image_id: {action, caption}} of decision files; of two decisions about a picture the later one counts.

    Raises:
      DataError: an unknown action, or an edit without a caption; names the row.
    """
    found = {}
    for path in paths:
        for where, row in files.read_rows(path):
            action = field(row, where, "action", str, "accept, edit or reject")
            if action not in ("accept", "edit", "reject"):
                raise DataError(f"{where}: action={action!r}: want accept, edit or reject")
            if action == "edit" and not field(row, where, "caption", str, "the new text").strip():
                raise DataError(f"{where}: an edit with an empty caption: reject it, or give the text")
            found[field(row, where, "image_id", str, "a text")] = row
    return found


def chosen(
    rows: Sequence[dict[str, Any]], decided: dict[str, dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows {image_id, image, caption} to export, and counts of what became of all.

    decided: None takes every row that no rule dropped, unseen by anybody.

    Raises:
      DataError: a decision about a picture that is not there, or was dropped.
    """
    open_rows = {row["image_id"]: row for row in rows if row["dropped"] is None}
    strange = [identity for identity in decided or {} if identity not in open_rows]
    if strange:
        raise DataError(f"decision about image_id {strange[0]!r}: not one of the {len(open_rows)} to be decided")
    counts = {"dropped": len(rows) - len(open_rows), "accept": 0, "edit": 0, "reject": 0, "undecided": 0}
    taken = []
    for identity, row in open_rows.items():
        told = {"action": "accept"} if decided is None else decided.get(identity, {"action": "undecided"})
        counts[told["action"]] += 1
        if told["action"] in ("accept", "edit"):
            caption = " ".join(told["caption"].split()) if told["action"] == "edit" else row["corrected"]
            taken.append({"image_id": identity, "image": row["image"], "caption": caption})
    return taken, counts


def export(out: Path, taken: Sequence[dict[str, Any]], images: epath.PathLike, instructions: Sequence[str],
           seed: int) -> None:  # fmt: skip
    """Writes what MiniGPT-4 and what LLaVA read: filter_cap.json with image/ID.jpg, and llava.json over the same files.

    In llava.json each caption answers one of the instructions, drawn. Source: Vision-CAIR/MiniGPT-4
    dataset/README_2_STAGE.md and minigpt4/datasets/datasets/cc_sbu_dataset.py @ d94738a (the layout).
    """
    (out / "image").mkdir(parents=True, exist_ok=True)
    records = []
    for row in taken:
        name = f"image/{row['image_id']}.jpg"
        _copy(images, row["image"], out / name)
        turns = [Pair(drawn(instructions, seed, row["image_id"], "question"), row["caption"])]
        records.append(record(row["image_id"], name, turns, seed))
    annotations = [{"image_id": row["image_id"], "caption": row["caption"]} for row in taken]
    files.write_json(out / "filter_cap.json", {"annotations": annotations})
    files.write_json(out / "llava.json", records)


def _copy(images: epath.PathLike, path: str, to: Path) -> None:
    """JPEG files as they are, others as JPEG."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg") and not is_bucket(images):
        shutil.copyfile(Path(images) / path, to)
    else:
        to.write_bytes(encode_jpeg(np.asarray(open_image(path, images)), quality=95))


def thumbnail(images: epath.PathLike, path: str, side: int = 320) -> str:
    """A picture as a data URL, for the review page."""
    jpeg = encode_jpeg(to_pixels(open_image(path, images), side, "pad"), quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
