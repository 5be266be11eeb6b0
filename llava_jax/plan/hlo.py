"""What a compiled step does, read from its optimized HLO: matrix products and collectives, loops multiplied out.

XLA's own cost analysis counts a loop's body once, so a scan over 32 layers looks like one. Here every computation is
walked from the entry, and what a loop's body costs is multiplied by its trip count. Counted are dots, convolutions
(TPU writes dots so) and flash attention's kernels; all else is linear in the activations and left out.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llava_jax.errors import UsageError


class Instruction(NamedTuple):
    """One line: %name = shape opcode(operands), attributes. literal: what stands between the parentheses."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str


class Computation(NamedTuple):
    """Instructions by name, in order; `root` is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


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
    open_loops: loops whose trip count is in the data, by the name of their operation.
    uncounted: kernels that nothing is known of.
    """

    products: Counter[str] = field(default_factory=Counter)
    transfers: Mapping[str, Transfer] = field(default_factory=dict)
    open_loops: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        return sum(self.products.values())


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")  # fmt: skip
ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128, **{
    f"{kind}{bits}": bits for kind, sizes in (("s", (2, 4, 8, 16, 32, 64)), ("u", (2, 4, 8, 16, 32, 64)),
                                              ("f", (16, 32, 64))) for bits in sizes
}}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def cost(text: str, slices: int = 1, open_trips: int = 1) -> Cost:
    """The cost of a program from `compiled.as_text()`.

    Args:
      slices: TPU slices that the program spans.
      open_trips: how often a loop runs whose trip count is not in the program.
    """
    entry, computations = parse(text)
    return _Reader(computations, slices, open_trips).cost(entry)


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """(name of the entry computation, computations by name)."""
    found, entry, name = dict[str, Computation](), "", ""
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            entry, name, lines = head[2] if head[1] else entry, head[2], []
        elif line == "}" and name:
            found[name], name = _computation(name, lines), ""
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line.strip())
        elif name and lines:
            lines[-1] += line  # a kernel's metadata may hold line breaks
    return entry, found


def _computation(name: str, lines: Sequence[str]) -> Computation:
    read = [_instruction(line.removeprefix("ROOT ")) for line in lines]
    root = next((one.name for one, line in zip(read, lines) if line.startswith("ROOT ")), "")
    return Computation(name, {one.name: one for one in read}, root)


def _instruction(line: str) -> Instruction:
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    literal = rest[start + 1 : end - 1]
    operands = tuple(word.split()[-1].lstrip("%") for word in _split(literal) if word)
    return Instruction(name.lstrip("%"), shape, rest[:start], operands, literal, rest[end:])


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise UsageError(f"HLO text has an open parenthesis: {text[start : start + 80]!r}")


def _split(literal: str) -> list[str]:
    """Operands at the commas that lie in no bracket (their shapes may be printed with them)."""
    parts, depth = [""], 0
    for letter in literal:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of each array in a shape, which may be a tuple."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(shape)]


