"""Our parameters as an export writes them: one in memory at a time, and a vocabulary of as many rows as it wants."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llava_jax.convert import table
from llava_jax.convert.files import Spec
from llava_jax.convert.source import Source

VOCABULARY = {"llm/embed/table": ("llm/embed/added", 0), "llm/head/kernel": ("llm/head/added", 1)}


def specs_of(source: Source, vocab: int) -> dict[str, Spec]:
    """Shapes and dtypes as exported: the added rows of the vocabulary joined to the others, and `vocab` of them."""
    specs = {name: Spec(tuple(spec.shape), np.dtype(spec.dtype)) for name, spec in source.specs.items()}
    for name, (added, axis) in VOCABULARY.items():
        if name not in specs:
            continue
        shape = list(specs[name].shape)
        shape[axis] = vocab
        dtypes = {specs[name].dtype, specs.pop(added, specs[name]).dtype}
        specs[name] = Spec(tuple(shape), dtypes.pop() if len(dtypes) == 1 else np.dtype("f4"))
    return specs


def tensors_of(
    source: Source, found: Sequence[table.Entry], specs: Mapping[str, Spec]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors in the order of `found`, one of our parameters in memory."""
    progress = table.Progress("exports", "leaves", [table.nbytes(specs[entry.ours]) for entry in found])
    for entry in found:
        # No name for the parameter here: it would live on while the next one is read.
        yield from table.their_tensors(entry, _leaf(source, entry.ours, specs[entry.ours]))
        progress.add(table.nbytes(specs[entry.ours]))


def _leaf(source: Source, name: str, spec: Spec) -> np.ndarray:
    """The parameter; one of the vocabulary with its added rows, and cut or filled to the exported number of rows."""
    leaf = source.read(name)
    if name not in VOCABULARY:
        return leaf
    added, axis = VOCABULARY[name]
    parts = [leaf] + ([source.read(added)] if added in source.tensors else [])
    return fit_axis([part.astype(spec.dtype, copy=False) for part in parts], axis, spec.shape[axis])


def fit_axis(parts: Sequence[np.ndarray], axis: int, size: int) -> np.ndarray:
    """The parts joined along an axis and cut or filled to `size`.

    What is filled in is the mean row of the first part: no text has these ids, and the mean of all logits is never
    the largest, so greedy decoding is that of the unpadded model (zero or random rows can win).
    """
    missing = size - sum(part.shape[axis] for part in parts)
    if missing > 0:
        mean = parts[0].mean(axis=axis, keepdims=True, dtype=np.float64).astype(parts[0].dtype)
        parts = [*parts, np.repeat(mean, missing, axis=axis)]
    whole = np.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]
    return whole[:size] if axis == 0 else whole[:, :size]
