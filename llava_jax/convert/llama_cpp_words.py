"""A tokenizer as GGUF holds it, so that llama.cpp makes the tokens of `prompt.encode`.

Source: llama.cpp of llama-cpp-python 0.3.36, src/llama-vocab.cpp, conversion/base.py.
"""

import json
from collections.abc import Mapping
from typing import Any

from llava_jax.checkpoint.model_json import PromptMetadata
from llava_jax.convert import tokenizer_files
from llava_jax.errors import UsageError
from llava_jax.prompt import ending, templates
from llava_jax.prompt.tokenizer import HubTokenizer, LlamaTokenizer, Tokenizer, Word

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
_WORD, _NOTHING = -1000.0, -10000.0  # scores of what SentencePiece has none for
_LETTERS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
            r"|\s+")  # fmt: skip
# How a tokenizer.json cuts a text into words -> (llama.cpp's name for it, whether it knows whole words beside merges).
_CUTS = {_LETTERS % r"\p{N}": ("qwen2", False), _LETTERS % r"\p{N}{1,3}": ("llama-bpe", True)}


def keys(tokenizer: Tokenizer, prompt: PromptMetadata, rows: int, where: str) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a vocabulary of `rows` words; an id between them that none has is unused.

    Raises:
      UsageError: llama.cpp has no such tokenizer.
    """
    words = tokenizer_files.without_image_token(tokenizer)
    strips = [word.text for word in words.words if word.lstrip or word.rstrip or word.single_word]
    if strips:
        raise UsageError(f"{where}: the word {strips[0]!r} takes white space along, or wants none beside it, which "
                         "llama.cpp does not know; use --format hf")  # fmt: skip
    kind = _llama if isinstance(tokenizer, LlamaTokenizer) else _byte_level
    pieces, of_kind = kind(tokenizer, where)
    pieces = {number: piece for number, piece in pieces.items() if number < rows}
    for word in words.words:
        text, score, _ = pieces.get(word.id, ("", _WORD, _NORMAL))
        pieces[word.id] = (word.text, score, _type(tokenizer, word))
    listed = [pieces.get(number, (f"[PAD{number}]", _NOTHING, _UNUSED)) for number in range(rows)]
    texts, scores, types = map(list, zip(*listed))
    values = {"tokens": [text.encode() for text in texts], "token_type": types, **of_kind}
    values |= {"scores": scores} if kind is _llama else {}
    ends = ending.of(templates.get(prompt.template), tokenizer).ids
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id,
           "padding": words.ids.get(words.pad), "eot": next((end for end in ends if end != tokenizer.eos_id), None)}
    values |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    values |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _type(tokenizer: Tokenizer, word: Word) -> int:
    if word.id == tokenizer.unk_id and isinstance(tokenizer, LlamaTokenizer):
        return _UNKNOWN
    return _CONTROL if word.special else _USER_DEFINED


_Pieces = dict[int, tuple[str, float, int]]  # id -> (text, score, type)


def _llama(tokenizer: LlamaTokenizer, where: str) -> tuple[_Pieces, dict[str, Any]]:
    """llama.cpp puts a space before the text and behind every special word, or nowhere; our `legacy`, or not.

    Without `legacy` the first stretch of a text gets one here: chat templates write it behind <s>.
    """
    spm, pieces = tokenizer.processor, {}
    for number in range(spm.get_piece_size()):
        kinds = ((spm.is_unknown, _UNKNOWN), (spm.is_control, _CONTROL), (spm.is_unused, _UNUSED), (spm.is_byte, _BYTE))
        kind = next((kind for test, kind in kinds if test(number)), _NORMAL)
        pieces[number] = (spm.id_to_piece(number), spm.get_score(number), kind)
    return pieces, {"model": "llama", "pre": "default", "add_space_prefix": tokenizer.legacy}


def _byte_level(tokenizer: HubTokenizer, where: str) -> tuple[_Pieces, dict[str, Any]]:
    content = json.loads(tokenizer.content)
    model, (pre, whole_words) = content["model"], _cut(content, where)
    known = {"type": "BPE", "byte_fallback": False, "ignore_merges": whole_words, "continuing_subword_prefix": "",
             "end_of_word_suffix": ""}  # fmt: skip
    for key, value in known.items():
        if (model.get(key) or type(value)()) != value:
            raise UsageError(f"{where}: tokenizer.json: model.{key} is {model.get(key)!r}, which llama.cpp does not "
                             f"know here; wanted {value!r}. Use --format hf")  # fmt: skip
    pieces = {number: (text, 0.0, _NORMAL) for text, number in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return pieces, {"model": "gpt2", "pre": pre, "merges": merges}


def _cut(content: Mapping[str, Any], where: str) -> tuple[str, bool]:
    part = content.get("pre_tokenizer") or {}
    for regex, entry in _CUTS.items():
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        steps = part.get("pretokenizers", [])
        bytes_ = steps[-1] if len(steps) == 2 else {}
        if split in steps and bytes_.get("type") == "ByteLevel" and not bytes_.get("use_regex", True):
            return entry
    names = ", ".join(name for name, _ in _CUTS.values())
    raise UsageError(f"{where}: tokenizer.json: pre_tokenizer is {json.dumps(part)[:80]}, which llama.cpp is not known "
                     f"to have; wanted tokenizer.model, or that of {names}. Use --format hf")  # fmt: skip
