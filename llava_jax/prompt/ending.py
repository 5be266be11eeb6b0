"""Whether a tokenizer can write a template, and what ends an answer: one rule for training, serving and exports."""

from typing import NamedTuple

from llava_jax.errors import UsageError
from llava_jax.prompt.encode import IMAGE_END, IMAGE_START
from llava_jax.prompt.templates import TEMPLATES, Template
from llava_jax.prompt.tokenizer import Tokenizer


class Ending(NamedTuple):
    """What ends an answer: one of these ids, or one of these texts, which are no token of their own."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def of(template: Template, tokenizer: Tokenizer) -> Ending:
    """What ends an answer in this template; the tokenizer's eos always does."""
    words = {stop: tokenizer.ids[stop] for stop in template.stops if stop in tokenizer.ids}
    ids = sorted({tokenizer.eos_id, *words.values()})
    return Ending(tuple(ids), tuple(stop for stop in template.stops if stop not in words))


def check(template: Template, tokenizer: Tokenizer, where: str, image_start_end: bool = False) -> None:
    """Refuses a format whose marks the tokenizer would write in letters.

    An answer would end with letters such as "<", "/", "s", ">": nobody who reads the checkpoint's eos would stop there.

    Args:
      where: the tokenizer, for the message.
      image_start_end: each image stands between <im_start> and <im_end>.

    Raises:
      ValueError: names the marks, the tokenizer's own end, and the templates that fit.
    """
    for mark in (IMAGE_START, IMAGE_END) if image_start_end else ():
        if mark not in tokenizer.ids:
            raise UsageError(
                f"image_start_end (mm_use_im_start_end) is true, but {mark} is no token of the tokenizer {where}: take "
                "the tokenizer that has it, or say false"
            )
    missing = [mark for mark in template.marks if mark not in tokenizer.ids]
    if missing:
        fit = [name for name, one in TEMPLATES.items() if all(mark in tokenizer.ids for mark in one.marks)]
        raise UsageError(
            f"template {template.name!r} is written with {' and '.join(missing)}, no token of the tokenizer {where}, "
            f"which ends a text with {tokenizer.piece(tokenizer.eos_id)!r}: choose one of {', '.join(fit)}"
        )
