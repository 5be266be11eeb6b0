"""Arrays onto the devices of all processes: each reads the parts that its own devices hold.

A part alone has no checksum: the sums of all parts go to every process (a few numbers a part), and add up to those of
the whole that were written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from llava_jax import distributed, errors
from llava_jax.checkpoint import tensors as tensor_files
from llava_jax.checkpoint.tensors import Box, Read, Request, Tensors
from llava_jax.errors import Unreachable, UnusableCheckpoint, UsageError

T = TypeVar("T")

Parts = dict[str, list[Any]]  # {name: [[box, [sum, sum]], ...]} of what one process read, as JSON

_CLASSES = {errors.UNREACHABLE: Unreachable, errors.USAGE: UsageError, errors.CHECKPOINT: UnusableCheckpoint}


def put(read: Read, struct: Any) -> jax.Array:
    """The array, in the dtype and with the sharding of a ShapeDtypeStruct."""
    return jax.make_array_from_callback(struct.shape, struct.sharding, read.astype(struct.dtype).take)


def load(
    places: Mapping[str, Tensors],
    wanted: Mapping[str, Any],
    put: Callable[[Read, Any], Any] = put,
    whole: Sequence[str] = (),
) -> tuple[dict[str, Any], Parts]:
    """({name: array}, what was read of them) for ShapeDtypeStructs with shardings; no other process is waited for.

    Args:
      put: called with what was read of an array and its struct, array after array.
      whole: names that every process reads whole.

    Raises:
      UnusableCheckpoint: an array is missing, damaged, or differs from its checksum.
      Unreachable, UsageError: as `files.retried`.
    """
    arrays: dict[str, Any] = {}
    parts: Parts = {}
    boxes = {name: None if name in whole else _boxes(struct) for name, struct in wanted.items()}

    def use(read: Read) -> None:
        arrays[read.name] = put(read, wanted[read.name])
        if read.sums:
            parts[read.name] = [[box, sums] for box, sums in read.sums.items()]

    tensor_files.read([Request(places[name], name, boxes[name]) for name in wanted], use)
    return arrays, parts


def difference(places: Mapping[str, Tensors], everywhere: Sequence[Parts]) -> str:
    """Which array differs from its checksum, given the parts that each process read; "" where none does."""
    for name in dict.fromkeys(name for parts in everywhere for name in parts):
        found: dict[str, Any] = {}
        for box, sums in (entry for parts in everywhere for entry in parts.get(name, [])):
            if found.setdefault(str(box), tuple(sums)) != tuple(sums):
                return f"{name} was not read alike by all processes"
        leaves = places[name]
        if not tensor_files.matches(leaves.checksums[name], leaves.spec(name).dtype, found.values()):
            return f"{name} differs from its checksum"
    return ""


def load_checked(
    places: Mapping[str, Tensors],
    wanted: Mapping[str, Any],
    put: Callable[[Read, Any], Any] = put,
    whole: Sequence[str] = (),
) -> dict[str, Any]:
    """`load`, compared with all other processes. Raises as `load`, and the same on all of them."""
    arrays, parts = agreed("load", lambda: load(places, wanted, put, whole))
    fault = difference(places, distributed.exchange("parts", parts))
    if fault:
        raise UnusableCheckpoint(f"{fault}; copy the checkpoint again, or use another step")
    return arrays


def agreed(what: str, call: Callable[[], T]) -> T:
    """What `call` returns, once it has returned on every process: no process goes on to wait for one that failed.

    Raises:
      Unreachable, UsageError, UnusableCheckpoint: on all processes, where it raised a message to the user on one; the
        first of these classes wins.
    """
    value, error, code = None, None, None
    try:
        value = call()
    except (OSError, ValueError) as caught:
        error, code = caught, errors.exit_code(caught)
        if code is None:
            raise
    faults = distributed.exchange(what, None if error is None else [code, str(error)])
    for kind in _CLASSES:
        for number, fault in enumerate(faults):
            if fault is not None and fault[0] == kind:
                if number == distributed.index():
                    assert error is not None
                    raise error
                raise _CLASSES[kind](f"process {number}: {fault[1]}")
    return value


def _boxes(struct: Any) -> list[Box]:
    """The parts of an array that the devices of this process hold, each once."""
    shape = tuple(struct.shape)
    indices = struct.sharding.addressable_devices_indices_map(shape).values()
    return list(dict.fromkeys(tensor_files.box_of(index, shape) for index in indices))
