"""Everything about a run that is known without a device or a data set.

`build` gives the model, the optimizer, abstract state with shardings and the jitted steps. `loop` runs it; the
same program compiles for a topology that is not there: `program.step.lower(program.state, program.frozen,
program.batch).compile()`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llava_jax import batch as batches
from llava_jax import chips, distributed, limits, params, sharding
from llava_jax import config as configs
from llava_jax.batch import AnyBatch
from llava_jax.distributed import Rows
from llava_jax.errors import UsageError
from llava_jax.models import lora, remat
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlavaConfig
from llava_jax.train import flops
from llava_jax.train import loss as losses
from llava_jax.train import optimizer as optimizers
from llava_jax.train import step as steps_of
from llava_jax.train.step import State

FIELDS = {"pixels": ("batch",)}  # how each field of a batch is cut, by logical names
ROW = ("batch", "tokens")  # the other fields


@dataclass(frozen=True)
class Program:
    """A run, compiled or not. `state`, `frozen` and `batch` hold ShapeDtypeStructs with shardings."""

    model: Llava
    optimizer: optax.GradientTransformationExtraArgs
    mesh: Mesh
    steps: int
    rates: Mapping[str, configs.Rate]  # of every name; None is frozen
    adapters: Mapping[str, tuple[int, int | float]]  # {kernel: (rank, alpha)}
    state: State
    frozen: Mapping[str, Any]  # in the compute dtype
    batch: AnyBatch
    rows: Rows  # those that this process loads
    step: Callable[..., Any]  # (state, frozen, batch) -> (state, Metrics); donates the state
    evaluate: Callable[..., Any]  # (state.params, frozen, batch) -> (sum of losses, supervised tokens)

    @functools.cached_property
    def flops(self) -> flops.ModelFlops:
        """Model FLOPs of an update, counted when they are first read."""
        forward = flops.trace(self.model, params.merge(self.state.params, self.frozen))
        return flops.count(forward, params.flatten(self.state.params))

    def put(self, local: AnyBatch) -> AnyBatch:
        """This process's rows of a batch, on the devices of the mesh.

        Raises:
          ValueError: it holds an id that the vocabulary has no row for.
        """
        llm = self.model.config.llm
        limits.check_ids(local, llm.vocab + llm.added_tokens)
        return type(local)(**{
            name: jax.tree.map(functools.partial(self._placed, name), x) for name, x in local._asdict().items()
        })  # fmt: skip

    def _placed(self, name: str, local: Any) -> jax.Array:
        size = local.shape[0] // len(self.rows.shards)
        shape = (size * self.rows.of, *local.shape[1:])

        def part(index: tuple[slice, ...]) -> Any:
            place = self.rows.shards.index((index[0].start or 0) // size)
            return local[place * size : (place + 1) * size][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, _field_sharding(self.mesh, name, shape), part)


def build(
    config: configs.Config, model_config: LlavaConfig, steps: int, mesh: Mesh | None = None,
    loss: losses.Loss | None = None,
) -> Program:  # fmt: skip
    """The program of a config; no array is made.

    Args:
      mesh: None makes it of this machine's devices.
      loss: what is minimised; None: the cross-entropy, with what the config adds to it.

    Raises:
      ValueError: a name that `rates` does not cover, an idle row, no trainable name, a tuple of rates that does
        not fit its stack, a batch that the mesh or the micro-batches do not divide, or a `loss` beside terms of the
        config's own.
    """
    check(config, model_config)
    mesh = sharding.make_mesh(asdict(config.mesh)) if mesh is None else mesh
    dtype = jnp.dtype(config.model.dtype)
    shapes = abstract_params(model_config)
    added = adapters(config.lora, shapes)
    shapes = lora.add(shapes, added)
    rates = params.lookup(params.flatten(shapes), config.rates, "rates", every_row=True)
    trainable_rates = _trainable(rates, shapes)
    tower_trains = any(name.startswith("vision/") for name in trainable_rates)
    tower_remat = remat.only(config.model.remat) if tower_trains else "none"
    model = Llava(model_config, dtype, config.model.remat, config.train.lora_dropout, tower_remat)
    trainable, frozen = params.split(shapes, trainable_rates)
    trainable = _placed(trainable, jnp.float32, mesh)
    optimizer = optimizers.build(config.train, trainable_rates, steps)
    state = _state(optimizer, trainable, mesh, config.train.offload_optimizer)
    if config.model.frozen_dtype == "int8":
        frozen = lora.quantised(frozen)

    packed = config.data.layout == "packed"
    minimised = _loss(config.train, loss)
    train_step = functools.partial(steps_of.train_step, model, optimizer, config.train, minimised, packed)
    evaluate = functools.partial(steps_of.eval_step, model, packed)
    whole, batch = sharding.replicated(mesh), _batch(config, model_config, mesh)
    options = compiler_options(config.compiler_options, mesh)
    return Program(
        model=model, optimizer=optimizer, mesh=mesh, steps=steps, rates=rates, adapters=added, state=state,
        frozen=_placed(frozen, None, mesh, dtype), batch=batch,
        rows=rows_here(config.data, mesh),
        step=jax.jit(
            _on(mesh, train_step), donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), whole),
            compiler_options=options,
        ),
        evaluate=jax.jit(_on(mesh, evaluate), out_shardings=whole, compiler_options=options),
    )  # fmt: skip


def _on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function traced with the mesh in use, so that `sharding.constrain` finds it."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def _loss(train: configs.Train, own: losses.Loss | None) -> losses.Loss:
    terms = [f"train.{key}={value}" for key, (value, _) in losses.terms(train).items()]
    if own is not None and terms:
        raise UsageError(f"{', '.join(terms)}: the config adds nothing to a loss of the caller's own; want 0 here, and "
                         "the term in that loss")  # fmt: skip
    return losses.of_config(train) if own is None else own


def _trainable(rates: Mapping[str, configs.Rate], shapes: Mapping[str, Any]) -> dict[str, configs.Rate]:
    trainable_rates = {name: rate for name, rate in rates.items() if rate is not None}
    if not trainable_rates:
        raise UsageError("table `rates` gives every parameter None: nothing would be trained; give one pattern a rate")
    flat = params.flatten(shapes)
    for name, rate in trainable_rates.items():
        if name.rpartition("/")[2] in lora.CONSTANTS:
            raise UsageError(f"table `rates`: {name} is a constant (alpha / rank), never trained: give it None")
        if isinstance(rate, tuple) and flat[name].shape[:1] != (len(rate),):
            raise UsageError(
                f"table `rates`: {name} of shape {flat[name].shape} has {len(rate)} rates; a tuple wants one for "
                "each layer of a stack (its first dimension)"
            )
    return trainable_rates


def adapters(table: Sequence[tuple[str, configs.Lora | None]], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """{kernel: (rank, alpha)} of the table `lora`, which must say something of every kernel."""
    rows = params.lookup(lora.targets(params.flatten(shapes)), table, "lora", every_row=True) if table else {}
    return {name: (row.rank, row.alpha) for name, row in rows.items() if row is not None}


def _placed(shapes: Mapping[str, Any], dtype: Any, mesh: Mesh, compute: Any = None) -> Any:
    """Shapes with shardings, in one dtype, or (None) each in the one that it has while the program runs."""
    flat, cut = params.flatten(shapes), params.flatten(sharding.of_parameters(shapes, mesh))
    kinds = {name: dtype or lora.running_dtype(name, x.dtype, compute) for name, x in flat.items()}
    return params.unflatten(
        {name: jax.ShapeDtypeStruct(x.shape, kinds[name], sharding=cut[name]) for name, x in flat.items()}
    )


def compiler_options(own: Sequence[tuple[str, Any]], mesh: Mesh) -> dict[str, Any]:
    """What XLA is told: the chip's options (`chips`), and the user's over them.

    Raises:
      ValueError: XLA does not know an option of the user's, or not that value of it.
    """
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    for name, value in own:
        probe = jax.jit(lambda x: x, compiler_options={name: value}, in_shardings=sharding.replicated(mesh))
        try:
            probe.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UsageError(f"compiler_options: XLA refuses {name}={value!r}: {str(error).splitlines()[0]}") from None
    return (dict(chip.compiler_options) if chip else {}) | dict(own)


def _state(optimizer: optax.GradientTransformationExtraArgs, trainable: Any, mesh: Mesh, offload: bool) -> State:
    whole = sharding.replicated(mesh)
    moments = jax.eval_shape(optimizer.init, trainable)
    cut = optimizers.state_shardings(optimizer, moments, trainable, whole)
    if offload:
        cut = jax.tree.map(lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, moments, cut)
    moments = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), moments, cut)
    return State(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), trainable, moments)


def check(config: configs.Config, model_config: LlavaConfig) -> None:
    """Raises ValueError where the model cannot read the rows of the config; takes no time."""
    data = config.data
    if data.share_images and model_config.cross is not None:
        raise UsageError("data.share_images=True: the records of a tree share the positions of their picture, and this "
                         f"model's {model_config.projector} puts no feature in one; want False")  # fmt: skip
    positions = model_config.llm.usable_positions
    limits.check_rows(data.sample_tokens or data.row_tokens, model_config.image_features, positions, data.lengths)


def _batch(config: configs.Config, model_config: LlavaConfig, mesh: Mesh) -> AnyBatch:
    data = config.data
    rows = rows_of(data, mesh)
    parts = config.train.accumulate * sharding.shards(mesh, "batch")
    if rows % parts:  # of packed rows there are so many a part
        raise UsageError(
            f"data.batch_samples={rows} is not divisible by train.accumulate={config.train.accumulate} x "
            f"mesh.data x mesh.fsdp={sharding.shards(mesh, 'batch')}: want a multiple of {parts}"
        )
    for length in (data.row_tokens, *data.lengths):
        parts = sharding.shards(mesh, "tokens")
        if length % parts:
            raise UsageError(f"a row of {length} tokens is not divisible by mesh.context={parts}")
    groups, side = rows // data.rows_per_group, model_config.vision.image_size
    limits.check_step(rows, data.row_tokens, groups * data.images_per_group, side)
    resizes = config.prompt.max_tiles > 0 or config.prompt.frames > 0
    fields = batches.spec(rows, data.row_tokens, groups, data.images_per_group, side, resizes)

    def struct(name: str, x: batches.Field) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_field_sharding(mesh, name, x.shape))

    return type(fields)(**{
        name: jax.tree.map(functools.partial(struct, name), x, is_leaf=lambda x: isinstance(x, batches.Field))
        for name, x in fields._asdict().items()
    })  # fmt: skip


def rows_of(data: configs.Data, mesh: Mesh) -> int:
    """Rows of a step, of all devices together."""
    return data.batch_samples if data.layout == "padded" else data.rows_per_chip * sharding.shards(mesh, "batch")


def rows_here(data: configs.Data, mesh: Mesh) -> Rows:
    """The rows of a step that this process loads."""
    shape = (rows_of(data, mesh), data.row_tokens)
    return distributed.rows(_field_sharding(mesh, "tokens", shape).devices_indices_map(shape), shape[0])


def _field_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    return sharding.of_array(mesh, shape, *FIELDS.get(name, ROW))
