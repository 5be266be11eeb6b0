"""Tiny tokenizers in the layouts of today's chat models, these models' chat templates in shorter words, and talks.

The special words stand at the end of the vocabulary, with the flags of the published files. Of the published chat
templates all is left out that a talk of texts does not reach: tools, thinking, roles in a wrong order.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

from llava_jax.prompt.conversation import Conversation, Turn
from tests.prompt import layouts

# How texts are cut into words; Llama 3 takes up to three digits together, Qwen one.
# Source: tokenizer.json of Qwen/Qwen2-7B-Instruct and of meta-llama/Meta-Llama-3-8B-Instruct.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "What is in the picture? A red cat and two dogs, near the sea.\n", "Describe it, please.\n\nIt's 2024!",
    "system user assistant You are a helpful assistant.", "答案 naïve 漢字 🌋", "  def f(x):\n    return x\n",
)  # fmt: skip
_CHATML = {text: True for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
_THINKING = {text: False for text in ("<tool_call>", "</tool_call>", "<think>", "</think>")}
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _write(folder: Path, backend: tokenizers.Tokenizer, words: Mapping[str, bool], config: Mapping[str, Any]) -> Path:
    """A directory of a byte-level BPE with these words (text -> special) behind its vocabulary."""
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS * 3, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)
                        for text, special in words.items()])  # fmt: skip
    entries = {str(backend.token_to_id(text)): layouts.word(text, special) for text, special in words.items()}
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": entries}))
    return folder


def _cut(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_CUTS % digits), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_qwen(folder: Path, words: Mapping[str, bool] = _CHATML) -> Path:
    """Qwen2's and Qwen2.5's: no word begins a text, <|im_end|> ends it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), _cut(r"\p{N}")
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None,
              "pad_token": "<|endoftext|>", "add_prefix_space": False}  # fmt: skip
    return _write(folder, backend, words, config)


def write_qwen_3(folder: Path) -> Path:
    """Qwen3's: its words for thinking are not special."""
    return write_qwen(folder, _CHATML | _THINKING)


def write_slow_qwen(folder: Path) -> Path:
    """Qwen2's without tokenizer.json, in vocab.json and merges.txt."""
    write_qwen(folder)
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    file.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return folder


def write_llama_3(folder: Path) -> Path:
    """Llama 3's: <|begin_of_text|> begins a text, <|eot_id|> ends a turn."""
    words = dict.fromkeys(_HEADERS, True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    backend.pre_tokenizer = _cut(r"\p{N}{1,3}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _HEADERS[0], "eos_token": _HEADERS[-1]}
    _write(folder, backend, words, config)
    begin = processors.TemplateProcessing(
        single=f"{_HEADERS[0]} $A", special_tokens=[(_HEADERS[0], backend.token_to_id(_HEADERS[0]))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_mistral(folder: Path) -> Path:
    """Mistral's: a SentencePiece model with `legacy` false."""
    return layouts.directory(folder, {}, legacy=False)


class ChatModel(NamedTuple):
    """How a chat model writes a talk.

    write: makes the directory of its tokenizer. chat: a Jinja text that gives what the published one gives.
    end: what ends a turn. trims: white space at the ends of messages is left out.
    begin: what to write, a special token first, so that the text behind it has the tokens it has by itself.
    """

    write: Callable[[Path], Path]
    chat: str
    end: str
    trims: bool = False
    begin: str = ""


def _chatml(system: str = "", thought: str = "") -> str:
    """ChatML with a default system text, and with what stands before a reply and before the last answer."""
    default = "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}"
    return (
        ("{% if messages[0].role != 'system' %}" + default + "{% endif %}" if system else "")
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        + "{% if loop.last and m.role == 'assistant' %}{{ '" + thought + "' }}{% endif %}"
        + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + thought + "' }}{% endif %}"
    )


# Source: chat_template in the tokenizer_config.json of the model named; Qwen3's with enable_thinking=False.
MODELS = {
    # Qwen/Qwen2.5-7B-Instruct
    "qwen": ChatModel(
        write_qwen, _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), "<|im_end|>"
    ),
    # Qwen/Qwen2-7B-Instruct
    "qwen_2": ChatModel(write_qwen, _chatml("You are a helpful assistant."), "<|im_end|>"),
    # Qwen/Qwen3-8B
    "qwen_3": ChatModel(write_qwen_3, _chatml(thought="<think>\n\n</think>\n\n"), "<|im_end|>"),
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama_3": ChatModel(
        write_llama_3,
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        trims=True,
    ),
    # mistralai/Mistral-7B-Instruct-v0.2
    "mistral": ChatModel(
        write_mistral,
        "{{ bos_token }}{% set told = messages[0].role == 'system' %}{% for m in messages[told | int :] %}"
        "{% if m.role == 'user' %}{{ ' [INST] ' }}{% if told and loop.first %}{{ messages[0].content + '\n\n' }}"
        "{% endif %}{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        begin="<s> ",
    ),
}  # fmt: skip
_ROLES = ("user", "assistant")
_ATOMS = ("a", "B", " cat", "USER:", "What", " is", " it", "?", "é", "e\u0301", "漢", "🌋", " 2024", "'s", ".", "  two",
          "\nThen", "\n\nNow", " <", "im_start", "|>", " [INST]", "###", "assistant")  # fmt: skip


class Talk(NamedTuple):
    """Texts of questions and answers in turn, and a system text or None."""

    texts: tuple[str, ...]
    system: str | None

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates want it."""
        first = [] if self.system is None else [("system", self.system)]
        return [{"role": role, "content": text} for role, text in (*first, *zip(_ROLES * 5, self.texts))]

    @property
    def conversation(self) -> Conversation:
        """As `encode` wants it, with its markers in place."""
        turns = tuple(Turn(role, text) for role, text in zip(_ROLES * 5, self.texts))
        images = ("x.png",) * "".join(self.texts).count("<image>")
        return Conversation(turns, images, "it", self.system, images_in_place=True)


def talks(count: int, blanks: bool = False, seed: int = 0) -> list[Talk]:
    """Talks of 1 to 5 questions and answers, with and without pictures and system texts.

    blanks: with white space at the ends of some texts.
    """
    rng = random.Random(seed)

    def text(pictures: bool = False) -> str:
        atoms = rng.choices(_ATOMS, k=rng.randint(1, 7)) + ["<image>"] * (pictures and rng.choice((0, 0, 1, 2)))
        rng.shuffle(atoms)
        ends = rng.choices(("", " ", "\n", "\n\n "), k=2) if blanks else ("", "")
        return ends[0] + ("".join(atoms).strip() or "a") + ends[1]

    return [
        Talk(tuple(text(i % 2 == 0) for i in range(2 * rng.randint(1, 5))), text() if rng.random() < 0.5 else None)
        for _ in range(count)
    ]
