"""From ids to text, piece by piece: no piece splits a character, and nothing of a stop string gets out.

The same steps make a whole answer, so an answer is always the sum of its pieces.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.generate.engine import NOTHING
from llava_jax.prompt.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what a tokenizer decodes an unfinished UTF-8 character to


class Text(NamedTuple):
    """An answer on its way from ids to text.

    said: what has been given out.
    held: decoded, but held back: white space, or what may be the beginning of a stop string.
    window: the last ids, enough to decode the next one in its surroundings.
    read: how many ids of the window are in `said` and `held`.
    stopped: a stop string was met; it and all that follows is dropped.
    trims: white space at its beginning and end is none of it.

        push " cat", push " ##", push "#"  ->  pieces "cat", "", ""; stopped (stop string "###")
    """

    said: str = ""
    held: str = ""
    window: tuple[int, ...] = ()
    read: int = 0
    stopped: bool = False
    trims: bool = True


class Row(NamedTuple):
    """One answer under way. limit: ids it may have; ended_by: "" while it goes on."""

    limit: int
    text: Text = Text()
    ids: tuple[int, ...] = ()
    ended_by: str = ""


def extended(
    row: Row, made: Sequence[int], ends: Sequence[int], tokenizer: Tokenizer, stops: tuple[str, ...]
) -> tuple[Row, str]:
    """A row with new ids, up to where it ends, and the text that can be shown now."""
    text, ids, pieces = row.text, list(row.ids), [""]
    ended_by = row.ended_by
    for token in made:
        if ended_by or token == NOTHING:
            break
        ids.append(token)
        if token not in ends:
            text, piece = push(text, token, tokenizer, stops)
            pieces.append(piece)
        if token in ends or text.stopped:
            ended_by = "stop"
        elif len(ids) == row.limit:
            ended_by = "length"
    if ended_by and not row.ended_by:
        text, piece = finish(text, tokenizer, stops)
        # The last piece may complete a stop string that the limit seemed to cut off.
        ended_by = "stop" if text.stopped else ended_by
        pieces.append(piece)
    return Row(row.limit, text, tuple(ids), ended_by), "".join(pieces)


def push(text: Text, token: int, tokenizer: Tokenizer, stops: tuple[str, ...]) -> tuple[Text, str]:
    """The text after one more id, and the piece that can be shown now (often empty)."""
    window = (*text.window, token)
    before = tokenizer.decode(list(window[: text.read]))
    now = tokenizer.decode(list(window))
    if len(now) <= len(before) or now.endswith(BROKEN):
        return text._replace(window=window), ""
    text = text._replace(window=window[text.read :], read=len(window) - text.read)
    return _release(text, now[len(before) :], stops)


def finish(text: Text, tokenizer: Tokenizer, stops: tuple[str, ...]) -> tuple[Text, str]:
    """The text when no id follows, and the last piece: all that was held back, without white space at the end."""
    if text.stopped:
        return text, ""
    before = tokenizer.decode(list(text.window[: text.read]))
    rest = tokenizer.decode(list(text.window))[len(before) :]
    text, piece = _release(text, rest, stops)
    last = "" if text.stopped else _trimmed(text, text.held)
    last = last.rstrip() if text.trims else last
    return text._replace(said=text.said + last, held=""), piece + last


def _release(text: Text, new: str, stops: tuple[str, ...]) -> tuple[Text, str]:
    """Gives out of `held + new` what can neither be white space at the end nor begin a stop string."""
    pending = text.held + new
    cuts = [at for at in (pending.find(stop) for stop in stops) if at >= 0]
    ready = pending[: min(cuts)] if cuts else pending[: len(pending) - _begun(pending, stops)]
    ready = ready.rstrip() if text.trims else ready
    held = "" if cuts else pending[len(ready) :]
    piece = _trimmed(text, ready)
    return text._replace(said=text.said + piece, held=held, stopped=bool(cuts)), piece


def _trimmed(text: Text, piece: str) -> str:
    """An answer begins with no white space: the reference strips it (llava/eval/run_llava.py)."""
    return piece if text.said or not text.trims else piece.lstrip()


def _begun(pending: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `pending` that a stop string begins with."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if pending.endswith(stop[:n])]
    return max(lengths, default=0)
