"""A record as it was written, and the one way from it to a `Conversation`.

Nothing that a record says is dropped in silence: `keys` says of each key whether it is read, harmless or refused.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from llava_jax.data.keys import HARMLESS, PART_KEYS, READ, RECORD_KEYS, TURN_KEYS
from llava_jax.data.problems import Finding, Problem, Unfit, brief
from llava_jax.data.shown import NOTHING, PICTURES, VIDEOS, Slot, images, inside, reference
from llava_jax.errors import DataError
from llava_jax.prompt.conversation import (
    IMAGE_MARKER,
    ROLES,
    VIDEO_MARKER,
    Conversation,
    Turn,
    Video,
    with_image_markers,
)

_SHOWN = {"image": PICTURES, "image_url": PICTURES, "video": VIDEOS, "video_url": VIDEOS}  # type of a part -> its keys
_PARTS = ("text", *_SHOWN)
_MARKS = ("loss", "train", "weight")  # of a turn: ms-swift's, axolotl's, OpenAI's
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


def parse(record: Record, root: epath.Path | None = None) -> Parsed | Problem:
    """The conversation that a record holds, in LLaVA's words or in `messages` of {role, content}.

        {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

    `image` (or `images`) as a string follows LLaVA's rule, as a list of k it wants k markers, kept in place; `video`
    (or `videos`) too, whose marker is `<video>`, or `<image>` in a record without pictures. A system text is the first
    turn, `system` or `system_prompt`. `loss`, `train` or `weight` of an answer says whether it is learned, `weight` of
    the record how much its tokens count.

    root: the image folder; a path that is absolute and lies in it becomes relative to it.
    """
    if record.fault:
        return Problem("unreadable", record.fault)
    try:
        return _parsed(record, root)
    except Unfit as unfit:
        return unfit.problem


def _parsed(record: Record, root: epath.Path | None) -> Parsed:
    raw = record.raw
    if isinstance(raw, Conversation):
        return _given(raw, record.id)
    if not isinstance(raw, dict):
        raise Unfit("bad_shape", f"want an object with 'conversations', got {brief(raw)}")
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
        raise Unfit("empty_conversations", f"{place} holds a system turn only: want a human turn and an answer")
    first = int(system is not None)
    given, in_place, key = images(raw, slots, turns)
    shown = tuple(inside(one, root) for one in given)
    if any(isinstance(one, Video) for one in shown):
        turns = [dataclasses.replace(turn, text=with_image_markers(turn.text, shown)) for turn in turns]
    conversation = Conversation(
        tuple(turns), shown, record.id, _system(raw, system, place), in_place, weight=_weight(raw.get("weight"))
    )
    return Parsed(conversation, place, first, key, tuple(dict.fromkeys(unknown)))


def _given(conversation: Conversation, id: str) -> Parsed:
    """A conversation that was written by no file; its types are those that a program may have wrong."""
    for i, turn in enumerate(conversation.turns):
        if not isinstance(turn, Turn) or not isinstance(turn.text, str):
            raise Unfit("bad_shape", f"turns[{i}]={brief(turn)}: want a llava_jax.Turn(role, text)")
        if turn.role not in ("user", "assistant"):
            raise Unfit("unknown_role", f"turns[{i}].role={brief(turn.role)}: want 'user' or 'assistant'")
    if not conversation.turns:
        raise Unfit("empty_conversations", "turns=(): want a question and an answer")
    _weight(conversation.weight)
    return Parsed(dataclasses.replace(conversation, id=id), "turns", 0, "images", ())


def _plain_turn(row: Any) -> Turn | None:
    """The turn of an object {from, value}, as nearly all are; None: it takes a closer look."""
    if type(row) is dict and len(row) == 2:
        speaker, text = row.get("from"), row.get("value")
        if type(speaker) is str and type(text) is str and speaker in ROLES:
            return Turn(ROLES[speaker], text)
    return None


def _turn(row: Any, place: str, index: int, slots: list[Slot], unknown: list[str]) -> Turn:
    """One turn; of the role "system" only the first. Adds its pictures and its unknown keys to the lists."""
    where = f"{place}[{index}]"
    if not isinstance(row, dict):
        raise Unfit("bad_shape", f"{where}={brief(row)}: want an object {{from, value}} or {{role, content}}")
    unknown += _unknown(row, TURN_KEYS, f"{place}[].")
    role, text = _role(row, where, index), _text(row, where, slots, unknown)
    if role == "system" and slots:
        raise Unfit("bad_shape", f"{where}, the system's, shows a picture: show it in a question")
    return Turn(role, text, _supervised(row, role, where))


def _unknown(row: Mapping[str, Any], table: Mapping[str, str], prefix: str) -> list[str]:
    """The keys that nothing reads; raises where one is refused."""
    unknown = []
    for key, value in row.items():
        use = table.get(key)
        if use is READ or use is HARMLESS or value in NOTHING:
            continue
        use = use or table.get(key.lower())
        if use is READ:
            use = f"keys are written in small letters: rename it to `{key.lower()}`"
        if use is not None and use is not HARMLESS:
            raise Unfit("unread_key", f"{prefix}{key}={brief(value)}: {use}")
        if use is None:
            unknown.append(prefix + key)
    return unknown


def _rows(raw: Mapping[str, Any]) -> tuple[str, list[Any]]:
    rows = raw.get("conversations")
    if rows and type(rows) is list and "messages" not in raw:
        return "conversations", rows
    places = [place for place in ("conversations", "messages") if raw.get(place) is not None]
    if len(places) == 2:
        raise Unfit("bad_shape", "both conversations and messages: keep one of them")
    place = places[0] if places else "conversations"
    rows = raw.get(place)
    if not isinstance(rows, list):
        raise Unfit("bad_shape", f"{place}={brief(rows)}: want a list of {{from, value}} or {{role, content}} "
                     f"objects; the record's keys are {brief(list(raw), 200)}")  # fmt: skip
    if not rows:
        raise Unfit("empty_conversations", f"{place}=[]: want a human turn and an answer")
    return place, rows


def _role(row: Mapping[str, Any], where: str, index: int) -> str:
    name = "role" if row.get("role") is not None else "from"
    speaker = row.get(name)
    if not isinstance(speaker, str):
        raise Unfit("bad_shape", f"{where}={brief(row)}: want {{from, value}} or {{role, content}}, both strings")
    if name == "role" and row.get("from") is not None:
        raise Unfit("bad_shape", f"{where} has both from and role: keep one of them")
    if speaker == "system" and not index:
        return speaker
    if speaker not in ROLES:
        raise Unfit("unknown_role", f"{where}.{name}={brief(speaker)}: want 'human' or 'gpt' (or 'user', 'assistant', "
                     "and 'system' as the first turn only)")  # fmt: skip
    return ROLES[speaker]


def _text(row: Mapping[str, Any], where: str, slots: list[Slot], unknown: list[str]) -> str:
    """The message, with a marker for each of its parts that is a picture; adds these to `slots`."""
    name = "content" if row.get("content") is not None else "value"
    text = row.get(name)
    if name == "content" and row.get("value") is not None:
        raise Unfit("bad_shape", f"{where} has both value and content: keep one of them")
    if isinstance(text, str):
        return text
    if not isinstance(text, list):
        raise Unfit("bad_shape", f"{where}.{name}={brief(text)}: want a string, or a list of parts")
    joined, last = "", ""
    for i, part in enumerate(text):
        piece = _part(part, f"{where}.{name}[{i}]", slots, unknown)
        # LLaVA writes a picture on a line of its own.
        shown = {IMAGE_MARKER, VIDEO_MARKER} & {last, piece}
        if last and piece and shown and not (last.endswith("\n") or piece.startswith("\n")):
            joined += "\n"
        joined, last = joined + piece, piece or last
    return joined


def _part(part: Any, where: str, slots: list[Slot], unknown: list[str]) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text", ""), str | None):
        raise Unfit("bad_shape", f"{where}={brief(part)}: want {{type: text, text}}, or of the type image or video")
    kind = part.get("type")
    if kind not in _PARTS:
        remedy = RECORD_KEYS.get(str(kind), "want one of " + ", ".join(_PARTS))
        raise Unfit("unread_key", f"{where}.type={brief(kind)}: {remedy}")
    unknown += _unknown(part, PART_KEYS, "content[].")
    pictures = [part[name] for name in (*_SHOWN, "path", "url") if part.get(name) not in NOTHING]
    if kind == "text":
        if part.get("text") is None:
            raise Unfit("bad_shape", f"{where}={brief(part)}: want a string as text")
        if pictures:
            raise Unfit("bad_shape", f"{where}={brief(part)}: a picture in a part of text: want a part for each")
        return part["text"]
    if part.get("text") or len(pictures) > 1:
        raise Unfit("bad_shape", f"{where}={brief(part)}: want one picture and no text in it: want a part for each")
    named = pictures[0] if pictures else None
    named = named["url"] if isinstance(named, dict) and "url" in named else named
    index = part.get("index")
    if index is not None and (type(index) is not int or index < 0):
        raise Unfit("bad_shape", f"{where}.index={brief(index)}: want the number of one of the record's "
                     f"`{_SHOWN[kind][1]}`, from 0")  # fmt: skip
    slots.append(Slot(None if named is None else reference(named, f"{where}={brief(part)}"), index, _SHOWN[kind]))
    return IMAGE_MARKER if _SHOWN[kind] is PICTURES else VIDEO_MARKER


def _supervised(row: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether an answer is learned, by the marks of its turn."""
    marks = {name: row[name] for name in _MARKS if row.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Unfit("bad_mark", f"{where}.{name}={brief(value)}: want true or 1 for an answer that is learned, "
                         "false or 0 for one that is not")  # fmt: skip
        if value and role != "assistant":
            raise Unfit("bad_mark", f"{where}.{name}={brief(value)} in a turn of the {role}: only answers can be "
                         "learned; leave it out")  # fmt: skip
    if len(set(map(bool, marks.values()))) == 2:
        raise Unfit("bad_mark", f"{where}: {brief(marks)} contradict each other")
    return all(marks.values()) or role != "assistant"


def _system(raw: Mapping[str, Any], turn: str | None, place: str) -> str | None:
    if "system" not in raw and "system_prompt" not in raw:
        return turn
    texts = {name: raw[name] for name in ("system", "system_prompt") if raw.get(name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise Unfit("bad_shape", f"{name}={brief(text)}: want a string")
    if turn is not None:
        texts[f"{place}[0]"] = turn
    if len(set(texts.values())) > 1:
        raise Unfit("bad_shape", f"{' and '.join(texts)} are different system texts: keep one of them")
    return next(iter(texts.values()), None)


def _weight(weight: Any) -> float | int:
    if weight is None:
        return 1.0
    low, high = _WEIGHTS
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not low <= weight <= high:
        raise Unfit("bad_weight", f"weight={brief(weight)}: want a number of {low} to {high:.0f}, by which the "
                     "record's tokens count in the loss; drop a record that shall not count")  # fmt: skip
    return weight
