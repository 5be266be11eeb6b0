"""Where a model that answers lies: the mesh of its devices, and its parameters and prompts on that mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llava_jax import params as names
from llava_jax import sharding
from llava_jax.errors import UsageError
from llava_jax.models.presets import LlamaConfig

FULL = 0.75  # of the devices' memory, for weights and caches; prefill and XLA's own buffers want the rest
PARTS = ("llm/blocks/", "llm/cross/")  # stacks that decoding holds as tuples of their layers


def choose_mesh(
    weight_bytes: int, row_bytes: int, slots: int, devices: Sequence[Any], memory_bytes: float | None = None
) -> Mesh | None:
    """The mesh that answers `slots` prompts at once on these devices.

    As many copies of the model as divide both the slots and the devices, and as fit: weights and the longest caches
    take `FULL` of the memory. Each copy has its own rows. The devices of one copy divide its heads and mlp width.

        16 slots, 8 devices, small model              -> 8 copies of 2 rows
        16 slots, 8 devices of 15.75 GiB, LLaVA 13B   -> 1 copy in 8 parts
        1 slot, 8 devices                             -> 1 copy in 8 parts

    Args:
      weight_bytes: of one copy.
      row_bytes: of the cache of a row that fills the model's positions.
      memory_bytes: of one device; None reads it from the device.

    Returns: None for a single device, which needs no mesh.

    Raises:
      UsageError: the weights alone exceed the memory of all devices together.
    """
    count = len(devices)
    limit = count * (_memory_bytes(devices[0]) if memory_bytes is None else memory_bytes)
    if weight_bytes > limit:
        raise UsageError(
            f"the model's weights take {weight_bytes / 2**30:.1f} GiB and the memory of {count} device(s) is "
            f"{limit / 2**30:.1f} GiB: use more devices, or --dtype bfloat16"
        )
    if count == 1:
        return None
    most = math.gcd(slots, count)
    copies = [n for n in range(most, 0, -1)
              if most % n == 0 and n * weight_bytes + slots * row_bytes <= FULL * limit]  # fmt: skip
    return sharding.mesh_of_copies(copies[0] if copies else 1, devices)


def _memory_bytes(device: Any) -> float:
    """What XLA may use of a device; a CPU does not say."""
    stats = device.memory_stats()
    return math.inf if stats is None else stats["bytes_limit"]


def row_bytes(config: LlamaConfig, dtype: Any, positions: int) -> int:
    """Bytes of keys and values of one row with all its positions."""
    return 2 * config.layers * config.kv_heads * config.head_width * positions * jnp.dtype(dtype).itemsize


def sharding_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How a mesh cuts a parameter of that name, or one layer of its stack."""
    tree = names.unflatten({name: jax.ShapeDtypeStruct(shape, jnp.float32)})
    return names.flatten(sharding.of_parameters(tree, mesh))[name]


def put(name: str, array: np.ndarray | jax.Array, mesh: Mesh | None) -> jax.Array:
    """A parameter, or one layer of its stack, on the devices as `sharding.PARAMETERS` says; not copied if it is there.

    A mesh may span processes: each reads the parts of its devices from the array, which all have.
    """
    if mesh is None:
        return jnp.asarray(array)
    cut = sharding_of(name, array.shape, mesh)
    if isinstance(array, jax.Array):
        return jax.device_put(array, cut)
    return jax.make_array_from_callback(array.shape, cut, lambda index: array[index])


def place(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Parameters on the devices of a mesh; a stack may be a tuple of its layers."""
    placed = {
        name: tuple(put(name, layer, mesh) for layer in leaf) if isinstance(leaf, tuple) else put(name, leaf, mesh)
        for name, leaf in names.flatten(tree).items()
    }
    return names.unflatten(placed)


def put_rows(x: np.ndarray, mesh: Mesh | None) -> np.ndarray | jax.Array:
    """An array of one row a slot on the devices, each with the rows of its copy of the model."""
    if mesh is None:
        return x
    return jax.make_array_from_callback(x.shape, abstract_rows(x, mesh).sharding, lambda index: x[index])


def abstract_rows(x: np.ndarray, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape and sharding of `put_rows`."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of_array(mesh, x.shape, "copies"))
