"""Compiles a training step ahead of time for chips that are absent: `train.program`'s own, with abstract arrays."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from llava_jax import chips, files, sharding
from llava_jax import config as configs
from llava_jax.checkpoint import model_json
from llava_jax.chips import Chip
from llava_jax.errors import UsageError
from llava_jax.models import presets, remat
from llava_jax.models.presets import LlavaConfig
from llava_jax.models.remat import Remat
from llava_jax.plan import compilers, hlo
from llava_jax.train import fitting
from llava_jax.train import memory as memories
from llava_jax.train import program as programs
from llava_jax.train.memory import Memory
from llava_jax.train.program import Program

STEPS = 1000  # of the learning rate schedule, where neither the config nor the data has a number; any compiles the same


class CompilerRefused(UsageError):
    """The compiler cannot compile a step (exit code 64)."""


@dataclass(frozen=True)
class Target:
    """The TPU slices or GPUs that a step is compiled for. devices: in JAX's sense, of all slices together."""

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
        """The bandwidth of a corner chip's links: two a dimension in a ring, one at the end of a line; GPUs have a
        switch, which gives two the bandwidth of eight."""
        if self.chip.cuda:
            return self.chip.ici_bytes_per_sec
        sizes = chips.dimensions(self.topology)
        links = sum((size > 1) + (size > 2 and size % self.chip.ring == 0) for size in sizes)
        return self.chip.ici_bytes_per_sec * links / (2 * len(sizes))


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
      ValueError: no such topology, no compiler for it, or the sizes of the mesh do not multiply to its devices.
    """
    chip = chips.of_topology(topology)
    devices = compilers.devices(chip, topology, mesh.slices)
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
    """The program that `train` would run there; of `model.remat=auto` the one that keeps least.

    Raises:
      ValueError: the program refuses the config, or the hosts cannot share the rows evenly.
    """
    model = model_of(config)
    if config.model.remat == fitting.AUTO:
        config = fitting.with_remat(config, fitting.LADDER[0])
    if target.chip.cuda:
        config = dataclasses.replace(config, compiler_options=compilers.UNTUNED + config.compiler_options)
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
    try:
        compiled, memory = memories.compile_step(program)
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(target, program, str(error)) from None
    secs = time.monotonic() - start
    cost = None if compiled is None else hlo.cost(compiled.as_text(), target.slices, chunks, tile_shares)
    return CompiledStep(target, program, memory, cost, secs)


def compile_config(
    config: configs.Config, target: Target, program: Program, chunks: int, tile_shares: Mapping[int, float]
) -> CompiledStep:
    """Compiles the step of a config, of which `build` gave the program."""
    if config.model.remat == fitting.AUTO:
        return fit_step(config, target, chunks, tile_shares)
    return compile_step(target, program, chunks, tile_shares)


def fit_step(
    config: configs.Config, target: Target, chunks: int, tile_shares: Mapping[int, float], first: int = 0
) -> CompiledStep:
    """The compiled step of a config with the rematerialisation that fits (`train.fitting`).

    Args:
      first: steps of that ladder that fit anyway.

    Raises:
      ValueError: nothing fits, or as `build` and `compile_step`.
    """
    steps = dict[Any, CompiledStep]()

    def peak(program: Program) -> int:
        compiled = compile_step(target, program, chunks, tile_shares)
        steps[program.model.remat] = compiled
        return compiled.memory.peak

    def built(policies: Remat) -> Program:
        return build(fitting.with_remat(config, policies), target)

    return steps[fitting.fit(built, peak, target.chip.hbm_bytes, first).model.remat]


def _refusal(target: Target, program: Program, error: str) -> CompilerRefused:
    rows, tokens = program.batch.tokens.shape
    mesh = " ".join(f"{name} {size}" for name, size in target.mesh.shape.items() if size > 1)
    policies = remat.describe(program.model.remat)
    reason = next((line.strip() for line in error.splitlines() if line.strip()), "it does not say why")
    return CompilerRefused(
        f"{compilers.describe(target.chip)} refuses a step of {rows} rows of {tokens} tokens, "
        f"remat {policies}, on {target.topology} with mesh {mesh or '1'}: {reason[:500]}. That is no fault of "
        "the config: ask for fewer rows or micro-batches (data.rows_per_chip, data.batch_samples, "
        f"train.accumulate), another --topology, or install a newer {compilers.package(target.chip)}"
    )
