"""Adapters for peft: `adapter_config.json` and `adapter_model.safetensors`, or the same beside a whole model.

Written are the names that transformers 4.57 and 5.x both load: `model.language_model.` for the decoder, and for the
tower `vision_model.` in full (4.57 passes over the shorter names of 5.x in silence).
Source: peft 0.21 `utils/save_and_load.py`, `tuners/lora/config.py`.
"""

import collections
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.convert import llava, readme, table
from llava_jax.convert.files import Spec, write_json, write_safetensors
from llava_jax.convert.source import Source, adapted
from llava_jax.convert.table import Entry
from llava_jax.errors import UsageError
from llava_jax.models import lora
from llava_jax.models.names import LINEAR

CONFIG = "adapter_config.json"
PROMPT = "llava_jax.json"  # in an adapter's directory: what peft has no place for
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"A": lora.A, "B": lora.B}


class Adapter(NamedTuple):
    """What goes into an adapter's directory: adapters of `kernels`, and the parameters `saved` whole."""

    kernels: tuple[str, ...]
    saved: tuple[str, ...]


class Module(NamedTuple):
    """One linear layer of theirs that has an adapter.

    Attributes:
      name: its path in the model, as written.
      suffix: the end of the path that is the same in every transformers.
      index: its place in our stack.
      scale: alpha / rank.
    """

    kernel: str
    name: str
    suffix: str
    index: tuple[int, ...]
    rank: int
    scale: float


def adapter_of(source: Source) -> Adapter:
    """All that a checkpoint has learned, as an adapter and a projector.

    Raises:
      ValueError: it has no adapters, or has learned what this form does not hold.
    """
    kernels = _kernels(source)
    own = {name for name, leaves in source.tensors.items() if leaves.folder.parent.parent == source.directory}
    moved = sorted(name for name in own if lora.kernel_of(name) is None)
    others = [name for name in moved if not name.startswith("projector/")]
    if moved and any(kernel.startswith("projector/") for kernel in kernels):
        others = moved
    if others:
        raise UsageError(
            f"{source.directory}: {others[0]} was trained too ({len(others)} such parameters), and a PEFT adapter "
            "holds adapters and a projector without one; use --split-projector, whose base has all the rest, or "
            "--format hf"
        )
    return Adapter(tuple(kernels), tuple(n for n in source.specs if n.startswith("projector/")) if moved else ())


def text_adapter_of(source: Source) -> tuple[Adapter, list[str]]:
    """(the decoder's adapters alone, the other adapted kernels).

    Raises:
      ValueError: there are none, or they have several ranks or scales, which vLLM reads as one.
    """
    kernels = _kernels(source)
    text = [name for name in kernels if name.startswith("llm/")]
    if not text:
        raise UsageError(f"{source.directory}: no adapter in the decoder, which --split-projector parts from the rest")
    kinds = sorted({(module.rank, module.scale) for module in _modules(source, text)})
    if len(kinds) > 1:
        shown = ", ".join(f"rank {rank} scale {scale:g}" for rank, scale in kinds)
        raise UsageError(
            f"{source.directory}: adapters of {shown}; vLLM, which --split-projector is for, takes one of each; "
            "leave the flag out, or use --format hf"
        )
    return Adapter(tuple(text), ()), [name for name in kernels if name not in text]


def write(source: Source, adapter: Adapter, directory: epath.Path, name: str, base: str | None) -> None:
    """Writes the files of an adapter into a directory.

    Args:
      name: of the whole export, for its README.
      base: what the model is called that the adapter belongs to.
    """
    modules = _modules(source, adapter.kernels)
    if not modules:
        raise UsageError(f"{source.directory}: all adapters are zero, so there is nothing to export")
    saved = _entries(source, adapter.saved)
    specs = {
        f"{PREFIX}{module.name}.lora_{letter}.weight": Spec(_shape(source, module, leaf), _dtype(source, module, leaf))
        for module in modules for letter, leaf in PARTS.items()
    }  # fmt: skip
    specs |= {PREFIX + n: Spec(e.their_shape, np.dtype(source.specs[e.ours].dtype)) for e in saved for n in e.theirs}
    write_safetensors(directory / WEIGHTS, specs, _tensors(source, modules, saved))
    write_json(directory / CONFIG, _config_json(modules, bool(saved), base))
    text = readme.adapter(name, base, bool(saved), max(module.rank for module in modules))
    files.write_whole(directory / "README.md", text.encode())


