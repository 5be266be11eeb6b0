"""Training's own saves: `DIR/STEP/{params, state, data}`, written by Orbax while training goes on.

params: the trainable leaves; state: optimizer and step; data: where the pipeline stood, and fingerprints of every
array. Orbax survives a kill at any moment, but it lists half-deleted steps, restores flipped bits without a word
and gives up at the first damaged step: what is here makes a restart find the newest step that is whole.
"""

import functools
import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from llava_jax import params
from llava_jax.checkpoint import store
from llava_jax.checkpoint.leaves import open_leaves
from llava_jax.errors import SaveFailed, UnusableCheckpoint

_TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = ".corrupt"


class Saved(NamedTuple):
    """What one step holds. `state` is any pytree of arrays, `data` JSON."""

    step: int
    params: Mapping[str, Any]
    state: Any
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """A directory's steps, to save to and restore from."""

    directory: epath.Path
    manager: ocp.CheckpointManager


def open_checkpoints(directory: epath.PathLike, keep: int) -> Checkpoints:
    """The steps of a run; only the newest `keep` stay. Leftovers of a killed save are deleted."""
    directory = store.absolute(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _delete_temporary(directory)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return Checkpoints(directory, ocp.CheckpointManager(directory, options=options))


def save(checkpoints: Checkpoints, saved: Saved) -> None:
    """Begins to write a step; returns when the arrays may be donated. A step that exists already is left alone.

    Raises:
      SaveFailed: this or the save before it could not be written (an asynchronous save fails one save late).
    """
    manager = checkpoints.manager
    if saved.step in manager.all_steps():
        return
    sums = fingerprint({"params": saved.params, "state": saved.state})
    content = {"data": saved.data, "sums": sums, "crc32": _crc32(saved.data, sums)}
    # Under plain names, so that no class of a library is needed to read the optimizer's state.
    trees = {name: params.unflatten(_names(tree)) for name, tree in (("params", saved.params), ("state", saved.state))}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(trees["params"]), state=ocp.args.StandardSave(trees["state"]),
        data=ocp.args.JsonSave(content),
    )  # fmt: skip
    try:
        begun = manager.save(saved.step, args=items)
    except (ValueError, OSError, RuntimeError) as error:
        raise _failed(checkpoints, error) from None
    if not begun:  # Orbax says so in a return value only: a later step lies in the directory
        raise SaveFailed(
            f"{checkpoints.directory}: step {saved.step} is not saved, as step {manager.latest_step()} is there "
            "already; is another run writing to the same --workdir?"
        )


def wait(checkpoints: Checkpoints) -> None:
    """Returns when everything begun is on disk under its final name. Raises SaveFailed."""
    try:
        checkpoints.manager.wait_until_finished()
    except (ValueError, OSError, RuntimeError) as error:
        raise _failed(checkpoints, error) from None


def close(checkpoints: Checkpoints) -> None:
    """Waits, and ends the writing threads."""
    wait(checkpoints)
    checkpoints.manager.close()


def seal(checkpoints: Checkpoints) -> None:
    """Gives the newest step the checksums that make later readers notice flipped bits; reads its parameters once."""
    wait(checkpoints)
    step = store.latest_step(checkpoints.directory)
    if step is not None and jax.process_index() == 0:
        store.seal(checkpoints.directory, step)


def restore(checkpoints: Checkpoints, trainable: Mapping[str, Any], state: Any) -> Saved | None:
    """The newest step that is whole, on the devices; None if there is none and never was.

    A damaged step is renamed `STEP.corrupt`, reported, and the one before it is tried.

    Args:
      trainable, state: ShapeDtypeStructs with the shardings wanted.

    Raises:
      UnusableCheckpoint: there were steps, and none of them can be used.
    """
    found = sorted((int(p.name) for p in checkpoints.directory.iterdir() if p.name.isdigit()), reverse=True)
    for step in found:
        try:
            saved, fault = _read(checkpoints, step, trainable, state), ""
        except (UnusableCheckpoint, OSError, KeyError) as error:
            saved, fault = None, _first_words(error)
        if _everywhere(not fault):
            return saved
        _set_aside(checkpoints, step, fault or "another process cannot read it")
    aside = sorted(p.name for p in checkpoints.directory.iterdir() if p.name.endswith(_ASIDE))
    if aside:
        raise UnusableCheckpoint(
            f"{checkpoints.directory}: no step can be used ({', '.join(aside)} are damaged); copy a whole step back, "
            "or begin again with another --workdir"
        )
    return None


