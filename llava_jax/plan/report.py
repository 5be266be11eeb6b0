"""What a compiled step means: memory, work, links, time and money, as numbers for programs and a page for people."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_jax import config as configs
from llava_jax import sharding
from llava_jax.models.presets import LlavaConfig
from llava_jax.plan.compile import Compiled, Place
from llava_jax.prompt import anyres
from llava_jax.train.loss import CHUNK
from llava_jax.train.program import Program

GIB = 2**30
# Tokens of a record beside its picture's, and how many of them are learned. LLaVA-1.5's mixture is about 850 tokens
# with 576 of the picture, of which half the text is answers; its captions are about 605, all text learned.
TEXT_TOKENS = {"plain": (29, 1.0), "": (274, 0.5)}
# Share of the positions that hold tokens in packed rows of at least so many. Source: tests/data/test_planner.py.
FILLS = ((4096, 0.99), (3072, 0.975), (0, 0.93))

# Where an operation belongs, by the name that the program gives it; the first that matches.
PARTS = (
    ("tower and projector", r"/(vision|ln_vision|resampler|projector)/"),
    ("attention", r"/llm/.*(flash_|bkgts|btkgh|dot_product_attention)"),
    ("decoder", r"/llm/"),
    ("logits", ""),
)
AGAIN = "rematted_computation"


@dataclass(frozen=True)
class Workload:
    """What a global step learns from, as `train.flops.ModelFlops` has it; and its samples."""

    samples: float
    tokens: int
    pairs: int
    supervised: int
    images: int
    chunks: int  # of supervised positions that a device's loss takes one after another
    said: str  # what was assumed


def load_of(config: configs.Config, model: LlavaConfig, program: Program, sample_tokens: int | None = None) -> Workload:
    """The load of a step over records of one picture and `sample_tokens` tokens (None: as LLaVA's own data)."""
    text, learned = TEXT_TOKENS.get(config.prompt.template, TEXT_TOKENS[""])
    features, tiles = _picture(config.prompt, model)
    length = min(sample_tokens or features + text, config.data.sample_tokens or config.data.row_tokens)
    rows, row_tokens = program.batch.tokens.shape
    packed = config.data.layout == "packed"
    fill = next(share for least, share in FILLS if row_tokens >= least)
    samples = fill * rows * row_tokens / length if packed else float(rows)
    shown = f" of {tiles} tiles" if tiles > 1 else ""
    slots = program.batch.pixels.shape[0] * program.batch.pixels.shape[1]
    supervised = int(samples * learned * max(1, length - features))
    parts = sharding.shards(program.mesh, "batch") * sharding.shards(program.mesh, "tokens")
    return Workload(
        samples=samples, tokens=int(samples * length), pairs=int(samples * length * (length + 1) / 2),
        supervised=supervised, images=min(math.ceil(samples * tiles), slots), chunks=-(-supervised // (parts * CHUNK)),
        said=f"records of {length} tokens with one picture{shown}, {100 * learned:.0f} % of the text learned"
        + (f", rows {100 * fill:.0f} % full" if packed else ", one in a row"),
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
    """FLOPs of a part of the model in one global step: what it must do, what it does, what of that is done again."""

    part: str
    useful: int
    executed: int
    again: int


def work_of(compiled: Compiled, load: Workload) -> list[Work]:
    """The parts of the model, in order. What is executed, neither useful nor again, is padding and masked pairs."""
    assert compiled.cost is not None
    program, place = compiled.program, compiled.place
    useful = useful_flops(program, load)
    done, again = Counter[str](), Counter[str]()
    for name, flops in compiled.cost.products.items():
        part = next(part for part, pattern in PARTS if re.search(pattern, name))
        done[part] += flops * place.devices
        again[part] += flops * place.devices if AGAIN in name else 0
    return [Work(part, useful[part], done[part], again[part]) for part, _ in PARTS]


def useful_flops(program: Program, load: Workload) -> dict[str, int]:
    """Model FLOPs by part."""
    flops = program.flops
    return {
        "tower and projector": flops.images * load.images, "attention": flops.pairs * load.pairs,
        "decoder": flops.tokens * load.tokens, "logits": flops.supervised * load.supervised,
    }  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of a step at best, for each thing that must be done; all of them at once is the roofline."""

    compute: float
    links: float
    between_slices: float

    @property
    def step(self) -> float:
        return max(self.compute, self.links, self.between_slices)


def times_of(compiled: Compiled) -> Times:
    """Compute at the chip's peak, links at their full speed, all overlapped: no run can be faster.

    What the memory's speed costs is left out: how much of the traffic stays on the chip is the compiler's secret.
    """
    assert compiled.cost is not None
    place = compiled.place
    near, far = (sum(_bytes(compiled, far=far).values()) for far in (False, True))
    links = near / place.ici_bytes_per_sec if near else 0.0
    return Times(compiled.cost.flops / place.chip.peak_flops, links, far / place.chip.dcn_bytes_per_sec)


def _bytes(compiled: Compiled, far: bool) -> dict[str, int]:
    assert compiled.cost is not None
    found = Counter[str]()
    for moved in compiled.cost.transfers.values():
        found[moved.kind] += int(moved.bytes) if moved.between_slices == far else 0
    return {kind: count for kind, count in sorted(found.items()) if count}


@dataclass(frozen=True)
class Costs:
    """How long and how dear. samples: of the whole run; None if nobody knows: then all is for a million of them."""

    samples: int | None
    price: float | None  # of a chip and hour

    def hours(self, samples_per_sec: float) -> float:
        return (self.samples or 1_000_000) / samples_per_sec / 3600


def numbers(compiled: Compiled, load: Workload, costs: Costs) -> dict[str, Any]:
    """The plan as JSON: bytes are integers of one device, FLOPs those of one global step, None what is not known."""
    place, memory = compiled.place, compiled.memory
    useful = sum(useful_flops(compiled.program, load).values())
    found: dict[str, Any] = {
        "topology": place.topology, "slices": place.slices, "chips": place.chips, "mesh": dict(place.mesh.shape),
        "fits": compiled.fits, "peak_hbm_bytes": memory.peak, "limit_hbm_bytes": place.chip.hbm_bytes,
        "argument_bytes": memory.arguments, "temp_bytes": memory.temporaries, "parameter_bytes": memory.moving,
        "frozen_bytes": memory.frozen, "optimizer_bytes": memory.optimizer, "batch_bytes": memory.batch,
        "host_bytes": memory.on_host, "assumed": load.said, "model_flops": useful, "executed_flops": None,
        "collective_bytes": None, "collective_bytes_between_slices": None, "step_secs_roofline": None,
        "mfu_roofline": None, "tokens_per_sec_roofline": None, "hours_roofline": None, "money_roofline": None,
        "samples": costs.samples, "compile_secs": round(compiled.secs, 1),
    }  # fmt: skip
    if compiled.cost is None:
        return found
    step = times_of(compiled).step
    hours = costs.hours(load.samples / step)
    return found | {
        "executed_flops": compiled.cost.flops * place.devices,
        "flops_by_part": {w.part: {"useful": w.useful, "executed": w.executed, "again": w.again}
                          for w in work_of(compiled, load)},
        "collective_bytes": _bytes(compiled, far=False),
        "collective_bytes_between_slices": _bytes(compiled, far=True),
        "step_secs_roofline": step,
        "mfu_roofline": useful / (step * place.devices * place.chip.peak_flops),
        "tokens_per_sec_roofline": load.tokens / step,
        "hours_roofline": hours,
        "money_roofline": None if costs.price is None else hours * place.chips * costs.price,
    }  # fmt: skip


def page(compiled: Compiled, load: Workload, costs: Costs) -> str:
    """What a person wants to see, top to bottom: does it fit, what is the work, how long, how dear."""
    place = compiled.place
    mesh = " x ".join(f"{axis} {size}" for axis, size in place.mesh.shape.items() if size > 1) or "one device"
    slices = f"{place.slices} slices of " if place.slices > 1 else ""
    lines = [f"{slices}{place.topology}: {place.chips} chips ({place.chip.kind}) on {place.hosts} host(s); mesh {mesh}",
             f"compiled in {compiled.secs:.0f} s; assumed: {load.said}", "", *_memory_lines(compiled)]  # fmt: skip
    if compiled.cost is not None:
        lines += ["", *_work_lines(compiled, load), "", *_time_lines(compiled, load), "", *_end_lines(
            place, load, costs, times_of(compiled).step, sum(useful_flops(compiled.program, load).values())
        )]  # fmt: skip
    return "\n".join(lines)


BAR = 60
LETTERS = {"parameters": "P", "frozen parameters": "F", "optimizer": "O", "batch": "B", "padding of layouts": ".",
           "temporaries": "T"}  # fmt: skip


def _memory_lines(compiled: Compiled) -> list[str]:
    memory, limit = compiled.memory, compiled.place.chip.hbm_bytes
    own = (memory.moving, memory.frozen, memory.optimizer, memory.batch)
    rest = memory.arguments + memory.outputs - memory.aliased - sum(own)
    held = dict(zip(LETTERS, (*own, max(0, rest), memory.temporaries)))
    bar = "".join(LETTERS[name] * round(BAR * size / limit) for name, size in held.items())
    cells = [[LETTERS[name] + " " + name, f"{size / GIB:.2f}"] for name, size in held.items() if size >= GIB / 200]
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    cells += [["peak", f"{memory.peak / GIB:.2f}"], ["limit", f"{limit / GIB:.2f}"]]
    if memory.on_host:
        cells.append(["on the host", f"{memory.on_host / GIB:.2f}"])
    drawn = f"|{bar[:BAR]:<{BAR}}|{bar[BAR : 2 * BAR]}"
    return [*table(["memory of a chip", "GiB"], cells), drawn, f"{verdict}: {memory.peak / limit:.0%} of the limit"]


def _work_lines(compiled: Compiled, load: Workload) -> list[str]:
    works = work_of(compiled, load)
    works.append(Work("all", *(sum(vars(w)[key] for w in works) for key in ("useful", "executed", "again"))))
    letter, unit = _unit(works[-1].executed)
    cells = [[w.part, *(f"{flops / unit:,.1f}" for flops in (w.useful, w.again, w.executed - w.useful - w.again,
             w.executed))] for w in works]  # fmt: skip
    lines = table([f"work of a step, {letter}FLOP", "useful", "again", "padding, masks", "done"], cells)
    assert compiled.cost is not None
    if compiled.cost.open_loops:
        lines.append(f"(the loss takes {CHUNK} learned positions at a time, here {load.chunks} times)")
    if compiled.cost.uncounted:
        lines.append(f"(not counted: {', '.join(dict.fromkeys(compiled.cost.uncounted))})")
    return lines


def _time_lines(compiled: Compiled, load: Workload) -> list[str]:
    times = times_of(compiled)
    near, far = _bytes(compiled, far=False), _bytes(compiled, far=True)
    letter, unit = _unit(sum(near.values()))
    cells = [["matrix products", "", f"{times.compute:.3g}"]]
    cells += [[f"  {kind}", f"{count / unit:.2f}", ""] for kind, count in near.items()]
    cells += [["links to other chips", f"{sum(near.values()) / unit:.2f}", f"{times.links:.3g}"]]
    if far:
        cells += [["network between slices", f"{sum(far.values()) / unit:.2f}", f"{times.between_slices:.3g}"]]
    return table(["a chip's step at best", f"{letter}B sent", "secs"], cells)


def _unit(largest: int) -> tuple[str, float]:
    """("T", 1e12) and so on: what makes the largest number readable."""
    sizes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next((pair for pair in sizes if largest >= pair[1]), ("", 1))


def _end_lines(place: Place, load: Workload, costs: Costs, step: float, useful: int) -> list[str]:
    hours = costs.hours(load.samples / step)
    share = useful / (step * place.devices * place.chip.peak_flops)
    what = f"{costs.samples:,} samples" if costs.samples else "a million samples"
    lines = [f"a step takes {step:.3g} s or more ({load.samples:,.0f} samples): at most {load.tokens / step:,.0f} "
             f"tokens/s, {100 * share:.1f} % MFU",
             f"{what}: {hours:.2f} hours or more"]  # fmt: skip
    if costs.price is not None:
        lines[-1] += f", {hours * place.chips * costs.price:,.2f} at {costs.price} a chip and hour"
    return [*lines, "(a bound, not a forecast: compute at peak, all communication hidden, memory traffic left out)"]


def table(head: list[str], cells: Iterable[list[str]]) -> list[str]:
    """Lines of a table, the first column to the left, the others to the right."""
    rows = [head, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
            for row in rows]  # fmt: skip
