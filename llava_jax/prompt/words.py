"""The words beside a tokenizer's vocabulary: what its files say of them, and where they stand in a text.

Special or not, a word is one token wherever it counts. Files of transformers 4 and 5 are read, old and new layouts.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.errors import UsageError

CONFIG, MODEL, FAST = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
ADDED, MAP = "added_tokens.json", "special_tokens_map.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_KINDS = {bool: "true or false", str: "a text", dict: "an object", list: "a list"}

Range = tuple[int, int]


class Token(NamedTuple):
    """One token and the characters text[start:end] it covers; none of its own if start == end."""

    id: int
    start: int
    end: int


class Word(NamedTuple):
    """A word that is one token.

    special: never part of what people write; left out when an answer is decoded.
    lstrip, rstrip: takes the white space before or after it along.
    single_word: counts only where no letter or digit touches it.
    normalized: a tokenizer.json compares it with the text as it has been rewritten.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def flags(self) -> dict[str, Any]:
        """The word as files of transformers hold it, without its id."""
        return {"content": self.text, **{name: self._asdict()[name] for name in _FLAGS}}


class HasWords:
    """What tokenizers of all kinds say of their words, which are ordered by rising id."""

    words: tuple[Word, ...]

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Text -> id of the special words."""
        return {word.text: word.id for word in self.words if word.special}

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Text -> id of all words."""
        return {word.text: word.id for word in self.words}


class Finder(NamedTuple):
    """Words by text, and an expression that finds each of them, the longest first."""

    words: Mapping[str, Word]
    pattern: re.Pattern | None

    def find(self, text: str, fixed: Sequence[Range] | None) -> list[tuple[int, int, Word]]:
        """(start, end, word) in a text, the first word first and the longest of those that begin there.

        fixed: where special words count; None: everywhere. Others always do.
        """
        found, at, behind = [], 0, 0
        while self.pattern is not None and (match := self.pattern.search(text, at)):
            start, end = match.span()
            word = self.words[match[0]]
            if not _counts(word, text, start, end, fixed):
                at = start + 1
                continue
            if word.lstrip:
                start = max(behind, len(text[:start].rstrip()))
            if word.rstrip:
                end = len(text) - len(text[end:].lstrip())
            found.append((start, end, word))
            at = behind = end
        return found


def finder(words: Iterable[Word]) -> Finder:
    """What finds these words in a text."""
    named = {word.text: word for word in words if word.text}
    ordered = sorted(named, key=len, reverse=True)
    return Finder(named, re.compile("|".join(map(re.escape, ordered))) if ordered else None)


class Stated(NamedTuple):
    """What the small files of a tokenizer say.

    config: tokenizer_config.json. words: by text; the id -1 is not stated. names: "eos_token" -> its text.
    """

    config: Mapping[str, Any]
    words: dict[str, Word]
    names: dict[str, str]


def stated(files: Mapping[str, bytes], where: str) -> Stated:
    """What the files say of words: tokenizer_config.json before tokenizer.json before added_tokens.json, as in
    transformers. What has a name, such as eos_token, is special.

    Raises:
      ValueError: a file is damaged; names the file and the key.
    """
    config = read_object(files, CONFIG, where)
    for key, kind in (("tokenizer_class", str), ("legacy", bool), ("add_bos_token", bool), ("add_prefix_space", bool)):
        _typed(config.get(key), (kind, type(None)), f"{where}/{CONFIG}: {key}")
    decoder = config.get("added_tokens_decoder")
    sources = (MAP, CONFIG) if decoder is None else (CONFIG,)
    named = [pair for name in sources for pair in _named(read_object(files, name, where), f"{where}/{name}")]
    special = {word.text for _, word in named}
    listed = _older(files, where, special) if decoder is None else []
    listed += _fast(files, where) + _decoder(config, f"{where}/{CONFIG}: added_tokens_decoder")
    words = {word.text: word for word in (*(word for _, word in named), *listed)}
    words |= {text: words[text]._replace(special=True) for text in special}
    return Stated(config, words, {key: word.text for key, word in named if key in NAMES})


def _older(files: Mapping[str, bytes], where: str, special: Collection[str]) -> list[Word]:
    place, content = f"{where}/{ADDED}", read_object(files, ADDED, where)
    numbers = {text: _number(value, f"{place}: {text!r}") for text, value in content.items()}
    return [Word(text, id, special=text in special, normalized=text not in special) for text, id in numbers.items()]


