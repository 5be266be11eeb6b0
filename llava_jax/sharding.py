"""The device mesh, and which mesh axes cut which dimensions of parameters and activations.

Four axes: `data` copies the model, `fsdp` cuts its weights and the batch, `tensor` cuts heads and mlp width,
`context` cuts a row's tokens. Names of mesh axes appear in this file only.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax import params
from llava_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor", "context")

# (pattern, mesh axes of the trailing dimensions); a stack's leading L is not cut. A matrix that ends a pair
# (o, down, fc2) has its axes swapped, so that `tensor` needs one all-reduce a pair and not two.
PARAMETERS = (
    (r"llm/embed/(table|added)", ("tensor", "fsdp")),
    (r".*/(o|down|fc2)/kernel", ("tensor", "fsdp")),
    (r".*/(o|down|fc2)/lora_a", (("tensor", "fsdp"), None)),  # an adapter's rank is too small to be cut
    (r".*/(o|down|fc2)/lora_b", (None, "fsdp")),
    (r".*/lora_a", ("fsdp", None)),
    (r".*/lora_b", (None, ("tensor", "fsdp"))),
    (r"vision/patch/kernel", ("fsdp",)),
    (r".*/kernel|llm/head/added", ("fsdp", "tensor")),
    (r".*/(q|k|v|fc1)/bias", ("tensor",)),
    (r".*", ()),
)

ACTIVATIONS = {
    "batch": ("data", "fsdp"),
    "copies": "data",  # a batch that is whole within each copy of the model
    "images": AXES,  # pictures are many and small: every device takes some, so none repeats another's work
    "tokens": "context",
    "heads": ("tensor", "context"),  # in attention all tokens must meet: what cut the tokens cuts the heads instead
    "mlp": "tensor",
    "vocab": "tensor",
    "width": "fsdp",
}
# An answer has few rows and reads all weights for each token: where `fsdp` cuts the weights, it cuts no rows. XLA then
# sums products over it; to rows that it cut as well XLA would bring the whole model, on every device.
ANSWERING = ACTIVATIONS | {"batch": ACTIVATIONS["copies"]}

_activations: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("activations", default=ACTIVATIONS)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `devices` (all of them by default) with the four axes; one size may be -1 and takes the rest.

    Of several slices each holds whole copies of the model: `data` then has `slices` times the size that is given, and
    only the sum of gradients crosses the network between slices.

    Raises:
      ValueError: an axis is missing or unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    types, slices = (AxisType.Auto,) * len(AXES), sizes.get("slices", 1)
    shape = fill(sizes, len(devices))
    if slices == 1:  # an axis of ours may take a part of a dimension of the chips' own grid: 2 of 4
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, types)
    found = len({device.slice_index for device in devices}) if devices[0].platform == "tpu" else 1
    if found != slices:
        raise UsageError(f"mesh.slices={slices}: these {len(devices)} devices are of {found} slice(s)")
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
    placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, types)


def mesh_of_copies(copies: int, devices: Sequence[Any]) -> Mesh:
    """The mesh of a model that answers: that many copies of it, each cut over the `tensor` axis of its devices.

    `fsdp` would save as much memory, but would send a sum for every product; `tensor` sends two a layer.
    """
    return make_mesh({"data": copies, "fsdp": 1, "tensor": -1, "context": 1}, devices)


def fill(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The sizes of the four axes in order, -1 replaced.

        {"data": 1, "fsdp": -1, "tensor": 2, "context": 1}, 8 devices -> (1, 4, 2, 1)
        the same with "slices": 2, 16 devices                          -> (2, 4, 2, 1)

    Raises: as `make_mesh`.
    """
    if set(sizes) - {"slices"} != set(AXES):
        raise UsageError(f"mesh={dict(sizes)}: want exactly the axes {', '.join(AXES)} (and slices)")
    shape = [sizes[axis] for axis in AXES]
    slices = sizes.get("slices", 1)
    given = math.prod(size for size in shape if size != -1) * slices
    if -1 in shape and devices % given == 0:
        shape[shape.index(-1)] = devices // given
    shape[0] *= slices
    if -1 in shape or math.prod(shape) != devices:
        raise UsageError(
            f"mesh={dict(sizes)} does not fit {devices} devices: the product of the sizes must be {devices} "
            "(one size may be -1 and takes what is left)"
        )
    return tuple(shape)


