"""Memory, FLOPs, communication, time and cost of a compiled step, as JSON and as a page of text."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_jax import config as configs
from llava_jax import sharding
from llava_jax.models import attention, remat
from llava_jax.models.presets import LlavaConfig
from llava_jax.plan import mixture
from llava_jax.plan.compile import CompiledStep, Target
from llava_jax.prompt import anyres
from llava_jax.train.loss import CHUNK
from llava_jax.train.program import Program

GIB = 2**30
CAPTIONS = "plain"  # the template of stage 1
SUPERVISED = 0.5  # share of a conversation's text that is answers; of a caption, all is

# The part of the model that an operation belongs to, by its name in the program; first match wins.
PARTS = (
    ("tower and projector", r"/(vision|ln_vision|resampler|projector)/"),
    ("attention", r"/llm/.*(flash_|bkgts|btkgh|dot_product_attention)"),
    ("decoder", r"/llm/"),
    ("logits", ""),
)
# What a collective is for, by its kind and the name of its operation; first match wins.
USES = (
    ("embedded tokens", r"llm\.embed"),
    ("gradients", r"^reduce-scatter|^all-reduce .*transpose\("),
    ("weights, backward pass", r"^all-gather .*transpose\("),
    ("weights, forward pass", r"^all-gather "),
    ("activations", r"Llava"),
    ("embedding's gradient, loss, norms", ""),
)
REMATERIALISED = "rematted_computation"
WITHOUT_CUDNN = ("(cuDNN is not installed here, so that rows without segments, as the tower's, have XLA's attention: "
                 "pip install nvidia-cudnn-cu12)")  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The counts of a global step that `train.flops.ModelFlops` multiplies, and its samples."""

    samples: float
    tokens: int
    pairs: int
    supervised: int
    images: int
    chunks: int  # of supervised positions that a device's loss takes one after another, of a micro-batch
    tile_shares: Mapping[int, float]  # of attention's causal tiles of that side, those that hold a sample's pair
    assumption: str  # in words, for the page


