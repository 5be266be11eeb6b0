"""The memory that answering takes on chips that are not here: its programs compiled from shapes alone."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llava_jax import params
from llava_jax.generate import placement
from llava_jax.generate.engine import Engine, Shape
from llava_jax.generate.weights import int8_shapes
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.names import NEVER_RUN


class Footprint(NamedTuple):
    """Bytes of one device at the peak of each program, its arguments included."""

    prefill: int
    decode: int


def footprint(model: Llava, mesh: Mesh, slots: int, shape: Shape, kind: str | None = None) -> Footprint:
    """What `slots` requests of one shape take on each device of a mesh, with weights as of `weights`.

    The mesh may be of a topology (`plan.compile.find_target`); nothing is allocated.
    """
    runner = Engine(model, slots, model.config.llm.vocab, (), mesh)
    memory = [program.memory_analysis() for program in runner.compiled(weights(model, mesh, kind), shape)]
    return Footprint(*(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
                       + m.temp_size_in_bytes for m in memory))  # fmt: skip


def weights(model: Llava, mesh: Mesh, kind: str | None = None) -> dict[str, Any]:
    """Shapes with shardings of the parameters that `Assistant.open` would place on the mesh.

    kind: "int8", or None for the model's dtype.
    """
    shapes = params.flatten(abstract_params(model.config))
    names = {n: jax.ShapeDtypeStruct(x.shape, model.dtype) for n, x in shapes.items() if not n.startswith(NEVER_RUN)}
    names = int8_shapes(names) if kind else names

    def placed(name: str, x: jax.ShapeDtypeStruct) -> Any:
        if not name.startswith(placement.PARTS):
            return placement.abstract(name, x.shape, x.dtype, mesh)
        return (placement.abstract(name, x.shape[1:], x.dtype, mesh),) * x.shape[0]

    return params.unflatten({name: placed(name, x) for name, x in names.items()})
