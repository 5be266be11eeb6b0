"""Memory of a step on one device, as the compiler plans it."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from llava_jax.errors import UsageError
from llava_jax.train.program import Program


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. The first four are what the program's arguments hold, without the padding of layouts."""

    trainable: int
    frozen: int
    optimizer: int
    batch: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    on_host: int = 0

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


def compile_step(program: Program) -> tuple[Any, Memory]:
    """The compiled step, None where it exceeds the memory of the device; and the memory that it takes or would take.

    Raises:
      JaxRuntimeError: the compiler cannot do it, for another reason than memory.
    """
    lowered = program.step.lower(program.state, program.frozen, program.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _memory_of_error(program, str(error))
    analysis = compiled.memory_analysis()
    return compiled, dataclasses.replace(
        arguments_of(program), arguments=analysis.argument_size_in_bytes, outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes, temporaries=analysis.temp_size_in_bytes,
        on_host=analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
    )  # fmt: skip


def arguments_of(program: Program) -> Memory:
    """Bytes of the arguments on one device, before anything is compiled."""
    state, size = program.state, _bytes_of
    parts = size(state.params), size(program.frozen), size(state.opt_state), size(program.batch)
    return Memory(*parts, arguments=sum(parts), outputs=0, aliased=0, temporaries=0)


def _bytes_of(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes, in its own memory."""
    on_device = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind in (None, "device")]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in on_device)


UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA's two ways to say so: the temporaries alone are too large, or all together.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_TOTAL = re.compile(r"Used ([\d.]+)([KMGT]) of")


def _memory_of_error(program: Program, error: str) -> Memory:
    """The memory that the compiler's error asks for, to its two digits."""
    memory = arguments_of(program)
    for pattern, argument_bytes in ((_TEMPORARIES, 0), (_TOTAL, memory.arguments)):
        match = pattern.search(error)
        if match:
            required = int(float(match[1]) * UNITS[match[2]])
            return dataclasses.replace(memory, temporaries=max(0, required - argument_bytes))
    raise UsageError(f"XLA ran out of memory and does not say by how much: {' '.join(error.split())[:500]}")
