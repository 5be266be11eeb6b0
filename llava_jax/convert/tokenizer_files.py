"""The tokenizer's files as transformers 4 writes them; `tokenizer.json` is made from `tokenizer.model` here.

transformers 5 reads a LLaVA's tokenizer.json to the letter and ignores the class that the directory names; files
that it writes itself crash transformers 4.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.convert.chat_template import IMAGE
from llava_jax.errors import UsageError
from llava_jax.prompt.tokenizer import LlamaTokenizer, Tokenizer, Word, load

PAD, VIDEO = "<pad>", "<video>"


class Words(NamedTuple):
    """A tokenizer as it is exported.

    Attributes:
      words: its words, by rising id.
      pad: text of the padding token.
    """

    tokenizer: Tokenizer
    words: tuple[Word, ...]
    pad: str

    @property
    def ids(self) -> dict[str, int]:
        """Text -> id of its words."""
        return {word.text: word.id for word in self.words}


def with_image_token(directory: epath.PathLike, legacy: bool | None, *others: str) -> Words:
    """A checkpoint's tokenizer with `<image>`, `<pad>` and `others`, which Hugging Face models want; ids that are there
    stay."""
    tokenizer = load(directory, legacy, added=(IMAGE, PAD, *others))
    return Words(tokenizer, tokenizer.words, PAD)


def without_image_token(tokenizer: Tokenizer) -> Words:
    """The tokenizer as the original code has it: without `<image>`, `<pad>` and `<video>` where nothing comes after
    them."""
    end = kept_rows(tokenizer, tokenizer.size)
    pad = tokenizer.pad_id
    if pad >= end:  # LLaVA pads with <unk>; other tokenizers seldom have one
        pad = tokenizer.eos_id if tokenizer.unk_id is None else tokenizer.unk_id
    return Words(tokenizer, tuple(word for word in tokenizer.words if word.id < end), tokenizer.piece(pad))


def kept_rows(tokenizer: Tokenizer, rows: int) -> int:
    """Rows of the vocabulary without those that `with_image_token` added."""
    end = tokenizer.size
    added = {tokenizer.ids.get(text) for text in (IMAGE, PAD, VIDEO)}
    while end - 1 in added:
        end -= 1
    return rows if end == tokenizer.size else end


def files(words: Words, processor_class: str | None) -> dict[str, bytes]:
    """{file name: content}: tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, and
    tokenizer.model where there is one.

    Raises:
      ValueError: a SentencePiece model that is no BPE, which tokenizer.json could not reproduce.
    """
    tokenizer = words.tokenizer
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    texts = {key: tokenizer.piece(number) for key, number in named.items() if number is not None}
    texts["pad_token"] = words.pad
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' word for "no limit"
        "padding_side": "left",  # what batched generation wants
        "added_tokens_decoder": {str(word.id): word.flags() for word in words.words},
    }
    found = {}
    if isinstance(tokenizer, LlamaTokenizer):
        found["tokenizer.model"] = tokenizer.model
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": tokenizer.legacy, "sp_model_kwargs": {}}
        config |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
        config |= {} if tokenizer.prefixed else {"add_prefix_space": False}
        model, first = _llama_json(tokenizer, words.words), tokenizer.processor.get_piece_size()
    else:
        # transformers 4 would give this class token_type_ids, which no decoder takes.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        model, first = json.loads(tokenizer.content) | {"added_tokens": _entries(words.words)}, 0
    if processor_class is not None:
        config |= {"processor_class": processor_class, "extra_special_tokens": {"image_token": IMAGE}}
    contents = {"tokenizer.json": model, "tokenizer_config.json": config | texts, "special_tokens_map.json": texts}
    contents["added_tokens.json"] = {word.text: word.id for word in words.words if word.id >= first}
    written = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in contents.items()}
    return found | {name: text.encode() for name, text in written.items()}


def _entries(words: Sequence[Word]) -> list[dict[str, Any]]:
    """`added_tokens` of tokenizer.json."""
    return [{"id": word.id, **word.flags()} for word in words]


def _llama_json(tokenizer: LlamaTokenizer, words: Sequence[Word]) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE. Source: transformers' LlamaConverter (behaviour only)."""
    processor = tokenizer.processor
    vocab = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    scores = [processor.get_score(number) for number in vocab.values()]
    if any(score != int(score) for score in scores):
        raise UsageError("tokenizer.model is no BPE (its scores are no ranks), so no tokenizer.json gives the same ids")
    # legacy: every stretch between words gets a "▁"; else only the one that begins the text.
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    scheme = "first" if tokenizer.prefixed else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.prefixed else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _entries(words),
        "normalizer": {"type": "Sequence", "normalizers": prepend} if tokenizer.legacy else None,
        "pre_tokenizer": None if tokenizer.legacy else metaspace,
        "post_processor": _start(tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id) if tokenizer.adds_bos else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab, scores),
        },
    }


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Every way to make a piece of two others, best piece first: what a BPE model merges, in its order."""
    found = []
    for piece, number in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        whole = [(vocab[left], vocab[right], left, right) for left, right in halves if left in vocab and right in vocab]
        found += [(-scores[number], number, *merge) for merge in whole]
    return [f"{left} {right}" for *_, left, right in sorted(found)]


def _start(text: str, number: int) -> dict[str, Any]:
    """A post-processor that puts <s> before every text."""
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": text, "type_id": 1}}, second],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }
