"""Compiles a training step ahead of time for TPUs that are absent: `train.program`'s own, with abstract arrays."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from llava_jax import chips, files, sharding
from llava_jax import config as configs
from llava_jax.checkpoint import model_json
from llava_jax.chips import Chip
from llava_jax.errors import UsageError
from llava_jax.models import presets
from llava_jax.models.presets import LlavaConfig
from llava_jax.plan import hlo
from llava_jax.train import program as programs
from llava_jax.train.program import Program

STEPS = 1000  # of the learning rate schedule, where neither the config nor the data has a number; any compiles the same


class CompilerRefused(UsageError):
    """The compiler cannot compile a step (exit code 64)."""


@dataclass(frozen=True)
class Target:
    """The TPU slices that a step is compiled for. devices: in JAX's sense, of all slices together."""

    topology: str
    slices: int
    chip: Chip
    mesh: Mesh

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(chips.dimensions(self.topology))

    @property
    def hosts(self) -> int:
        return self.slices * chips.hosts(self.topology)

    @property
    def ici_bytes_per_sec(self) -> float:
        """The bandwidth of a corner chip's links: two a dimension in a ring, one at the end of a line."""
        sizes = chips.dimensions(self.topology)
        links = sum((size > 1) + (size > 2 and size % self.chip.ring == 0) for size in sizes)
        return self.chip.ici_bytes_per_sec * links / (2 * len(sizes))


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


@dataclass(frozen=True)
class CompiledStep:
    """The compiler's result. cost: None where the step exceeds the memory, and compilation failed."""

    target: Target
    program: Program
    memory: Memory
    cost: hlo.Cost | None
    secs: float

    @property
    def fits(self) -> bool:
        return self.cost is not None and self.memory.peak <= self.target.chip.hbm_bytes


def find_target(mesh: configs.Mesh, topology: str) -> Target:
    """The mesh over the devices of a topology, which need not be attached.

    Raises:
      ValueError: no such topology, no libtpu, or the sizes of the mesh do not multiply to its devices.
    """
    chip = chips.of_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "plan compiles with the TPU's own compiler, which is not installed: `pip install libtpu` (it needs no "
            "TPU; `pip install 'jax[tpu]'` takes the version that suits this jax)"
        )
    # libtpu looks for a TPU and its metadata when it is loaded, and locks it; these variables prevent that.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):  # fmt: skip
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if mesh.slices > 1:
        options["num_slices"] = mesh.slices
    if chips.dimensions(topology) == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on TPU VMs: one device a chip; the other chips have it by default
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return Target(topology, mesh.slices, chip, sharding.make_mesh(dataclasses.asdict(mesh), devices))


def model_of(config: configs.Config) -> LlavaConfig:
    """The sizes of the model, by the config's preset, else by the model.json of its base; no array is opened.

    Raises:
      UsageError: neither is there. UnusableCheckpoint: the base's model.json is damaged.
    """
    preset, base = config.model.preset, config.model.base
    if preset:
        return presets.get(preset)
    if base and files.exists(f"{base}/{model_json.FILE}"):
        return presets.config_from_json(dict(model_json.read(base).model))
    raise UsageError(
        f"model.preset is empty, and model.base={base!r} has no {model_json.FILE} here: add "
        f"--config.model.preset=NAME with one of {', '.join(presets.PRESETS)}, or name a base that is here"
    )


def build(config: configs.Config, target: Target) -> Program:
    """The program that `train` would run there.

    Raises:
      ValueError: the program refuses the config, or the hosts cannot share the rows evenly.
    """
    model = model_of(config)
    program = programs.build(config, model, config.train.steps or STEPS, target.mesh)
    rows = program.batch.tokens.shape[0]
    if rows % target.hosts:
        key = "data.batch_samples" if config.data.layout == "padded" else "data.rows_per_chip"
        raise UsageError(
            f"{rows} rows a step do not divide over {target.hosts} hosts of {target.topology}: each host loads its "
            f"own; set {key} for a multiple of {target.hosts} rows"
        )
    return program


def compile_step(
    target: Target, program: Program, chunks: int, tile_shares: Mapping[int, float]
) -> CompiledStep:
    """Compiles the step of a program that was built for this place.

    Args:
      chunks: how often the loop over supervised positions runs on a device; the data decides, see `hlo.cost`.
      tile_shares: the data decides these too.

    Raises:
      CompilerRefused: the compiler cannot do it, for another reason than memory.
    """
    start = time.monotonic()
    lowered = program.step.lower(program.state, program.frozen, program.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise _refusal(target, program, str(error)) from None
        return CompiledStep(target, program, _memory_of_error(program, str(error)), None, time.monotonic() - start)
    secs = time.monotonic() - start
    analysis = compiled.memory_analysis()
    memory = dataclasses.replace(
        arguments_of(program), arguments=analysis.argument_size_in_bytes, outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes, temporaries=analysis.temp_size_in_bytes,
        on_host=analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
    )  # fmt: skip
    return CompiledStep(target, program, memory, hlo.cost(compiled.as_text(), target.slices, chunks, tile_shares), secs)


def _refusal(target: Target, program: Program, error: str) -> CompilerRefused:
    rows, tokens = program.batch.tokens.shape
    mesh = " ".join(f"{name} {size}" for name, size in target.mesh.shape.items() if size > 1)
    said = next((line.strip() for line in error.splitlines() if line.strip()), "it does not say why")
    return CompilerRefused(
        f"the TPU's compiler (libtpu {importlib.metadata.version('libtpu')}) refuses a step of {rows} rows of {tokens} "
        f"tokens, remat {program.model.remat}, on {target.topology} with mesh {mesh or '1'}: {said[:500]}. That is no "
        "fault of the config: ask for fewer rows or micro-batches (data.rows_per_chip, data.batch_samples, "
        "train.accumulate), another --topology, or install a newer libtpu"
    )


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

