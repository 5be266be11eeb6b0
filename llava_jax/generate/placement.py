"""Where a model that answers lies: the mesh of its devices, and its parameters and prompts on that mesh."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax import distributed, sharding
from llava_jax import params as names
from llava_jax.checkpoint.tensors import Read
from llava_jax.errors import UsageError
from llava_jax.models.llava import Llava
from llava_jax.models.parts import DecoderConfig

FULL = 0.75  # of the devices' memory, for weights and caches; prefill and XLA's own buffers want the rest
PARTS = ("llm/blocks/", "llm/cross/")  # stacks that decoding holds as tuples of their layers


def choose_devices(weight_bytes: int) -> list[Any]:
    """The devices of this process, or those of all processes of its job where these alone cannot hold the model."""
    devices = jax.local_devices()
    if distributed.count() == 1 or weight_bytes <= FULL * len(devices) * memory_bytes(devices[0]):
        return devices
    return jax.devices()


def choose_mesh(weight_bytes: int, row_bytes: int, slots: int, devices: Sequence[Any], limit: float) -> Mesh | None:
    """The mesh of `copies` on these devices, whose parts divide heads and mlp width; None for a single device.

    Raises: as `copies`, whose arguments it has.
    """
    number = copies(weight_bytes, row_bytes, slots, len(devices), limit)
    return None if len(devices) == 1 else sharding.mesh_of_copies(number, devices)


def mesh_for(model: Llava, tree: Any, slots: int) -> Mesh | None:
    """The mesh for parameters (arrays or shapes) that lie on none yet; None for a single device."""
    llm = model.config.llm
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    row = row_bytes(llm, model.dtype, llm.usable_positions)
    devices = choose_devices(weights)
    return choose_mesh(weights, row, slots, devices, memory_bytes(devices[0]))


def copies(weight_bytes: int, row_bytes: int, slots: int, devices: int, limit: float) -> int:
    """How many copies of a model answer `slots` prompts at once; each has its own rows, on its part of the devices.

    As many as divide both the slots and the devices, and as fit: weights and the longest caches take `FULL` of the
    memory.

        16 slots, 8 devices, small model              -> 8, each with 2 rows
        16 slots, 8 devices of 15.75 GiB, LLaVA 13B   -> 1, cut over all devices
        1 slot, 8 devices                             -> 1, cut over all devices

    Args:
      weight_bytes: of one copy.
      row_bytes: of the cache of a row that fills the model's positions.
      limit: bytes of memory of one device.

    Raises:
      UsageError: the weights alone exceed the memory of all devices together.
    """
    memory = devices * limit
    if weight_bytes > memory:
        raise UsageError(
            f"the model's weights take {weight_bytes / 2**30:.1f} GiB, and {devices} device(s) have "
            f"{memory / 2**30:.1f} GiB together: use more devices, or --dtype bfloat16"
        )
    most = math.gcd(slots, devices)
    return next((n for n in range(most, 1, -1)
                 if most % n == 0 and n * weight_bytes + slots * row_bytes <= FULL * memory), 1)  # fmt: skip


def memory_bytes(device: Any) -> float:
    """What XLA may use of a device; a CPU does not say."""
    stats = device.memory_stats()
    return math.inf if stats is None else stats["bytes_limit"]


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether other processes must make the same calls."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def row_bytes(config: DecoderConfig, dtype: Any, positions: int) -> int:
    """Bytes of keys and values of one row with all its positions."""
    return 2 * config.layers * config.kv_heads * config.head_width * positions * jnp.dtype(dtype).itemsize


def abstract(name: str, shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """A parameter, or one layer of its stack, with the sharding that `sharding.PARAMETERS` gives it."""
    struct = jax.ShapeDtypeStruct(shape, dtype)
    if mesh is None:
        return struct
    cut = names.flatten(sharding.of_parameters(names.unflatten({name: struct}), mesh))[name]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)


def put(read: Read, struct: jax.ShapeDtypeStruct, mesh: Mesh | None) -> jax.Array | tuple[jax.Array, ...]:
    """A parameter that was read from a checkpoint, on the devices of this process.

    Stacks become tuples of their layers: XLA takes the slices of a stack out of the decode loop, a second copy of the
    model.
    """
    if not read.name.startswith(PARTS):
        return _put(lambda index: read.take(index).astype(struct.dtype), struct)
    layer = abstract(read.name, struct.shape[1:], struct.dtype, mesh)

    def take(number: int, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(read.take((slice(number, number + 1), *index))[0], struct.dtype)

    return tuple(_put(functools.partial(take, number), layer) for number in range(struct.shape[0]))


def _put(take: Callable[[tuple[slice, ...]], np.ndarray], struct: jax.ShapeDtypeStruct) -> jax.Array:
    if struct.sharding is None:
        return jnp.asarray(take((slice(None),) * len(struct.shape)))
    return jax.make_array_from_callback(struct.shape, struct.sharding, take)


def place(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Parameters in memory on the devices of a mesh; those that lie there are not copied. A stack may be a tuple."""

    def cut(name: str, array: Any) -> jax.Array:
        return jax.device_put(array, abstract(name, array.shape, array.dtype, mesh).sharding)

    return names.unflatten({
        name: tuple(cut(name, layer) for layer in leaf) if isinstance(leaf, tuple) else cut(name, leaf)
        for name, leaf in names.flatten(tree).items()
    })  # fmt: skip


def put_rows(x: np.ndarray, mesh: Mesh | None) -> np.ndarray | jax.Array:
    """An array of one row a slot on the devices, each with the rows of its copy of the model."""
    if mesh is None:
        return x
    return jax.make_array_from_callback(x.shape, abstract_rows(x, mesh).sharding, lambda index: x[index])


def abstract_rows(x: np.ndarray, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape and sharding of `put_rows`."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of_array(mesh, x.shape, "copies"))
