"""What makes a record unfit for training. The pipeline refuses exactly what `python -m llava_jax.data validate` lists.

The reasons follow what breaks the reference's trainer, or quietly spoils it; each check is a pure function of one
record and costs microseconds, but for the token counts and the pictures themselves.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.data.packing import cut
from llava_jax.data.sources import Record, Source
from llava_jax.errors import Unreachable
from llava_jax.prompt.conversation import ROLES
from llava_jax.prompt.encode import IMAGE_MARKER, Format, encode
from llava_jax.prompt.images import open_image
from llava_jax.prompt.templates import Template
from llava_jax.prompt.tokenizer import Tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_ROOT = re.compile(r"[/\\]|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]*://")
Listings = dict[epath.Path, frozenset[str]]
_OPENERS = 8  # threads; PIL releases the interpreter lock while it decodes

# reason -> (is the record refused, what it means). The others are listed and counted, and the record is used.
REASONS = {
    "malformed_json": (True, "the line is no JSON"),
    "bad_shape": (True, "a field is missing or has the wrong type"),
    "empty_conversations": (True, "no turns at all"),
    "unknown_role": (True, "`from` is neither human nor gpt (user, assistant)"),
    "assistant_first": (True, "the first turn is the assistant's"),
    "wrong_order": (True, "two turns of one role in a row"),
    "unanswered": (True, "the last turn is not the assistant's"),
    "empty_answer": (True, "an assistant turn has no text"),
    "image_without_marker": (True, "an image that no <image> shows"),
    "marker_without_image": (True, "<image> in a record without an image"),
    "several_markers": (True, "more <image> in a turn than images"),
    "marker_count": (True, "<image> markers of all turns are not as many as the images"),
    "marker_in_answer": (True, "<image> in an assistant turn"),
    "missing_image": (True, "the image file does not exist"),
    "bad_image": (True, "the image cannot be opened"),
    "unsafe_path": (True, "the image path leaves the image folder"),
    "lone_surrogate": (True, "half of a UTF-16 pair, which is no text"),
    "not_a_caption": (True, "template `plain` wants one question with an image and one caption"),
    "empty_question": (True, "the template puts its system text into the first turn, which is empty"),
    "no_learned_tokens": (True, "nothing to learn is left within the row"),
    "unreadable": (True, "the record cannot be read from its file"),
    "bad_text": (True, "the text cannot be encoded"),
    "too_many_images": (True, "more images than a row takes"),
    "control_text": (False, "a separator written out in a turn: read as letters here, masked whole by LLaVA"),
    "cut": (False, "longer than the row: its right end is not trained on"),
    "duplicate_id": (False, "an id that an earlier record has"),
}


class Problem(NamedTuple):
    """One thing that is wrong with a record; reason is a key of `REASONS`."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """A problem and the record that has it. line is None but in JSON lines."""

    path: str
    index: int
    line: int | None
    id: str
    reason: str
    detail: str

    @property
    def fatal(self) -> bool:
        return REASONS[self.reason][0]

    def __str__(self) -> str:
        where = f"{self.path}[{self.index}]" if self.line is None else f"{self.path}:{self.line}"
        return f"{where} id={brief(self.id)} {self.reason}: {self.detail}"


def found(record: Record, problem: Problem) -> Finding:
    """The problem with the record's place and id."""
    return Finding(record.path, record.index, record.line, record.id, problem.reason, problem.detail)


