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
from llava_jax.prompt.tokenizer import HubTokenizer, LlamaTokenizer, Tokenizer, load

PAD = "<pad>"


class Words(NamedTuple):
    """A tokenizer as it is exported.

    Attributes:
      specials: text -> id of its special tokens.
      pad: text of the padding token.
    """

    tokenizer: Tokenizer
    specials: dict[str, int]
    pad: str


def with_image_token(directory: epath.PathLike, legacy: bool | None) -> Words:
    """A checkpoint's tokenizer with `<image>` and `<pad>`, which Hugging Face models want; ids that are there stay."""
    tokenizer = load(directory, legacy, added=(IMAGE, PAD))
    return Words(tokenizer, tokenizer.specials, PAD)


def without_image_token(tokenizer: Tokenizer) -> Words:
    """The tokenizer as the original code has it: without `<image>`, `<pad>` and what comes after them."""
    end = kept_rows(tokenizer, tokenizer.size)
    pad = tokenizer.pad_id
    if pad >= end:  # LLaVA pads with <unk>; other tokenizers seldom have one
        pad = tokenizer.processor.unk_id() if isinstance(tokenizer, LlamaTokenizer) else tokenizer.eos_id
    kept = {text: number for text, number in tokenizer.specials.items() if number < end}
    return Words(tokenizer, kept, tokenizer.piece(pad))


def kept_rows(tokenizer: Tokenizer, rows: int) -> int:
    """Rows of the vocabulary without those that `with_image_token` added."""
    return min(tokenizer.specials.get(text, rows) for text in (IMAGE, PAD))


def files(words: Words, processor_class: str | None) -> dict[str, bytes]:
    """{file name: content}: tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, and
    tokenizer.model where there is one.

    Raises:
      ValueError: a SentencePiece model that is no BPE, which tokenizer.json could not reproduce.
    """
    tokenizer = words.tokenizer
    texts = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
    texts["pad_token"] = words.pad
    specials = dict(sorted(words.specials.items(), key=lambda item: item[1]))
    decoder = {str(number): _flags(text) for text, number in specials.items()}
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' word for "no limit"
        "padding_side": "left",  # what batched generation wants
        "added_tokens_decoder": decoder,
    }
    found = {}
    if isinstance(tokenizer, LlamaTokenizer):
        found["tokenizer.model"] = tokenizer.model
        texts["unk_token"] = tokenizer.piece(tokenizer.processor.unk_id())
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": tokenizer.legacy, "sp_model_kwargs": {}}
        config |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
        model, first = _llama_json(tokenizer, specials), tokenizer.processor.get_piece_size()
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        model, first = _hub_json(tokenizer, specials), 0
    if processor_class is not None:
        config |= {"processor_class": processor_class, "extra_special_tokens": {"image_token": IMAGE}}
    contents = {"tokenizer.json": model, "tokenizer_config.json": config | texts, "special_tokens_map.json": texts}
    contents["added_tokens.json"] = {text: number for text, number in specials.items() if number >= first}
    written = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in contents.items()}
    return found | {name: text.encode() for name, text in written.items()}


def _llama_json(tokenizer: LlamaTokenizer, specials: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE. Source: transformers' LlamaConverter (behaviour only)."""
    processor = tokenizer.processor
    vocab = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    scores = [processor.get_score(number) for number in vocab.values()]
    if any(score != int(score) for score in scores):
        raise UsageError("tokenizer.model is no BPE (its scores are no ranks), so no tokenizer.json gives the same ids")
    # legacy: every stretch between special tokens gets a "▁"; else only the one that begins the text.
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **_flags(text)} for text, number in specials.items()],
        "normalizer": {"type": "Sequence", "normalizers": prepend} if tokenizer.legacy else None,
        "pre_tokenizer": None if tokenizer.legacy else metaspace,
        "post_processor": _start(tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id) if tokenizer.adds_bos else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
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


def _hub_json(tokenizer: HubTokenizer, specials: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer's own tokenizer.json with these special tokens in it."""
    content = json.loads(tokenizer.files()["tokenizer.json"])
    there = {token["content"]: token for token in content["added_tokens"]}
    content["added_tokens"] = [there.get(text, {"id": number, **_flags(text)}) for text, number in specials.items()]
    return content


def _flags(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **flags}
