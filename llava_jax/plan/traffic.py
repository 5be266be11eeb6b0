"""Bytes that an instruction of optimized HLO reads from the device's memory and writes to it.

Each instruction outside of fusions reads its operands and writes its result once, but for what lies in on-chip memory,
which a layout names. Of a stack of layers only the slice counts that is read or replaced. Not known is how often
a kernel reads an operand again: once counts, so that the sum is a lower bound there.
"""

import math
import re
from collections.abc import Iterator, Mapping

from llava_jax.plan.hlo_text import ITEM_BITS, Computation, Instruction, attribute

# They move nothing: names, loops (whose bodies are counted), and the ends of what has begun.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"}  # fmt: skip
STARTS = {"all-gather-start", "reduce-scatter-start", "all-to-all-start"}  # (operands, results)
SLICES = {"dynamic-slice", "slice", "gather"}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


def memory_bytes(computations: Mapping[str, Computation], computation: Computation, op: Instruction) -> int:
    """The bytes of one instruction that is in no fusion."""
    if op.opcode in FREE or op.opcode.endswith(("-done", "-update")):
        return 0
    shapes = [computation.instructions[name].shape if name in computation.instructions else "" for name in op.operands]
    if op.opcode in ("copy-start", "slice-start"):  # (result, operand, ...) and ((operand), result, ...)
        result = op.shape if op.opcode == "copy-start" else op.shape.partition("), ")[2]
        size, held = next(_places(result))
        return size * (held + (_held(shapes[0]) > 0))
    if op.opcode == "fusion-start":  # ((operand, ...), result, ...)
        op = op._replace(opcode="fusion", shape=op.shape.partition("), ")[2])
    if op.opcode in STARTS:
        return _held(op.shape)
    if op.opcode in SLICES:
        return 2 * _held(op.shape)
    if op.opcode == "dynamic-update-slice":
        return 2 * _held(shapes[1])
    if op.opcode == "fusion":
        body = computations[attribute(op, r"calls=%?([\w.\-]+)")]
        inputs = [one for one in body.instructions.values() if one.opcode == "parameter"]
        read = sum(_read(computations, body, one) for one in inputs if _held(shapes[int(one.literal)]))
        return read + (_replaced(body, op) if _held(op.shape) else 0)
    return sum(map(_held, shapes)) + _held(op.shape)


def _read(computations: Mapping[str, Computation], body: Computation, value: Instruction) -> int:
    """Bytes that a fusion reads of a value: all, or the slices that it uses; none where it replaces a slice."""
    total, size = 0, _size(value.shape)
    for reader in (one for one in body.instructions.values() if value.name in one.operands):
        if reader.opcode in SLICES and reader.operands[0] == value.name:
            total += _size(reader.shape)
        elif reader.opcode == "bitcast":
            total += _read(computations, body, reader)
        elif reader.opcode == "fusion":
            inner = computations[attribute(reader, r"calls=%?([\w.\-]+)")]
            place = str(reader.operands.index(value.name))
            total += sum(_read(computations, inner, one) for one in inner.instructions.values()
                         if one.opcode == "parameter" and one.literal == place)  # fmt: skip
        elif reader.opcode != "dynamic-update-slice" or reader.operands[0] != value.name:
            return size
    return min(total, size)


def _replaced(body: Computation, op: Instruction) -> int:
    """Bytes that a fusion writes: its result, or the slice of it that it replaces."""
    root = body.instructions[body.root]
    while root.opcode == "bitcast":
        root = body.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _size(body.instructions[root.operands[1]].shape)
    return _held(op.shape)


def _places(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether they lie in the device's memory) of each array; on-chip memories have a number: S(1)."""
    for kind, dims, layout in _ARRAY.findall(shape):
        size = ITEM_BITS.get(kind, 8) * math.prod(int(d) for d in dims.split(",") if d) // 8
        yield size, "S(" not in layout


def _held(shape: str) -> int:
    """Bytes in the device's memory."""
    return sum(size for size, held in _places(shape) if held)


def _size(shape: str) -> int:
    return sum(size for size, _ in _places(shape))