def _fast(files: Mapping[str, bytes], where: str) -> list[Word]:
    place, content = f"{where}/{FAST}: added_tokens", read_object(files, FAST, where)
    entries = _typed(content.get("added_tokens", []), (list,), place)
    return [_word(entry, place)._replace(id=_number(entry.get("id"), f"{place}: id")) for entry in entries]


def _decoder(config: Mapping[str, Any], place: str) -> list[Word]:
    entries = {} if config.get("added_tokens_decoder") is None else config["added_tokens_decoder"]
    return [
        _word(entry, f"{place}: {key}")._replace(id=_number(int(key) if key.isdecimal() else key, f"{place}: {key}"))
        for key, entry in _typed(entries, (dict,), place).items()
    ]  # fmt: skip


def _number(value: Any, place: str) -> int:
    """The id of a token."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise UsageError(f"{place} is {str(value)[:60]!r}: want the id of a token; copy the file again")
    return value


def numbered(said: Stated, known: Callable[[str], int | None], size: int, where: str) -> tuple[Word, ...]:
    """The words by rising id; one whose id is not stated has the vocabulary's, or the next one that is free.

    Differs from transformers: a pad_token that is no word yet does not become one, as nothing is written with it.

    Args:
      known: the id of a text in the vocabulary, whose size is `size`.

    Raises:
      ValueError: two words have one id, or ids beyond the vocabulary leave gaps.
    """
    found: dict[int, Word] = {}
    for word in sorted(said.words.values(), key=lambda word: word.id < 0):  # those with an id first
        number = word.id if word.id >= 0 else known(word.text)
        if number is None and word.text == said.names.get("pad_token"):
            continue
        number = max([size - 1, *found]) + 1 if number is None else number
        if number in found:
            raise UsageError(f"tokenizer {where}: {found[number].text!r} and {word.text!r} both have the id {number}")
        found[number] = word._replace(id=number)
    later = {word.text: number for number, word in sorted(found.items()) if number >= size}
    if list(later.values()) != list(range(size, size + len(later))):
        raise UsageError(f"tokenizer {where}: added tokens {later} leave gaps: want ids from {size} upwards")
    return tuple(word for _, word in sorted(found.items()))


def read_object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object of a file, {} where there is none. Raises ValueError where it holds something else."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}/{name}: not JSON: {error}; copy the file again") from None
    return _typed(content, (dict,), f"{where}/{name}")


def _counts(word: Word, text: str, start: int, end: int, fixed: Sequence[Range] | None) -> bool:
    if word.special and fixed is not None and not any(low <= start and end <= high for low, high in fixed):
        return False
    touches = re.match(r"\w", text[end : end + 1]) or re.match(r"\w", text[max(start - 1, 0) : start])
    return not (word.single_word and touches)


def _named(content: Mapping[str, Any], place: str) -> list[tuple[str, Word]]:
    """(key, word) of all that tokenizer_config.json or special_tokens_map.json calls special."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            values = _typed(value or [], (list, dict), f"{place}: {key}")
            found += [(key, entry) for entry in (values.values() if isinstance(values, dict) else values)]
        elif key.endswith("_token") and value and not isinstance(value, bool):  # add_bos_token is none
            found.append((key, value))
    words = [
        (key, _word(entry, f"{place}: {key}") if isinstance(entry, dict)
         else Word(_typed(entry, (str,), f"{place}: {key}"), -1))
        for key, entry in found
    ]  # fmt: skip
    return [(key, word) for key, word in words if word.text]


def _word(entry: Any, place: str) -> Word:
    """A word as files hold it; its id is elsewhere."""
    _typed(entry, (dict,), place)
    text = _typed(entry.get("content"), (str,), f"{place}: content")
    flags = {name: _typed(entry[name], (bool,), f"{place}: {name}") for name in _FLAGS if name in entry}
    special = flags.get("special", False)
    return Word(text, -1, **{"special": special, "normalized": not special} | flags)


def _typed(value: Any, kinds: tuple[type, ...], place: str) -> Any:
    """The value, which is of one of the kinds. Raises ValueError where it is not."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wish = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
        raise UsageError(f"{place} is {str(value)[:60]!r}: want {wish}; copy the file again")
    return value