def size_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape, without the padding of its layout; the small floats (f8...) take one each."""
    return sum(ITEM_BITS.get(kind, 8) * math.prod(dims) // 8 for kind, dims in arrays(shape))


class _Reader:
    """Walks the computations; each is counted once and scaled where it is called."""

    def __init__(self, computations: Mapping[str, Computation], slices: int, open_trips: int) -> None:
        self.computations = computations
        self.slices = slices
        self.open_trips = open_trips
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str, fused: bool = False) -> Cost:
        here = self.computations[name]
        total = Cost()
        for one in here.instructions.values():
            total = _sum(total, self._own(here, one, fused))
            for called, times, inside in self._calls(here, one):
                total = _sum(total, _scaled(self.cost(called, fused or inside), times))
        return total

    def _own(self, here: Computation, one: Instruction, fused: bool) -> Cost:
        flops, kind = 0, one.opcode.removesuffix("-start")
        if one.opcode in ("dot", "convolution"):
            flops = _dot_flops(here, one) if one.opcode == "dot" else _convolution_flops(here, one)
        elif one.opcode == "custom-call" and '"tpu_custom_call"' in one.attributes:
            flops = _kernel_flops(here, one)
            if flops is None:
                return Cost(uncounted=(_op_name(one) or one.name,))
        elif one.opcode == "while" and self._trips(here, one) is None:
            return Cost(open_loops=(_op_name(one) or one.name,))
        elif kind in COLLECTIVES or one.opcode == "send":
            moved = self._transfer(here, one, kind)
            key = _attribute(one, r"channel_id=(\d+)") if fused else ""
            return Cost(transfers={f"channel {key}" if key else one.name: moved}) if moved else Cost()
        return Cost(Counter({_op_name(one): flops})) if flops else Cost()

    def _calls(self, here: Computation, one: Instruction) -> Iterator[tuple[str, int, bool]]:
        """(computation, times, whether it is a fusion's body) of all that an instruction calls."""
        if one.opcode == "while":
            trips = self._trips(here, one)
            yield _attribute(one, r"body=%?([\w.\-]+)"), self.open_trips if trips is None else trips, False
        elif one.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)
            listed = _attribute(one, r"branch_computations=\{([^}]*)\}")
            branches += [name.strip().lstrip("%") for name in listed.split(",") if name.strip()]
            yield max(branches, key=lambda name: self.cost(name).flops), 1, False  # the dearest branch
        elif one.opcode in ("fusion", "call", "async-start"):
            called = _attribute(one, r"(?:calls|to_apply)=%?([\w.\-]+)")
            yield called, 1, one.opcode == "fusion"

    def _trips(self, here: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs; None if that cannot be read.

        From XLA's own note, or from a condition `counter < constant` whose counter the body raises by a constant.
        """
        known = _attribute(loop, r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[_attribute(loop, r"condition=%?([\w.\-]+)")]
        body = self.computations[_attribute(loop, r"body=%?([\w.\-]+)")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (condition.instructions[name] for name in test.operands)
        index = _attribute(counter, r"index=(\d+)") if counter.opcode == "get-tuple-element" else ""
        if not index:
            return None
        last, first = _constant(condition, limit.name), _constant(here, _element(here, loop.operands[0], int(index)))
        step = _step(body, int(index))
        return None if None in (last, first, step) else max(0, -(-(last - first) // step))

    def _transfer(self, here: Computation, one: Instruction, kind: str) -> Transfer | None:
        held = sum(size_bytes(here.instructions[name].shape) for name in one.operands if name in here.instructions)
        if one.opcode == "send":  # between TPU slices the host's runtime does what the chips cannot
            kind = _attribute(one, r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
            return Transfer(kind, _op_name(one), _sent(kind, held, self.slices), True) if kind else None
        if here.name.startswith("all-reduce-scatter"):  # an all-reduce fused with taking one's own part of it
            kind = "reduce-scatter"
        return Transfer(kind, _op_name(one), _sent(kind, held, _group(one)))


def _sum(a: Cost, b: Cost) -> Cost:
    if not (b.products or b.transfers or b.open_loops or b.uncounted):
        return a
    transfers = dict(a.transfers)
    for key, moved in b.transfers.items():
        before = transfers.get(key)
        # A fused collective goes on through several fusions under one channel: it moves its bytes once.
        if before and key.startswith("channel "):
            moved = max(before, moved, key=lambda one: one.bytes)
        elif before:
            moved = moved._replace(bytes=before.bytes + moved.bytes)
        transfers[key] = moved
    return Cost(a.products + b.products, transfers, a.open_loops + b.open_loops, a.uncounted + b.uncounted)


def _scaled(cost: Cost, times: int) -> Cost:
    if times == 1:
        return cost
    products = Counter({name: flops * times for name, flops in cost.products.items()})
    transfers = {key: moved._replace(bytes=moved.bytes * times) for key, moved in cost.transfers.items()}
    return Cost(products, transfers, cost.open_loops, cost.uncounted)


def _attribute(one: Instruction, pattern: str) -> str:
    found = re.search(pattern, one.attributes)
    return found[1] if found else ""


def _op_name(one: Instruction) -> str:
    return _attribute(one, r'op_name="([^"]*)"')


def _constant(here: Computation, name: str) -> int | None:
    """The value of an integer constant, through copies."""
    one = here.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "convert"):
        one = here.instructions.get(one.operands[0])
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.literal):
        return None
    return int(one.literal)


def _element(here: Computation, name: str, index: int) -> str:
    """The name of a tuple's element, "" if the tuple is not made here."""
    one = here.instructions[name]
    return one.operands[index] if one.opcode == "tuple" else ""


def _step(body: Computation, index: int) -> int | None:
    """What a loop's body adds to element `index` of its state."""
    raised = body.instructions.get(_element(body, body.root, index))
    while raised is not None and raised.opcode in ("copy", "bitcast"):
        raised = body.instructions.get(raised.operands[0])
    if raised is None or raised.opcode != "add":
        return None
    return next((value for value in (_constant(body, name) for name in raised.operands) if value), None)


def _dot_flops(here: Computation, dot: Instruction) -> int:
    (_, left), *_ = arrays(here.instructions[dot.operands[0]].shape)
    (_, out), *_ = arrays(dot.shape)
    inner = _attribute(dot, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(out) * math.prod(left[int(d)] for d in inner.split(",") if d)


def _convolution_flops(here: Computation, one: Instruction) -> int:
    """Products with something other than padding; TPU writes a batched dot with the batch as a dilated dimension."""
    (_, left), *_ = arrays(here.instructions[one.operands[0]].shape)
    (_, right), *_ = arrays(here.instructions[one.operands[1]].shape)
    (_, out), *_ = arrays(one.shape)
    in_labels, kernel_labels, out_labels = re.split(r"_|->", _attribute(one, r"dim_labels=([\w>\-]+)"))
    window, spatial = _window(one), 1
    for d in (letter for letter in in_labels if letter.isdigit()):
        sizes = left[in_labels.index(d)], right[kernel_labels.index(d)], out[out_labels.index(d)]
        spatial *= _meetings(*sizes, **{key: values[int(d)] for key, values in window.items()})
    groups = int(_attribute(one, r"batch_group_count=(\d+)") or 1)
    batch = left[in_labels.index("b")] // groups
    return 2 * batch * spatial * right[kernel_labels.index("i")] * right[kernel_labels.index("o")]


def _window(one: Instruction) -> dict[str, list[int]]:
    """{"stride": [...], "pad": [low ...], "lhs_dilate": [...], "rhs_dilate": [...]}, one number a dimension."""
    text = _attribute(one, r"window=\{([^}]*)\}")
    told = dict(word.split("=") for word in text.split())
    dims = len(told["size"].split("x")) if told else 0
    read = {"pad": [int(word.split("_")[0]) for word in told["pad"].split("x")] if "pad" in told else [0] * dims}
    for key in ("stride", "lhs_dilate", "rhs_dilate"):
        read[key] = [int(word) for word in told[key].split("x")] if key in told else [1] * dims
    return read


@functools.cache
def _meetings(inner: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Along one dimension: pairs of (result, element of the kernel) that meet an element of the input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - pad
    return int(np.sum((place >= 0) & (place <= (inner - 1) * lhs_dilate) & (place % lhs_dilate == 0)))


# Products of [T, H] x [H, S] size that each of flash attention's kernels (`models.flash`) makes of a tile.
FLASH = {"forward": 2, "backward": 5}


def _kernel_flops(here: Computation, one: Instruction) -> int | None:
    """FLOPs of a flash attention kernel, whose products lie in its own code; None for another kernel.

    Its operands give the shapes and its metadata the tile. Counted is every tile on or below the diagonal: which of
    them hold a sample's queries and keys, and are computed, is in the data.
    """
    kind = re.search(r"flash_(forward|backward)", one.attributes + one.name)
    noted = re.search(r'"xprof_metadata":"(\{.*?\})"', one.attributes)
    shapes = [dims for name in one.operands for type_, dims in arrays(here.instructions[name].shape)
              if type_ in ("bf16", "f32") and len(dims) >= 3]  # fmt: skip
    if kind is None or noted is None or len(shapes) < 2:
        return None
    tile = json.loads(noted[1].replace('\\"', '"'))["tile"]
    queries, keys = shapes[0], shapes[1]
    return 2 * FLASH[kind[1]] * math.prod(queries[:-2]) * queries[-1] * _tile_pairs(queries[-2], keys[-2], tile)


def _tile_pairs(queries: int, keys: int, tile: int) -> int:
    """(query, key) pairs in the tiles that a causal mask touches; queries may go on behind the last key."""
    return int(np.sum(np.minimum(keys, np.arange(tile, queries + 1, tile))) * tile)


def _group(one: Instruction) -> int:
    """Devices that take part in a collective, from whichever of the ways in which XLA writes its groups."""
    if one.opcode.startswith("collective-permute"):
        return 2
    listed = _attribute(one, r"replica_groups=\{\{([\d,]+)\}")
    if listed:
        return len(listed.split(","))
    iota = _attribute(one, r"replica_groups=\[([\d,]+)\]<=")
    if iota:
        return int(iota.split(",")[-1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", one.attributes)
    if axes is None:
        raise UsageError(f"HLO text of {one.name} has replica groups of an unknown form: {one.attributes[:200]!r}")
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])  # an axis, or a part of one: 'x':(2)4
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _sent(kind: str, held: int, devices: int) -> int:
    """Bytes that a device holding `held` of them sends in a ring of `devices`."""
    if kind in ("collective-permute", "collective-broadcast"):
        return held
    if kind == "all-gather":
        return held * (devices - 1)
    times = 2 if kind == "all-reduce" else 1  # reduce-scatter and all-to-all: all but its own part
    return times * held * (devices - 1) // devices
