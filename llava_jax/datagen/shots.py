"""The few-shot prompt of the language model: instructions and examples, read from the prompts folder.

A folder in the layout of LLaVA's (playground/data/prompts) replaces ours:

    conversation/system_message.txt, conversation/000_caps.txt, conversation/000_conv.txt, ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from llava_jax.errors import MissingFile, UsageError
from llava_jax.files import listed
from llava_jax.files import read as read_file

PROMPTS = Path(__file__).parent / "prompts"
BRIEF, DETAIL = "brief_questions.txt", "detail_questions.txt"


class Kind(NamedTuple):
    """One kind of instruction data. folder: of its prompts; boxes: its contexts hold the boxes.

    Conversations are generated from the captions alone. Source: haotian-liu/LLaVA issue 87, and its few-shot files.
    """

    folder: str
    boxes: bool


KINDS = {
    "conversation": Kind("conversation", boxes=False),
    "detail": Kind("detail_description", boxes=True),
    "reasoning": Kind("complex_reasoning", boxes=True),
}


class Shots(NamedTuple):
    """Instructions, and examples as (context, answer)."""

    system: str
    examples: tuple[tuple[str, str], ...]

    def messages(self, context: str) -> list[dict[str, Any]]:
        """The request: system, then user and assistant for each example, then the context."""
        messages_so_far = [{"role": "system", "content": self.system}]
        for example, answer in self.examples:
            messages_so_far += [{"role": "user", "content": example}, {"role": "assistant", "content": answer}]
        return [*messages_so_far, {"role": "user", "content": context}]


def read(kind: str, prompts: epath.PathLike = PROMPTS) -> Shots:
    """The prompts of a kind ("conversation", "detail", "reasoning").

    Raises:
      FileNotFoundError: the folder lacks them, or an example lacks its other half; names the file.
    """
    folder = epath.Path(prompts) / KINDS[kind].folder
    examples = []
    for path in (path for path in listed(folder) if path.name.endswith("_caps.txt")):
        examples.append((_text(path), _text(path.parent / path.name.replace("_caps.txt", "_conv.txt"))))
    return Shots(_text(folder / "system_message.txt"), tuple(examples))


def lines(name: str, prompts: epath.PathLike = PROMPTS) -> Sequence[str]:
    """The non-empty lines of a text file in the prompts folder, such as the questions.

    Raises:
      FileNotFoundError: there is none. ValueError: it is empty.
    """
    texts = [line.strip() for line in _text(epath.Path(prompts) / name).splitlines() if line.strip()]
    if not texts:
        raise UsageError(f"{epath.Path(prompts) / name}: empty: want one question a line")
    return texts


def _text(path: epath.Path) -> str:
    try:
        return read_file(path).decode().strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingFile(f"prompts {str(path)!r}: no such file: want the layout of "
                          f"{PROMPTS}: KIND/system_message.txt, 000_caps.txt, 000_conv.txt ...") from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise UsageError(f"prompts {str(path)!r}: byte {error.start} is no UTF-8 text: save it as UTF-8") from None