def fingerprint(tree: Any) -> dict[str, list[int]]:
    """{name: two uint32 sums} of every array's bits, the same on any mesh and any number of devices.

    One flipped bit, two swapped values or a zeroed block change it. On the device: it reads memory once.
    """
    return {name: value.tolist() for name, value in _names(jax.device_get(_fingerprint(tree))).items()}


def _read(checkpoints: Checkpoints, step: int, trainable: Mapping[str, Any], state: Any) -> Saved:
    """A step, compared with its fingerprints. Orbax's own restore casts dtypes and takes flipped bits silently.

    Raises:
      UnusableCheckpoint, OSError, KeyError: it is damaged.
    """
    folder = checkpoints.directory / str(step)
    missing = [item for item in ("params", "state", "data") if not (folder / item).is_dir()]
    if missing:
        raise UnusableCheckpoint(f"{folder}: it has no {', '.join(missing)}")
    content = _read_data(checkpoints, step)
    read = {"params": _read_arrays(folder / "params", trainable), "state": _read_arrays(folder / "state", state)}
    sums = fingerprint(read)
    wrong = sorted(name for name in sums.keys() | content["sums"].keys() if sums.get(name) != content["sums"].get(name))
    if wrong:
        raise UnusableCheckpoint(f"{folder}: {len(wrong)} arrays differ from their fingerprint, such as {wrong[0]}")
    return Saved(step, read["params"], read["state"], content["data"])


def _read_data(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    try:
        items = ocp.args.Composite(data=ocp.args.JsonRestore())
        content = checkpoints.manager.restore(step, args=items)["data"]
    except ValueError as error:  # no JSON, or no text
        raise UnusableCheckpoint(f"its data item cannot be read ({_first_words(error)})") from None
    if not isinstance(content, dict) or set(content) != {"data", "sums", "crc32"} or content["crc32"] != _crc32(
        content["data"], content["sums"]
    ):  # fmt: skip
        raise UnusableCheckpoint("its data item differs from its checksum")
    return content


def _read_arrays(folder: epath.Path, tree: Any) -> Any:
    """The arrays of a tree of ShapeDtypeStructs, each device's part read on its own."""
    leaves, wanted = open_leaves(folder), _names(tree)
    store.check_specs({name: leaves.spec(name) for name in leaves.names}, wanted, str(folder), dtypes=True)
    arrays = [
        jax.make_array_from_callback(x.shape, x.sharding, functools.partial(leaves.read, name))
        for name, x in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def _names(tree: Any) -> dict[str, Any]:
    """{name: leaf} in the tree's own order; a name is the path to the leaf, "opt_state/0/mu/projector/0/kernel"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _set_aside(checkpoints: Checkpoints, step: int, fault: str) -> None:
    target = checkpoints.directory / f"{step}{_ASIDE}"
    print(f"checkpoint step {step} is damaged ({fault}): it is now called {target.name}, the step before it is tried",
          file=sys.stderr, flush=True)  # fmt: skip
    if jax.process_index() == 0:
        if target.exists():
            target.rmtree()
        (checkpoints.directory / str(step)).rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"set aside {step}")
    checkpoints.manager.reload()


def _everywhere(fine: bool) -> bool:
    """Whether all processes found the step fine: they must restore the same one."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _failed(checkpoints: Checkpoints, error: Exception) -> SaveFailed:
    """Makes the steps known anew, as Orbax still lists the failed one. Its threads may be writing on for a moment, so
    what they leave (it keeps a full disk full) is deleted by the next `open_checkpoints`."""
    checkpoints.manager.reload()
    return SaveFailed(
        f"{checkpoints.directory}: a checkpoint could not be written ({_first_words(error)}); whole steps there: "
        f"{store.steps(checkpoints.directory) or 'none'}. Is the disk full?"
    )


def _delete_temporary(directory: epath.Path) -> None:
    """Half-written steps would keep a full disk full. (Orbax's own option for this works in the background.)"""
    if jax.process_index() == 0:
        for path in directory.glob(f"*{_TEMPORARY}*"):
            path.rmtree()


def _first_words(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if isinstance(error, UnusableCheckpoint) else f"{type(error).__name__}: {line}"


def _crc32(*content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@jax.jit
def _fingerprint(tree: Any) -> Any:
    return jax.tree.map(_sums, tree)


def _sums(x: Array) -> UInt32[Array, "2"]:
    """Sums modulo 2**32 of the bits, once weighted by position: addition has no order, so no mesh changes them."""
    x = jax.device_put(x, jax.memory.Space.Device)  # an offloaded optimizer's arrays are on the host
    unsigned = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
    bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA6B)
    weight = weight ^ (weight >> 15) | 1
    return jnp.stack([jnp.sum((bits ^ (bits >> 16)) * weight, dtype=jnp.uint32), jnp.sum(bits, dtype=jnp.uint32)])
