"""A record as it was written, and the one way from it to a `Conversation`.

Nothing that a record says is dropped in silence: `keys` says of each key whether it is read, harmless or refused.
"""

import base64
import binascii
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.data.keys import HARMLESS, PART_KEYS, READ, RECORD_KEYS, TURN_KEYS
from llava_jax.data.problems import Finding, Problem, brief
from llava_jax.errors import DataError
from llava_jax.prompt.conversation import ROLES, Conversation, Turn
from llava_jax.prompt.encode import IMAGE_MARKER

_PARTS = ("text", "image", "image_url")
_MARKS = ("loss", "train", "weight")  # of a turn: ms-swift's, axolotl's, OpenAI's
_NOTHING = (None, "", [], {}, "[]")
_WEIGHTS = (1e-6, 1e6)


@dataclass(frozen=True)
class Record:
    """One record as it was written.

    path: the file; index: place in the source, from 0; line: in JSON lines, from 1, else None.
    raw: the parsed JSON value, whatever it is, or the `Conversation` of a data set that is an object. A picture that
      comes with the record (TFDS, shards, parquet) is bytes where JSON names a file.
    fault: why the record cannot be read; "" where it can.
    """

    path: str
    index: int
    line: int | None
    raw: Any
    fault: str = ""

    @property
    def where(self) -> str:
        """`records.json[16]` (index) or `records.jsonl:17` (line)."""
        return f"{self.path}[{self.index}]" if self.line is None else f"{self.path}:{self.line}"

    @property
    def id(self) -> str:
        """The record's own id; where it stands if it has none."""
        if isinstance(self.raw, Conversation):
            return self.raw.id or self.where
        own = self.raw.get("id") if isinstance(self.raw, dict) else None
        return self.where if own is None else str(own)

    @property
    def conversation(self) -> Conversation:
        """The record's turns and images. Raises as `conversation_in`."""
        return self.conversation_in(None)

    def conversation_in(self, root: epath.Path | None) -> Conversation:
        """The record's turns and images, whose paths are relative to the image folder where they lie in it.

        Raises:
          DataError: the record has another shape, or a fault; names it.
        """
        parsed = parse(self, root)
        if isinstance(parsed, Problem):
            raise DataError(str(found(self, parsed)))
        return parsed.conversation


def found(record: Record, problem: Problem) -> Finding:
    """The problem with the record's place and id."""
    return Finding(record.path, record.index, record.line, record.id, problem.reason, problem.detail)


class Parsed(NamedTuple):
    """A record's conversation.

    place: "conversations" or "messages". first: the row of its first turn, 1 behind a system turn.
    pictures: the key that names its pictures. unknown: keys that nothing reads, as `mood` or `conversations[].mood`.
    """

    conversation: Conversation
    place: str
    first: int
    pictures: str
    unknown: tuple[str, ...]