def _kernels(source: Source) -> list[str]:
    kernels = adapted(source)
    if not kernels:
        raise UsageError(f"{source.directory}: no adapters in it, so there is nothing for --format peft; use hf")
    return kernels


def _entries(source: Source, names: Sequence[str]) -> list[Entry]:
    leaves = {name: source.specs[name] for name in names}
    rows = llava.rows(llava.NEW4, source.config) if names else []
    return table.entries(leaves, rows, llava.first_layers(source.config), "conversion")


def _modules(source: Source, kernels: Sequence[str]) -> list[Module]:
    """The layers with an adapter; one whose A is zero has none."""
    found = []
    for entry in _entries(source, kernels):
        a, scale = (source.read(lora.beside(entry.ours, leaf)) for leaf in (lora.A, lora.SCALE))
        for i, theirs in enumerate(entry.theirs):
            index, name = (i,) if entry.stacked else (), theirs.removesuffix(".weight")
            used = np.flatnonzero(a[index].any(axis=0))  # columns of zeros fill a stack up to its largest rank
            if len(used):
                suffix = re.sub(r"^model\.(vision_tower\.vision_model\.)?", "", name)
                found.append(Module(entry.ours, name, suffix, index, int(used[-1]) + 1, float(scale[index])))
    return found


def _shape(source: Source, module: Module, leaf: str) -> tuple[int, int]:
    *_, inputs, outputs = source.specs[module.kernel].shape
    return (module.rank, inputs) if leaf == lora.A else (outputs, module.rank)


def _dtype(source: Source, module: Module, leaf: str) -> np.dtype:
    return np.dtype(source.specs[lora.beside(module.kernel, leaf)].dtype)


def _tensors(
    source: Source, modules: Sequence[Module], saved: Sequence[Entry]
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """In the order of the specs; one adapter's stacks in memory."""
    kernel, leaves = "", dict[str, np.ndarray]()
    for module in modules:
        if module.kernel != kernel:
            kernel = module.kernel
            leaves = {leaf: source.read(lora.beside(kernel, leaf)) for leaf in PARTS.values()}
        for letter, leaf in PARTS.items():
            matrix = leaves[leaf][module.index]
            matrix = matrix[:, : module.rank] if leaf == lora.A else matrix[: module.rank]
            yield f"{PREFIX}{module.name}.lora_{letter}.weight", LINEAR.theirs(matrix)
    for entry in saved:
        for name, tensor in table.their_tensors(entry, source.read(entry.ours)):
            yield PREFIX + name, tensor


def _config_json(modules: Sequence[Module], with_projector: bool, base: str | None) -> dict[str, Any]:
    alphas = {module: _number(module.scale * module.rank) for module in modules}
    (rank, alpha), _ = collections.Counter((m.rank, alphas[m]) for m in modules).most_common(1)[0]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "rank_pattern": {re.escape(m.suffix): m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {re.escape(m.suffix): alphas[m] for m in modules if alphas[m] != alpha},
        "target_modules": _target_modules(modules),
        "modules_to_save": ["multi_modal_projector"] if with_projector else None,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip


def _number(alpha: float) -> int | float:
    """A whole number where it is one: peft's own type, and JSON that others read."""
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(modules: Sequence[Module]) -> str:
    """A regular expression: peft takes a list by suffixes, and CLIP has a q_proj too."""
    layers: dict[str, list[str]] = {}
    for module in modules:
        match = re.match(r"(.*\.layers\.)?(?:(\d+)\.)?(.*)", module.suffix)
        assert match is not None  # every part may be empty
        start, number, end = match.groups("")
        layers.setdefault(f"{re.escape(start)}{{}}{re.escape(end)}", []).append(number)
    parts = [form.format(rf"(?:{'|'.join(found)})\." if found != [""] else "") for form, found in layers.items()]
    return rf"(?:.*\.)?(?:{'|'.join(parts)})"
