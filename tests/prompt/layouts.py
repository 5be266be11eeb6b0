"""Tokenizer directories in every layout that is met, of one small LLaMA vocabulary, and texts to try them on."""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / "golden" / "tiny_llama.model"
PIECES = 960  # of that model
CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None)
PLACES = ("config", "added", "json")  # tokenizer_config.json, added_tokens.json, tokenizer.json alone


def word(text: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """A word as files of transformers hold it."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": text, **plain, "special": special, **flags}


BASE = {0: word("<unk>"), 1: word("<s>"), 2: word("</s>")}
WORDS = {
    "none": {},
    "special": {960: word("<tool>")},
    "plain": {960: word("<tool>", False), 961: word("<end>")},
    "normalized": {960: word("<tool>", False, normalized=True)},
    "strips": {960: word("<tool>", lstrip=True), 961: word("<end>", False, rstrip=True)},
    "single": {960: word("tool", False, single_word=True)},
}
ATOMS = ["a", "B", " cat", "USER:", "\n", "</s>", "<s>", "<unk>", "<tool>", "<end>", "tool", "é", "漢", "🌋", " ", "  ",
         "the", "<image>", ".", "▁", "<", "tools"]  # fmt: skip


def directory(
    folder: Path, words: Mapping[int, dict[str, Any]], place: str = "config", kind: str | None = "LlamaTokenizer",
    legacy: bool | None = None, model: bool = True, fast: Mapping[str, Any] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """Writes a directory of these words.

    place: the file that states them. model: with tokenizer.model. fast: with this tokenizer.json, but for its words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = {**BASE, **words}
    if model:
        shutil.copy(MODEL, folder / "tokenizer.model")
    if fast is not None:
        stated = [{"id": number, **entry} for number, entry in (every if place == "json" else BASE).items()]
        (folder / "tokenizer.json").write_text(json.dumps({**fast, "added_tokens": stated}))
    found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, **config}
    found |= {} if kind is None else {"tokenizer_class": kind}
    found |= {} if legacy is None else {"legacy": legacy}
    if place == "config":
        found["added_tokens_decoder"] = {str(number): entry for number, entry in every.items()}
    if place == "added":
        added = {entry["content"]: number for number, entry in words.items()}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        found["additional_special_tokens"] = [entry["content"] for entry in words.values() if entry["special"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return folder


def texts(count: int, seed: int = 0, atoms: Sequence[str] = tuple(ATOMS)) -> list[str]:
    """Texts of words, letters and blanks in any order."""
    rng = random.Random(seed)
    return ["".join(rng.choices(atoms, k=rng.randint(1, 8))) for _ in range(count)]
