"""The fastest way that fits: rows a chip x rematerialisation x mesh, compiled from the most promising one down.

Every choice has a bound that costs no compilation: no run of it can be faster, or need less memory. A choice whose
bound promises nothing over what was found is not compiled, so that of some forty choices a handful is.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llava_jax import config as configs
from llava_jax import params, sharding
from llava_jax.models.presets import LlavaConfig
from llava_jax.plan import report
from llava_jax.plan.compile import (
    Compiled,
    CompilerRefused,
    Place,
    arguments_of,
    build,
    compile_step,
    find_place,
    model_of,
)  # fmt: skip
from llava_jax.plan.report import GIB, Workload
from llava_jax.train import flops
from llava_jax.train.program import Program

ROWS = (1, 2, 4, 8, 16)
# What a policy keeps on the device, in bytes a token, layer and unit of width, and the share of the decoder's forward
# pass that it does again; both at the least. Source: models/remat.py, and what XLA leaves of it on v5e.
KEPT_BYTES = {"none": 22, "full": 2, "save_qkv": 8, "save_dots": 22, "offload_inputs": 0, "offload_qkv": 2}
AGAIN = {"none": 0.0, "full": 0.7, "save_qkv": 0.4, "save_dots": 0.0, "offload_inputs": 0.7, "offload_qkv": 0.4}
WORTH = 0.99  # a choice is compiled if it may take at most this share of the best one's time


class Choice(NamedTuple):
    """One way to run. secs: of a useful token, at the least. sizes: (policy, mesh) and rows a chip."""

    secs: float
    kind: tuple[str, configs.Mesh]
    rows: int
    overrides: dict[str, str]
    place: Place
    program: Program
    load: Workload


class Found(NamedTuple):
    """A choice that was compiled. secs: of a useful token with nothing overlapped."""

    compiled: Compiled
    load: Workload
    overrides: dict[str, str]
    secs: float


def search(
    path: str, overrides: Mapping[str, str], topology: str, sample_tokens: int | None
) -> Found | None:
    """The fastest that fits, None if none does. Progress goes to stderr.

    Choices are compared by compute plus communication: how much of the two overlaps is not known before a run.
    """
    left = sorted(_choices(path, overrides, topology, sample_tokens), key=lambda choice: choice.secs)
    _say(f"{len(left)} choices may fit; each takes a minute or more")
    best: Found | None = None
    slack, spent, tried = float("inf"), 0.0, 0  # slack: the least that a choice took over its bound
    while left:
        choice, *left = left
        try:
            compiled = compile_step(choice.place, choice.program, choice.load.chunks)
        except CompilerRefused as error:
            _say(f"{_name(choice)}: {error}")
            continue
        spent, tried = spent + compiled.secs, tried + 1
        if compiled.fits:
            found = Found(compiled, choice.load, choice.overrides, sum(vars(report.times_of(compiled)).values())
                          / choice.load.tokens)  # fmt: skip
            slack = min(slack, found.secs / choice.secs)
            best = found if best is None or found.secs < best.secs else best
            left = [other for other in left if other.secs * slack <= WORTH * best.secs]
        else:
            left = [other for other in left if other.kind != choice.kind or other.rows < choice.rows]
        _say(f"{_name(choice)}: {_verdict(compiled, choice.load)}; at most {len(left)} more, "
             f"{len(left) * spent / tried / 60:.0f} minutes")  # fmt: skip
    return best


def _choices(
    path: str, overrides: Mapping[str, str], topology: str, sample_tokens: int | None
) -> Iterator[Choice]:
    """All choices that the program accepts and whose least memory is below the limit."""
    told = configs.load(path, overrides)
    model = model_of(told)
    for mesh in _meshes(find_place(configs.Mesh(slices=told.mesh.slices), topology), model):
        place = find_place(mesh, topology)
        # What the host would hold is tried only where the user does: its transfers are not in the time.
        for policy in (name for name in AGAIN if not name.startswith("offload") or name == told.model.remat):
            for rows in ROWS:
                set_here = _overrides(told.data, place, mesh, policy, rows)
                try:
                    config = configs.load(path, {**overrides, **set_here})
                    program = build(config, place)
                except ValueError:
                    continue  # the config's other settings do not allow it: groups, micro-batches, divisors
                load = report.load_of(config, model, program, sample_tokens)
                if _least_bytes(program, policy) <= place.chip.hbm_bytes:
                    secs = _least_secs(place, program, load, policy)
                    yield Choice(secs, (policy, mesh), rows, set_here, place, program, load)


def _meshes(place: Place, model: LlavaConfig) -> list[configs.Mesh]:
    """Weights cut over all devices of a slice, over half of them in two copies, or by heads in two."""
    devices, slices = place.devices // place.slices, place.slices
    found = [configs.Mesh(fsdp=devices, slices=slices)]
    if devices % 2 == 0:
        found.append(configs.Mesh(data=2, fsdp=devices // 2, slices=slices))
    if devices % 2 == 0 and model.llm.kv_heads % 2 == 0:
        found.append(configs.Mesh(fsdp=devices // 2, tensor=2, slices=slices))
    return found


def _overrides(data: configs.Data, place: Place, mesh: configs.Mesh, policy: str, rows: int) -> dict[str, str]:
    """What to set for a choice; the pool of pictures keeps its size for each row."""
    found: dict[str, Any] = {"model.remat": policy, "mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp,
                             "mesh.tensor": mesh.tensor}  # fmt: skip
    if data.layout == "padded":
        found["data.batch_samples"] = rows * sharding.shards(place.mesh, "batch")
    else:
        group = min(rows, data.rows_per_group)
        pictures = -(-data.images_per_group * group // data.rows_per_group)
        found |= {"data.rows_per_chip": rows, "data.rows_per_group": group, "data.images_per_group": pictures}
    return {key: str(value) for key, value in found.items()}


def _least_bytes(program: Program, policy: str) -> int:
    """Arguments, gradients of what is trained (bfloat16), and what the policy keeps between the passes."""
    held = arguments_of(program)
    llm, rows = program.model.config.llm, program.batch.tokens
    tokens = rows.sharding.shard_shape(rows.shape)[0] * rows.shape[1]
    kept = KEPT_BYTES[policy] * tokens * llm.width * llm.layers // sharding.shards(program.mesh, "heads")
    return held.arguments + held.moving // 2 + kept


def _least_secs(place: Place, program: Program, load: Workload, policy: str) -> float:
    """A useful token's share of compute plus communication: the weights are gathered for each pass, in bfloat16, and
    the gradients brought back."""
    useful = sum(report.useful_flops(program, load).values())
    whole = params.merge(program.state.params, program.frozen)
    forward = flops.count(flops.trace(program.model, whole), ()).tokens * load.tokens
    compute = (useful + AGAIN[policy] * forward) / (place.devices * place.chip.peak_flops)
    moving, frozen = params.count(program.state.params), params.count(program.frozen)
    parts = sharding.shards(program.mesh, "width")
    sent = 2 * (2 * (moving + frozen) + moving) * (parts - 1) / parts / sharding.shards(program.mesh, "mlp")
    return (compute + sent / place.ici_bytes_per_sec) / load.tokens


def _name(choice: Choice) -> str:
    policy, mesh = choice.kind
    return f"{choice.rows} rows, {policy}, data {mesh.data} fsdp {mesh.fsdp} tensor {mesh.tensor}"


def _verdict(compiled: Compiled, load: Workload) -> str:
    needed = f"{compiled.memory.peak / GIB:.2f} GiB"
    if not compiled.fits:
        return f"does not fit ({needed})"
    times = report.times_of(compiled)
    speed = load.tokens / compiled.place.devices / sum(vars(times).values())
    return f"fits ({needed}), {speed:,.0f} tokens/s a device with nothing overlapped"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