class _Unfit(ValueError):
    """What `parse` returns as a problem."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.problem = Problem(reason, detail)


class _Slot(NamedTuple):
    """A picture among a message's parts. ref: it names one; None: it is one of the record's, `index` if given."""

    ref: Any
    index: int | None


def parse(record: Record, root: epath.Path | None = None) -> Parsed | Problem:
    """The conversation that a record holds, in LLaVA's words or in `messages` of {role, content}.

        {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

    `image` (or `images`) as a string follows LLaVA's rule, as a list of k it wants k markers, kept in place. A system
    text is the first turn, `system` or `system_prompt`. `loss`, `train` or `weight` of an answer says whether it is
    learned, `weight` of the record how much its tokens count.

    root: the image folder; a path that is absolute and lies in it becomes relative to it.
    """
    if record.fault:
        return Problem("unreadable", record.fault)
    try:
        return _parsed(record, root)
    except _Unfit as unfit:
        return unfit.problem


def _parsed(record: Record, root: epath.Path | None) -> Parsed:
    raw = record.raw
    if isinstance(raw, Conversation):
        return _given(raw, record.id)
    if not isinstance(raw, dict):
        raise _Unfit("bad_shape", f"want an object with 'conversations', got {brief(raw)}")
    unknown = _unknown(raw, RECORD_KEYS, "")
    place, rows = _rows(raw)
    turns, system, slots = [], None, []
    for i, row in enumerate(rows):
        turn = _plain_turn(row) or _turn(row, place, i, slots, unknown)
        if turn.role == "system":
            system = turn.text
        else:
            turns.append(turn)
    if not turns:
        raise _Unfit("empty_conversations", f"{place} holds a system turn only: want a human turn and an answer")
    first = int(system is not None)
    images, in_place, key = _images(raw, slots)
    images = tuple(_inside(image, root) if isinstance(image, str) else image for image in images)
    conversation = Conversation(
        tuple(turns), images, record.id, _system(raw, system, place), in_place, weight=_weight(raw.get("weight"))
    )
    return Parsed(conversation, place, first, key, tuple(dict.fromkeys(unknown)))


def _given(conversation: Conversation, id: str) -> Parsed:
    """A conversation that was written by no file; its types are those that a program may have wrong."""
    for i, turn in enumerate(conversation.turns):
        if not isinstance(turn, Turn) or not isinstance(turn.text, str):
            raise _Unfit("bad_shape", f"turns[{i}]={brief(turn)}: want a llava_jax.Turn(role, text)")
        if turn.role not in ("user", "assistant"):
            raise _Unfit("unknown_role", f"turns[{i}].role={brief(turn.role)}: want 'user' or 'assistant'")
    if not conversation.turns:
        raise _Unfit("empty_conversations", "turns=(): want a question and an answer")
    _weight(conversation.weight)
    return Parsed(dataclasses.replace(conversation, id=id), "turns", 0, "images", ())


def _plain_turn(row: Any) -> Turn | None:
    """The turn of an object {from, value}, as nearly all are; None: it takes a closer look."""
    if type(row) is dict and len(row) == 2:
        speaker, text = row.get("from"), row.get("value")
        if type(speaker) is str and type(text) is str and speaker in ROLES:
            return Turn(ROLES[speaker], text)
    return None


def _turn(row: Any, place: str, index: int, slots: list[_Slot], unknown: list[str]) -> Turn:
    """One turn; of the role "system" only the first. Adds its pictures and its unknown keys to the lists."""
    where = f"{place}[{index}]"
    if not isinstance(row, dict):
        raise _Unfit("bad_shape", f"{where}={brief(row)}: want an object {{from, value}} or {{role, content}}")
    unknown += _unknown(row, TURN_KEYS, f"{place}[].")
    role, text = _role(row, where, index), _text(row, where, slots, unknown)
    if role == "system" and slots:
        raise _Unfit("bad_shape", f"{where}, the system's, shows a picture: show it in a question")
    return Turn(role, text, _supervised(row, role, where))


def _unknown(row: Mapping[str, Any], table: Mapping[str, str], prefix: str) -> list[str]:
    """The keys that nothing reads; raises where one is refused."""
    unknown = []
    for key, value in row.items():
        use = table.get(key)
        if use is READ or use is HARMLESS or value in _NOTHING:
            continue
        use = use or table.get(key.lower())
        if use is READ:
            use = f"keys are written in small letters: rename it to `{key.lower()}`"
        if use is not None and use is not HARMLESS:
            raise _Unfit("unread_key", f"{prefix}{key}={brief(value)}: {use}")
        if use is None:
            unknown.append(prefix + key)
    return unknown


def _rows(raw: Mapping[str, Any]) -> tuple[str, list[Any]]:
    rows = raw.get("conversations")
    if rows and type(rows) is list and "messages" not in raw:
        return "conversations", rows
    places = [place for place in ("conversations", "messages") if raw.get(place) is not None]
    if len(places) == 2:
        raise _Unfit("bad_shape", "both conversations and messages: keep one of them")
    place = places[0] if places else "conversations"
    rows = raw.get(place)
    if not isinstance(rows, list):
        raise _Unfit("bad_shape", f"{place}={brief(rows)}: want a list of {{from, value}} or {{role, content}} "
                     f"objects; the record's keys are {brief(list(raw), 200)}")  # fmt: skip
    if not rows:
        raise _Unfit("empty_conversations", f"{place}=[]: want a human turn and an answer")
    return place, rows


def _role(row: Mapping[str, Any], where: str, index: int) -> str:
    name = "role" if row.get("role") is not None else "from"
    speaker = row.get(name)
    if not isinstance(speaker, str):
        raise _Unfit("bad_shape", f"{where}={brief(row)}: want {{from, value}} or {{role, content}}, both strings")
    if name == "role" and row.get("from") is not None:
        raise _Unfit("bad_shape", f"{where} has both from and role: keep one of them")
    if speaker == "system" and not index:
        return speaker
    if speaker not in ROLES:
        raise _Unfit("unknown_role", f"{where}.{name}={brief(speaker)}: want 'human' or 'gpt' (or 'user', 'assistant', "
                     "and 'system' as the first turn only)")  # fmt: skip
    return ROLES[speaker]


def _text(row: Mapping[str, Any], where: str, slots: list[_Slot], unknown: list[str]) -> str:
    """The message, with a marker for each of its parts that is a picture; adds these to `slots`."""
    name = "content" if row.get("content") is not None else "value"
    text = row.get(name)
    if name == "content" and row.get("value") is not None:
        raise _Unfit("bad_shape", f"{where} has both value and content: keep one of them")
    if isinstance(text, str):
        return text
    if not isinstance(text, list):
        raise _Unfit("bad_shape", f"{where}.{name}={brief(text)}: want a string, or a list of parts")
    joined, last = "", ""
    for i, part in enumerate(text):
        piece = _part(part, f"{where}.{name}[{i}]", slots, unknown)
        # LLaVA writes a picture on a line of its own.
        if last and piece and IMAGE_MARKER in (last, piece) and not (last.endswith("\n") or piece.startswith("\n")):
            joined += "\n"
        joined, last = joined + piece, piece or last
    return joined


def _part(part: Any, where: str, slots: list[_Slot], unknown: list[str]) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text", ""), str | None):
        raise _Unfit("bad_shape", f"{where}={brief(part)}: want {{type: text, text}} or {{type: image}}")
    kind = part.get("type")
    if kind not in _PARTS:
        remedy = RECORD_KEYS.get(str(kind), "want one of " + ", ".join(_PARTS))
        raise _Unfit("unread_key", f"{where}.type={brief(kind)}: {remedy}")
    unknown += _unknown(part, PART_KEYS, "content[].")
    pictures = [part[name] for name in ("image", "image_url", "path", "url") if part.get(name) not in _NOTHING]
    if kind == "text":
        if part.get("text") is None:
            raise _Unfit("bad_shape", f"{where}={brief(part)}: want a string as text")
        if pictures:
            raise _Unfit("bad_shape", f"{where}={brief(part)}: a picture in a part of text: want a part for each")
        return part["text"]
    if part.get("text") or len(pictures) > 1:
        raise _Unfit("bad_shape", f"{where}={brief(part)}: want one picture and no text in it: want a part for each")
    named = pictures[0] if pictures else None
    named = named["url"] if isinstance(named, dict) and "url" in named else named
    index = part.get("index")
    if index is not None and (type(index) is not int or index < 0):
        raise _Unfit("bad_shape", f"{where}.index={brief(index)}: want the number of a picture in `images`, from 0")
    slots.append(_Slot(None if named is None else _reference(named, f"{where}={brief(part)}"), index))
    return IMAGE_MARKER


def _supervised(row: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether an answer is learned, by the marks of its turn."""
    marks = {name: row[name] for name in _MARKS if row.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _Unfit("bad_mark", f"{where}.{name}={brief(value)}: want true or 1 for an answer that is learned, "
                         "false or 0 for one that is not")  # fmt: skip
        if value and role != "assistant":
            raise _Unfit("bad_mark", f"{where}.{name}={brief(value)} in a turn of the {role}: only answers can be "
                         "learned; leave it out")  # fmt: skip
    if len(set(map(bool, marks.values()))) == 2:
        raise _Unfit("bad_mark", f"{where}: {brief(marks)} contradict each other")
    return all(marks.values()) or role != "assistant"


def _system(raw: Mapping[str, Any], turn: str | None, place: str) -> str | None:
    if "system" not in raw and "system_prompt" not in raw:
        return turn
    texts = {name: raw[name] for name in ("system", "system_prompt") if raw.get(name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise _Unfit("bad_shape", f"{name}={brief(text)}: want a string")
    if turn is not None:
        texts[f"{place}[0]"] = turn
    if len(set(texts.values())) > 1:
        raise _Unfit("bad_shape", f"{' and '.join(texts)} are different system texts: keep one of them")
    return next(iter(texts.values()), None)


def _weight(weight: Any) -> float | int:
    if weight is None:
        return 1.0
    low, high = _WEIGHTS
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not low <= weight <= high:
        raise _Unfit("bad_weight", f"weight={brief(weight)}: want a number of {low} to {high:.0f}, by which the "
                     "record's tokens count in the loss; drop a record that shall not count")  # fmt: skip
    return weight


def _images(raw: Mapping[str, Any], slots: Sequence[_Slot]) -> tuple[tuple[Any, ...], bool, str]:
    """The pictures in reading order, whether their markers stay where they are, and the key that names them."""
    image = raw.get("image")
    if type(image) is str and image and not slots and "images" not in raw and not image.startswith("data:"):
        return (image,), False, "image"
    names = [name for name in ("image", "images") if raw.get(name) is not None and raw[name] != []]
    if len(names) == 2:
        raise _Unfit("bad_shape", "both image and images: keep one of them")
    key, value = (names[0], raw[names[0]]) if names else ("image", [])
    shown = f"{key}={brief(value)}"
    images = tuple(_reference(one, shown) for one in (value if isinstance(value, list) else [value]))
    if any(slot.ref is not None for slot in slots):
        if images or any(slot.ref is None for slot in slots):
            raise _Unfit("bad_shape", "some pictures are named in the parts of messages, others in the record: want "
                         "all of them in one place")  # fmt: skip
        return tuple(slot.ref for slot in slots), True, "content"
    order = [slot.index for slot in slots if slot.index is not None]
    if order:
        if len(order) < len(slots) or set(order) != set(range(len(images))):
            raise _Unfit("marker_count", f"the parts of messages show the pictures {order} of {len(images)} in "
                         f"{key}: want each of them, counted from 0")  # fmt: skip
        images = tuple(images[i] for i in order)
    return images, bool(slots) or (isinstance(value, list) and bool(images)), key


def _reference(value: Any, shown: str) -> str | bytes:
    """A path, or the picture's bytes: {bytes, path} is the form of Hugging Face `datasets`."""
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) or (isinstance(value, str) and value and not value.startswith("data:")):
        return value
    if not isinstance(value, str) or not value:
        raise _Unfit("bad_shape", f"{shown}: want a path or a list of paths, or no such key for text alone")
    try:
        return base64.b64decode(value.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise _Unfit("bad_image", f"image={brief(value)}: no base64 text ({error})") from None


def _inside(path: str, root: epath.Path | None) -> str:
    """The path relative to the image folder, if it is absolute and lies in it; else as it is."""
    if root is None or not (path.startswith("/") or "://" in path):
        return path
    if files.is_bucket(root) or files.is_bucket(path):
        return path.removeprefix(f"{os.fspath(root).rstrip('/')}/")
    below = _below(path, os.path.abspath(root))
    try:
        return below or _below(path, resolved(root)) or _below(os.path.realpath(path), resolved(root)) or path
    except ValueError:  # a zero byte or half a character: no path
        return path


def _below(path: str, folder: str) -> str:
    """The path within the folder; "" if it lies elsewhere."""
    folder = folder.rstrip("/") + "/"
    return path[len(folder) :].lstrip("/") if path.startswith(folder) else ""


@functools.cache
def resolved(root: epath.Path) -> str:
    """A local folder's path without links; epath's own `resolve` does not follow them."""
    return os.path.realpath(root)
