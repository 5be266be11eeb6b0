"""The tokenizer that a tokenizer.json describes, run to the letter by the library that defines the format."""

import bisect
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from llava_jax.errors import Foreign, UsageError
from llava_jax.prompt import words
from llava_jax.prompt.words import HasWords, Range, Stated, Token, Word

# Stand for special words among letters that look like special words; Unicode keeps them for such uses for ever.
_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True, eq=False)
class HubTokenizer(HasWords):
    """Any tokenizer of a tokenizer.json; fields and methods as in `LlamaTokenizer`.

    content: tokenizer.json, with all words in it. bos_id: None where no word begins a text.
    """

    content: str
    words: tuple[Word, ...]
    adds_bos: bool
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int
    legacy: None = None

    @functools.cached_property
    def size(self) -> int:
        """Number of ids, added words included."""
        return max(_backend(self.content).get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of `text`, special words in it recognised; bos: bos_id, if there is one, comes first."""
        first = [] if self.bos_id is None or not bos else [self.bos_id]
        return first + [token.id for token in self.tokenize(text)]

    def tokenize(self, text: str, fixed: Sequence[Range] | None = None) -> list[Token]:
        """Tokens of `text` without bos; special words are recognised inside the `fixed` ranges only (None: all)."""
        counted = self._finder.find(text, fixed)
        if counted == self._finder.find(text, None):
            return _tokens(_backend(self.content), text)
        return self._among_letters(text, counted)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; special words left out, or as they are written."""
        return _backend(self.content).decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token."""
        return _backend(self.content).id_to_token(token)

    def files(self) -> dict[str, bytes]:
        """Name -> content of what a checkpoint saves so that `tokenizer.load` of it gives this tokenizer again."""
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: self.piece(number) for key, number in named.items() if number is not None},
            "added_tokens_decoder": {str(word.id): word.flags() for word in self.words},
        }
        return {words.FAST: self.content.encode(), words.CONFIG: json.dumps(config, indent=2).encode()}

    @functools.cached_property
    def _finder(self) -> words.Finder:
        return words.finder(word for word in self.words if word.special)

    def _among_letters(self, text: str, counted: Sequence[tuple[int, int, Word]]) -> list[Token]:
        """Tokens of a text with special words that count (`counted`), and letters that only look like some.

        A character that stands for them replaces those that count, and a tokenizer that takes all others for letters
        reads the text: a text that is cut at such letters would have other tokens around the cuts.
        """
        mark = next((character for character in _STAND_INS if character not in text), None)
        if mark is None:
            raise UsageError("the text holds all of U+FDD0 to U+FDEF, which are no characters: leave one of them out")
        parts, places, longer, at = [], [], [0], 0
        for start, end, _ in counted:
            parts += [text[at:start], mark]
            places.append(start - longer[-1])
            longer.append(longer[-1] + end - start - 1)
            at = end
        found, numbers = [], iter(counted)
        for token in _tokens(_literal(self.content, mark), "".join([*parts, text[at:]])):
            start, end = (place + longer[bisect.bisect_left(places, place)] for place in token[1:])
            found.append(Token(next(numbers)[2].id if token.id == self.size else token.id, start, end))
        return found


def build(files: Mapping[str, bytes], said: Stated, added: Sequence[str], where: str) -> HubTokenizer:
    """The tokenizer of a tokenizer.json and what the files beside it say.

    Raises:
      ValueError: the files are damaged or do not fit, or name no eos_token.
    """
    content = words.read_object(files, words.FAST, where)
    vocabulary = _vocabulary(content, f"{where}/{words.FAST}")
    said = said._replace(words=said.words | {text: said.words.get(text, Word(text, -1)) for text in added})
    found = words.numbered(said, vocabulary.get, len(vocabulary), where)
    entries = [{"id": word.id, **word.flags()} for word in found]
    text = json.dumps(content | {"added_tokens": entries, "truncation": None, "padding": None}, ensure_ascii=False)
    with Foreign(lambda error: UsageError(f"{where}/{words.FAST}: not a tokenizer ({error}); copy the file again")):
        backend = _backend(text)
        first = backend.encode("").ids
    other = [word.text for word in found if backend.token_to_id(word.text) != word.id]
    if other:
        raise UsageError(f"tokenizer {where}: {other} have other ids in {words.FAST} than beside it; copy it again")
    ids = {key: backend.token_to_id(name) for key, name in said.names.items()}
    bos, eos, pad, unk = (ids.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token"))
    if eos is None:
        raise UsageError(f"tokenizer {where}: names no eos_token: state it in {words.CONFIG}")
    if first not in ([], [bos], [eos], [bos, eos]):
        pieces = [backend.id_to_token(number) for number in first]
        raise UsageError(f"tokenizer {where}: puts {pieces} around every text: want its bos_token first, or nothing")
    spare = next(number for number in (pad, unk, eos) if number is not None)  # always one of the special words
    return HubTokenizer(text, found, first[:1] == [bos], bos_id=bos, eos_id=eos, unk_id=unk, pad_id=spare)


def _vocabulary(content: Mapping[str, Any], place: str) -> dict[str, int]:
    """Text -> id of a tokenizer.json without its added words."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and entry for entry in vocabulary):  # Unigram's
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise UsageError(f"{place}: no vocabulary in it; copy the file again")
    return vocabulary


@functools.lru_cache(maxsize=8)
def _backend(content: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(content)


@functools.lru_cache(maxsize=8)
def _literal(content: str, mark: str) -> tokenizers.Tokenizer:
    """The tokenizer to which special words are letters; `mark` is one more word, with the next id."""
    backend = tokenizers.Tokenizer.from_str(content)
    backend.encode_special_tokens = True
    backend.add_tokens([tokenizers.AddedToken(mark, normalized=False)])
    return backend


def _tokens(backend: tokenizers.Tokenizer, text: str) -> list[Token]:
    coded = backend.encode(text, add_special_tokens=False)
    return [Token(number, *place) for number, place in zip(coded.ids, coded.offsets, strict=True)]
