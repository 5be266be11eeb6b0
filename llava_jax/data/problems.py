"""What can be wrong with a record, in words: one table of reasons, and how a problem is told with its place."""

from dataclasses import dataclass
from typing import Any, NamedTuple

# reason -> (is the record refused, what it means). The others are listed and counted, and the record is used.
REASONS = {
    "bad_source": (True, "the file or directory cannot be read as a whole"),
    "unreadable": (True, "the record cannot be read from its file: no JSON, damaged, cut off"),
    "bad_shape": (True, "a field is missing or has the wrong type"),
    "unread_key": (True, "a key that is not trained on: audio, tools, preferences, video without prompt.frames, ..."),
    "bad_mark": (True, "`loss`, `train` or `weight` of a turn is neither true (1) nor false (0)"),
    "bad_weight": (True, "the record's `weight` is no number that can weigh it"),
    "empty_conversations": (True, "no turns at all"),
    "unknown_role": (True, "the role is neither human (user) nor gpt (assistant)"),
    "assistant_first": (True, "the first turn is the assistant's"),
    "wrong_order": (True, "two turns of one role in a row"),
    "unanswered": (True, "the last turn is not the assistant's"),
    "empty_answer": (True, "an assistant turn has no text"),
    "image_without_marker": (True, "an image that no <image> shows"),
    "marker_without_image": (True, "<image> in a record without an image"),
    "several_markers": (True, "more <image> in a turn than images"),
    "marker_count": (True, "<image> markers of all turns are not as many as the images"),
    "marker_in_answer": (True, "<image> in an assistant turn"),
    "missing_image": (True, "the image or video file does not exist"),
    "bad_image": (True, "the image or video cannot be opened"),
    "replaced_image": (True, "a picture of tiles, or a video, has another size than when lengths were measured"),
    "unsafe_path": (True, "the image path leaves the image folder"),
    "lone_surrogate": (True, "half of a UTF-16 pair, which is no text"),
    "not_a_caption": (True, "template `plain` wants one question with an image and one caption"),
    "empty_question": (True, "the template puts its system text into the first turn, which is empty"),
    "no_learned_tokens": (True, "nothing to learn is left within the row"),
    "bad_text": (True, "the text cannot be encoded"),
    "too_many_images": (True, "more images, tiles or frames than a row takes (data.images_per_group)"),
    "control_text": (False, "a separator written out in a turn: read as letters here, masked whole by LLaVA"),
    "foreign_marker": (False, "another program's sign for a picture or a clip in a turn: read as letters"),
    "cut": (False, "longer than the row (data.row_tokens): its right end is not trained on"),
    "duplicate_id": (False, "an id that an earlier record has"),
    "unknown_key": (False, "a key that nothing reads; each is listed once"),
}


class Problem(NamedTuple):
    """One thing that is wrong with a record; reason is a key of `REASONS`."""

    reason: str
    detail: str

    @property
    def fatal(self) -> bool:
        return REASONS[self.reason][0]


class Unfit(ValueError):
    """A problem with a record, on its way out of what reads it."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.problem = Problem(reason, detail)


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


def brief(value: Any, limit: int = 80) -> str:
    """`repr` on one line of at most `limit` characters: safe to print whatever a file holds."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
