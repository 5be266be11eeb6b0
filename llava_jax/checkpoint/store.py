"""A checkpoint directory's parameters: its steps, its own leaves and those of the checkpoints it rests on.

What lies in `DIR/STEP/params` is written and read by `leaves`; here a directory's `base` entries are resolved,
and refused when they moved or changed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llava_jax import params
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint.card import absolute
from llava_jax.checkpoint.leaves import LeafWriter, Leaves, checksum, open_leaves, staged, write_checksums
from llava_jax.errors import UnusableCheckpoint

__all__ = [
    "PARAMS", "LeafWriter", "absolute", "check_specs", "checksum", "fingerprint", "latest_step", "leaf_specs",
    "load_params", "own_leaves", "own_specs", "places", "read_leaf", "seal", "staged", "steps", "write_checksums",
]  # fmt: skip

PARAMS = "params"


def steps(directory: epath.PathLike) -> list[int]:
    """The usable steps, ascending. A step that is empty, half written or half deleted is none."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    found = [int(path.name) for path in directory.iterdir() if re.fullmatch(r"\d+", path.name)]
    return sorted(step for step in found if _is_usable(directory / str(step) / PARAMS))


def latest_step(directory: epath.PathLike) -> int | None:
    """The newest usable step, or None."""
    found = steps(directory)
    return found[-1] if found else None


def own_leaves(directory: epath.PathLike, step: int | None = None) -> Leaves:
    """The leaves that lie in this very directory; `step` None is the latest.

    Raises:
      UnusableCheckpoint: no usable step, or not this one.
    """
    directory = epath.Path(directory)
    usable = steps(directory)
    if not usable:
        raise UnusableCheckpoint(
            f"{directory}: no usable checkpoint step here (a directory NUMBER/params, whole); "
            "name a directory that `convert` or `train` wrote"
        )
    if step is not None and step not in usable:
        raise UnusableCheckpoint(f"{directory}: no usable step {step}; usable are {', '.join(map(str, usable))}")
    return open_leaves(directory / str(usable[-1] if step is None else step) / PARAMS)


def places(directory: epath.PathLike, step: int | None = None) -> dict[str, Leaves]:
    """{name: the leaves it lies among} for all leaves, those of the bases included.

    Raises:
      UnusableCheckpoint: no usable step, or a base that is missing or changed.
    """
    return _places(epath.Path(directory), step, ())


def own_specs(directory: epath.PathLike, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the leaves in this very directory; no array is read."""
    leaves = own_leaves(directory, step)
    return {name: leaves.spec(name) for name in leaves.names}


def leaf_specs(directory: epath.PathLike, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of all leaves, those of the bases included; no array is read."""
    return {name: leaves.spec(name) for name, leaves in places(directory, step).items()}


def read_leaf(
    directory: epath.PathLike, step: int | None, name: str, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """One leaf, or the part `index` of it, in the dtype it has on disk; from a base if it lies there.

    Raises:
      UnusableCheckpoint: the leaf is missing, damaged, or differs from its checksum.
    """
    return _among(places(directory, step), name, directory).read(name, index)


def load_params(
    directory: epath.PathLike,
    names: Iterable[str] | None = None,
    step: int | None = None,
    dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """A nested dict of leaves, those of the bases included.

    Args:
      names: the leaves wanted; None is all of them.
      step: None is the latest.
      dtype: cast every leaf to it; None keeps what is on disk.
      put: called with (name, array) as soon as a leaf is read; its result takes the leaf's place. A `put` that
        moves the leaf to a device keeps the host's peak at one leaf.

    Raises:
      UnusableCheckpoint: a leaf is wanted that neither the checkpoint nor a base holds, or one is damaged.
    """
    found = places(directory, step)

    def load(name: str) -> Any:
        array = _among(found, name, directory).read(name)
        array = array if dtype is None else array.astype(dtype)
        return array if put is None else put(name, array)

    return params.unflatten({name: load(name) for name in (found if names is None else names)})


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


def seal(directory: epath.PathLike, step: int) -> None:
    """Writes the checksums of a step that Orbax wrote; reads every one of its own leaves once."""
    leaves = own_leaves(directory, step)
    write_checksums(leaves.folder, {name: checksum(leaves.read(name)) for name in leaves.names})


def fingerprint(directory: epath.PathLike, step: int | None = None) -> str:
    """One line that changes when any leaf's name, shape, dtype or bytes change; the path plays no part.

    It is made from the checksums, so it costs milliseconds; leaves without one are read. Reading a leaf compares
    it with its checksum, so a bit that flips later is caught there.
    """
    leaves = own_leaves(directory, step)
    lines = []
    for name in leaves.names:
        spec = leaves.spec(name)
        value = leaves.checksums[name] if name in leaves.checksums else checksum(leaves.read(name))
        lines.append([name, list(spec.shape), str(spec.dtype), value])
    bases = [[base.fingerprint, list(base.patterns)] for base in _bases(epath.Path(directory))]
    return "sha256:" + hashlib.sha256(json.dumps([lines, bases]).encode()).hexdigest()


def _places(directory: epath.Path, step: int | None, above: tuple[epath.Path, ...]) -> dict[str, Leaves]:
    leaves = own_leaves(directory, step)
    if leaves.folder in above:
        raise UnusableCheckpoint(f"{directory}: it is its own base, by way of {above[-1]}")
    found = {name: leaves for name in leaves.names}
    for base in _bases(directory):
        below = _places(_resolve(directory, base), base.step, (*above, leaves.folder))
        for name in below:
            if any(re.fullmatch(pattern, name) for pattern in base.patterns):
                found.setdefault(name, below[name])
    return dict(sorted(found.items()))


def _resolve(directory: epath.Path, base: cards.Base) -> epath.Path:
    path = directory / base.path  # an absolute path stays what it is
    if base.step not in steps(path):
        raise UnusableCheckpoint(
            f"{directory}: its base {path} (step {base.step}) is not there; put it back, or set `base` in "
            f"{directory / cards.FILE} to where it lies now"
        )
    now = fingerprint(path, base.step)
    if now != base.fingerprint:
        raise UnusableCheckpoint(
            f"{directory}: its base {path} (step {base.step}) has changed (fingerprint {now[:15]}, wanted "
            f"{base.fingerprint[:15]}); put the unchanged base back "
            "(`convert merge` makes a checkpoint that needs none)"
        )
    return path


def _bases(directory: epath.Path) -> tuple[cards.Base, ...]:
    """The bases a directory names; a directory without a card (bare Orbax) names none."""
    return cards.read_card(directory).base if (directory / cards.FILE).exists() else ()


def _among(found: Mapping[str, Leaves], name: str, directory: epath.PathLike) -> Leaves:
    if name not in found:
        raise UnusableCheckpoint(
            f"{directory}: no leaf {name} in it nor in its bases; it holds {len(found)}, see "
            f"`python -m llava_jax.convert inspect {directory}`"
        )
    return found[name]


def _is_usable(folder: epath.Path) -> bool:
    try:
        return open_leaves(folder).is_whole()
    except UnusableCheckpoint:
        return False
