"""Searches rows a chip x rematerialisation x mesh for the fastest choice that fits, in the order of their bounds.

Every choice has lower bounds of time and memory that cost no compilation. A choice whose bound is no better than the
best result is not compiled, so that of some forty choices a handful is.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llava_jax import config as configs
from llava_jax import params, sharding
from llava_jax.errors import UsageError
from llava_jax.models import remat
from llava_jax.models.presets import LlavaConfig
from llava_jax.plan import report
from llava_jax.plan.compile import (
    CompiledStep,
    CompilerRefused,
    Target,
    build,
    compile_step,
    find_target,
    fit_step,
    model_of,
)  # fmt: skip
from llava_jax.plan.report import GIB, Workload
from llava_jax.train import fitting, flops
from llava_jax.train import memory as memories
from llava_jax.train.program import Program

ROWS = (1, 2, 4, 8, 16)
# Bytes that a policy keeps on the device for each token, layer and unit of width, and the share of the decoder's
# forward pass that it rematerialises; lower bounds. Source: models/remat.py, as compiled by XLA for v5e.
SAVED_BYTES = {"none": 22, "full": 2, "save_qkv": 8, "save_linear": 18, "save_dots": 22, "offload_inputs": 0,
               "offload_qkv": 2}  # fmt: skip
REMATERIALISED = {"none": 0.0, "full": 0.7, "save_qkv": 0.4, "save_linear": 0.0, "save_dots": 0.0,
                  "offload_inputs": 0.7, "offload_qkv": 0.4}  # fmt: skip
MIN_GAIN = 0.99  # a choice is compiled if it may take at most this share of the best one's time


class Choice(NamedTuple):
    """One way to run. secs: of a sample's token, at the least. kind: (policy, mesh); rows: of a chip."""

    secs: float
    kind: tuple[str, configs.Mesh]
    rows: int
    overrides: dict[str, str]
    target: Target
    program: Program
    workload: Workload


class Result(NamedTuple):
    """A choice that was compiled. secs: of a sample's token with nothing overlapped."""

    compiled: CompiledStep
    workload: Workload
    overrides: dict[str, str]
    secs: float


def search(
    path: str, overrides: Mapping[str, str], topology: str, sample_tokens: int | None
) -> Result | None:
    """The fastest choice that fits, None if none does. Progress goes to stderr.

    Choices are compared by compute plus communication: how much of the two overlaps is not known before a run.
    """
    candidates = sorted(_choices(path, overrides, topology, sample_tokens), key=lambda choice: choice.secs)
    _log(f"{len(candidates)} choices may fit; each takes a minute or more")
    best: Result | None = None
    slack, compile_secs, count = float("inf"), 0.0, 0  # slack: the least that a choice took over its bound
    while candidates:
        choice, *candidates = candidates
        workload = choice.workload
        try:
            compiled = compile_step(choice.target, choice.program, workload.chunks, workload.tile_shares)
        except CompilerRefused as error:
            _log(f"{_name(choice)}: {error}")
            continue
        compile_secs, count = compile_secs + compiled.secs, count + 1
        if compiled.fits:
            secs = report.times_of(compiled).in_turn / choice.workload.tokens
            result = Result(compiled, choice.workload, choice.overrides, secs)
            slack = min(slack, result.secs / choice.secs)
            best = result if best is None or result.secs < best.secs else best
            candidates = [other for other in candidates if other.secs * slack <= MIN_GAIN * best.secs]
        else:
            candidates = [other for other in candidates if other.kind != choice.kind or other.rows < choice.rows]
        _log(f"{_name(choice)}: {_verdict(compiled, choice.workload)}; at most {len(candidates)} more, "
             f"{len(candidates) * compile_secs / count / 60:.0f} minutes")  # fmt: skip
    return best if best is None else _fitted(best, path, overrides)


def _fitted(best: Result, path: str, overrides: Mapping[str, str]) -> Result:
    """The best choice with layers that keep more than its policy says, as many as fit."""
    policy, model = best.overrides["model.remat"], best.compiled.program.model.config
    if policy not in fitting.LADDER[:-1] or model.cross is not None:
        return best
    settings = best.overrides | {"model.remat": fitting.AUTO}
    config, workload = configs.load(path, {**overrides, **settings}), best.workload
    try:
        compiled = fit_step(config, best.compiled.target, workload.chunks, workload.tile_shares,
                            fitting.LADDER.index(policy))  # fmt: skip
    except (CompilerRefused, UsageError) as error:
        _log(f"model.remat=auto: {error}")
        return best
    secs = report.times_of(compiled).in_turn / workload.tokens
    _log(f"{remat.describe(compiled.program.model.remat)}: {_verdict(compiled, workload)}")
    return Result(compiled, workload, settings, secs) if secs < best.secs else best


