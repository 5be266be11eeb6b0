"""The device mesh, and which mesh axes cut which dimensions of parameters and activations.

Four axes: `data` copies the model, `fsdp` cuts its weights and the batch, `tensor` cuts heads and mlp width,
`context` cuts a row's tokens. Names of mesh axes appear in this file only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax import params

AXES = ("data", "fsdp", "tensor", "context")

# (pattern, mesh axes of the trailing dimensions); a stack's leading L is not cut. A matrix that ends a pair
# (o, down, fc2) has its axes swapped, so that `tensor` needs one all-reduce a pair and not two.
PARAMETERS = (
    (r"llm/embed/(table|added)", ("tensor", "fsdp")),
    (r".*/(o|down|fc2)/kernel", ("tensor", "fsdp")),
    (r"vision/patch/kernel", ("fsdp",)),
    (r".*/kernel|llm/head/added", ("fsdp", "tensor")),
    (r".*/(q|k|v|fc1)/bias", ("tensor",)),
    (r".*", ()),
)

ACTIVATIONS = {"batch": ("data", "fsdp"), "tokens": "context", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `devices` (all of them by default) with the four axes; one size may be -1 and takes the rest.

    Raises:
      ValueError: an axis is missing or unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(fill(sizes, len(devices)), AXES, axis_types=types, devices=devices)


def fill(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The sizes of the four axes in order, -1 replaced.

        {"data": 1, "fsdp": -1, "tensor": 2, "context": 1}, 8 devices -> (1, 4, 2, 1)

    Raises: as `make_mesh`.
    """
    if set(sizes) != set(AXES):
        raise ValueError(f"mesh={dict(sizes)}: want exactly the axes {', '.join(AXES)}")
    shape = [sizes[axis] for axis in AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % given == 0:
        shape[shape.index(-1)] = devices // given
    if -1 in shape or math.prod(shape) != devices:
        raise ValueError(
            f"mesh={dict(sizes)} does not fit {devices} devices: the product of the sizes must be {devices} "
            "(one size may be -1 and takes what is left)"
        )
    return tuple(shape)


def of_parameters(tree: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """`NamedSharding`s in the shape of a tree of parameters (arrays or shapes), by `PARAMETERS`."""
    flat = params.flatten(tree)
    rules = params.lookup(flat, PARAMETERS, "sharding")
    return params.unflatten({n: NamedSharding(mesh, _fit(x.shape, rules[n], mesh.shape)) for n, x in flat.items()})


def of_array(mesh: Mesh, shape: Sequence[int], *names: str | None) -> NamedSharding:
    """The sharding of an array whose leading dimensions have these logical names (`ACTIVATIONS`; None: not cut)."""
    return NamedSharding(mesh, _activation(tuple(shape), names, mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shards(mesh: Mesh, name: str) -> int:
    """In how many parts the mesh cuts a dimension of that logical name."""
    return _parts(ACTIVATIONS[name], mesh.shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions cut as their logical names say; `x` itself where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _activation(x.shape, names, mesh.shape))


def constrain_parameters(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tree of parameters, or of their gradients, cut as parameters are; the tree itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    flat = params.flatten(tree)
    rules = params.lookup(flat, PARAMETERS, "sharding")
    cut = {n: jax.lax.with_sharding_constraint(x, _fit(x.shape, rules[n], mesh.shape)) for n, x in flat.items()}
    return params.unflatten(cut)


def _activation(shape: tuple[int, ...], names: Sequence[str | None], sizes: Mapping[str, int]) -> PartitionSpec:
    axes = [None if name is None else ACTIVATIONS[name] for name in names]
    return _fit(shape, axes + [None] * (len(shape) - len(axes)), sizes)


def _fit(shape: Sequence[int], axes: Sequence[Any], sizes: Mapping[str, int]) -> PartitionSpec:
    """Axes for the trailing dimensions; one that does not divide its dimension is left out (jit refuses those)."""
    tail = list(shape[len(shape) - len(axes) :])
    cut = [axis if dim % _parts(axis, sizes) == 0 else None for dim, axis in zip(tail, axes)]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *cut)


def _parts(axis: str | Sequence[str] | None, sizes: Mapping[str, int]) -> int:
    if axis is None:
        return 1
    return math.prod(sizes[name] for name in ([axis] if isinstance(axis, str) else axis))
