"""Where every parameter's first value comes from: the `init` table, read one parameter at a time onto the devices."""

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llava_jax import distributed, files, params
from llava_jax.checkpoint import lock, reader, sharded
from llava_jax.checkpoint.model_json import Base
from llava_jax.checkpoint.sharded import agreed
from llava_jax.checkpoint.tensors import WORKERS, Read
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models import lora
from llava_jax.models.llava import init_params
from llava_jax.train.program import Program
from llava_jax.train.step import State

RANDOM = "random"
_log = logging.getLogger(__name__)


def resolve(program: Program, table: Sequence[tuple[str, str]], workdir: epath.PathLike, seed: int) -> dict[str, str]:
    """{name: checkpoint directory or "random"} for every parameter of the model.

    A checkpoint holds only what is trained and names its bases for the rest, so frozen ones that begin at random (an
    adapter's scale too) are written once, to `workdir/random`, which is then their directory.

    Raises:
      UsageError: a name without a row, a row without a name, adapters that would be lost or scaled otherwise, or a
        directory that another run still writes to.
      UnusableCheckpoint: a directory of the table lacks a parameter or has it in another shape; names both.
    """
    frozen = _stored(program.frozen)
    wanted = params.flatten(program.state.params) | frozen
    rows = [(pattern, value if value == RANDOM else str(reader.absolute(value))) for pattern, value in table]
    sources = params.lookup(wanted, rows, "init", every_row=True)
    for directory, names in _by_directory(sources).items():
        agreed("start", functools.partial(_refuse_unfinished, directory))
        _log.info("begins with step %s of %s: %d parameters", reader.latest_step(directory), directory, len(names))
        found = reader.tensor_specs(directory)
        _refuse_missing_adapters(directory, found, names)
        held = {name: found[name] for name in names if name in found}
        reader.check_specs(held, {name: wanted[name] for name in names}, f"table `init`: checkpoint {directory}")
        _refuse_lost_adapters(directory, found, sources)
        _refuse_other_scales(program, directory, names)
    adrift = {name: frozen[name] for name in frozen if sources[name] == RANDOM}
    if not adrift:
        return sources
    kept = str(reader.absolute(epath.Path(workdir) / RANDOM))
    _keep_random(program, adrift, epath.Path(kept), seed)
    return sources | dict.fromkeys(adrift, kept)


def _refuse_unfinished(directory: str) -> None:
    """A run that goes on deletes its older steps (`checkpoint.keep`), and this one would rest on them."""
    holding = lock.holder(directory) if distributed.index() == 0 else ""
    if holding:
        raise UsageError(
            f"table `init`: {directory} is still being trained ({holding}), and its older steps are deleted as it goes "
            f"on; wait for its end, or begin with what `python -m llava_jax.convert merge {directory} OUT` makes of it"
        )


