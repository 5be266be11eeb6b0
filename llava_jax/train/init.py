"""Where every leaf's first value comes from: the `init` table, read one leaf at a time onto the devices."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llava_jax import params
from llava_jax.checkpoint import store
from llava_jax.checkpoint.card import Base
from llava_jax.models.llava import init_params
from llava_jax.train.program import Program
from llava_jax.train.step import State

RANDOM = "random"


def resolve(program: Program, table: Sequence[tuple[str, str]], workdir: epath.PathLike, seed: int) -> dict[str, str]:
    """{name: checkpoint directory or "random"} for every leaf of the model.

    A checkpoint holds only what moves and names its bases for the rest, so frozen leaves that begin at random are
    written once, to `workdir/random`, which is then their directory.

    Raises:
      ValueError: a name without a row, or a row without a name.
      UnusableCheckpoint: a directory of the table lacks a leaf or has it in another shape; names both.
    """
    frozen = params.flatten(program.frozen)
    wanted = params.flatten(program.state.params) | frozen
    rows = [(pattern, value if value == RANDOM else str(store.absolute(value))) for pattern, value in table]
    sources = params.lookup(wanted, rows, "init", every_row=True)
    for directory, names in _by_directory(sources).items():
        found = store.leaf_specs(directory)
        held = {name: found[name] for name in names if name in found}
        store.check_specs(held, {name: wanted[name] for name in names}, f"table `init`: checkpoint {directory}")
    adrift = {name: frozen[name] for name in frozen if sources[name] == RANDOM}
    if not adrift:
        return sources
    kept = str(store.absolute(epath.Path(workdir) / RANDOM))
    _keep_random(program, adrift, epath.Path(kept), seed)
    return sources | dict.fromkeys(adrift, kept)


def bases(program: Program, sources: Mapping[str, str]) -> tuple[Base, ...]:
    """The checkpoints that a card names for the frozen leaves."""
    found = []
    for directory, names in _by_directory({name: sources[name] for name in params.flatten(program.frozen)}).items():
        step = store.latest_step(directory)
        assert step is not None, directory
        found.append(Base(directory, step, store.fingerprint(directory, step), tuple(map(re.escape, names))))
    return tuple(found)


def state(program: Program, sources: Mapping[str, str], seed: int) -> State:
    """The state before the first update."""
    wanted = params.flatten(program.state.params)
    chosen = {name: leaf for name, leaf in wanted.items() if sources[name] == RANDOM}
    flat = params.flatten(_random(program, chosen, seed)) if chosen else {}
    for directory, names in _by_directory({name: sources[name] for name in wanted}).items():
        flat |= params.flatten(read(directory, {name: wanted[name] for name in names}))
    trainable = params.unflatten({name: flat[name] for name in wanted})
    placed = jax.tree.map(lambda x: x.sharding, program.state)
    begin = jax.jit(lambda tree: State(jax.numpy.int32(0), tree, program.optimizer.init(tree)), out_shardings=placed)
    return begin(trainable)


def frozen(program: Program, sources: Mapping[str, str]) -> dict[str, Any]:
    """The frozen leaves of a run that begins."""
    wanted = params.flatten(program.frozen)
    flat: dict[str, Any] = {}
    for directory, names in _by_directory({name: sources[name] for name in wanted}).items():
        flat |= params.flatten(read(directory, {name: wanted[name] for name in names}))
    return params.unflatten(flat)


def read(directory: epath.PathLike, wanted: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """Leaves of a checkpoint or of its bases, on the devices, with the dtypes and shardings of the structs in `wanted`.

    The host's peak is one leaf, and its copy where the dtype changes.
    """

    def put(name: str, array: np.ndarray) -> jax.Array:
        struct = wanted[name]
        array = array.astype(struct.dtype, copy=False)
        return jax.make_array_from_callback(struct.shape, struct.sharding, lambda index: array[index])

    return store.load_params(directory, wanted, step, put=put) if wanted else {}


def _random(program: Program, chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Leaves as the model's own initialisers draw them; a leaf's value does not depend on which others are drawn."""
    structs = params.unflatten(chosen)

    def draw(key: jax.Array) -> dict[str, Any]:
        flat = params.flatten(init_params(program.model.config, key))
        return params.unflatten({name: flat[name].astype(struct.dtype) for name, struct in chosen.items()})

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, structs))(jax.random.key(seed))


def _keep_random(program: Program, chosen: Mapping[str, Any], directory: epath.Path, seed: int) -> None:
    drawn = params.flatten(_random(program, chosen, seed))
    if jax.process_count() > 1:
        drawn = {name: multihost_utils.process_allgather(leaf, tiled=True) for name, leaf in drawn.items()}
    if jax.process_index() == 0 and store.latest_step(directory) is None:
        with store.LeafWriter(directory / "0" / store.PARAMS) as writer:
            for name, leaf in drawn.items():
                writer.write(name, np.asarray(leaf))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("random leaves written")


def _by_directory(sources: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source != RANDOM:
            grouped.setdefault(source, []).append(name)
    return grouped
