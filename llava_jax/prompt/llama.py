"""LLaMA's SentencePiece model, driven directly, in both of transformers' `legacy` modes."""

import functools
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece

from llava_jax.errors import UsageError
from llava_jax.prompt import words
from llava_jax.prompt.words import HasWords, Range, Stated, Token, Word

_SPACE = "▁"
# Appended to a serialized model, protobuf merges it in: normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX = b"\x1a\x02\x18\x01"
_PROBE = "a  ﬁÅ① "  # a model that rewrites its input, or adds spaces to it, changes this


@dataclass(frozen=True, eq=False)
class LlamaTokenizer(HasWords):
    """SentencePiece as LLaMA uses it.

        legacy=True    <s> ▁Hi </s> ▁US ER     every stretch between added words starts with a "▁"
        legacy=False   <s> ▁Hi </s> USER       only the first one does; with `prefixed` False not even that

    model: the serialized SentencePiece model. words: <unk>, <s>, </s> and what was added, by rising id.
    adds_bos: a prompt starts with bos_id. pad_id: unk_id where the files name no padding, as in LLaVA.
    """

    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    words: tuple[Word, ...]
    legacy: bool
    adds_bos: bool
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    prefixed: bool = True

    @property
    def size(self) -> int:
        """Number of ids, added words included."""
        return max(self.processor.get_piece_size(), self.words[-1].id + 1)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of `text`, special words in it recognised; bos: bos_id comes first."""
        return [self.bos_id] * bos + [token.id for token in self.tokenize(text)]

    def tokenize(self, text: str, fixed: Sequence[Range] | None = None) -> list[Token]:
        """Tokens of `text` without bos; special words are recognised inside the `fixed` ranges only (None: all).

        Differs from LLaVA: it recognises them in what a user types too, who can then end a turn or a training target.
        Source: transformers 4.37.2 LlamaTokenizer and PreTrainedTokenizer, the behaviour with `fixed` None.
        """
        tokens: list[Token] = []
        at = 0
        for start, end, word in self._finder.find(text, fixed):
            tokens += self._stretch(text, at, start)
            tokens.append(Token(word.id, start, end))
            at = end
        return tokens + self._stretch(text, at, len(text))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text that `tokenize` made `ids` from; special words left out, or as they are written."""
        parts: list[str] = []
        run: list[int] = []
        prefixed = self.prefixed  # `tokenize` put a "▁" in front of the stretch that comes next
        for token in [*(int(token) for token in ids), None]:
            if token is not None and token not in self._words_by_id:
                run.append(token)
                continue
            if run:
                text = self.processor.decode(run)
                parts.append(text.removeprefix(" ") if prefixed else text)
                run, prefixed = [], False
            prefixed = self.legacy or (prefixed and token == self.bos_id)
            if token is not None and not (skip_special and self._words_by_id[token].special):
                parts.append(self._words_by_id[token].text)
        return "".join(parts)

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token: "▁cat", "<0x0A>", "</s>"."""
        word = self._words_by_id.get(token)
        return self.processor.id_to_piece(token) if word is None else word.text

    def files(self) -> dict[str, bytes]:
        """Name -> content of what a checkpoint saves so that `tokenizer.load` of it gives this tokenizer again."""
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.legacy,
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            **({} if self.prefixed else {"add_prefix_space": False}),
            "bos_token": self.piece(self.bos_id),
            "eos_token": self.piece(self.eos_id),
            "unk_token": self.piece(self.unk_id),
            "pad_token": self.piece(self.pad_id),
            "added_tokens_decoder": {str(word.id): word.flags() for word in self.words},
        }
        return {words.MODEL: self.model, words.CONFIG: json.dumps(config, indent=2).encode()}

    @functools.cached_property
    def _finder(self) -> words.Finder:
        return words.finder(self.words)

    @functools.cached_property
    def _words_by_id(self) -> dict[int, Word]:
        return {word.id: word for word in self.words}

    @functools.cached_property
    def _width(self) -> Callable[[int], int]:
        """Id -> the bytes of text that it stands for: one for a byte piece ("<0xE7>")."""

        @functools.cache
        def width(number: int) -> int:
            processor = self.processor
            return 1 if processor.is_byte(number) else len(processor.id_to_piece(number).replace(_SPACE, " ").encode())

        return width

    def _stretch(self, text: str, start: int, end: int) -> list[Token]:
        """Tokens of text[start:end], which holds no word that counts."""
        if start == end:
            return []
        prefix = _SPACE if self.legacy or (start == 0 and self.prefixed) else ""
        spaced = prefix + text[start:end].replace(_SPACE, " ")
        ids = self.processor.encode(spaced)
        widths = [self._width(number) for number in ids]
        encoded = np.frombuffer(spaced.replace(_SPACE, " ").encode(), np.uint8)
        character = np.append(np.cumsum((encoded & 0xC0) != 0x80) - 1, len(spaced))
        borders = character[np.cumsum([0, *widths])] + start - len(prefix)
        borders = np.maximum(borders, start).tolist()
        return [Token(*token) for token in zip(ids, borders[:-1], borders[1:], strict=True)]


def build(model: bytes, said: Stated, legacy: bool | None, added: Sequence[str], where: str) -> LlamaTokenizer:
    """The tokenizer of a `tokenizer.model` and what the files beside it say.

    Raises:
      ValueError: `legacy` is stated nowhere, the model does not follow LLaMA's rules, or the files do not fit.
    """
    legacy = said.config.get("legacy") if legacy is None else legacy
    if legacy is None:
        raise UsageError(
            f"tokenizer {where}: legacy is not stated: give legacy=true or false (true: 'US ER' after '</s>' as "
            "LLaVA-1.5 was served at first; false: 'USER', what LLaVA-1.5 checkpoints say)"
        )
    prefixed = said.config.get("add_prefix_space") is not False
    if legacy and not prefixed:
        raise UsageError(
            f"tokenizer {where}: legacy is true and add_prefix_space false, which transformers 4 and 5 understand "
            f"differently: take one of the two out of {words.CONFIG}"
        )
    processor = _processor(model, where)
    own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    known = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    renamed = {word.id for word in said.words.values()}
    pieces = {text: Word(text, id) for text, id in known.items() if id in own.values() and id not in renamed}
    said = said._replace(words=pieces | said.words | {text: said.words.get(text, Word(text, -1)) for text in added})
    found = tuple(  # SentencePiece rewrites nothing, so every word is compared with the text itself
        word._replace(normalized=False) for word in words.numbered(said, known.get, processor.get_piece_size(), where)
    )
    ids = {word.text: word.id for word in found}
    named = own | {key: ids[text] for key, text in said.names.items() if text in ids}
    adds_bos = said.config.get("add_bos_token")
    return LlamaTokenizer(
        model, processor, found, legacy, adds_bos=True if adds_bos is None else adds_bos, prefixed=prefixed,
        bos_id=named["bos_token"], eos_id=named["eos_token"], unk_id=named["unk_token"],
        pad_id=named.get("pad_token", named["unk_token"]),
    )  # fmt: skip


def train_llama(texts: Iterable[str], pieces: int) -> bytes:
    """A serialized SentencePiece model with LLaMA's settings (BPE, byte fallback, nothing rewritten) for these texts.

    pieces: size of the vocabulary; 259 of them are <unk>, <s>, </s> and the bytes.
    """
    out = io.BytesIO()
    # A word stands at the start of a stretch as often as after a space, so each text is read both ways.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(form for text in texts for form in (text, f" {text}")), model_writer=out,
        vocab_size=pieces, model_type="bpe", byte_fallback=True, character_coverage=1.0, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue() + _DUMMY_PREFIX


def _processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model, without a "▁" of its own accord in front of what it encodes."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model + _NO_DUMMY_PREFIX)
    except RuntimeError as error:
        raise UsageError(f"tokenizer {where}: not a SentencePiece model ({len(model)} bytes)") from error
    if processor.decode(processor.encode(_PROBE)) != _PROBE or processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UsageError(
            f"tokenizer {where}: rewrites its input or lacks <s> or </s>, so it does not follow LLaMA's rules: give a "
            "directory with tokenizer.json instead"
        )
    return processor
