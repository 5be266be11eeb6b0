"""Training's own saves: `DIR/STEP/{params, state, data}`, written by Orbax while training goes on.

params: the trainable parameters; state: optimizer and step; data: where the pipeline stood, and fingerprints of every
array. Orbax survives a kill at any moment, but it lists half-deleted steps, restores flipped bits without a word
and gives up at the first damaged step: what is here makes a restart find the newest step that is whole.

A step is one of three things when it cannot be used. Not finished (a save that was killed): it is deleted. Damaged: it
is set aside for somebody to look at. Out of reach: nothing is touched, and the run ends with `Unreachable`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from llava_jax import distributed, files, params
from llava_jax.checkpoint import reader, record, sharded, sums
from llava_jax.checkpoint.sharded import agreed
from llava_jax.checkpoint.tensors import COMMIT, Tensors, open_tensors
from llava_jax.errors import SaveFailed, Unreachable, UnusableCheckpoint

_TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = ".corrupt"  # of the name that a damaged step gets on a disk
_MARK = "corrupt.txt"  # in a bucket, which renames nothing: the object that takes the place of Orbax's commit file
_PROBE = "probe"
_ITEMS = ("params", "state", record.ITEM)


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
    kept: set[int] = field(default_factory=set)  # steps that stay however old they are


class _Preserved(NamedTuple):
    """Orbax asks it, when a save begins, which steps stay; it deletes the others once the save is whole."""

    keep: int
    kept: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in self.kept or step in steps[-self.keep :] for step in steps]


def open_checkpoints(directory: epath.PathLike, keep: int) -> Checkpoints:
    """The steps of a run; only the newest `keep` stay, and one of `keep_also`. Leftovers of a killed save are deleted.

    Raises:
      Unreachable, UsageError: as `files.retried`, on all processes.
    """
    directory = reader.absolute(directory)
    agreed("workdir", lambda: _prepare(directory) if distributed.index() == 0 else None)
    kept = set[int]()
    # Orbax's file of times and metrics in each step is not read: nothing here needs it, and damage to it would raise.
    options = ocp.CheckpointManagerOptions(preservation_policy=_Preserved(keep, kept), create=False,
                                           lightweight_initialize=True)  # fmt: skip

    def listed() -> ocp.CheckpointManager:  # once, as it may wait for all processes (gcsfs repeats its requests anyway)
        return files.retried(lambda: ocp.CheckpointManager(directory, options=options), directory, secs=0.0)

    return Checkpoints(directory, agreed("manager", listed), kept)


def keep_also(checkpoints: Checkpoints, step: int) -> None:
    """Lets one step stay beside the newest, in the place of the one named before; all processes call it."""
    checkpoints.kept.clear()
    checkpoints.kept.add(step)


def _prepare(directory: epath.Path) -> None:
    """Makes the directory and deletes what is not finished: it would keep a full disk full. (Orbax's own option for
    this works in the background.)"""
    files.make_directory(directory)
    entries = files.listed(directory)
    if files.is_bucket(directory) and not entries:  # reading cannot tell an empty bucket from one that does not exist
        files.write_whole(directory / _PROBE, b"")
        files.delete(directory / _PROBE)
    for entry in entries:
        if _TEMPORARY in entry.name:
            files.delete(entry)
    for step in reader.numbered(directory):
        folder = directory / str(step)
        if not reader.is_finished(folder) and not files.exists(folder / _MARK):
            files.delete(folder)


def save(checkpoints: Checkpoints, saved: Saved) -> None:
    """Begins to write a step; returns when the arrays may be donated. A step that exists already is left alone.

    Raises:
      SaveFailed: this or the save before it could not be written (an asynchronous save fails one save late).
      Unreachable: the same, as the store gave errors that pass for longer than its clients try.
    """
    manager = checkpoints.manager
    if saved.step in manager.all_steps():
        return
    if files.is_bucket(checkpoints.directory):
        agreed("old step", lambda: _delete_old(checkpoints.directory / str(saved.step)))
    written = {f"{item}/{name}": array for item, tree in (("params", saved.params), ("state", saved.state))
               for name, array in _names(tree).items()}  # fmt: skip
    content = record.make(saved.data, sums.of_arrays(written))
    # Under plain names, so that no class of a library is needed to read the optimizer's state.
    trees = {name: params.unflatten(_names(tree)) for name, tree in (("params", saved.params), ("state", saved.state))}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(trees["params"]), state=ocp.args.StandardSave(trees["state"]),
        data=ocp.args.JsonSave(content),
    )  # fmt: skip
    try:
        begun = manager.save(saved.step, args=items)
    except (ValueError, OSError, RuntimeError, *files.client_errors()) as error:
        raise _failed(checkpoints, error) from None
    if not begun:  # Orbax says so in a return value only: a later step lies in the directory
        raise SaveFailed(
            f"{checkpoints.directory}: step {saved.step} is not saved, as step {manager.latest_step()} is there "
            "already; is another run writing to the same --workdir?"
        )


def _delete_old(step: epath.Path) -> None:
    """Deletes what was set aside under the name of a step that is now saved."""
    if distributed.index() == 0 and not reader.is_finished(step):
        files.delete(step)


def wait(checkpoints: Checkpoints) -> None:
    """Returns when everything begun is on disk under its final name. Raises as `save`."""
    try:
        checkpoints.manager.wait_until_finished()
    except (ValueError, OSError, RuntimeError, *files.client_errors()) as error:
        raise _failed(checkpoints, error) from None


def close(checkpoints: Checkpoints) -> None:
    """Waits, and ends the writing threads."""
    wait(checkpoints)
    checkpoints.manager.close()


def restore(checkpoints: Checkpoints, trainable: Mapping[str, Any], state: Any) -> Saved | None:
    """The newest step that is whole on all processes, on the devices; None if there is none and never was.

    A damaged step is set aside and reported, and the one before it is tried. On a disk it is renamed `STEP.corrupt`;
    in a bucket `STEP/corrupt.txt`, which says what is wrong with it, replaces Orbax's commit file: such a step is
    passed over, and deleted when the run comes to it again.

    Args:
      trainable, state: ShapeDtypeStructs with the shardings wanted.

    Raises:
      UnusableCheckpoint: there were steps, and none of them can be used.
      Unreachable, UsageError: a process cannot read one; as `files.retried`, on all processes.
    """
    for step in sorted(_candidates(checkpoints), reverse=True):
        found = agreed("step", lambda step=step: _read(checkpoints, step, trainable, state))
        fault = _fault(found)
        if not fault:
            arrays = found.arrays
            return Saved(step, arrays["params"], arrays["state"], found.data)
        agreed("set aside", lambda step=step, fault=fault: _set_aside(checkpoints, step, fault))
        checkpoints.manager.reload()
    aside = _aside(checkpoints.directory)
    if aside:
        raise UnusableCheckpoint(
            f"{checkpoints.directory}: no step can be used ({', '.join(aside)} are damaged); copy a whole step back, "
            "or begin again with another --workdir"
        )
    return None


class _Found(NamedTuple):
    """What one process has read of a step. fault: why it is damaged, "" where this process found nothing."""

    fault: str
    data: Mapping[str, Any] = {}
    arrays: Mapping[str, Any] = {}
    places: Mapping[str, Mapping[str, Tensors]] = {}
    parts: Mapping[str, sharded.Parts] = {}


def _candidates(checkpoints: Checkpoints) -> list[int]:
    """The finished steps, as process 0 sees them."""
    directory = checkpoints.directory

    def finished() -> list[int]:
        numbers = reader.numbered(directory) if distributed.index() == 0 else []
        return [step for step in numbers if reader.is_finished(directory / str(step))]

    return distributed.exchange("steps", agreed("list", finished))[0]


def _read(checkpoints: Checkpoints, step: int, trainable: Mapping[str, Any], state: Any) -> _Found:
    """A step, as far as this process holds it. Orbax's own restore casts dtypes and takes flipped bits silently."""
    folder = checkpoints.directory / str(step)
    arrays, places, parts = {}, {}, {}
    try:
        missing = [item for item in _ITEMS if not files.exists(folder / item)]
        content = record.read(folder)
        if missing or content is None:
            raise UnusableCheckpoint(f"{folder}: it has no {', '.join(missing) or record.ITEM}")
        data, written = content
        for item, tree in (("params", trainable), ("state", state)):
            prefix = f"{item}/"
            own = {name.removeprefix(prefix): value for name, value in written.items() if name.startswith(prefix)}
            leaves, wanted = open_tensors(folder / item, own), _names(tree)
            places[item] = dict.fromkeys(leaves.names, leaves)
            specs = {name: leaves.spec(name) for name in leaves.names}
            reader.check_specs(specs, wanted, str(leaves.folder), dtypes=True)
            flat, parts[item] = sharded.load(places[item], wanted)
            arrays[item] = jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in wanted])
    except UnusableCheckpoint as error:
        return _Found(_first_words(error))
    return _Found("", data, arrays, places, parts)


