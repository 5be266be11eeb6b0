"""What is said and shown: turns, pictures, an optional system text.

Training records, chat messages and benchmark questions all become a `Conversation` before anything else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.errors import UsageError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
_MARKERS = re.compile(f"{IMAGE_MARKER}|{VIDEO_MARKER}")
# LLaVA's own names first; the others occur in published data sets and mean the same.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    role: "user" or "assistant".
    supervised: False for an answer that stands there and is not learned.
    """

    role: str
    text: str
    supervised: bool = True


class Length(NamedTuple):
    """frames: of a video. rate: of them a second; None: nothing says it, as of a folder. pixels: of one; 0: unknown."""

    frames: int
    rate: float | None = None
    pixels: int = 0


@dataclass(frozen=True)
class Video:
    """A video, which stands among a conversation's pictures, and whose marker is `<image>` too.

    source: path of a file or of a folder of frames (pictures, in natural order of their names), relative to the image
      folder; path object; a file's bytes; or pictures in order, of the kinds that `Conversation.images` may have.
    length: of the video that pictures in `source` were chosen of; None: they are all of it, and say no times.
    """

    source: Any
    length: Length | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the pictures that `<image>` markers in them stand for.

    images: path relative to the image folder, path object, encoded bytes, PIL image or `Video`, in reading order.
    id: the record's own id, for messages.
    system: replaces the template's system text; None keeps it, "" leaves it out.
    images_in_place: True keeps every marker where it was written and wants one marker for each image; False is
        LLaVA's rule for its single image: the markers of a turn become one, at the front of that turn.
    begun: what the assistant has said already of the reply that is wanted; it goes on from there.
    weight: how much each supervised token counts in the loss.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    id: str = ""
    system: str | None = None
    images_in_place: bool = False
    begun: str = ""
    weight: float | int = 1.0


def question(text: str, images: Sequence[Any] = ()) -> Conversation:
    """One question about some pictures, of the kinds that `Conversation.images` may have. Raises as `with_markers`."""
    # LLaVA's rule for its one picture is to show it first; several stand where they were named.
    turn = Turn("user", with_markers(text, images))
    return Conversation((turn,), tuple(images), images_in_place=len(images) > 1)


def with_markers(text: str, images: Sequence[Any]) -> str:
    """A question with one marker for each of its pictures; where it has none, they are shown before it.

    `<video>` may mark a video, and becomes `<image>`; in a question without a video it is letters.

    Raises:
      UsageError: it has markers, and not one for each picture, or `<video>` where a picture is to stand.
    """
    found, count = markers(text, images), len(images)
    if len(found) not in (0, count):
        raise UsageError(f"the question has {len(found)} {IMAGE_MARKER} for {count} picture(s): want one each, or none")
    wrong = next((i for i, (kind, one) in enumerate(zip(found, images), 1)
                  if kind == VIDEO_MARKER and not isinstance(one, Video)), None)  # fmt: skip
    if wrong:
        raise UsageError(f"marker {wrong} of the question is {VIDEO_MARKER}, which stands for a picture: write "
                         f"{IMAGE_MARKER}, or name them in the order of their markers")  # fmt: skip
    return with_image_markers(text, images) if found else f"{IMAGE_MARKER}\n" * count + text


def markers(text: str, images: Sequence[Any]) -> list[str]:
    """The markers in a text, in order; `<video>` is one beside a video only."""
    return [kind for kind in _MARKERS.findall(text) if kind == IMAGE_MARKER or _has_video(images)]


def with_image_markers(text: str, images: Sequence[Any]) -> str:
    """The text with `<image>` for each `<video>`, beside a video."""
    return text.replace(VIDEO_MARKER, IMAGE_MARKER) if _has_video(images) else text


def _has_video(images: Sequence[Any]) -> bool:
    return any(isinstance(one, Video) for one in images)


def check_text(text: str, where: str) -> None:
    """Raises ValueError if `text` cannot be written as UTF-8 (a lone surrogate); `where` names it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is no "
            "text: repair the record's \\u escapes"
        ) from error
