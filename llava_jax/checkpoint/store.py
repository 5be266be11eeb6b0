"""A checkpoint directory's parameters: its steps, its own leaves and those of the checkpoints it rests on.

What lies in `DIR/STEP/params` is written by `writer` and read by `leaves`; here a directory's `base` entries are
resolved, and refused when they moved or changed.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from llava_jax import files, params
from llava_jax.checkpoint import best, sums
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint import leaves as reading
from llava_jax.checkpoint.card import absolute
from llava_jax.checkpoint.leaves import CHECKSUMS, COMMIT, Leaves, Request, open_leaves
from llava_jax.checkpoint.writer import LeafWriter, staged
from llava_jax.errors import UnusableCheckpoint

__all__ = [
    "PARAMS", "LeafWriter", "Step", "absolute", "best_step", "check_specs", "fingerprint", "holding", "is_finished",
    "latest_step", "leaf_specs", "load_params", "number", "numbered", "own_leaves", "own_specs", "places", "read_leaf",
    "staged", "steps",
]  # fmt: skip

_log = logging.getLogger(__name__)
PARAMS = "params"
BEST = "best"
Step = int | Literal["best"] | None  # of a checkpoint; None is the latest, "best" that of the lowest validation loss


def numbered(directory: epath.PathLike) -> list[int]:
    """The numbers of all step directories there, ascending, whole or not."""
    return sorted(int(entry.name) for entry in files.listed(directory) if re.fullmatch(r"[0-9]{1,18}", entry.name))


def steps(directory: epath.PathLike) -> list[int]:
    """The usable steps, ascending. A step that is empty, half written or half deleted is none.

    Raises:
      Unreachable, UsageError: as `files.retried`.
    """
    return [step for step in numbered(directory) if _is_usable(epath.Path(directory) / str(step))]


def latest_step(directory: epath.PathLike) -> int | None:
    """The newest usable step, or None. A newer one that was written to its end and is damaged is named in the log.

    Raises: as `steps`.
    """
    directory = epath.Path(directory)
    newest, damaged = newest_step(directory)
    for newer in damaged if newest is not None else ():
        _name_damaged(directory, newer, newest)
    return newest


def newest_step(directory: epath.PathLike) -> tuple[int | None, list[int]]:
    """The newest usable step, and the newer ones that were written to their end and are damaged.

    Raises: as `steps`.
    """
    directory, damaged = epath.Path(directory), list[int]()
    for step in reversed(numbered(directory)):
        if _is_usable(directory / str(step)):
            return step, damaged
        damaged += [step] if is_finished(directory / str(step)) else []
    return None, damaged


@functools.cache
def _name_damaged(directory: epath.Path, step: int, taken: int) -> None:
    """Once in a process, which may ask for the latest step often."""
    _log.warning("%s: step %d is damaged, or was copied in part: step %d is taken", directory, step, taken)


def best_step(directory: epath.PathLike) -> int:
    """The step with the lowest validation loss, of those that are there.

    Raises:
      UnusableCheckpoint: no training run has kept one, or best.json is damaged.
      Unreachable, UsageError: as `files.retried`.
    """
    directory = epath.Path(directory)
    there = {step for step in numbered(directory) if is_finished(directory / str(step))}
    found = best.lowest(row for row in best.read(directory).rows if row[0] in there)
    if found is None:
        raise UnusableCheckpoint(
            f"{directory}: no step is known to be the best: `train` keeps the one with the lowest validation loss "
            f"where checkpoint.best=true. Steps there: {', '.join(map(str, sorted(there))) or 'none'}"
        )
    return found[0]


def number(directory: epath.PathLike, step: Step) -> int | None:
    """The number of a step; None where the latest is wanted and none is usable. Raises as `steps` and `best_step`."""
    if step is None:
        return latest_step(directory)
    return best_step(directory) if step == BEST else step


def is_finished(step: epath.Path) -> bool:
    """Whether a step was written to its end.

    On a disk a step gets its name last. In a bucket Orbax's commit file is last (Orbax's own `is_checkpoint_finalized`
    looks for it, and loads all of Orbax); a step that `LeafWriter` wrote before format 2 has checksums instead.
    """
    if not files.is_bucket(step):
        return True
    return files.exists(step / COMMIT) or files.exists(step / PARAMS / CHECKSUMS)


def own_leaves(directory: epath.PathLike, step: Step = None) -> Leaves:
    """The leaves that lie in this very directory.

    Raises:
      UnusableCheckpoint: no usable step, or not this one.
      Unreachable, UsageError: as `files.retried`.
    """
    directory = epath.Path(directory)
    chosen = number(directory, step)
    if chosen is not None and _is_usable(directory / str(chosen)):
        return open_leaves(directory / str(chosen) / PARAMS)
    usable = steps(directory)
    if usable:
        raise UnusableCheckpoint(f"{directory}: no usable step {chosen}; usable are {', '.join(map(str, usable))}")
    if not files.exists(directory / cards.FILE):
        raise UnusableCheckpoint(cards.missing(directory))
    raise UnusableCheckpoint(
        f"{directory}: no usable checkpoint step here (a directory NUMBER/params, whole): a run has none before its "
        "first save, nor where copying stopped halfway"
    )


def places(directory: epath.PathLike, step: Step = None) -> dict[str, Leaves]:
    """{name: the leaves it lies among} for all leaves, those of the bases included.

    Raises:
      UnusableCheckpoint: no usable step, or a base that is missing or changed.
    """
    return _places(epath.Path(directory), step, ())


def holding(directory: epath.PathLike, names: Iterable[str], step: Step = None) -> dict[str, Leaves]:
    """`places` of these leaves alone; raises UnusableCheckpoint too where nobody holds one."""
    found = places(directory, step)
    return {name: _among(found, name, directory) for name in names}


def own_specs(directory: epath.PathLike, step: Step = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the leaves in this very directory; no array is read."""
    leaves = own_leaves(directory, step)
    return {name: leaves.spec(name) for name in leaves.names}