def _refuse_missing_adapters(directory: str, found: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in (name for name in names if lora.kernel_of(name) and name not in found):
        raise UnusableCheckpoint(
            f"table `init`: checkpoint {directory} has no {name}; adapters begin fresh where a row before its own says "
            '(".*/lora_.*", "random")'
        )


def _refuse_lost_adapters(directory: str, found: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """A kernel is half of what was learned where its checkpoint has an adapter beside it."""
    for name, adapter in ((name, lora.beside(name, lora.A)) for name in lora.targets(found)):
        if adapter in found and sources.get(name) == directory != sources.get(adapter):
            raise UsageError(
                f"table `init`: {directory} has an adapter beside {name}, which this run would leave behind; "
                f"`python -m llava_jax.convert merge {directory} OUT` adds it to the kernel (start from OUT), or train "
                'it on: a row of `lora` for it, and `init` without another place for ".*/lora_.*"'
            )


def _refuse_other_scales(program: Program, directory: str, names: Sequence[str]) -> None:
    scales = [name for name in names if name.endswith("/" + lora.SCALE)]
    for name, leaves in (reader.holding(directory, scales) if scales else {}).items():
        rank, alpha = program.adapters[str(lora.kernel_of(name))]
        held = leaves.read(name)
        if not np.array_equal(held, np.full_like(held, alpha / rank)):
            shown = ", ".join(f"{scale:g}" for scale in np.unique(held))
            raise UsageError(
                f"table `init`: the adapter {name} of {directory} was trained at alpha / rank = {shown}, table `lora` "
                f"says {alpha:g} / {rank}; set alpha so that they agree, as the same factors mean another model"
            )


def bases(program: Program, sources: Mapping[str, str]) -> tuple[Base, ...]:
    """The checkpoints that metadata names for the frozen parameters."""
    found = []
    for directory, names in _by_directory({name: sources[name] for name in _stored(program.frozen)}).items():
        step = reader.latest_step(directory)
        assert step is not None, directory
        found.append(Base(directory, step, reader.fingerprint(directory, step), tuple(map(re.escape, names))))
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
    """The frozen parameters of a run that begins."""
    wanted = params.flatten(program.frozen)
    flat: dict[str, Any] = {}
    for directory, names in _by_directory({name: sources[name] for name in _stored(program.frozen)}).items():
        flat |= params.flatten(read(directory, wanted, names=names))
    return params.unflatten({name: flat[name] for name in wanted})


def read(
    directory: epath.PathLike, wanted: Mapping[str, Any], step: int | None = None, names: Iterable[str] | None = None
) -> dict[str, Any]:
    """Tensors of a checkpoint or of its bases, on the devices, with dtypes and shardings of the structs in `wanted`.

    Each process reads the parts that its devices hold; all compare what all have read with the checksums. A kernel that
    is wanted in int8 is made so here, of the whole kernel, and its columns' scales come with it. The host's peak is one
    parameter (or several small ones, see `checkpoint.tensors`), and its copy where the dtype changes.

    Args:
      names: the parameters to read, of those in `wanted`; None is all.

    Raises:
      UnusableCheckpoint, Unreachable, UsageError: on all processes, where one cannot read its part.
    """
    scales: dict[str, jax.Array] = {}

    def put(read: Read, struct: Any) -> jax.Array:
        if struct.dtype != np.int8:
            return sharded.put(read, struct)
        kernel, scale = lora.quantise(read.whole())
        name = lora.beside(read.name, lora.KERNEL_SCALE)
        scales[name] = _put(scale, wanted[name])
        return _put(kernel, struct)

    names = [name for name in (wanted if names is None else names) if not name.endswith("/" + lora.KERNEL_SCALE)]
    if not names:
        return {}
    places = agreed("places", lambda: reader.holding(directory, names, step))
    whole = [name for name in names if wanted[name].dtype == np.int8]
    flat = sharded.load_checked(places, {name: wanted[name] for name in names}, put, whole)
    return params.unflatten(flat | scales)


def _put(array: np.ndarray, struct: Any) -> jax.Array:
    return jax.make_array_from_callback(struct.shape, struct.sharding, lambda index: array[index])


def _stored(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a checkpoint can hold: scales of int8 columns are made while kernels are read."""
    flat = params.flatten(tree)
    return {name: leaf for name, leaf in flat.items() if not name.endswith("/" + lora.KERNEL_SCALE)}


def _random(program: Program, chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Tensors as the model's own initialisers draw them; a value does not depend on which others are drawn."""
    structs = params.unflatten(chosen)

    def draw(key: jax.Array) -> dict[str, Any]:
        flat = params.flatten(init_params(program.model.config, key))
        for name, kernel in ((name, lora.kernel_of(name)) for name in chosen):
            if kernel is not None:
                rank, alpha = program.adapters[kernel]
                flat[name] = lora.initial(name, chosen[name].shape, key, alpha / rank)
        return params.unflatten({name: flat[name].astype(struct.dtype) for name, struct in chosen.items()})

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, structs))(jax.random.key(seed))


def _keep_random(program: Program, chosen: Mapping[str, Any], directory: epath.Path, seed: int) -> None:
    # A checkpoint holds kernels that no rounding has touched: int8 is made of them as they are read.
    plain = {
        name: jax.ShapeDtypeStruct(x.shape, program.model.dtype if x.dtype == np.int8 else x.dtype, sharding=x.sharding)
        for name, x in chosen.items()
    }
    drawn = params.flatten(_random(program, plain, seed))
    if jax.process_count() > 1:
        drawn = {name: multihost_utils.process_allgather(leaf, tiled=True) for name, leaf in drawn.items()}


    def write() -> None:
        if distributed.index() != 0:
            return
        # Left by a start that ended before its first checkpoint, perhaps with another seed, alpha or dtype.
        files.delete(directory / "0")
        with reader.TensorWriter(directory / "0" / reader.PARAMS) as writer, ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda name: writer.write(name, np.asarray(drawn[name])), drawn))  # a disk syncs each file

    agreed("random parameters", write)


def _by_directory(sources: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source != RANDOM:
            grouped.setdefault(source, []).append(name)
    return grouped
