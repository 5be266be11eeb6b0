"""Text to token ids and back, each token with the characters it came from.

LLaMA's SentencePiece model is driven directly, in both of transformers' `legacy` modes; any other tokenizer of a
Hugging Face directory goes through transformers. Special tokens count only where the caller says so.
"""

import io
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from etils import epath

from llava_jax.errors import MissingFile, UsageError

# `tokenizer_class` of the directories whose tokenizer.model follows LLaMA's rules.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
# The files that make up a tokenizer in a Hugging Face directory.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
)  # fmt: skip
_SPACE = "▁"
# Appended to a serialized model, protobuf merges it in: normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX = b"\x1a\x02\x18\x01"
_PROBE = "a  ﬁÅ① "  # a model that rewrites its input, or adds spaces to it, changes this

Range = tuple[int, int]


class Token(NamedTuple):
    """One token and the characters text[start:end] it covers; none of its own if start == end."""

    id: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class LlamaTokenizer:
    """SentencePiece as LLaMA uses it.

        legacy=True    <s> ▁Hi </s> ▁US ER     every stretch between special tokens starts with a "▁"
        legacy=False   <s> ▁Hi </s> USER       only the first one does

    model: the serialized SentencePiece model. added: special tokens after its own. specials: text -> id of both.
    adds_bos: a prompt starts with bos_id. pad_id: unk_id where the model has no padding token, as in LLaVA.
    """

    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    specials: dict[str, int]
    added: tuple[str, ...]
    legacy: bool
    adds_bos: bool
    bos_id: int
    eos_id: int
    pad_id: int

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.processor.get_piece_size() + len(self.added)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of `text`, special tokens in it recognised; bos: bos_id comes first."""
        return [self.bos_id] * bos + [token.id for token in self.tokenize(text)]

    def tokenize(self, text: str, fixed: Sequence[Range] | None = None) -> list[Token]:
        """Tokens of `text` without bos; special tokens are recognised inside the `fixed` ranges only (None: all).

        Differs from LLaVA: it recognises them in what a user types too, who can then end a turn or a training target.
        Source: transformers 4.37.2 LlamaTokenizer and PreTrainedTokenizer, the behaviour with `fixed` None.
        """
        tokens: list[Token] = []
        at = 0
        for start, end in _inside(self.specials, text, fixed):
            tokens += self._stretch(text, at, start)
            tokens.append(Token(self.specials[text[start:end]], start, end))
            at = end
        return tokens + self._stretch(text, at, len(text))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text that `tokenize` made `ids` from; special tokens left out, or as they are written."""
        written = {number: text for text, number in self.specials.items()}
        parts: list[str] = []
        run: list[int] = []
        prefixed = True  # `tokenize` put a "▁" in front of the stretch that comes next
        for token in [*(int(token) for token in ids), None]:
            if token is not None and token not in written:
                run.append(token)
                continue
            if run:
                text = self.processor.decode(run)
                parts.append(text.removeprefix(" ") if prefixed else text)
                run, prefixed = [], False
            prefixed = self.legacy or (prefixed and token == self.bos_id)
            if token is not None and not skip_special:
                parts.append(written[token])
        return "".join(parts)

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token: "▁cat", "<0x0A>", "</s>"."""
        own = self.processor.get_piece_size()
        return self.processor.id_to_piece(token) if token < own else self.added[token - own]

    def files(self) -> dict[str, bytes]:
        """Name -> content of what a checkpoint saves so that `load` of it gives this tokenizer again."""
        written = {number: text for text, number in self.specials.items()}
        flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.legacy,
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            "bos_token": written[self.bos_id],
            "eos_token": written[self.eos_id],
            "unk_token": written[self.processor.unk_id()],
            "pad_token": written[self.pad_id],
            "added_tokens_decoder": {str(number): {"content": written[number], **flags} for number in sorted(written)},
        }
        return {"tokenizer.model": self.model, "tokenizer_config.json": json.dumps(config, indent=2).encode()}

    def _stretch(self, text: str, start: int, end: int) -> list[Token]:
        """Tokens of text[start:end], which holds no special token."""
        if start == end:
            return []
        prefix = _SPACE if self.legacy or start == 0 else ""
        spaced = prefix + text[start:end].replace(_SPACE, " ")
        pieces = self.processor.encode(spaced, out_type=str)
        ids = [self.processor.piece_to_id(piece) for piece in pieces]
        # Byte pieces ("<0xE7>") stand for one byte of a character that the vocabulary lacks: count in bytes.
        widths = [
            1 if self.processor.is_byte(number) else len(piece.replace(_SPACE, " ").encode())
            for number, piece in zip(ids, pieces, strict=True)
        ]
        encoded = np.frombuffer(spaced.replace(_SPACE, " ").encode(), np.uint8)
        character = np.append(np.cumsum((encoded & 0xC0) != 0x80) - 1, len(spaced))
        borders = character[np.cumsum([0, *widths])] + start - len(prefix)
        borders = np.maximum(borders, start).tolist()
        return [Token(*token) for token in zip(ids, borders[:-1], borders[1:], strict=True)]


@dataclass(frozen=True, eq=False)
class HubTokenizer:
    """Any fast tokenizer of a Hugging Face directory; fields and methods as in `LlamaTokenizer`."""

    guest: Any  # transformers.PreTrainedTokenizerFast; transformers is imported only where one is loaded
    specials: dict[str, int]
    adds_bos: bool
    bos_id: int
    eos_id: int
    pad_id: int
    legacy: None = None

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.guest)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of `text`, special tokens in it recognised; bos: bos_id comes first."""
        return [self.bos_id] * bos + [token.id for token in self.tokenize(text)]

    def tokenize(self, text: str, fixed: Sequence[Range] | None = None) -> list[Token]:
        """Tokens of `text` without bos; special tokens are recognised inside the `fixed` ranges only (None: all)."""
        everywhere, wanted = _inside(self.specials, text, None), set(_inside(self.specials, text, fixed))
        # A special token that does not count is cut after its first letter, so that nothing recognises it.
        cuts = [start + 1 for start, end in everywhere if (start, end) not in wanted]
        tokens: list[Token] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            coded = self.guest(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            tokens += [
                Token(number, start + first, start + last)
                for number, (first, last) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
            ]
        return tokens

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; special tokens left out, or as they are written."""
        numbers = [int(token) for token in ids]
        return self.guest.decode(numbers, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """How the vocabulary writes one token."""
        return self.guest.convert_ids_to_tokens(token)

    def files(self) -> dict[str, bytes]:
        """Name -> content of what a checkpoint saves so that `load` of it gives this tokenizer again."""
        with tempfile.TemporaryDirectory() as folder:
            self.guest.save_pretrained(folder)
            return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.name in _FILES}


Tokenizer = LlamaTokenizer | HubTokenizer


def load(path: epath.PathLike, legacy: bool | None = None, added: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer in a Hugging Face directory, or of a SentencePiece `tokenizer.model` file.

    legacy: transformers' switch for LLaMA tokenizers; None takes it from the directory's tokenizer_config.json.
    added: special tokens to add after those that are there.

    Raises:
      FileNotFoundError: there is no such path, or no tokenizer in it.
      ValueError: `legacy` is stated nowhere, or stated for a tokenizer that has none; the files are damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise MissingFile(f"tokenizer {path}: no such file or directory")
    if not path.is_dir():
        return _llama(path.read_bytes(), {}, {}, legacy, added, str(path))
    config = _json(path / "tokenizer_config.json")
    model = path / "tokenizer.model"
    if model.exists() and config.get("tokenizer_class", _LLAMA_CLASSES[0]) in _LLAMA_CLASSES:
        return _llama(model.read_bytes(), config, _json(path / "added_tokens.json"), legacy, added, str(path))
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).exists()}
    if not files:
        raise MissingFile(f"tokenizer {path}: want tokenizer.model or tokenizer.json in it")
    if legacy is not None:
        raise UsageError(f"tokenizer {path}: legacy={legacy} is for LLaMA's tokenizer.model only: leave it out")
    return _hub(files, added, str(path))


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


def save(tokenizer: Tokenizer, directory: epath.PathLike) -> None:
    """Writes `tokenizer.files()` into `directory`, which is made if it is not there."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)


def _llama(
    model: bytes, config: dict, older_added: dict, legacy: bool | None, added: tuple[str, ...], where: str
) -> LlamaTokenizer:
    """config: tokenizer_config.json; older_added: added_tokens.json, text -> id."""
    legacy = config.get("legacy") if legacy is None else legacy
    if legacy is None:
        raise UsageError(
            f"tokenizer {where}: legacy is not stated: give legacy=true or false (true: 'US ER' after '</s>' as "
            "LLaVA-1.5 was served at first; false: 'USER', what LLaVA-1.5 checkpoints say)"
        )
    processor = _processor(model, where)
    own = processor.get_piece_size()
    base = {processor.id_to_piece(i): i for i in (processor.unk_id(), processor.bos_id(), processor.eos_id())}
    found = {entry["content"]: int(number) for number, entry in config.get("added_tokens_decoder", {}).items()}
    later = {text: number for text, number in {**older_added, **found}.items() if number >= own}
    if sorted(later.values()) != list(range(own, own + len(later))):
        raise UsageError(f"tokenizer {where}: added tokens {later} leave gaps: want ids from {own} upwards")
    names = tuple(dict.fromkeys([*sorted(later, key=later.get), *added]))
    specials = base | {text: own + index for index, text in enumerate(names)}
    pad = config.get("pad_token")
    pad = pad["content"] if isinstance(pad, dict) else pad
    return LlamaTokenizer(
        model, processor, specials, names, legacy, adds_bos=config.get("add_bos_token", True),
        bos_id=processor.bos_id(), eos_id=processor.eos_id(), pad_id=specials.get(pad, processor.unk_id()),
    )  # fmt: skip


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


def _hub(files: dict[str, bytes], added: tuple[str, ...], where: str) -> HubTokenizer:
    import transformers  # seconds to import, and LLaMA's tokenizer does without

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            guest = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UsageError(f"tokenizer {where}: transformers cannot load it: {error}") from error
    if not guest.is_fast:
        raise UsageError(f"tokenizer {where}: has no tokenizer.json: convert it with transformers first")
    guest.add_tokens(list(added), special_tokens=True)
    if guest.eos_token_id is None:
        raise UsageError(f"tokenizer {where}: names no eos_token: state it in tokenizer_config.json")
    start = guest("").input_ids[:1]
    eos = guest.eos_token_id
    bos = guest.bos_token_id if guest.bos_token_id is not None else eos
    spare = [number for number in (guest.pad_token_id, guest.unk_token_id) if number is not None]
    # Added but not special, as GPT-NeoX has for runs of spaces, is ordinary vocabulary.
    specials = {token.content: number for number, token in guest.added_tokens_decoder.items() if token.special}
    return HubTokenizer(guest, specials, adds_bos=start == [bos], bos_id=bos, eos_id=eos, pad_id=[*spare, 0][0])


def _inside(specials: dict[str, int], text: str, fixed: Sequence[Range] | None) -> list[Range]:
    """Where special tokens stand in the `fixed` ranges of `text` (None: in all of it), the longest where two do."""
    if not specials:
        return []
    pattern = re.compile("|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True)))
    ranges = [(0, len(text))] if fixed is None else fixed
    return [match.span() for start, end in ranges for match in pattern.finditer(text, start, end)]


def _json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