def _choices(
    path: str, overrides: Mapping[str, str], topology: str, sample_tokens: int | None
) -> Iterator[Choice]:
    """All choices that the program accepts and whose least memory is below the limit."""
    config = configs.load(path, overrides)
    model = model_of(config)
    for mesh in _meshes(find_target(configs.Mesh(slices=config.mesh.slices), topology), model):
        target = find_target(mesh, topology)
        # Offloading is tried only where the config uses it: its transfers are not in the time.
        for policy in (name for name in REMATERIALISED if not name.startswith("offload") or name == config.model.remat):
            for rows in ROWS:
                settings = _overrides(config.data, target, mesh, policy, rows)
                try:
                    choice_config = configs.load(path, {**overrides, **settings})
                    program = build(choice_config, target)
                except ValueError:
                    continue  # the config's other settings do not allow it: groups, micro-batches, divisors
                workload = report.workload_of(choice_config, model, program, sample_tokens)
                if _least_bytes(program, policy) <= target.chip.hbm_bytes:
                    secs = _least_secs(target, program, workload, policy)
                    yield Choice(secs, (policy, mesh), rows, settings, target, program, workload)


def _meshes(target: Target, model: LlavaConfig) -> list[configs.Mesh]:
    """Weights sharded over all devices of a slice, over half of them in two replicas, or by heads in two."""
    devices, slices = target.devices // target.slices, target.slices
    meshes = [configs.Mesh(fsdp=devices, slices=slices)]
    if devices % 2 == 0:
        meshes.append(configs.Mesh(data=2, fsdp=devices // 2, slices=slices))
    if devices % 2 == 0 and model.llm.kv_heads % 2 == 0:
        meshes.append(configs.Mesh(fsdp=devices // 2, tensor=2, slices=slices))
    return meshes


def _overrides(data: configs.Data, target: Target, mesh: configs.Mesh, policy: str, rows: int) -> dict[str, str]:
    """The settings of a choice; the pool of pictures keeps its size for each row."""
    settings: dict[str, Any] = {"model.remat": policy, "mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp,
                                "mesh.tensor": mesh.tensor}  # fmt: skip
    if data.layout == "padded":
        settings["data.batch_samples"] = rows * sharding.shards(target.mesh, "batch")
    else:
        group = min(rows, data.rows_per_group)
        pictures = -(-data.images_per_group * group // data.rows_per_group)
        settings |= {"data.rows_per_chip": rows, "data.rows_per_group": group, "data.images_per_group": pictures}
    return {key: str(value) for key, value in settings.items()}


def _least_bytes(program: Program, policy: str) -> int:
    """Arguments, gradients of the trainable parameters (bfloat16), and the activations that the policy saves."""
    memory = memories.arguments_of(program)
    llm, rows = program.model.config.llm, program.batch.tokens
    tokens = rows.sharding.shard_shape(rows.shape)[0] * rows.shape[1]
    saved_bytes = SAVED_BYTES[policy] * tokens * llm.width * llm.layers // sharding.shards(program.mesh, "heads")
    return memory.arguments + memory.trainable // 2 + saved_bytes


def _least_secs(target: Target, program: Program, workload: Workload, policy: str) -> float:
    """Compute plus communication for a sample's token: the weights are gathered for each pass, in bfloat16, and the
    gradients reduced."""
    model_flops = sum(report.model_flops(program, workload).values())
    all_params = params.merge(program.state.params, program.frozen)
    forward = flops.count(flops.trace(program.model, all_params), ()).tokens * workload.tokens
    compute = (model_flops + REMATERIALISED[policy] * forward) / (target.devices * target.chip.peak_flops)
    trainable, frozen = params.count(program.state.params), params.count(program.frozen)
    parts = sharding.shards(program.mesh, "width")
    sent_bytes = 2 * (2 * (trainable + frozen) + trainable) * (parts - 1) / parts / sharding.shards(program.mesh, "mlp")
    return (compute + sent_bytes / target.ici_bytes_per_sec) / workload.tokens


def _name(choice: Choice) -> str:
    policy, mesh = choice.kind
    return f"{choice.rows} rows, {policy}, data {mesh.data} fsdp {mesh.fsdp} tensor {mesh.tensor}"


def _verdict(compiled: CompiledStep, workload: Workload) -> str:
    peak = f"{compiled.memory.peak / GIB:.2f} GiB"
    if not compiled.fits:
        return f"does not fit ({peak})"
    speed = workload.tokens / compiled.target.devices / report.times_of(compiled).in_turn
    return f"fits ({peak}), {speed:,.0f} tokens/s a device with nothing overlapped"


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
