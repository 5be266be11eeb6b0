"""Low-rank adapters beside the kernels of `Dense`, and the int8 kernels that they may rest on.

An adapter is three leaves in its kernel's dict, stacked as the kernel is: `lora_a` [.., in, rank], `lora_b`
[.., rank, out] and `lora_scale` [..] (alpha / rank, a constant). An int8 kernel has its columns' scales beside it,
`kernel_scale` [.., out]. `Dense` takes whichever it finds. Source: Hu et al. 2021 (LoRA); peft 0.21 `tuners/lora`.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int8

from llava_jax.errors import UsageError
from llava_jax.models.names import NEVER_RUN

A, B, SCALE = LEAVES = ("lora_a", "lora_b", "lora_scale")
KERNEL, KERNEL_SCALE = "kernel", "kernel_scale"
CONSTANTS = (SCALE, KERNEL_SCALE)  # leaves that never move, and stay float32 whatever the others are

# Kernels that no Dense multiplies with, or that never run.
_WITHOUT = re.compile(rf"llm/head/kernel|vision/patch/kernel|{NEVER_RUN}.*")
_INT8 = re.compile(r"llm/blocks/\w+/kernel")


def targets(names: Iterable[str]) -> list[str]:
    """The kernels among a model's names that can have an adapter."""
    return [name for name in names if name.endswith("/" + KERNEL) and not _WITHOUT.fullmatch(name)]


def beside(kernel: str, leaf: str) -> str:
    """The name of a kernel's neighbour: beside("llm/blocks/q/kernel", A) -> "llm/blocks/q/lora_a"."""
    return f"{kernel.rpartition('/')[0]}/{leaf}"


def kernel_of(name: str) -> str | None:
    """The kernel that an adapter's leaf lies beside; None for any other leaf."""
    folder, _, leaf = name.rpartition("/")
    return f"{folder}/{KERNEL}" if leaf in LEAVES else None


def add(shapes: Mapping[str, Any], adapters: Mapping[str, tuple[int, int | float]]) -> dict[str, Any]:
    """Names and shapes of a model with the leaves of its adapters, float32.

    Args:
      shapes: nested, as `abstract_params` gives them.
      adapters: {kernel: (rank, alpha)} for some of `targets`.
    """
    return _with(shapes, {name: rank for name, (rank, _) in adapters.items()})


def add_found(shapes: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Names and shapes of a model with the adapters that `names` (name: anything with a shape) holds."""
    ranks = {name: names[beside(name, A)].shape[-1] for name in targets(_flat(shapes)) if beside(name, A) in names}
    return _with(shapes, ranks)


def _with(shapes: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    flat = _flat(shapes)
    assert set(ranks) <= set(targets(flat)), sorted(set(ranks) - set(targets(flat)))
    for name, rank in ranks.items():
        *stack, inputs, outputs = flat[name].shape
        sizes = {A: (*stack, inputs, rank), B: (*stack, rank, outputs), SCALE: tuple(stack)}
        flat |= {beside(name, leaf): jax.ShapeDtypeStruct(size, jnp.float32) for leaf, size in sizes.items()}
    return _nested(flat)


def initial(name: str, shape: tuple[int, ...], key: Array, scale: float) -> Float[Array, "..."]:
    """The first value of an adapter's leaf, float32: `lora_b` is zero, so the model begins as it is without.

    Args:
      key: of the run; the name is folded in, so no leaf's value depends on which others are drawn.
      scale: alpha / rank.

    Source: peft `LoraLayer.reset_lora_parameters`: Kaiming uniform with a = sqrt(5), that is within 1 / sqrt(in).
    """
    leaf = name.rpartition("/")[2]
    if leaf == B:
        return jnp.zeros(shape, jnp.float32)
    if leaf == SCALE:
        return jnp.full(shape, scale, jnp.float32)
    assert leaf == A, name
    bound = shape[-2] ** -0.5
    return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32, -bound, bound)


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with every adapter added to its kernel (on the host), which keeps its dtype."""
    adapted = _flat(params)
    flat = {name: leaf for name, leaf in adapted.items() if kernel_of(name) is None}
    for name in (name for name in targets(flat) if beside(name, A) in adapted):
        flat[name] = merged(*(np.asarray(adapted[n]) for n in (name, *(beside(name, leaf) for leaf in LEAVES))))
    return _nested(flat)


def merged(
    kernel: Float[np.ndarray, "*L In Out"],
    a: Float[np.ndarray, "*L In R"],
    b: Float[np.ndarray, "*L R Out"],
    scale: Float[np.ndarray, "*L"],
    dtype: Any = None,
) -> Float[np.ndarray, "*L In Out"]:
    """kernel + scale * a @ b, summed in float32, in `dtype` (None: the kernel's). Memory: the result and one layer."""
    total = np.empty(kernel.shape, kernel.dtype if dtype is None else dtype)
    for layer in np.ndindex(kernel.shape[:-2]):
        product = a[layer].astype(np.float32) @ b[layer].astype(np.float32)
        total[layer] = kernel[layer].astype(np.float32) + np.float32(scale[layer]) * product
    return total


def quantised(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Names, shapes and dtypes of frozen leaves with the decoder's matrices in int8, each with its `kernel_scale`.

    Raises:
      ValueError: none of the decoder's matrices is among them.
    """
    flat = _flat(shapes)
    chosen = [name for name in flat if _INT8.fullmatch(name)]
    if not chosen:
        raise UsageError(
            "model.frozen_dtype=int8: no matrix of the decoder's blocks is frozen, so none could be kept in int8; "
            'give "llm/blocks/.*/kernel" no rate (None), or set model.frozen_dtype=compute'
        )
    for name in chosen:
        shape = flat[name].shape
        flat[name] = jax.ShapeDtypeStruct(shape, jnp.int8)
        flat[beside(name, KERNEL_SCALE)] = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32)
    return _nested(flat)


def running_dtype(name: str, dtype: Any, compute: Any) -> Any:
    """The dtype that a frozen leaf has in a running program: its own where that carries meaning, else `compute`."""
    return dtype if np.dtype(dtype) == np.int8 or name.rpartition("/")[2] in CONSTANTS else compute


def quantise(
    kernel: Float[np.ndarray, "*L In Out"],
) -> tuple[Int8[np.ndarray, "*L In Out"], Float[np.ndarray, "*L Out"]]:
    """(int8 kernel, scale of each column): symmetric, the column's largest weight is 127 of its scale.

    Layer by layer, so that beside the result there is one layer in float32.
    """
    small = np.empty(kernel.shape, np.int8)
    scale = np.empty((*kernel.shape[:-2], kernel.shape[-1]), np.float32)
    for layer in np.ndindex(kernel.shape[:-2]):
        wide = kernel[layer].astype(np.float32)
        scale[layer] = np.abs(wide).max(axis=0) / np.float32(127)
        small[layer] = np.rint(wide / np.where(scale[layer], scale[layer], 1))  # a column of zeros has scale 0
    return small, scale


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
