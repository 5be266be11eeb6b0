"""A checkpoint directory's parameters: its steps, its own parameters and those of the checkpoints it rests on.

What lies in `DIR/STEP/params` is written by `writer` and read by `tensors`; here a directory's `base` entries are
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
from llava_jax.checkpoint import best, model_json, sums
from llava_jax.checkpoint import tensors as tensor_files
from llava_jax.checkpoint.model_json import absolute
from llava_jax.checkpoint.tensors import CHECKSUMS, COMMIT, Request, Tensors, open_tensors
from llava_jax.checkpoint.writer import TensorWriter, staged
from llava_jax.errors import UnusableCheckpoint

__all__ = [
    "PARAMS", "TensorWriter", "Step", "absolute", "best_step", "check_specs", "fingerprint", "holding", "is_finished",
    "latest_step", "newest_step", "tensor_specs", "load_params", "number", "numbered", "own_tensors", "own_specs",
    "sources", "read_tensor", "staged", "steps",
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
    looks for it, and loads all of Orbax); a step that `TensorWriter` wrote before format 2 has checksums instead.
    """
    if not files.is_bucket(step):
        return True
    return files.exists(step / COMMIT) or files.exists(step / PARAMS / CHECKSUMS)


def own_tensors(directory: epath.PathLike, step: Step = None) -> Tensors:
    """The parameters that lie in this very directory.

    Raises:
      UnusableCheckpoint: no usable step, or not this one.
      Unreachable, UsageError: as `files.retried`.
    """
    directory = epath.Path(directory)
    chosen = number(directory, step)
    if chosen is not None and _is_usable(directory / str(chosen)):
        return open_tensors(directory / str(chosen) / PARAMS)
    usable = steps(directory)
    if usable:
        raise UnusableCheckpoint(f"{directory}: no usable step {chosen}; usable are {', '.join(map(str, usable))}")
    if not files.exists(directory / model_json.FILE):
        raise UnusableCheckpoint(model_json.missing(directory))
    raise UnusableCheckpoint(
        f"{directory}: no usable checkpoint step here (a directory NUMBER/params, whole): a run has none before its "
        "first save, nor where copying stopped halfway"
    )


def sources(directory: epath.PathLike, step: Step = None) -> dict[str, Tensors]:
    """{name: the parameters it lies among} for all parameters, those of the bases included.

    Raises:
      UnusableCheckpoint: no usable step, or a base that is missing or changed.
    """
    return _sources(epath.Path(directory), step, ())


def holding(directory: epath.PathLike, names: Iterable[str], step: Step = None) -> dict[str, Tensors]:
    """`sources` of these parameters alone; raises UnusableCheckpoint too where nobody holds one."""
    found = sources(directory, step)
    return {name: _among(found, name, directory) for name in names}


def own_specs(directory: epath.PathLike, step: Step = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the parameters in this very directory; no array is read."""
    leaves = own_tensors(directory, step)
    return {name: leaves.spec(name) for name in leaves.names}


def tensor_specs(directory: epath.PathLike, step: Step = None) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of all parameters, those of the bases included; no array is read."""
    return {name: leaves.spec(name) for name, leaves in sources(directory, step).items()}


def read_tensor(directory: epath.PathLike, step: Step, name: str) -> np.ndarray:
    """One parameter in the dtype it has on disk; from a base if it lies there.

    Raises:
      UnusableCheckpoint: the parameter is missing, damaged, or differs from its checksum.
    """
    return _among(sources(directory, step), name, directory).read(name)


def load_params(
    directory: epath.PathLike,
    names: Iterable[str] | None = None,
    step: Step = None,
    dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """A nested dict of parameters, those of the bases included.

    Args:
      names: the parameters wanted; None is all of them.
      dtype: cast every parameter to it; None keeps what is on disk.
      put: called with (name, array) as soon as a parameter is read; its result takes its place. A `put` that moves
        the parameter to a device keeps the host's peak at one parameter.

    Raises:
      UnusableCheckpoint: a parameter is wanted that neither the checkpoint nor a base holds, or one is damaged.
    """
    found = sources(directory, step) if names is None else holding(directory, names, step)

    def use(read: tensor_files.Read) -> tuple[str, Any]:
        array = read.whole()
        array = array if dtype is None else array.astype(dtype)
        return read.name, array if put is None else put(read.name, array)

    return params.unflatten(dict(tensor_files.read([Request(leaves, name) for name, leaves in found.items()], use)))


def check_specs(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, dtypes: bool = False) -> None:
    """Compares {name: array or shape}; raises UnusableCheckpoint naming the first parameters that differ.

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
    """One line that changes when any parameter's name, shape, dtype or bytes change; the path plays no part.

    It is made from the checksums, so it costs milliseconds; parameters without one are read. Reading one compares
    it with its checksum, so a bit that flips later is caught there.

    like: a fingerprint to compare with; those of format 1 are made from CRC-32s, so each parameter without one is read.
    """
    kind = "sha256" if like.startswith("sha256:") else "sums"
    leaves = own_tensors(directory, step)
    lines = []
    for name in leaves.names:
        spec, value = leaves.spec(name), leaves.checksums.get(name)
        if kind == "sha256" and not isinstance(value, int):
            value = tensor_files.crc32(leaves.read(name))
        elif value is None:
            value = sums.of_part(leaves.read(name), [0] * len(spec.shape), spec.shape)
        lines.append([name, list(spec.shape), str(spec.dtype), value if isinstance(value, int) else value[:2]])
    bases = [[base.fingerprint, list(base.patterns)] for base in model_json.bases(directory)]
    return f"{kind}:" + hashlib.sha256(json.dumps([lines, bases]).encode()).hexdigest()


def _sources(directory: epath.Path, step: Step, above: tuple[epath.Path, ...]) -> dict[str, Tensors]:
    leaves = own_tensors(directory, step)
    if leaves.folder in above:
        raise UnusableCheckpoint(f"{directory}: it is its own base, by way of {above[-1]}")
    found = {name: leaves for name in leaves.names}
    for base in model_json.bases(directory):
        below = _sources(_resolve(directory, base), base.step, (*above, leaves.folder))
        for name in below:
            if any(re.fullmatch(pattern, name) for pattern in base.patterns):
                found.setdefault(name, below[name])
    return dict(sorted(found.items()))


def _resolve(directory: epath.Path, base: model_json.Base) -> epath.Path:
    """Where a base lies: the first place with the parameters that were there when it was named."""
    tried = []
    for path in model_json.candidates(directory, base):
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
        f"is not there ({'; '.join(tried)}). Put it back unchanged, or set its `path` in {directory / model_json.FILE} "
        "to where it lies now; or make it again as it was made (`convert import` or `convert assemble` of the same "
        "files, `train` of the same stage). `convert merge` makes a checkpoint that needs no base"
    )


def _brief(patterns: Iterable[str]) -> str:
    """"3 parameters such as llm/norm/scale": metadata names them by patterns that are their escaped names."""
    shown = [pattern.replace("\\", "") for pattern in patterns]
    return f"{len(shown)} patterns of parameters such as {shown[0]}" if shown else "nothing"


def _among(found: Mapping[str, Tensors], name: str, directory: epath.PathLike) -> Tensors:
    if name not in found:
        raise UnusableCheckpoint(
            f"{directory}: no parameter {name} in it nor in its bases; it holds {len(found)}, see "
            f"`python -m llava_jax.convert inspect {directory}`"
        )
    return found[name]


def _is_usable(step: epath.Path) -> bool:
    if not is_finished(step):
        return False
    try:
        return open_tensors(step / PARAMS).is_whole()
    except UnusableCheckpoint:
        return False