def brief(value: Any, limit: int = 80) -> str:
    """`repr` on one line of at most `limit` characters: safe to print whatever a file holds."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Rules(NamedTuple):
    """What the format of a run adds to the checks: see `rules`."""

    controls: tuple[str, ...]
    images_only: bool
    system_inside: bool


def rules(template: Template, tokenizer: Tokenizer | None = None) -> Rules:
    """The checks' view of a template and a tokenizer.

    controls are the texts that a turn should not hold: what opens the assistant's turn, and special tokens written
    out. For v1 with LLaMA's tokenizer: "ASSISTANT:", "</s>", "<s>", "<unk>".
    """
    opener = "".join(part.text for part in (*template.user.after, *template.assistant.before))
    texts = {opener.strip(), *(stop.strip() for stop in template.stops if stop.strip().startswith("<"))}
    if tokenizer is not None:
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        texts |= {tokenizer.decode([token], skip_special=False).strip() for token in specials if token is not None}
    return Rules(tuple(sorted(texts - {""})), template.images_only, template.system_inside)


def check(record: Record, rules: Rules) -> list[Problem]:
    """Everything wrong with the record's words and paths, without tokenising and without touching its files."""
    if record.fault:
        return [Problem("unreadable", record.fault)]
    shape = _shape(record.raw)
    if shape:
        return [shape]
    rows = record.raw["conversations"]
    first = 1 if rows[0]["from"] == "system" else 0
    roles = [ROLES[row["from"]] for row in rows[first:]]
    texts = [row["value"] for row in rows]
    paths = _paths(record.raw)
    return [
        *_roles(roles, texts[first:], first),
        *_frames(texts[first:], len(paths), rules),
        *_text([*texts, *paths], rules.controls),
        *_markers(roles, texts[first:], len(paths), first),
        *(Problem("unsafe_path", f"image={brief(path)}: want a path inside the image folder")
          for path in paths if _escapes(path)),
    ]  # fmt: skip


def _paths(raw: dict[str, Any]) -> list[Any]:
    images = raw.get("image", [])
    return images if isinstance(images, list) else [images]


def _shape(raw: Any) -> Problem | None:
    if not isinstance(raw, dict):
        return Problem("bad_shape", f"want an object with 'conversations', got {brief(raw)}")
    rows = raw.get("conversations")
    if not isinstance(rows, list):
        return Problem("bad_shape", f"conversations={brief(rows)}: want a list of {{from, value}} objects")
    if not rows:
        return Problem("empty_conversations", "conversations=[]: want a human turn and an answer")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("from"), str):
            return Problem("bad_shape", f"conversations[{i}]={brief(row)}: want {{from, value}}, both strings")
        if not isinstance(row.get("value"), str):
            return Problem("bad_shape", f"conversations[{i}].value={brief(row.get('value'))}: want a string")
        if row["from"] not in ROLES and not (i == 0 and row["from"] == "system"):
            return Problem("unknown_role", f"conversations[{i}].from={brief(row['from'])}: want 'human' or 'gpt'")
    for path in _paths(raw):
        if not isinstance(path, str) or not path:
            return Problem("bad_shape", f"image={brief(raw['image'])}: want a path or a list of paths, or no image key")
    return None


def _roles(roles: list[str], texts: list[str], first: int) -> Iterator[Problem]:
    if not roles:
        yield Problem("empty_conversations", "conversations holds a system turn only: want a human turn and an answer")
        return
    if roles[0] == "assistant":
        yield Problem("assistant_first", f"conversations[{first}].from is the assistant's: want a human turn first")
    for i in range(1, len(roles)):
        if roles[i] == roles[i - 1]:
            yield Problem("wrong_order", f"conversations[{first + i}] is the {roles[i]}'s, and so is the one before")
            break
    if roles[-1] == "user":
        yield Problem("unanswered", f"conversations[{first + len(roles) - 1}], the last, is the user's: want an answer")
    for i, (role, text) in enumerate(zip(roles, texts), first):
        if role == "assistant" and not text.strip():
            yield Problem("empty_answer", f"conversations[{i}].value={brief(text)}: an answer without text")


def _frames(texts: list[str], images: int, rules: Rules) -> Iterator[Problem]:
    """What single templates want."""
    if rules.images_only and (len(texts) != 2 or not images or IMAGE_MARKER not in texts[0]):
        yield Problem("not_a_caption", f"{len(texts)} turns, {images} image(s): want one question with {IMAGE_MARKER} "
                      "and its image, and one caption")  # fmt: skip
    if rules.system_inside and texts and not texts[0]:
        yield Problem("empty_question", "the first turn has no text: want a question there")


