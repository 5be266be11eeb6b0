"""The weights of a model that answers, read onto its devices: in its dtype, or with int8 matrices.

int8 is of the matrices of the decoder's blocks, with a scale a column: half of bfloat16's bytes. They are made of the
checkpoint's own weights as these are read; embeddings, head, norms, tower and connector stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax import params
from llava_jax.checkpoint import sharded
from llava_jax.checkpoint.tensors import Read, Tensors
from llava_jax.errors import UsageError
from llava_jax.generate import placement
from llava_jax.models import lora

INT8 = "int8"
Layers = tuple[jax.Array, ...]


def check(weights: str | None) -> None:
    """Raises UsageError unless `weights` is None (those of the model's dtype), or int8 and of use here."""
    if weights not in (None, INT8):
        raise UsageError(f"weights {weights!r}: want {INT8!r}, or None for those of the model's dtype")
    if weights == INT8 and jax.default_backend() == "cpu":
        raise UsageError(
            "weights int8: on a CPU XLA converts int8 at 0.6 GB/s (jaxlib 0.10.2) before every product, so that each "
            "token would take several times as long; leave it out here. It is for TPUs and GPUs"
        )


def int8_shapes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """{name: shape} with the decoder's matrices in int8, and a float32 `kernel_scale` beside each."""
    return params.flatten(lora.quantised(shapes))


def read(
    sources: Mapping[str, Tensors], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None
) -> dict[str, Any]:
    """The parameters of a checkpoint, on the devices; of a mesh that spans processes each reads its own parts, and
    whole the kernels that are made int8 here, whose scales no checkpoint has."""
    structs = {name: placement.abstract(name, x.shape, x.dtype, mesh) for name, x in shapes.items() if name in sources}
    scales: dict[str, Layers] = {}

    def put(read: Read, struct: jax.ShapeDtypeStruct) -> Any:
        if struct.dtype != np.int8:
            return placement.put(read, struct, mesh)
        kernel, scales[lora.beside(read.name, lora.KERNEL_SCALE)] = _put_int8(read, struct, mesh)
        return kernel

    if placement.spans_processes(mesh):
        whole = [name for name, struct in structs.items() if struct.dtype == np.int8]
        return params.unflatten(sharded.load_checked(sources, structs, put, whole) | scales)
    return params.unflatten(sharded.load(sources, structs, put, whole=tuple(structs))[0] | scales)


def _put_int8(read: Read, struct: jax.ShapeDtypeStruct, mesh: Mesh | None) -> tuple[Layers, Layers]:
    """(kernels, scales) of the layers of a stack that was read whole, on the devices of this process.

    The host holds one layer in float32 beside what was read.
    """
    kernels, scales, scale = [], [], lora.beside(read.name, lora.KERNEL_SCALE)
    for number in range(struct.shape[0]):
        layer = read.take((slice(number, number + 1), slice(None), slice(None)))[0]
        for stack, name, array in zip((kernels, scales), (read.name, scale), lora.quantise(layer)):
            stack.append(_put(array, placement.abstract(name, array.shape, array.dtype, mesh)))
    return tuple(kernels), tuple(scales)


def _put(array: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
    if struct.sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(struct.shape, struct.sharding, lambda index: array[index])
