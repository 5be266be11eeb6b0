"""The text of optimized HLO, read into computations of instructions."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llava_jax.errors import UsageError


class Instruction(NamedTuple):
    """One line: %name = shape opcode(operands), attributes. literal: what stands between the parentheses."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str


class Computation(NamedTuple):
    """Instructions by name, in order; `root` is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128, **{
    f"{kind}{bits}": bits for kind, sizes in (("s", (2, 4, 8, 16, 32, 64)), ("u", (2, 4, 8, 16, 32, 64)),
                                              ("f", (16, 32, 64))) for bits in sizes
}}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """(name of the entry computation, computations by name)."""
    computations, entry, name = dict[str, Computation](), "", ""
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            entry, name, lines = head[2] if head[1] else entry, head[2], []
        elif line == "}" and name:
            computations[name], name = _computation(name, lines), ""
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line.strip())
        elif name and lines:
            lines[-1] += line  # a kernel's metadata may hold line breaks
    return entry, computations


def _computation(name: str, lines: Sequence[str]) -> Computation:
    instructions = [_instruction(line.removeprefix("ROOT ")) for line in lines]
    root = next((op.name for op, line in zip(instructions, lines) if line.startswith("ROOT ")), "")
    return Computation(name, {op.name: op for op in instructions}, root)


def _instruction(line: str) -> Instruction:
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    end = _closing_index(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing_index(rest, start)
    literal = rest[start + 1 : end - 1]
    operands = tuple(operand.split()[-1].lstrip("%") for operand in _split(literal) if operand)
    return Instruction(name.lstrip("%"), shape, rest[:start], operands, literal, rest[end:])


def _closing_index(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise UsageError(f"HLO text has an open parenthesis: {text[start : start + 80]!r}")


def _split(literal: str) -> list[str]:
    """Operands at the commas that lie in no bracket (their shapes may be printed with them)."""
    parts, depth = [""], 0
    for letter in literal:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of each array in a shape, which may be a tuple."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(shape)]


def size_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape, without the padding of its layout; the small floats (f8...) take one each."""
    return sum(ITEM_BITS.get(kind, 8) * math.prod(dims) // 8 for kind, dims in arrays(shape))


def attribute(op: Instruction, pattern: str) -> str:
    match = re.search(pattern, op.attributes)
    return match[1] if match else ""
