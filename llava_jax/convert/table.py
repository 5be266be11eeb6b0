"""One table of names, read both ways: which of their tensors make each of our parameters, and with which axes.

Rows are those of `models.names`, which the parts of a model hold. Import checks that every tensor of theirs is used
exactly once and has the shape and dtype that the model asks for; export walks the same entries backwards.
"""

import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax import params
from llava_jax.checkpoint.reader import TensorWriter
from llava_jax.convert.files import Spec, TensorFiles
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.names import Axes, Row

FLOATS = ("float32", "float16", "bfloat16")


_LAYER = re.compile(r"\{layer(?:\*(\d+))?\}")


class Part(NamedTuple):
    """Some parameters, the files that hold them and the table between the two.

    Attributes:
      leaves: beginnings of our names; "" is all.
      ignored: patterns over names of theirs that are of other parts, or nothing of the model.
    """

    leaves: tuple[str, ...]
    tensors: TensorFiles
    rows: list[Row]
    ignored: tuple[str, ...] = ()


class Entry(NamedTuple):
    """One of our parameters and what it is made of.

    Attributes:
      shape: ours.
      theirs: names of their tensors; more than one, or `stacked`: layers, along our first axis.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    stacked: bool
    axes: Axes

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of each of their tensors."""
        return self.axes.their_shape(self.shape[1:] if self.stacked else self.shape)


def entries(leaves: Mapping[str, Any], rows: Sequence[Row], first_layer: Mapping[str, int], what: str) -> list[Entry]:
    """What every parameter is made of.

    Args:
      leaves: {our name: anything with a shape}.
      rows: the table; our pattern's groups may stand in their name as \\1.
      first_layer: {beginning of our name: their number of a stack's first layer}, 0 where none fits.
      what: the table's name, for messages.
    """
    found = []
    rows = [(pattern, (pattern, *value)) for pattern, value in rows]
    for name, (pattern, theirs, axes) in params.lookup(leaves, rows, what).items():
        match = re.fullmatch(pattern, name)
        assert match is not None
        theirs = match.expand(theirs)
        shape = tuple(leaves[name].shape)
        if not _LAYER.search(theirs):
            found.append(Entry(name, shape, (theirs,), False, axes))
            continue
        first = next((number for start, number in first_layer.items() if name.startswith(start)), 0)
        layers = tuple(_numbered(theirs, first + i) for i in range(shape[0]))
        found.append(Entry(name, shape, layers, True, axes))
    return found


def _numbered(theirs: str, layer: int) -> str:
    return _LAYER.sub(lambda match: str(layer * int(match[1] or 1)), theirs)


def check(found: Sequence[Entry], tensors: TensorFiles, ignored: Iterable[str] = ()) -> dict[str, np.dtype]:
    """{our name: dtype}, when the tensors are exactly those that the entries want.

    Args:
      ignored: patterns over their names that are known to hold nothing of the model (buffers).

    Raises:
      UnusableCheckpoint: a tensor is missing, left over, or has the wrong shape or dtype; names it.
    """
    wanted = {theirs: entry for entry in found for theirs in entry.theirs}
    faults = [f"{name} is missing (for {entry.ours})" for name, entry in wanted.items() if name not in tensors.specs]
    for name, spec in tensors.specs.items():
        if name in wanted:
            faults += _faults(name, spec, wanted[name])
        elif not any(re.fullmatch(pattern, name) for pattern in ignored):
            faults.append(f"{name} {spec.shape} is not known")
    dtypes = {}
    for entry in found:
        kinds = {tensors.specs[name].dtype for name in entry.theirs if name in tensors.specs}
        if len(kinds) > 1:
            faults.append(f"{entry.theirs[0]} and the other layers have dtypes {', '.join(sorted(map(str, kinds)))}")
        dtypes[entry.ours] = next(iter(kinds), np.dtype("f4"))
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UnusableCheckpoint(f"{tensors.path} does not fit its config: {'; '.join(faults[:4])}{more}")
    return dtypes


def _faults(name: str, spec: Spec, entry: Entry) -> list[str]:
    if spec.shape != entry.their_shape:
        return [f"{name} has shape {spec.shape}, wanted {entry.their_shape}"]
    if spec.dtype.name not in FLOATS:
        return [f"{name} has dtype {spec.dtype}, wanted one of {', '.join(FLOATS)}"]
    return []


def read_tensor(entry: Entry, tensors: TensorFiles) -> np.ndarray:
    """Our parameter in their dtype. Memory: the parameter and one of their tensors."""
    if not entry.stacked:
        return entry.axes.ours(tensors.read(entry.theirs[0]))
    stack = np.empty(entry.shape, tensors.specs[entry.theirs[0]].dtype)
    for layer, name in enumerate(entry.theirs):
        stack[layer] = entry.axes.ours(tensors.read(name))
    return stack


def their_tensors(entry: Entry, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Their (name, tensor) of one of our parameters, in the order of `entry.theirs`."""
    for layer, name in enumerate(entry.theirs):
        yield name, entry.axes.theirs(leaf[layer] if entry.stacked else leaf)


def write_leaves(writer: TensorWriter, sources: Sequence[tuple[Entry, TensorFiles]]) -> None:
    """Reads and writes every parameter, one in memory at a time."""
    sizes = [sum(nbytes(tensors.specs[name]) for name in entry.theirs) for entry, tensors in sources]
    progress = Progress("imports", "leaves", sizes)
    for (entry, tensors), size in zip(sources, sizes):
        writer.write(entry.ours, read_tensor(entry, tensors))
        progress.add(size)


class Progress:
    """Prints a line every few seconds of a long conversion: what is done, and how long the rest takes."""

    def __init__(self, verb: str, noun: str, sizes: Sequence[int]):
        self._verb, self._noun, self._count, self._bytes = verb, noun, len(sizes), sum(sizes)
        self._done, self._done_bytes, self._start, self._last = 0, 0, time.monotonic(), time.monotonic()

    def add(self, size_bytes: int) -> None:
        """Counts one thing done."""
        self._done += 1
        self._done_bytes += size_bytes
        now = time.monotonic()
        if now - self._last < 5:
            return
        self._last = now
        left = (now - self._start) * (self._bytes / max(self._done_bytes, 1) - 1)
        print(
            f"{self._verb} {self._done} of {self._count} {self._noun}, {self._done_bytes / 1e9:.1f} of "
            f"{self._bytes / 1e9:.1f} GB, {left:.0f} s left",
            file=sys.stderr,
        )


def nbytes(spec: Spec) -> int:
    """Size of a tensor in bytes."""
    return math.prod(spec.shape) * spec.dtype.itemsize
