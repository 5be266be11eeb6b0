"""What is said and shown: turns, pictures, an optional system text.

Training records, chat messages and benchmark questions all become a `Conversation` before anything else.
"""

from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UsageError

# LLaVA's own names first; the others occur in published data sets and mean the same.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message. role: "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the pictures that `<image>` markers in them stand for.

    images: path relative to the image folder, path object, encoded bytes or PIL image, in reading order.
    id: the record's own id, for messages.
    system: replaces the template's system text; None keeps it, "" leaves it out.
    images_in_place: True keeps every marker where it was written and wants one marker for each image; False is
        LLaVA's rule for its single image: the markers of a turn become one, at the front of that turn.
    begun: what the assistant has said already of the reply that is wanted; it goes on from there.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    id: str = ""
    system: str | None = None
    images_in_place: bool = False
    begun: str = ""


def from_record(record: Any, where: str = "") -> Conversation:
    """The conversation in one LLaVA JSON record.

        {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

    `image` as a string follows LLaVA's rule, as a list of k paths it wants k markers, kept in place. A first turn
    from "system" becomes the system text.

    where: file and line, for messages, and the id of a record that has none.

    Raises:
      ValueError: a field is missing or has the wrong type; names the record and the path inside it.
    """
    if not isinstance(record, dict):
        raise UsageError(f"record {where!r}: want a JSON object with 'conversations', got {type(record).__name__}")
    identity = str(record.get("id", where))
    name = f"record {identity!r}" + (f" ({where})" if where and where != identity else "")
    rows = record.get("conversations")
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{name}: conversations={_brief(rows)}: want a list of at least one {{from, value}} object")
    system, turns = None, []
    for index, row in enumerate(rows):
        role, text = _row(row, f"{name}: conversations[{index}]", first=index == 0)
        if role == "system":
            system = text
        else:
            turns.append(Turn(role, text))
    if not turns:
        raise UsageError(f"{name}: conversations holds a system turn only: want at least one turn from human or gpt")
    images = _images(record, name)
    return Conversation(tuple(turns), images, identity, system, isinstance(record.get("image"), list))


def check_text(text: str, where: str) -> None:
    """Raises ValueError if `text` cannot be written as UTF-8 (a lone surrogate); `where` names it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is no "
            "text: repair the record's \\u escapes"
        ) from error


def _row(row: Any, where: str, first: bool) -> tuple[str, str]:
    """Role ("user", "assistant", or "system" if `first`) and text of one {from, value} object."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}={_brief(row)}: want an object {{from, value}}")
    speaker, text = row.get("from"), row.get("value")
    if not isinstance(text, str):
        raise UsageError(f"{where}.value={_brief(text)}: want a string")
    check_text(text, f"{where}.value")
    if first and speaker == "system":
        return "system", text
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UsageError(
            f"{where}.from={_brief(speaker)}: want 'human' or 'gpt' (or 'user', 'assistant', and 'system' as the "
            "first turn only)"
        )
    return ROLES[speaker], text


def _images(record: dict[str, Any], name: str) -> tuple[str, ...]:
    if "image" not in record:
        return ()
    given = record["image"]
    paths = given if isinstance(given, list) else [given]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise UsageError(f"{name}: image={_brief(given)}: want a path or a list of paths (leave it out for text)")
        check_text(path, f"{name}: image")
    return tuple(paths)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