def of_parameters(tree: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """`NamedSharding`s in the shape of a tree of parameters (arrays or shapes), by `PARAMETERS`."""
    flat = params.flatten(tree)
    rules = params.lookup(flat, PARAMETERS, "sharding")
    return params.unflatten({n: NamedSharding(mesh, _fit(x.shape, rules[n], mesh.shape)) for n, x in flat.items()})


def of_array(mesh: Mesh | AbstractMesh, shape: Sequence[int], *names: str | None) -> NamedSharding:
    """The sharding of an array whose leading dimensions have these logical names (`ACTIVATIONS`; None: not cut)."""
    return NamedSharding(mesh, _activation(tuple(shape), names, mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shards(mesh: Mesh, name: str) -> int:
    """In how many parts the mesh cuts a dimension of that logical name."""
    return _parts(_activations.get()[name], mesh.shape)


def cuts(name: str, size: int) -> tuple[str, ...]:
    """The mesh axes that cut a dimension of that logical name and size, for a sum over its parts in `per_shard`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = _fit((size,), [_activations.get()[name]], mesh.shape)[0]
    return tuple(axis for axis in _axes(axes) if mesh.shape[axis] > 1)


@contextlib.contextmanager
def answering(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Inside it a model that answers is traced for this mesh (`ANSWERING`); None: for a device without a mesh."""
    if mesh is None:
        yield
        return
    before = _activations.set(ANSWERING)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _activations.reset(before)


def platform() -> str:
    """What the computation that is being traced will run on: "tpu", "gpu" or "cpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def one_cpu() -> bool:
    """Whether the computation that is being traced will run on a CPU, and on one device of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def per_shard(
    function: Callable[..., Any], arguments: Sequence[Sequence[str | None]], results: Sequence[int | None] | int
) -> Callable[..., Any]:
    """`function` called on each device's own part of its arguments: for kernels, which know no mesh.

    Args:
      arguments: for each argument the logical names of its leading dimensions.
      results: for each result (or the only one) the argument that it is cut like; None: it is the same everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def call(*values: jax.Array) -> Any:
        cut = [_activation(value.shape, names, mesh.shape) for value, names in zip(values, arguments, strict=True)]
        out = jax.tree.map(lambda i: PartitionSpec() if i is None else cut[i], results, is_leaf=lambda i: i is None)
        return jax.shard_map(function, in_specs=tuple(cut), out_specs=out, check_vma=False)(*values)

    return call


def reduce_scatter(x: jax.Array, axes: str | Sequence[str], dim: int) -> jax.Array:
    """In `per_shard`: the sum over mesh axes, of which each device keeps its own part of one dimension.

    An axis of 4 or more devices goes in two stages, the sum of neighbours second: of a sum over all chips of a square
    or cubic slice TPU's compiler (libtpu 0.0.42.1) makes an all-reduce, which sends twice as much.
    """
    for axis in _axes(axes):
        size = jax.lax.axis_size(axis)
        inner = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
        outer = size // inner
        if inner == 1:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
            continue
        far = [[first + inner * place for place in range(outer)] for first in range(inner)]
        near = [[inner * place + first for first in range(inner)] for place in range(outer)]
        for members in (far, near):
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, axis_index_groups=members, tiled=True)
    return x


def reduces(place: str, shape: Sequence[int], x: jax.Array, *names: str) -> bool:
    """Whether axes that cut the leading dimensions of `x` cut the parameter that it is multiplied by."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    rows = {axis for part in _activation(x.shape, names, mesh.shape) for axis in _axes(part)}
    cut = {axis for part in _parameter(place, shape, mesh.shape) for axis in _axes(part)}
    return any(mesh.shape[axis] > 1 for axis in rows & cut)


def product_sum(place: str, x: jax.Array, slope: jax.Array, *names: str) -> jax.Array:
    """The gradient x^T slope of a matrix, cut as the parameter `place` is; one reduction of each device's own sum.

    names: of the leading dimensions of both, which are summed over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(_activation(x.shape, names, mesh.shape))[: len(names)]
    cut = tuple(_parameter(place, (x.shape[-1], slope.shape[-1]), mesh.shape))
    summed = [axis for part in rows for axis in _axes(part)]
    scattered = [tuple(axis for axis in _axes(part) if axis in summed) for part in cut]
    columns = [tuple(axis for axis in _axes(part) if axis not in summed) for part in cut]

    def part(x: jax.Array, slope: jax.Array) -> jax.Array:
        total = jax.numpy.einsum("...i,...o->io", x, slope)
        for dim, axes in enumerate(scattered):
            total = reduce_scatter(total, axes, dim)
        left = tuple(axis for axis in summed if axis not in scattered[0] + scattered[1])
        return jax.lax.psum(total, left) if left else total

    specs = tuple(PartitionSpec(*rows, axes or None) for axes in columns)
    return jax.shard_map(part, in_specs=specs, out_specs=PartitionSpec(*cut), check_vma=False)(x, slope)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions cut as their logical names say; `x` itself where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _activation(x.shape, names, mesh.shape))


def constrain_parameters(tree: Mapping[str, Any], place: str = "") -> Mapping[str, Any]:
    """A tree of parameters, or of their gradients, cut as parameters are; the tree itself without a mesh.

    place: the name that the tree has in the whole ("llm/blocks"; one layer of a stack is cut as the stack is).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    flat = params.flatten(tree)
    rules = params.lookup([f"{place}/{n}".lstrip("/") for n in flat], PARAMETERS, "sharding")
    specs = [_fit(x.shape, rule, mesh.shape) for x, rule in zip(flat.values(), rules.values())]
    cut = {n: jax.lax.with_sharding_constraint(x, spec) for (n, x), spec in zip(flat.items(), specs)}
    return params.unflatten(cut)


def _parameter(place: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    return _fit(shape, params.lookup([place], PARAMETERS, "sharding")[place], sizes)


def _activation(shape: tuple[int, ...], names: Sequence[str | None], sizes: Mapping[str, int]) -> PartitionSpec:
    table = _activations.get()
    axes = [None if name is None else table[name] for name in names]
    return _fit(shape, axes + [None] * (len(shape) - len(axes)), sizes)


def _fit(shape: Sequence[int], axes: Sequence[Any], sizes: Mapping[str, int]) -> PartitionSpec:
    """Axes for the trailing dimensions; one that does not divide its dimension is left out (jit refuses those)."""
    tail = list(shape[len(shape) - len(axes) :])
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *(_fit_one(d, a, sizes) for d, a in zip(tail, axes)))


def _fit_one(dim: int, axis: Any, sizes: Mapping[str, int]) -> Any:
    """Of several axes as many as divide the dimension, from the first on."""
    if not isinstance(axis, tuple):
        return axis if axis is not None and dim % sizes[axis] == 0 else None
    kept = next(axis[:n] for n in range(len(axis), -1, -1) if dim % _parts(axis[:n], sizes) == 0)
    return kept or None


def _axes(axis: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _parts(axis: str | Sequence[str] | None, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in _axes(axis))