def workload_of(
    config: configs.Config, model: LlavaConfig, program: Program, sample_tokens: int | None = None
) -> Workload:
    """The workload of a step over LLaVA's records (`plan.mixture`), scaled to a mean of `sample_tokens` if given."""
    data, captions = config.data, config.prompt.template == CAPTIONS
    features, tiles = _picture(config.prompt, model)
    count, row_tokens = program.batch.tokens.shape
    packed = data.layout == "packed"
    row = mixture.rows(captions, features, tiles, sample_tokens, data.sample_tokens or row_tokens, row_tokens,
                       data.rows_per_group, data.images_per_group, packed, data.share_images)  # fmt: skip
    text = max(row.samples, row.all_tokens - features * row.all_images / tiles)
    supervised = int(count * text * (1.0 if captions else SUPERVISED))
    parts = sharding.shards(program.mesh, "batch") * sharding.shards(program.mesh, "tokens") * config.train.accumulate
    shown = f" of {tiles} tiles" if tiles > 1 else ""
    return Workload(
        samples=count * row.samples, tokens=int(count * row.tokens), pairs=int(count * row.pairs),
        supervised=supervised, images=math.ceil(count * row.images), chunks=-(-supervised // (parts * CHUNK)),
        tile_shares=row.tile_shares,
        assumption=f"records of {row.all_tokens / row.samples:.0f} tokens on average"
        f", {100 * row.all_images / tiles / row.samples:.0f} % with a picture{shown}, "
        f"{100 if captions else 100 * SUPERVISED:.0f} % of the text supervised"
        + (f", {100 - 100 * row.tokens / row.all_tokens:.0f} % of all positions shared" if data.share_images else "")
        + (f", rows {100 * row.tokens / row_tokens:.1f} % full" if packed else ", one in a row"),
    )  # fmt: skip


def _picture(prompt: configs.Prompt, model: LlavaConfig) -> tuple[int, int]:
    """Features and tiles of a picture; where they depend on its size, of the commonest of COCO's."""
    tiling = anyres.tiling(prompt.image_mode, prompt.grids, prompt.merge, prompt.max_tiles, prompt.several)
    if tiling is None:
        return model.image_features, 1
    layout = anyres.layout((640, 480), tiling, model.vision.image_size, model.image_features)
    return len(layout.slots), layout.tiles


@dataclass(frozen=True)
class Work:
    """FLOPs of a part of the model in one global step: model FLOPs, executed, and rematerialised of these."""

    part: str
    model: int
    executed: int
    rematerialised: int


def work_of(compiled: CompiledStep, workload: Workload) -> list[Work]:
    """The parts of the model, in order. The rest of the executed FLOPs is padding and masked pairs."""
    assert compiled.cost is not None
    program, target = compiled.program, compiled.target
    by_part = model_flops(program, workload)
    executed, rematerialised = Counter[str](), Counter[str]()
    for name, flops in compiled.cost.products.items():
        part = next(part for part, pattern in PARTS if re.search(pattern, name))
        executed[part] += flops * target.devices
        rematerialised[part] += flops * target.devices if REMATERIALISED in name else 0
    return [Work(part, by_part[part], executed[part], rematerialised[part]) for part, _ in PARTS]


def model_flops(program: Program, workload: Workload) -> dict[str, int]:
    """Model FLOPs by part."""
    flops = program.flops
    return {
        "tower and projector": flops.images * workload.images, "attention": flops.pairs * workload.pairs,
        "decoder": flops.tokens * workload.tokens, "logits": flops.supervised * workload.supervised,
    }  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Lower bounds of a step in seconds, for each resource; their maximum is the roofline."""

    compute: float
    memory: float
    links: float
    between_slices: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.links, self.between_slices)

    @property
    def in_turn(self) -> float:
        """Compute and communication with nothing overlapped; memory is read and written meanwhile."""
        return max(self.compute, self.memory) + self.links + self.between_slices


def times_of(compiled: CompiledStep) -> Times:
    """Compute at the chip's peak, memory and links at their full speed, all overlapped: no run can be faster."""
    assert compiled.cost is not None
    target = compiled.target
    link_bytes, slice_bytes = (sum(_bytes(compiled, crosses).values()) for crosses in (False, True))
    links = link_bytes / target.ici_bytes_per_sec if link_bytes else 0.0
    chip, cost = target.chip, compiled.cost
    return Times(cost.flops / chip.peak_flops, cost.memory_bytes / chip.hbm_bytes_per_sec, links,
                 slice_bytes / chip.dcn_bytes_per_sec)  # fmt: skip


def _bytes(compiled: CompiledStep, between_slices: bool) -> dict[str, int]:
    assert compiled.cost is not None
    by_kind = Counter[str]()
    for transfer in compiled.cost.transfers.values():
        by_kind[transfer.kind] += int(transfer.bytes) if transfer.between_slices == between_slices else 0
    return {kind: count for kind, count in sorted(by_kind.items()) if count}


@dataclass(frozen=True)
class Costs:
    """Inputs of hours and money. samples: of the whole run; None if unknown: then all is for a million of them."""

    samples: int | None
    price: float | None  # of a chip and hour

    def hours(self, samples_per_sec: float) -> float:
        return (self.samples or 1_000_000) / samples_per_sec / 3600


def numbers(compiled: CompiledStep, workload: Workload, costs: Costs) -> dict[str, Any]:
    """The plan as JSON: bytes are integers of one device, FLOPs those of one global step, None if unknown."""
    target, memory = compiled.target, compiled.memory
    model = sum(model_flops(compiled.program, workload).values())
    content: dict[str, Any] = {
        "topology": target.topology, "slices": target.slices, "chips": target.chips, "mesh": dict(target.mesh.shape),
        "fits": compiled.fits, "peak_hbm_bytes": memory.peak, "limit_hbm_bytes": target.chip.hbm_bytes,
        "argument_bytes": memory.arguments, "temp_bytes": memory.temporaries, "parameter_bytes": memory.trainable,
        "frozen_bytes": memory.frozen, "optimizer_bytes": memory.optimizer, "batch_bytes": memory.batch,
        "host_bytes": memory.on_host, "assumed": workload.assumption, "model_flops": model, "executed_flops": None,
        "collective_bytes": None, "collective_bytes_between_slices": None, "collective_uses": None,
        "memory_bytes": None, "remat": remat.describe(compiled.program.model.remat), "step_secs_roofline": None,
        "mfu_roofline": None, "tokens_per_sec_roofline": None, "hours_roofline": None, "money_roofline": None,
        "samples": costs.samples, "compile_secs": round(compiled.secs, 1),
    }  # fmt: skip
    if compiled.cost is None:
        return content
    step = times_of(compiled).step
    hours = costs.hours(workload.samples / step)
    return content | {
        "executed_flops": compiled.cost.flops * target.devices,
        "flops_by_part": {w.part: {"useful": w.model, "executed": w.executed, "again": w.rematerialised}
                          for w in work_of(compiled, workload)},
        "memory_bytes": compiled.cost.memory_bytes,
        "collective_bytes": _bytes(compiled, between_slices=False),
        "collective_uses": {f"{kind}: {use}": count for (kind, use), count in _uses(compiled).items()},
        "collective_bytes_between_slices": _bytes(compiled, between_slices=True),
        "step_secs_roofline": step,
        "mfu_roofline": model / (step * target.devices * target.chip.peak_flops),
        "tokens_per_sec_roofline": workload.tokens / step,
        "hours_roofline": hours,
        "money_roofline": None if costs.price is None else hours * target.chips * costs.price,
    }  # fmt: skip


def page(compiled: CompiledStep, workload: Workload, costs: Costs) -> str:
    """The plan as text, top to bottom: memory, FLOPs, time, cost."""
    target = compiled.target
    mesh = " x ".join(f"{axis} {size}" for axis, size in target.mesh.shape.items() if size > 1) or "one device"
    slices = f"{target.slices} slices of " if target.slices > 1 else ""
    chips = f"{target.chips} chips ({target.chip.kind}) on {target.hosts} host(s)"
    lines = [f"{slices}{target.topology}: {chips}; mesh {mesh}; remat {remat.describe(compiled.program.model.remat)}",
             f"compiled in {compiled.secs:.0f} s; assumed: {workload.assumption}",
             *([WITHOUT_CUDNN] if target.chip.cuda and not attention.has_cudnn() else []), "",
             *_memory_lines(compiled)]  # fmt: skip
    if compiled.cost is not None:
        model = sum(model_flops(compiled.program, workload).values())
        lines += ["", *_work_lines(compiled, workload), "", *_time_lines(compiled), "",
                  *_end_lines(target, workload, costs, times_of(compiled).step, model)]  # fmt: skip
    return "\n".join(lines)


BAR = 60
LETTERS = {"parameters": "P", "frozen parameters": "F", "optimizer": "O", "batch": "B", "padding of layouts": ".",
           "temporaries": "T"}  # fmt: skip


def _memory_lines(compiled: CompiledStep) -> list[str]:
    memory, limit = compiled.memory, compiled.target.chip.hbm_bytes
    argument_bytes = (memory.trainable, memory.frozen, memory.optimizer, memory.batch)
    padding = memory.arguments + memory.outputs - memory.aliased - sum(argument_bytes)
    sizes = dict(zip(LETTERS, (*argument_bytes, max(0, padding), memory.temporaries)))
    bar = "".join(LETTERS[name] * round(BAR * size / limit) for name, size in sizes.items())
    cells = [[LETTERS[name] + " " + name, f"{size / GIB:.2f}"] for name, size in sizes.items() if size >= GIB / 200]
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    cells += [["peak", f"{memory.peak / GIB:.2f}"], ["limit", f"{limit / GIB:.2f}"]]
    if memory.on_host:
        cells.append(["on the host", f"{memory.on_host / GIB:.2f}"])
    drawing = f"|{bar[:BAR]:<{BAR}}|{bar[BAR : 2 * BAR]}"
    return [*table(["memory of a chip", "GiB"], cells), drawing, f"{verdict}: {memory.peak / limit:.0%} of the limit"]


def _work_lines(compiled: CompiledStep, workload: Workload) -> list[str]:
    works = work_of(compiled, workload)
    works.append(Work("all", *(sum(vars(w)[key] for w in works) for key in ("model", "executed", "rematerialised"))))
    letter, unit = _unit(works[-1].executed)
    columns = [(w.model, w.rematerialised, w.executed - w.model - w.rematerialised, w.executed) for w in works]
    cells = [[w.part, *(f"{flops / unit:,.1f}" for flops in row)] for w, row in zip(works, columns)]
    head = [f"work of a step, {letter}FLOP", "model", "rematerialised", "padding and masked", "executed"]
    lines = table(head, cells)
    assert compiled.cost is not None
    if compiled.cost.open_loops:
        lines.append(f"(the loss takes {CHUNK} supervised positions at a time, here {workload.chunks} times)")
    if compiled.cost.uncounted:
        lines.append(f"(not counted: {', '.join(dict.fromkeys(compiled.cost.uncounted))})")
    return lines


def _time_lines(compiled: CompiledStep) -> list[str]:
    assert compiled.cost is not None
    times = times_of(compiled)
    link_bytes, slice_bytes = (sum(_bytes(compiled, crosses).values()) for crosses in (False, True))
    letter, unit = _unit(max(link_bytes, compiled.cost.memory_bytes))
    cells = [["matrix products", "", f"{times.compute:.3g}"],
             ["memory", f"{compiled.cost.memory_bytes / unit:.2f}", f"{times.memory:.3g}"]]  # fmt: skip
    cells += [[f"  {kind}: {use}", f"{count / unit:.2f}", ""] for (kind, use), count in _uses(compiled).items()
              if count >= link_bytes / 200]  # fmt: skip
    cells += [["links to other chips", f"{link_bytes / unit:.2f}", f"{times.links:.3g}"]]
    if slice_bytes:
        cells += [["network between slices", f"{slice_bytes / unit:.2f}", f"{times.between_slices:.3g}"]]
    return table(["roofline bound of a chip's step", f"{letter}B", "secs"], cells)


def _uses(compiled: CompiledStep) -> dict[tuple[str, str], int]:
    """{(kind, use): bytes} of the collectives on the chips' own links, the largest first."""
    assert compiled.cost is not None
    found = Counter[tuple[str, str]]()
    for transfer in compiled.cost.transfers.values():
        if not transfer.between_slices:
            name = f"{transfer.kind} {transfer.op_name}"
            found[transfer.kind, next(use for use, pattern in USES if re.search(pattern, name))] += transfer.bytes
    return dict(found.most_common())


def _unit(largest: int) -> tuple[str, float]:
    """("T", 1e12) and so on: the SI prefix of the largest number."""
    sizes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next((pair for pair in sizes if largest >= pair[1]), ("", 1))


def _end_lines(target: Target, workload: Workload, costs: Costs, step: float, model: int) -> list[str]:
    hours = costs.hours(workload.samples / step)
    share = model / (step * target.devices * target.chip.peak_flops)
    samples_text = f"{costs.samples:,} samples" if costs.samples else "a million samples"
    lines = [f"a step takes {step:.3g} s or more ({workload.samples:,.0f} samples): at most "
             f"{workload.tokens / step:,.0f} tokens/s, {100 * share:.1f} % MFU",
             f"{samples_text}: {hours:.2f} hours or more"]  # fmt: skip
    if costs.price is not None:
        lines[-1] += f", {hours * target.chips * costs.price:,.2f} at {costs.price} a chip and hour"
    return [*lines, "(a roofline bound: the largest of three, with the others hidden. Memory: what the program's "
                    "instructions read and write once; kernels read some of it again)"]  # fmt: skip


def table(head: list[str], cells: Iterable[list[str]]) -> list[str]:
    """Lines of a table, the first column to the left, the others to the right."""
    rows = [head, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
            for row in rows]  # fmt: skip