def leaf_specs(directory: epath.PathLike, step: Step = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of all leaves, those of the bases included; no array is read."""
    return {name: leaves.spec(name) for name, leaves in places(directory, step).items()}


def read_leaf(directory: epath.PathLike, step: Step, name: str) -> np.ndarray:
    """One leaf in the dtype it has on disk; from a base if it lies there.

    Raises:
      UnusableCheckpoint: the leaf is missing, damaged, or differs from its checksum.
    """
    return _among(places(directory, step), name, directory).read(name)


def load_params(
    directory: epath.PathLike,
    names: Iterable[str] | None = None,
    step: Step = None,
    dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """A nested dict of leaves, those of the bases included.

    Args:
      names: the leaves wanted; None is all of them.
      dtype: cast every leaf to it; None keeps what is on disk.
      put: called with (name, array) as soon as a leaf is read; its result takes the leaf's place. A `put` that
        moves the leaf to a device keeps the host's peak at one leaf.

    Raises:
      UnusableCheckpoint: a leaf is wanted that neither the checkpoint nor a base holds, or one is damaged.
    """
    found = places(directory, step) if names is None else holding(directory, names, step)

    def use(read: reading.Read) -> tuple[str, Any]:
        array = read.whole()
        array = array if dtype is None else array.astype(dtype)
        return read.name, array if put is None else put(read.name, array)

    return params.unflatten(dict(reading.read([Request(leaves, name) for name, leaves in found.items()], use)))


def check_specs(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, dtypes: bool = False) -> None:
    """Compares {name: array or shape}; raises UnusableCheckpoint naming the first leaves that differ.

    Args:
      where: what holds `found`, for the message.
      dtypes: compare dtypes too.
    """
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unexpected" for name in found if name not in wanted]
    for name in (name for name in wanted if name in found):
        have, wish = found[name], wanted[name]
        if tuple(have.shape) != tuple(wish.shape):
            faults.append(f"{name} has shape {tuple(have.shape)}, wanted {tuple(wish.shape)}")
        elif dtypes and np.dtype(have.dtype) != np.dtype(wish.dtype):
            faults.append(f"{name} has dtype {have.dtype}, wanted {wish.dtype}")
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UnusableCheckpoint(f"{where} does not fit the model: {'; '.join(faults[:5])}{more}")


def fingerprint(directory: epath.PathLike, step: Step = None, like: str = "") -> str:
    """One line that changes when any leaf's name, shape, dtype or bytes change; the path plays no part.

    It is made from the checksums, so it costs milliseconds; leaves without one are read. Reading a leaf compares
    it with its checksum, so a bit that flips later is caught there.

    like: a fingerprint to compare with; those of format 1 are made from CRC-32s, so every leaf without one is read.
    """
    kind = "sha256" if like.startswith("sha256:") else "sums"
    leaves = own_leaves(directory, step)
    lines = []
    for name in leaves.names:
        spec, value = leaves.spec(name), leaves.checksums.get(name)
        if kind == "sha256" and not isinstance(value, int):
            value = reading.crc32(leaves.read(name))
        elif value is None:
            value = sums.of_part(leaves.read(name), [0] * len(spec.shape), spec.shape)
        lines.append([name, list(spec.shape), str(spec.dtype), value if isinstance(value, int) else value[:2]])
    bases = [[base.fingerprint, list(base.patterns)] for base in cards.bases(directory)]
    return f"{kind}:" + hashlib.sha256(json.dumps([lines, bases]).encode()).hexdigest()


def _places(directory: epath.Path, step: Step, above: tuple[epath.Path, ...]) -> dict[str, Leaves]:
    leaves = own_leaves(directory, step)
    if leaves.folder in above:
        raise UnusableCheckpoint(f"{directory}: it is its own base, by way of {above[-1]}")
    found = {name: leaves for name in leaves.names}
    for base in cards.bases(directory):
        below = _places(_resolve(directory, base), base.step, (*above, leaves.folder))
        for name in below:
            if any(re.fullmatch(pattern, name) for pattern in base.patterns):
                found.setdefault(name, below[name])
    return dict(sorted(found.items()))


def _resolve(directory: epath.Path, base: cards.Base) -> epath.Path:
    """Where a base lies: the first place with the leaves that were there when it was named."""
    tried = []
    for path in cards.places(directory, base):
        if not _is_usable(path / str(base.step)):
            usable = ", ".join(map(str, steps(path)))
            tried.append(f"{path}: its steps are {usable}" if usable else f"{path}: there is no checkpoint")
            continue
        now = fingerprint(path, base.step, base.fingerprint)
        if now == base.fingerprint:
            return path
        tried.append(f"{path}: step {base.step} has changed (fingerprint {now[:15]}, wanted {base.fingerprint[:15]})")
    raise UnusableCheckpoint(
        f"{directory}: its base, step {base.step} of {base.origin or base.path}, which holds {_brief(base.patterns)}, "
        f"is not there ({'; '.join(tried)}). Put it back unchanged, or set its `path` in {directory / cards.FILE} to "
        "where it lies now; or make it again as it was made (`convert import` or `convert assemble` of the same files, "
        "`train` of the same stage). `convert merge` makes a checkpoint that needs no base"
    )


def _brief(patterns: Iterable[str]) -> str:
    """"3 parameters such as llm/norm/scale": a card names them by patterns that are their escaped names."""
    shown = [pattern.replace("\\", "") for pattern in patterns]
    return f"{len(shown)} patterns of parameters such as {shown[0]}" if shown else "nothing"


def _among(found: Mapping[str, Leaves], name: str, directory: epath.PathLike) -> Leaves:
    if name not in found:
        raise UnusableCheckpoint(
            f"{directory}: no leaf {name} in it nor in its bases; it holds {len(found)}, see "
            f"`python -m llava_jax.convert inspect {directory}`"
        )
    return found[name]


def _is_usable(step: epath.Path) -> bool:
    if not is_finished(step):
        return False
    try:
        return open_leaves(step / PARAMS).is_whole()
    except UnusableCheckpoint:
        return False
