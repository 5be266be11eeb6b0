"""Text to token ids and back, each token with the characters it came from.

A directory's own files decide: LLaMA's tokenizer.model is driven directly, any other tokenizer.json is followed to the
letter. Special words count only where the caller says so; other added words are ordinary vocabulary.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from llava_jax.errors import Foreign, MissingFile, UsageError
from llava_jax.files import exists
from llava_jax.prompt import hub, llama, words
from llava_jax.prompt.hub import HubTokenizer
from llava_jax.prompt.llama import LlamaTokenizer, train_llama
from llava_jax.prompt.words import Token, Word

__all__ = ["HubTokenizer", "LlamaTokenizer", "Token", "Tokenizer", "Word", "load", "save", "train_llama"]

# `tokenizer_class` of the directories whose tokenizer.model follows LLaMA's rules, and of those that do not say.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_ANY_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The files that make up a tokenizer in a Hugging Face directory.
_FILES = (
    words.FAST, words.CONFIG, words.MAP, words.ADDED, words.MODEL, "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model",
)  # fmt: skip

Tokenizer = LlamaTokenizer | HubTokenizer


def load(path: epath.PathLike, legacy: bool | None = None, added: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer in a Hugging Face directory, or of a SentencePiece `tokenizer.model` file.

    legacy: transformers' switch for LLaMA tokenizers; None takes it from the directory's tokenizer_config.json.
    added: special words to add after those that are there.

    Raises:
      FileNotFoundError: there is no such path, or no tokenizer in it.
      ValueError: `legacy` is stated nowhere, or stated for a tokenizer that has none; the files are damaged.
    """
    path, where = epath.Path(path), str(path)
    if not exists(path):
        raise MissingFile(f"tokenizer {path}: no such file or directory")
    if not path.is_dir():
        return llama.build(path.read_bytes(), words.stated({}, where), legacy, added, where)
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).exists()}
    said = words.stated(files, where)
    if not set(files) - {words.CONFIG, words.MAP, words.ADDED}:
        raise MissingFile(f"tokenizer {path}: want tokenizer.model or tokenizer.json in it")
    if words.MODEL in files and _follows_llama(files, said, legacy):
        return llama.build(files[words.MODEL], said, legacy, added, where)
    if legacy is not None:
        raise UsageError(f"tokenizer {path}: legacy={legacy} is for LLaMA's tokenizer.model only: leave it out")
    if words.FAST not in files:
        files = _converted(files, where)
        said = words.stated(files, where)
    if said.config.get("tokenizer_class") in _LLAMA_CLASSES:
        said = said._replace(names=_LLAMA_NAMES | said.names)
    return hub.build(files, said, added, where)


def save(tokenizer: Tokenizer, directory: epath.PathLike) -> None:
    """Writes `tokenizer.files()` into `directory`, which is made if it is not there."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)


def _follows_llama(files: Mapping[str, bytes], said: words.Stated, legacy: bool | None) -> bool:
    """Whether a directory's tokenizer.model counts, and is LLaMA's: where its class says so, or nothing does."""
    kind = said.config.get("tokenizer_class")
    if words.FAST in files:
        return kind in _LLAMA_CLASSES or (kind is None and legacy is not None)
    return kind is None or kind in _LLAMA_CLASSES + _ANY_CLASSES


def _converted(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a directory without the first, as transformers makes them."""
    import transformers  # seconds to import, and most directories do without

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        with Foreign(lambda error: UsageError(f"tokenizer {where}: transformers cannot load it: {error}")):
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not theirs.is_fast:
        raise UsageError(f"tokenizer {where}: has no tokenizer.json: convert it with transformers first")
    named = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token, "unk_token": theirs.unk_token}
    config = named | {"pad_token": theirs.pad_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {words.FAST: theirs.backend_tokenizer.to_str().encode(), words.CONFIG: json.dumps(config).encode()}
