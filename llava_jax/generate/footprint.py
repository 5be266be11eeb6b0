"""What answering takes on chips that are not here: prefill and decode compiled from shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_jax import params as names
from llava_jax import sharding
from llava_jax.generate import engine, placement
from llava_jax.generate.engine import Engine, Shape
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlavaConfig


class Footprint(NamedTuple):
    """Bytes of one device at the peak of each program, arguments included."""

    prefill: int
    decode: int


def weights(config: LlavaConfig, dtype: Any, mesh: Mesh) -> dict[str, Any]:
    """Shapes with shardings, as `Assistant.open` holds a checkpoint's parameters: stacks in parts."""
    held = {n: x for n, x in names.flatten(abstract_params(config)).items() if not n.startswith("vision/tail/")}

    def placed(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        x = jax.ShapeDtypeStruct(shape, dtype)
        (cut,) = names.flatten(sharding.of_parameters(names.unflatten({name: x}), mesh)).values()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

    return names.unflatten({
        n: (placed(n, x.shape[1:]),) * x.shape[0] if n.startswith(placement.PARTS) else placed(n, x.shape)
        for n, x in held.items()
    })  # fmt: skip


def compiled(model: Llava, tree: Any, mesh: Mesh, slots: int, shape: Shape):
    runner = Engine(model, slots, model.config.llm.vocab, (2,), mesh)
    return engine.lower(runner, tree, shape)
