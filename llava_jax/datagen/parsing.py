"""Answers of the language model to turns of a conversation, or the reason why one is refused."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"\**(question|answer)\**[ \t]*:\**[ \t]*", re.IGNORECASE)
_MARKER = "<image>"
# A model that talks about its sources instead of the picture. Whole words; "box" alone is a thing in pictures.
_SOURCE_WORDS = re.compile(
    r"\b(captions?|bounding box(es)?|coordinates?|(provided|given) (information|text|sentences?|descriptions?|list))\b"
    r"|\b(described|mentioned) (as|in) the\b|\bthe (sentences|descriptions) (say|state|mention|describe)",
    re.IGNORECASE,
)
_COORDINATES = re.compile(r"[\[(] *[01]?\.\d+ *,")


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Refusal(ValueError):
    """The answer is not used. str() is the reason: a word of REASONS, a colon, and what was found."""


REASONS = {
    "unfinished": "the server did not end it with `stop`: it was cut short or filtered",
    "empty": "there is no text",
    "shape": "no blocks of Question: and Answer: in turn",
    "pairs": "another number of questions than this kind has",
    "marker": "it holds <image>, which stands for the picture",
    "sources": "it talks about captions, boxes or coordinates",
}


def pairs(text: str) -> list[Pair]:
    """Questions and answers of a text with blocks between lines of `===`; a last question without answer is dropped.

    Raises:
      Refusal: a block has no head or no text, two of one kind follow each other, or there is no pair.
    """
    blocks = [_block(block) for block in _SEPARATOR.split(text.replace("\r\n", "\n").replace("\r", "\n").strip())]
    if len(blocks) % 2 and blocks[-1][0] == "question":
        blocks = blocks[:-1]
    if not blocks:
        raise Refusal("shape: a question without an answer")
    for index, (head, _) in enumerate(blocks):
        if head != ("question", "answer")[index % 2]:
            raise Refusal(f"shape: block {index + 1} is another {head}")
    return [Pair(blocks[i][1], blocks[i + 1][1]) for i in range(0, len(blocks) - 1, 2)]


def _block(block: str) -> tuple[str, str]:
    heading = _HEADING.match(block.strip())
    if not heading:
        raise Refusal(f"shape: a block starts with {block.strip()[:40]!r}, not with Question: or Answer:")
    text = block.strip()[heading.end() :].strip()
    if not text:
        raise Refusal(f"shape: an empty {heading[1].lower()}")
    return heading[1].lower(), text


def parse(kind: str, text: str, finish_reason: str, question: str) -> Sequence[Pair]:
    """The turns of one record.

    Args:
      kind: "conversation" (some pairs), "reasoning" (exactly one), "detail" (the whole text answers `question`).
      finish_reason: as the server gave it.

    Raises:
      Refusal: with the reason.
    """
    if finish_reason != "stop":
        raise Refusal(f"unfinished: finish_reason is {finish_reason!r}")
    if not text.strip():
        raise Refusal("empty: no text")
    turns = [Pair(question, text.strip())] if kind == "detail" else pairs(text)
    if kind == "reasoning" and len(turns) != 1:
        raise Refusal(f"pairs: {len(turns)}, want 1")
    joined = "\n".join(part for pair in turns for part in pair)
    if _MARKER in joined:
        raise Refusal(f"marker: {_MARKER} in the text")
    leak = _SOURCE_WORDS.search(joined) or _COORDINATES.search(joined)
    if leak:
        raise Refusal(f"sources: {leak[0]!r}")
    return turns
