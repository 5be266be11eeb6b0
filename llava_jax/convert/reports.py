"""`inspect`, `verify` and `merge`: what a checkpoint is, whether it is whole, and one that needs no other."""

import dataclasses
import json
import math
from collections.abc import Iterator

from etils import epath

from llava_jax.checkpoint import model_json, reader
from llava_jax.convert.files import Spec
from llava_jax.convert.source import Source, merge_adapters, open_source
from llava_jax.convert.table import Progress, nbytes
from llava_jax.errors import UnusableCheckpoint


def inspect(directory: epath.PathLike, step: reader.Step = None) -> Iterator[str]:
    """Lines that tell what a checkpoint is; no array is read."""
    source = open_source(directory, step)
    yield f"{source.directory}: {source.metadata.family}, steps {', '.join(map(str, reader.steps(directory)))}"
    yield f"fingerprint {reader.fingerprint(directory, step)}"
    yield f"prompt {json.dumps(dataclasses.asdict(source.metadata.prompt))}"
    for part, value in source.metadata.model.items():
        yield f"model.{part} {json.dumps(value)}"
    for key, value in source.metadata.source.items():
        if key != "dtypes":
            yield f"source.{key} {json.dumps(value)}"
    for base in source.metadata.base:
        more = f" ... ({len(base.patterns)})" if len(base.patterns) > 3 else ""
        yield f"base {base.path} step {base.step} {base.fingerprint[:15]} for {', '.join(base.patterns[:3])}{more}"
    width = max(len(name) for name in source.specs)
    own = reader.own_tensors(directory, step).folder
    for name, spec in source.specs.items():
        shape = "x".join(map(str, spec.shape))
        lies = "" if source.tensors[name].folder == own else f"  from {source.tensors[name].folder}"
        yield f"{name.ljust(width)}  {shape.ljust(20)} {spec.dtype}{lies}"
    count = sum(math.prod(spec.shape) for spec in source.specs.values())
    size = sum(_nbytes(source, name) for name in source.specs)
    yield f"{len(source.specs)} tensors, {count:,} parameters, {size / 1e9:.3f} GB"


def verify(directory: epath.PathLike, step: reader.Step = None) -> str:
    """Reads every parameter, bases included, and compares it with its checksum; returns one line on what was found.

    Raises:
      UnusableCheckpoint: something is missing, of the wrong shape, or changed since it was written; or it has no
        checksum, so that nobody can know; or a newer step, which readers pass over, is damaged.
    """
    newest, damaged = reader.newest_step(directory)
    if step is None and newest is not None and damaged:
        raise UnusableCheckpoint(
            f"{directory}: step {damaged[0]} is damaged, or was copied in part: copy it again, or verify the step that "
            f"is taken in its place: --step {newest}"
        )
    source = open_source(directory, step)
    progress = Progress("verifies", "leaves", [_nbytes(source, name) for name in source.specs])
    unknown = [name for name, leaves in source.tensors.items() if name not in leaves.checksums]
    for name, leaves in source.tensors.items():
        leaves.read(name)
        progress.add(_nbytes(source, name))
    if unknown:
        raise UnusableCheckpoint(
            f"{source.directory}: {len(unknown)} of {len(source.specs)} tensors have no checksum, such as "
            f"{unknown[0]}: only their size is known to be right. `python -m llava_jax.convert merge {directory} "
            "OUT` writes a checkpoint with checksums, from where on damage is noticed"
        )
    return f"{source.directory}: {len(source.specs)} tensors read, all as they were written"


def merge(directory: epath.PathLike, destination: epath.PathLike, step: reader.Step = None) -> None:
    """Writes a checkpoint that holds every parameter itself, in its own dtype, names no base and has no adapters.

    An adapter is added to its kernel in float32; the sum has the kernel's dtype.

    Raises:
      UnusableCheckpoint: a base is gone or changed.
      ValueError: `destination` exists.
    """
    source = merge_adapters(open_source(directory, step))
    number = reader.number(directory, step)
    metadata = dataclasses.replace(source.metadata, base=())
    progress = Progress("merges", "leaves", [_nbytes(source, name) for name in source.specs])
    with reader.staged(destination) as partial:
        with reader.TensorWriter(partial / str(number) / reader.PARAMS) as writer:
            for name in source.specs:
                writer.write(name, source.read(name))
                progress.add(_nbytes(source, name))
        model_json.write(partial, metadata, model_json.read_tokenizer_files(directory))


def _nbytes(source: Source, name: str) -> int:
    spec = source.specs[name]
    return nbytes(Spec(tuple(spec.shape), spec.dtype))