def _text(texts: list[str], controls: Sequence[str]) -> Iterator[Problem]:
    joined = "\n".join(texts)
    surrogate = None if joined.isascii() else _SURROGATE.search(joined)
    if surrogate:
        yield Problem("lone_surrogate", f"{surrogate.group()!r}: half a character; repair the \\u escapes")
    for control in controls:
        if control in joined:
            place = joined.index(control)
            shown = brief(joined[max(place - 20, 0) : place + len(control) + 20])
            yield Problem("control_text", f"{control!r} in {shown}: the model would read it as a separator")


def _markers(roles: list[str], texts: list[str], images: int, first: int) -> Iterator[Problem]:
    counts = [text.count(IMAGE_MARKER) for text in texts]
    total = sum(counts)
    if not total and not images:
        return
    for i, (role, count) in enumerate(zip(roles, counts), first):
        if count and role == "assistant":
            yield Problem("marker_in_answer", f"conversations[{i}] is an answer and holds {IMAGE_MARKER}")
    if not total:
        yield Problem("image_without_marker", f"{images} image(s) and no {IMAGE_MARKER}: the model would see none")
    elif not images:
        yield Problem("marker_without_image", f"{total} {IMAGE_MARKER} and no image")
    elif max(counts) > images:
        yield Problem("several_markers", f"conversations[{first + counts.index(max(counts))}] holds {max(counts)} "
                      f"{IMAGE_MARKER} for {images} image(s)")  # fmt: skip
    elif total != images:
        yield Problem("marker_count", f"{total} {IMAGE_MARKER} in all turns for {images} image(s)")


def _escapes(path: str) -> bool:
    return bool(_OTHER_ROOT.match(path)) or "\0" in path or ".." in path.replace("\\", "/").split("/")


def check_files(record: Record, root: epath.Path | None, listings: Listings) -> list[Problem]:
    """Images of a sound record that are not files below `root`; nothing is opened.

    listings: of a bucket's folders, as far as records before this one were in them; those of this one are added.
    """
    if record.pictures or root is None:
        return []
    problems = []
    for path in _paths(record.raw):
        shown = brief(path, 200)
        place = next((place for place in _spellings(root, path) if _is_file(place, listings)), None)
        if place is None:
            problems.append(Problem("missing_image", f"{shown}: no such file in {root}"))
        elif not files.is_bucket(place) and not Path(place).resolve().is_relative_to(_resolved(root)):
            problems.append(Problem("unsafe_path", f"{shown}: a link that leaves {root}"))
    return problems


def _is_file(place: epath.Path, listings: Listings) -> bool:
    """In a bucket three requests answer this of one file, and one that of a thousand."""
    if not files.is_bucket(place) or not place.suffix:  # a listing does not tell a folder from a file
        return place.is_file()
    folder = place.parent
    if folder not in listings:
        listings[folder] = frozenset(entry.name for entry in files.listed(folder))
    return place.name in listings[folder]


@functools.cache
def _resolved(root: epath.Path) -> Path:
    return Path(root).resolve()  # epath's own does not follow links


def _spellings(root: epath.Path, path: str) -> Iterator[epath.Path]:
    """The path as written, then with é as one character and as two: what `images.open_image` tries."""
    yield root / path
    if not path.isascii():
        yield from (root / unicodedata.normalize(form, path) for form in ("NFC", "NFD"))


def check_pictures(record: Record, root: epath.Path | None) -> list[Problem]:
    """Images of a sound record that do not open."""
    problems = []
    for i, reference in enumerate(record.conversation.images):
        try:
            open_image(reference, root)
        except Unreachable:  # no fault of the picture's
            raise
        except (ValueError, OSError) as error:
            problems.append(Problem("bad_image", f"image {i}: {brief(str(error), 400)[1:-1]}"))
    return problems


