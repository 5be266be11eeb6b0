"""Counts products, collectives and memory traffic of a compiled step in its optimized HLO, times loops' trip counts.

XLA's own cost analysis counts a loop's body once, so a scan over 32 layers looks like one. Here every computation is
walked from the entry, and what a loop's body costs is multiplied by its trip count. Counted are dots, convolutions
(TPU writes dots so) and what `kernels` knows; all else is linear in the activations and left out.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from llava_jax.errors import UsageError
from llava_jax.plan import kernels, traffic
from llava_jax.plan.hlo_text import Computation, Instruction, arrays, attribute, parse, size_bytes


class Transfer(NamedTuple):
    """One kind of collective at one place, over the whole step.

    bytes: what one device sends (and receives) by the best ring; see `_sent`.
    between_slices: it crosses the data centre's network and not the chips' own links.
    """

    kind: str
    op_name: str
    bytes: int
    between_slices: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one device and one step.

    products: FLOPs by the name of the operation in the program that they come from.
    transfers: by channel or instruction; parts of one asynchronous collective share a channel.
    memory_bytes: read from the device's memory and written to it (`plan.traffic`).
    open_loops: loops whose trip count is in the data, by the name of their operation.
    uncounted: kernels of unknown cost.
    """

    products: Counter[str] = field(default_factory=Counter)
    transfers: Mapping[str, Transfer] = field(default_factory=dict)
    memory_bytes: int = 0
    open_loops: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        return sum(self.products.values())


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")  # fmt: skip
def cost(
    text: str, slices: int = 1, open_trips: int = 1, tile_shares: Mapping[int, float] = MappingProxyType({})
) -> Cost:
    """The cost of a program from `compiled.as_text()`.

    Args:
      slices: TPU slices that the program spans.
      open_trips: how often a loop runs whose trip count is not in the program.
      tile_shares: of flash attention's causal tiles of that side, the share that is computed; all where it is missing.
    """
    entry, computations = parse(text)
    return _Reader(computations, slices, open_trips, tile_shares).cost(entry)


