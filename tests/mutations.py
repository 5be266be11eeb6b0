"""Random damage to the files of checkpoints and of workdirs, and what came of it.

Each file of a tree is damaged in every way of OPERATIONS by turns. What reads the tree afterwards has the same facts
as before, or ends with one line of ours; anything else is a fault: facts that differ without a word, or a traceback.
"""

import contextlib
import functools
import io
import itertools
import logging
import random
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax import errors


class Outcome(NamedTuple):
    """kind: "equal", "named" (the damage was said, and the facts are those of before or of the step before), "refused",
    "SILENT" or "TRACEBACK"; said: in words."""

    kind: str
    said: str = ""


def _replaced(content: bytes, at: int, part: bytes) -> bytes:
    return content[:at] + part + content[at + len(part) :]


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Another digit in the place of one; a file without digits gets one."""
    places = [i for i, byte in enumerate(content[:100_000]) if 48 <= byte < 58] or [0]
    at = rng.choice(places)
    return _replaced(content, at, bytes([48 + (content[at : at + 1] == b"0") + rng.randrange(9) % 9]))


def _bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return _replaced(content, at, bytes([content[at] ^ 1 << rng.randrange(8)]))


def _swapped(content: bytes, rng: random.Random) -> bytes:
    half = max(1, len(content) // 2)
    size = rng.randrange(1, min(16, half) + 1)
    first, second = rng.randrange(half - size + 1), half + rng.randrange(max(1, len(content) - half - size + 1))
    one, two = content[first : first + size], content[second : second + size]
    return _replaced(_replaced(content, first, two), second, one[: len(two)])


def _line(content: bytes, rng: random.Random) -> bytes:
    """Without one of its lines."""
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


# {name: what it makes of a file that is not empty}
CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flips": _bit,
    "a byte": lambda content, rng: _replaced(content, rng.randrange(len(content)), bytes([rng.randrange(256)])),
    "a digit": _digit,
    "a block of zeros": lambda content, rng: _replaced(content, rng.randrange(len(content)), bytes(8)),
    "a block of noise": lambda content, rng: _replaced(content, rng.randrange(len(content)), rng.randbytes(16)),
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "empty": lambda content, rng: b"",
    "longer": lambda content, rng: content + rng.randbytes(rng.randrange(1, 40)),
    "twice": lambda content, rng: content + content,
    "blocks swapped": _swapped,
    "a line less": _line,
    "a list": lambda content, rng: b"[]",
    "an object": lambda content, rng: b"{}",
    "deep": lambda content, rng: b"[" * 100_000,
}
OPERATIONS = (*CONTENTS, "gone", "a directory", "another file")


def damage(path: Path, operation: str, others: list[Path], rng: random.Random) -> None:
    """Damages a file."""
    content = path.read_bytes()
    if operation in CONTENTS:
        path.write_bytes(CONTENTS[operation](content or b"0", rng))
        return
    path.unlink()
    if operation == "a directory":
        path.mkdir()
    elif operation == "another file":
        shutil.copyfile(rng.choice(others), path)


def files_of(tree: Path) -> list[Path]:
    """All files below a folder, relative to it."""
    return sorted(path.relative_to(tree) for path in tree.rglob("*") if path.is_file())


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """What is said on stderr and in the log."""
    said, logger = io.StringIO(), logging.getLogger("llava_jax")
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(said):
            yield said
    finally:
        logger.removeHandler(handler)


def tried(read: Callable[[Path], Any], tree: Path, wanted: Any, older: Any = None) -> Outcome:
    """What came of reading a damaged tree.

    Args:
      read: returns facts, or raises what a command would show as one line.
      older: facts of a step before, which may be read where that is said.
    """
    try:
        with heard() as said:
            found = read(tree)
    except Exception as error:
        line = str(error)
        ours = errors.exit_code(error) is not None and line and "\n" not in line and "Traceback" not in said.getvalue()
        return Outcome("refused", line) if ours else Outcome("TRACEBACK", traceback.format_exc(limit=-4))
    is_named = "damaged" in said.getvalue()
    if found != wanted and not (is_named and found == older):
        return Outcome("SILENT", said.getvalue())
    return Outcome("named", said.getvalue()) if is_named else Outcome("equal")


def cases(trees: dict[str, Path], rng: random.Random) -> Iterator[tuple[str, Path, str]]:
    """(tree, file, operation) without end. Kinds of files come by turns: most files are pieces of arrays."""
    kinds: dict[str, list[tuple[str, Path]]] = {}
    for name, tree in trees.items():
        for path in files_of(tree):
            kinds.setdefault(re.sub("[0-9a-f]{8,}|[0-9]+", "#", path.name), []).append((name, path))
    operations = list[str]()
    for kind in itertools.cycle(sorted(kinds)):
        operations = operations or rng.sample(OPERATIONS, len(OPERATIONS))
        yield *rng.choice(kinds[kind]), operations.pop()


def run(
    trees: dict[str, Path], read: Callable[[str, Path], Any], count: int, seed: int, folder: Path,
    older: Callable[[str, Path], Any] = lambda name, tree: None,
) -> Iterator[tuple[str, Outcome]]:  # fmt: skip
    """(what was damaged, what came of it) of `count` mutations of copies of the trees."""
    rng, wanted, before = random.Random(seed), dict[str, Any](), dict[str, Any]()
    for name, tree in trees.items():
        place = folder / f"{name.replace('/', '-')}-as-it-was"
        shutil.copytree(tree, place)
        wanted[name], before[name] = read(name, place), older(name, place)
        shutil.rmtree(place)
    for number, (name, path, operation) in enumerate(itertools.islice(cases(trees, rng), count)):
        place = folder / f"mutation-{number}"  # a place of its own: what is said once of a place is said of each
        shutil.copytree(trees[name], place)
        damage(place / path, operation, [trees[name] / other for other in files_of(trees[name])], rng)
        outcome = tried(functools.partial(read, name), place, wanted[name], before[name])
        yield f"{name}: {path}: {operation}", outcome
        shutil.rmtree(place)
