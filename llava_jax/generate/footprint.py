"""The memory that answering takes on chips that are not here: its programs compiled from shapes alone."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llava_jax import params
from llava_jax.generate import placement
from llava_jax.generate.engine import Engine, Shape
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.names import NEVER_RUN


class Footprint(NamedTuple):
    """Bytes of one device at the peak of each program, its arguments included."""

    prefill: int
    decode: int


def footprint(model: Llava, mesh: Mesh, slots: int, shape: Shape) -> Footprint:
    """What `slots` requests of one shape take on each device of a mesh, with weights in the model's dtype.

    The mesh may be of a topology (`plan.compile.find_target`); nothing is allocated.
    """
    runner = Engine(model, slots, model.config.llm.vocab, (), mesh)
    memory = [program.memory_analysis() for program in runner.compiled(weights(model, mesh), shape)]
    return Footprint(*(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
                       + m.temp_size_in_bytes for m in memory))  # fmt: skip


def weights(model: Llava, mesh: Mesh) -> dict[str, Any]:
    """Shapes with shardings of the parameters that `Assistant.open` would place on the mesh."""

    def placed(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return placement.abstract(name, shape, model.dtype, mesh)

    names = {n: x for n, x in params.flatten(abstract_params(model.config)).items() if not n.startswith(NEVER_RUN)}
    return params.unflatten({
        name: (placed(name, x.shape[1:]),) * x.shape[0] if name.startswith(placement.PARTS) else placed(name, x.shape)
        for name, x in names.items()
    })  # fmt: skip