class _Reader:
    """Walks the computations; each is counted once and scaled where it is called."""

    def __init__(
        self, computations: Mapping[str, Computation], slices: int, open_trips: int, tile_shares: Mapping[int, float]
    ) -> None:
        self.computations = computations
        self.slices = slices
        self.open_trips = open_trips
        self.tile_shares = tile_shares
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str, fused: bool = False) -> Cost:
        computation = self.computations[name]
        total = Cost()
        for op in computation.instructions.values():
            total = _sum(total, self._own_cost(computation, op, fused))
            if not fused:
                total = _sum(total, Cost(memory_bytes=traffic.memory_bytes(self.computations, computation, op)))
            for called, times, inside in self._calls(computation, op):
                total = _sum(total, _scale(self.cost(called, fused or inside), times))
        return total

    def _own_cost(self, computation: Computation, op: Instruction, fused: bool) -> Cost:
        flops: int | None = 0
        kind = op.opcode.removesuffix("-start")
        if op.opcode in ("dot", "convolution"):
            flops = _dot_flops(computation, op) if op.opcode == "dot" else _convolution_flops(computation, op)
        elif op.opcode == "custom-call":
            flops = kernels.flops(computation, op, self.tile_shares)
            if flops is None:
                return Cost(uncounted=(_op_name(op) or op.name,))
        elif op.opcode == "while" and self._trips(computation, op) is None:
            return Cost(open_loops=(_op_name(op) or op.name,))
        elif kind in COLLECTIVES or op.opcode == "send":
            transfer = self._transfer(computation, op, kind)
            key = attribute(op, r"channel_id=(\d+)") if fused else ""
            return Cost(transfers={f"channel {key}" if key else op.name: transfer}) if transfer else Cost()
        return Cost(Counter({_op_name(op): flops})) if flops else Cost()

    def _calls(self, computation: Computation, op: Instruction) -> Iterator[tuple[str, int, bool]]:
        """(computation, times, whether it is a fusion's body) of all that an instruction calls."""
        if op.opcode == "while":
            trips = self._trips(computation, op)
            yield attribute(op, r"body=%?([\w.\-]+)"), self.open_trips if trips is None else trips, False
        elif op.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.attributes)
            names = attribute(op, r"branch_computations=\{([^}]*)\}")
            branches += [name.strip().lstrip("%") for name in names.split(",") if name.strip()]
            yield max(branches, key=lambda name: self.cost(name).flops), 1, False  # the costliest branch
        elif op.opcode in ("fusion", "fusion-start", "call", "async-start"):
            called = attribute(op, r"(?:calls|to_apply)=%?([\w.\-]+)")
            yield called, 1, op.opcode.startswith("fusion")

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs; None if that cannot be read.

        From XLA's own note, or from a condition `counter < constant` whose counter the body raises by a constant.
        """
        trip_count = attribute(loop, r'"known_trip_count":\{"n":"(\d+)"')
        if trip_count:
            return int(trip_count)
        condition = self.computations[attribute(loop, r"condition=%?([\w.\-]+)")]
        body = self.computations[attribute(loop, r"body=%?([\w.\-]+)")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (condition.instructions[name] for name in test.operands)
        index = attribute(counter, r"index=(\d+)") if counter.opcode == "get-tuple-element" else ""
        if not index:
            return None
        initial = _element(computation, loop.operands[0], int(index))
        last, first = _constant(condition, limit.name), _constant(computation, initial)
        step = _step(body, int(index))
        return None if None in (last, first, step) else max(0, -(-(last - first) // step))

    def _transfer(self, computation: Computation, op: Instruction, kind: str) -> Transfer | None:
        instructions = computation.instructions
        operand_bytes = sum(size_bytes(instructions[name].shape) for name in op.operands if name in instructions)
        if op.opcode == "send":  # between TPU slices the host's runtime does what the chips cannot
            kind = attribute(op, r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
            return Transfer(kind, _op_name(op), _ring_bytes(kind, operand_bytes, self.slices), True) if kind else None
        if computation.name.startswith("all-reduce-scatter"):  # an all-reduce fused with taking one's own part of it
            kind = "reduce-scatter"
        return Transfer(kind, _op_name(op), _ring_bytes(kind, operand_bytes, _group(op)))


def _sum(a: Cost, b: Cost) -> Cost:
    if not (b.products or b.transfers or b.memory_bytes or b.open_loops or b.uncounted):
        return a
    transfers = dict(a.transfers)
    for key, transfer in b.transfers.items():
        previous = transfers.get(key)
        # A fused collective spans several fusions under one channel: it transfers its bytes once.
        if previous and key.startswith("channel "):
            transfer = max(previous, transfer, key=lambda candidate: candidate.bytes)
        elif previous:
            transfer = transfer._replace(bytes=previous.bytes + transfer.bytes)
        transfers[key] = transfer
    return Cost(a.products + b.products, transfers, a.memory_bytes + b.memory_bytes, a.open_loops + b.open_loops,
                a.uncounted + b.uncounted)  # fmt: skip


def _scale(cost: Cost, times: int) -> Cost:
    if times == 1:
        return cost
    products = Counter({name: flops * times for name, flops in cost.products.items()})
    transfers = {key: transfer._replace(bytes=transfer.bytes * times) for key, transfer in cost.transfers.items()}
    return Cost(products, transfers, cost.memory_bytes * times, cost.open_loops, cost.uncounted)


def _op_name(op: Instruction) -> str:
    return attribute(op, r'op_name="([^"]*)"')


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, through copies."""
    op = computation.instructions.get(name)
    while op is not None and op.opcode in ("copy", "bitcast", "convert"):
        op = computation.instructions.get(op.operands[0])
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.literal):
        return None
    return int(op.literal)


def _element(computation: Computation, name: str, index: int) -> str:
    """The name of a tuple's element, "" if this instruction builds no tuple."""
    op = computation.instructions[name]
    return op.operands[index] if op.opcode == "tuple" else ""