def _fault(found: _Found) -> str:
    """Why a step is damaged, the same on all processes; "" where it is whole."""
    everywhere = distributed.exchange("fault", found.fault)
    for number, fault in enumerate(everywhere):
        if fault:
            return fault if number == distributed.index() else f"on process {number}: {fault}"
    parts = distributed.exchange("parts", found.parts)
    faults = (sharded.difference(found.places[item], [one[item] for one in parts]) for item in found.places)
    return next(filter(None, faults), "")


def _names(tree: Any) -> dict[str, Any]:
    """{name: parameter} in the tree's own order; a name is its path, "opt_state/0/mu/projector/0/kernel"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _set_aside(checkpoints: Checkpoints, step: int, fault: str) -> None:
    if distributed.index() != 0:
        return
    folder, target = checkpoints.directory / str(step), checkpoints.directory / f"{step}{_ASIDE}"
    if files.is_bucket(folder):
        what = f"{folder / _MARK} says so"
        files.write_whole(folder / _MARK, f"{fault}\n".encode())
        files.delete(folder / COMMIT)
    else:
        what = f"it is now called {target.name}"
        files.delete(target)
        folder.rename(target)
    print(f"checkpoint step {step} is damaged ({fault}): {what}, the step before it is tried",
          file=sys.stderr, flush=True)  # fmt: skip


def _aside(directory: epath.Path) -> list[str]:
    """The names of what was set aside."""
    names = [entry.name for entry in files.listed(directory)]
    if files.is_bucket(directory):
        return [name for name in names if name.isdecimal() and files.exists(directory / name / _MARK)]
    return [name for name in names if name.endswith(_ASIDE)]


def _failed(checkpoints: Checkpoints, error: Exception) -> SaveFailed | Unreachable:
    """Makes the steps known anew, as Orbax still lists the failed one. Its threads may be writing on for a moment, so
    what they leave (it keeps a full disk full) is deleted by the next `open_checkpoints`."""
    directory, words = checkpoints.directory, _first_words(error)
    if files.fault(error) == "passing":
        return Unreachable(f"{directory}: a checkpoint could not be written ({words}); the same command goes on from "
                           "the last whole step once the store answers")  # fmt: skip
    checkpoints.manager.reload()
    return SaveFailed(
        f"{directory}: a checkpoint could not be written ({words}); whole steps there: "
        f"{reader.steps(directory) or 'none'}. Is the disk full, and may this account write there?"
    )


def _first_words(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if isinstance(error, UnusableCheckpoint) else f"{type(error).__name__}: {line}"