def check_tokens(record: Record, format: Format, row_tokens: int) -> list[Problem]:
    """Whether a sound record fits into a row of `row_tokens`, image features counted."""
    if _surely_fits(record, format, row_tokens):
        return []
    try:
        example = encode(record.conversation, format, open_images=False)
    except ValueError as error:
        return [Problem("bad_text", str(error))]
    kept, lost = cut(example, row_tokens)
    length = f"{len(example.tokens)} tokens for a row of {row_tokens}"
    if not kept.learned[1:].any():
        return [Problem("no_learned_tokens", f"{length}: no target is left of {int(example.learned.sum())}")]
    return [Problem("cut", f"{length}: {lost} of {int(example.learned.sum())} targets are lost")] if lost else []


def _surely_fits(record: Record, format: Format, row_tokens: int) -> bool:
    """True if even one token a character would fit: most records are spared the tokenizer (30 times as fast)."""
    texts = [row["value"] for row in record.raw["conversations"]]
    if not "".join(texts).isascii():
        return False
    fixed, each = _frame_characters(format.template)
    images = sum(text.count(IMAGE_MARKER) for text in texts)
    return sum(map(len, texts)) + fixed + len(texts) * each + images * format.image_features <= row_tokens


@functools.cache
def _frame_characters(template: Template) -> tuple[int, int]:
    """At least as many tokens as the template adds to a conversation, and to each turn of it."""
    frames = [part.text for frame in (template.user, template.assistant) for part in (*frame.before, *frame.after)]
    # 8 more a turn for begin-of-sequence and the blanks SentencePiece puts before pieces; the image marker's own 7
    # characters make room for image start, image end and the blanks around an image.
    each = sum(map(len, [*frames, template.between, *template.image_frame])) + 8
    fixed = [template.system, *template.system_frame, *(part.text for part in template.ending)]
    examples = sum(len(turn.text) + each for turn in template.examples)
    return sum(map(len, fixed)) + examples + 8, each


def validate(
    source: Source, rules: Rules, format: Format | None = None, row_tokens: int = 0,
    open_images: bool = False,
) -> Iterator[Finding]:  # fmt: skip
    """Every finding in the source, in the order of its records.

    Args:
      source: opened with keep_broken=True, if lines that are no JSON are to be listed too.
      rules: from `rules`.
      format: given, token counts are checked against `row_tokens`.
      open_images: decode every image (thousands a minute); otherwise they are only looked for.
    """
    seen: dict[str, str] = {}
    listings: Listings = {}
    with ThreadPoolExecutor(_OPENERS) as pool:
        for records in _chunks(source if open_images else map(source.text, range(len(source))), 256):
            found_here = [_record_problems(record, source, listings, rules, format, row_tokens) for record in records]
            if open_images:
                sound = [not any(REASONS[p.reason][0] for p in problems) for problems in found_here]
                opened = pool.map(lambda pair: check_pictures(pair[0], source.images) if pair[1] else [],
                                  zip(records, sound))  # fmt: skip
                found_here = [problems + more for problems, more in zip(found_here, opened)]
            for record, problems in zip(records, found_here):
                yield from (found(record, problem) for problem in problems + _duplicate(record, seen))


def _record_problems(
    record: Record, source: Source, listings: Listings, rules: Rules, format: Format | None, row_tokens: int
) -> list[Problem]:
    problems = check(record, rules)
    if problems:
        return problems
    problems = check_files(record, source.images, listings)
    return problems + (check_tokens(record, format, row_tokens) if format else [])


def _duplicate(record: Record, seen: dict[str, str]) -> list[Problem]:
    if not isinstance(record.raw, dict) or "id" not in record.raw:
        return []
    first = seen.setdefault(record.id, record.where)
    return [Problem("duplicate_id", f"{first} has it too")] if first != record.where else []


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