def _step(body: Computation, index: int) -> int | None:
    """What a loop's body adds to element `index` of its state."""
    update = body.instructions.get(_element(body, body.root, index))
    while update is not None and update.opcode in ("copy", "bitcast"):
        update = body.instructions.get(update.operands[0])
    if update is None or update.opcode != "add":
        return None
    return next((value for value in (_constant(body, name) for name in update.operands) if value), None)


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    (_, left), *_ = arrays(computation.instructions[dot.operands[0]].shape)
    (_, out), *_ = arrays(dot.shape)
    inner = attribute(dot, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(out) * math.prod(left[int(d)] for d in inner.split(",") if d)


def _convolution_flops(computation: Computation, op: Instruction) -> int:
    """Products with something other than padding; TPU writes a batched dot with the batch as a dilated dimension."""
    (_, left), *_ = arrays(computation.instructions[op.operands[0]].shape)
    (_, right), *_ = arrays(computation.instructions[op.operands[1]].shape)
    (_, out), *_ = arrays(op.shape)
    in_labels, kernel_labels, out_labels = re.split(r"_|->", attribute(op, r"dim_labels=([\w>\-]+)"))
    window, spatial = _window(op), 1
    for d in (letter for letter in in_labels if letter.isdigit()):
        sizes = left[in_labels.index(d)], right[kernel_labels.index(d)], out[out_labels.index(d)]
        spatial *= _overlaps(*sizes, **{key: values[int(d)] for key, values in window.items()})
    groups = int(attribute(op, r"batch_group_count=(\d+)") or 1)
    batch = left[in_labels.index("b")] // groups
    return 2 * batch * spatial * right[kernel_labels.index("i")] * right[kernel_labels.index("o")]


def _window(op: Instruction) -> dict[str, list[int]]:
    """{"stride": [...], "pad": [low ...], "lhs_dilate": [...], "rhs_dilate": [...]}, one number a dimension."""
    text = attribute(op, r"window=\{([^}]*)\}")
    fields = dict(value.split("=") for value in text.split())
    dims = len(fields["size"].split("x")) if fields else 0
    pads = fields["pad"].split("x") if "pad" in fields else ["0"] * dims
    window = {"pad": [int(pad.split("_")[0]) for pad in pads]}
    for key in ("stride", "lhs_dilate", "rhs_dilate"):
        window[key] = [int(value) for value in fields[key].split("x")] if key in fields else [1] * dims
    return window


@functools.cache
def _overlaps(inner: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Along one dimension: pairs of (result, element of the kernel) that meet an element of the input."""
    positions = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - pad
    return int(np.sum((positions >= 0) & (positions <= (inner - 1) * lhs_dilate) & (positions % lhs_dilate == 0)))


def _group(op: Instruction) -> int:
    """Devices that take part in a collective, from whichever of the ways in which XLA writes its groups."""
    if op.opcode.startswith("collective-permute"):
        return 2
    members = attribute(op, r"replica_groups=\{\{([\d,]+)\}")
    if members:
        return len(members.split(","))
    iota = attribute(op, r"replica_groups=\[([\d,]+)\]<=")
    if iota:
        return int(iota.split(",")[-1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.attributes)
    if axes is None:
        raise UsageError(f"HLO text of {op.name} has replica groups of an unknown form: {op.attributes[:200]!r}")
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])  # an axis, or a part of one: 'x':(2)4
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _ring_bytes(kind: str, operand_bytes: int, devices: int) -> int:
    """Bytes that a device holding `held` of them sends in a ring of `devices`."""
    if kind in ("collective-permute", "collective-broadcast"):
        return operand_bytes
    if kind == "all-gather":
        return operand_bytes * (devices - 1)
    times = 2 if kind == "all-reduce" else 1  # reduce-scatter and all-to-all: all but its own part
    return times * operand_bytes * (devices - 1) // devices
