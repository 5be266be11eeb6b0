"""Adapters of peft into a checkpoint of ours that rests on an imported model.

All namings are read: those of transformers 4 and 5, and the original code's with its `non_lora_trainables`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import llava, table, tiling, unread
from llava_jax.convert.files import TensorFiles, open_files, read_json
from llava_jax.convert.peft import CONFIG, PREFIX, PROMPT
from llava_jax.convert.prompting import PromptOptions, original_mode
from llava_jax.convert.source import Source, adapted, open_source
from llava_jax.convert.table import Entry
from llava_jax.errors import MissingWeights, UnusableCheckpoint, UsageError
from llava_jax.models import lora
from llava_jax.models.names import LINEAR, NEVER_RUN
from llava_jax.prompt import anyres, ending, templates

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_WEIGHTS = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")  # of the original code

_VOCABULARY = ("llm/embed/table", "llm/head/kernel")

# What an adapter's config may say, the default first: another value makes another function of the same tensors.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "use_dora": (False,), "use_qalora": (False,),
    "lora_bias": (False,), "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "use_rslora": (False, True), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
_NUMBERS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # key -> that of modules with their own


class Tensor(NamedTuple):
    """One tensor of theirs and what it is here.

    Attributes:
      module: the path of the linear layer it belongs to.
      part: "A" or "B" of an adapter; "" for a parameter that was saved whole.
      entry: our parameter (for an adapter its kernel).
      index: place in our stack.
    """

    name: str
    module: str
    part: str
    entry: Entry
    index: tuple[int, ...]


def is_adapter(directory: epath.PathLike) -> bool:
    """Whether a directory holds an adapter; the original code's holds config.json too."""
    return files.is_file(epath.Path(directory) / CONFIG)


def import_adapter(
    source: epath.PathLike, destination: epath.PathLike, base: epath.PathLike | None, options: PromptOptions
) -> None:
    """Makes the checkpoint `destination` of an adapter and names `base`, a checkpoint of ours, for the rest.

    A layer without an adapter, or with one of a lower rank than its stack's, is filled with zeros, which change
    nothing and never move. Adapters of the tower's blocks that LLaVA does not run are left out.

    Raises:
      FileNotFoundError: a file is missing.
      UnusableCheckpoint: the tensors do not fit the base or the adapter's config; names them.
      ValueError: no base, one with adapters of its own, or an existing `destination`.
    """
    directory = epath.Path(source)
    if base is None:
        raise UsageError(f"{directory} holds an adapter: say --base CHECKPOINT, the imported model it was trained on")
    config = _read_config(directory)
    opened = open_source(base)
    if adapted(opened):
        raise UsageError(f"--base {base} has adapters of its own: `convert merge {base} OUT` first, and say --base OUT")
    tensors = open_files(directory, [_weights(directory), *_existing(directory, OTHER_WEIGHTS)])
    found = _find(tensors, _known(opened), config)
    adapters = {t.entry.ours: [o for o in found if o.part and o.entry == t.entry] for t in found if t.part}
    step = reader.latest_step(base)
    assert step is not None
    rest = model_json.Base(str(reader.absolute(base)), step, reader.fingerprint(base, step), (".*",))
    origin = {"imported_from": str(directory), "layout": "peft", "left_out": len(tensors.specs) - len(found)}
    metadata = model_json.Metadata(opened.metadata.model, _prompt(directory, opened, options), (rest,), origin)
    with reader.staged(destination) as partial:
        with reader.TensorWriter(partial / "0" / reader.PARAMS) as writer:
            for kernel, parts in adapters.items():
                for leaf, stack in _stacks(opened.specs[kernel].shape, parts, tensors, config):
                    writer.write(lora.beside(kernel, leaf), stack)
            for entry in _whole(found):
                writer.write(entry.ours, table.read_tensor(entry, tensors))
        model_json.write(partial, metadata, model_json.read_tokenizer_files(base))


def _read_config(directory: epath.Path) -> dict[str, Any]:
    content = read_json(directory / CONFIG)
    for key, allowed in _PLAIN.items():
        if content.get(key, allowed[0]) not in allowed:
            raise UnusableCheckpoint(
                f"{directory / CONFIG}: {key} is {content[key]!r}; wanted {allowed[0]!r}. Merge it in peft "
                "(merge_and_unload), save that model, and import it"
            )
    for key, patterns in _NUMBERS.items():
        _check_number(content.get(key), f"{directory / CONFIG}: {key}")
        _check_patterns(content.get(patterns) or {}, f"{directory / CONFIG}: {patterns}")
    return content


def _check_patterns(own: Any, where: str) -> None:
    if not isinstance(own, dict):
        raise UnusableCheckpoint(f"{where} is {own!r}; wanted an object of numbers")
    for form, value in own.items():
        _check_number(value, f"{where}: {form}")
        try:
            re.compile(form)
        except re.error as error:
            raise UnusableCheckpoint(f"{where}: {form!r} is no regular expression ({error})") from None


def _check_number(value: Any, where: str) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UnusableCheckpoint(f"{where} is {value!r}; wanted a number above 0")


def _weights(directory: epath.Path) -> epath.Path:
    found = _existing(directory, WEIGHTS)
    if not found:
        raise MissingWeights(f"{directory}: no weights here; wanted {' or '.join(WEIGHTS)}")
    return found[0]


def _existing(directory: epath.Path, names: Iterable[str]) -> list[epath.Path]:
    """The first of the files that is there; peft and the original code write either, and the safe one counts."""
    return [directory / name for name in names if files.is_file(directory / name)][:1]


def _known(source: Source) -> dict[str, tuple[Entry, tuple[int, ...]]]:
    """{their name in any layout: (our parameter, place in its stack)}."""
    leaves = {name: spec for name, spec in source.specs.items() if not name.endswith("/added")}
    found: dict[str, tuple[Entry, tuple[int, ...]]] = {}
    for layout in (llava.NEW4, llava.NEW5, llava.HUB, llava.LEG5, llava.ORIGINAL):
        rows = llava.parts_rows(layout, source.config)
        mine = leaves
        if layout is llava.ORIGINAL or source.config.projector == "mlp2x_gelu":
            rows += llava.projector_rows(layout, source.config.projector)
        else:
            mine = {name: leaf for name, leaf in leaves.items() if not name.startswith("projector/")}
        for entry in table.entries(mine, rows, llava.first_layers(source.config), "conversion"):
            found |= {name: (entry, (i,) if entry.stacked else ()) for i, name in enumerate(entry.theirs)}
    return found


def _find(
    tensors: TensorFiles, known: Mapping[str, tuple[Entry, tuple[int, ...]]], config: Mapping[str, Any]
) -> list[Tensor]:
    """What each tensor is; those of blocks that never run are left out."""
    found, faults = [], []
    for name, spec in tensors.specs.items():
        plain = name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain)
        module, part = match.groups() if match else (plain.removesuffix(".weight"), "")
        if name == plain or (f"{module}.weight" if part else plain) not in known:
            faults.append(f"{name} {spec.shape} is not known")
            continue
        tensor = Tensor(name, module, part, *known[f"{module}.weight" if part else plain])
        if tensor.part and not lora.targets([tensor.entry.ours]):
            faults += [f"{name}: no adapter can be there"] * (not tensor.entry.ours.startswith(NEVER_RUN))
            continue
        wanted = _shape(tensor, config)
        if spec.shape != wanted or spec.dtype.name not in table.FLOATS:
            faults.append(f"{name} has shape {spec.shape} and dtype {spec.dtype}, wanted {wanted} and floats")
        found.append(tensor)
    faults += _incomplete(found, tensors) or ([] if any(tensor.part for tensor in found) else ["no lora_A in it"])
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UnusableCheckpoint(
            f"{tensors.path} does not fit its {CONFIG} and --base: {'; '.join(faults[:4])}{more}"
            + _other_vocabulary(found, tensors, config)
        )
    return found


def _other_vocabulary(found: Iterable[Tensor], tensors: TensorFiles, config: Mapping[str, Any]) -> str:
    """The remedy for an adapter that keeps the vocabulary's rows of a model with more or fewer of them."""
    for name, _, part, entry, _ in found:
        (rows, *width), wanted = tensors.specs[name].shape, entry.their_shape
        if not part and entry.ours in _VOCABULARY and rows != wanted[0] and tuple(width) == wanted[1:]:
            model = config.get("base_model_name_or_path") or "THAT_MODEL"
            return (
                f". It was trained on a model with {rows} rows of vocabulary, --base has {wanted[0]}; `export --format "
                f"hf` adds rows for <image> and <pad>. `convert import {model} DST`, and say --base DST"
            )
    return ""


def _incomplete(found: Iterable[Tensor], tensors: TensorFiles) -> list[str]:
    """What is there twice, lacks its other half or its other layers, or is of two dtypes."""
    faults = []
    groups: dict[tuple[str, str], dict[tuple[int, ...], str]] = {}
    entries = {}
    for name, _, part, entry, index in found:
        places = groups.setdefault((entry.ours, part), {})
        faults += [f"{name} and {places[index]} are the same"] if index in places else []
        places[index], entries[entry.ours] = name, entry
    for (ours, part), places in groups.items():
        other = groups.get((ours, {"A": "B", "B": "A"}.get(part, "")), {})
        wanted = range(len(entries[ours].theirs)) if not part else ()
        faults += [f"{name} has no other half" for index, name in places.items() if index not in other]
        faults += [f"{ours} lacks layer {i}" for i in wanted if entries[ours].stacked and (i,) not in places]
        kinds = sorted({str(tensors.specs[name].dtype) for name in places.values()})
        faults += [f"{ours}: its layers have dtypes {', '.join(kinds)}"] if len(kinds) > 1 else []
    return faults


def _shape(tensor: Tensor, config: Mapping[str, Any]) -> tuple[int, ...]:
    rank, shape = _of(tensor.module, config, "r", "rank_pattern"), tensor.entry.their_shape
    return {"": shape, "A": (rank, *shape[1:]), "B": (*shape[:1], rank)}[tensor.part]


def _of(module: str, config: Mapping[str, Any], key: str, patterns: str) -> Any:
    """A module's own value, or the config's. Source: peft 0.21 `get_pattern_key`."""
    own = config.get(patterns) or {}
    return next((own[form] for form in own if re.match(rf"(.*\.)?({form})$", module)), config[key])


def _scale(module: str, config: Mapping[str, Any]) -> float:
    rank, alpha = _of(module, config, "r", "rank_pattern"), _of(module, config, "lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _stacks(
    shape: tuple[int, ...], parts: Iterable[Tensor], tensors: TensorFiles, config: Mapping[str, Any]
) -> list[tuple[str, np.ndarray]]:
    """The three parameters beside a kernel of `shape`."""
    *stack, inputs, outputs = shape
    parts = list(parts)
    rank = max(_of(tensor.module, config, "r", "rank_pattern") for tensor in parts)
    dtype = tensors.specs[parts[0].name].dtype
    a, b = np.zeros((*stack, inputs, rank), dtype), np.zeros((*stack, rank, outputs), dtype)
    scale = np.full(stack, _scale("", config), np.float32)
    for tensor in parts:
        matrix = LINEAR.ours(tensors.read(tensor.name))
        scale[tensor.index] = _scale(tensor.module, config)
        if tensor.part == "A":
            a[tensor.index][:, : matrix.shape[1]] = matrix
        else:
            b[tensor.index][: matrix.shape[0]] = matrix
    return [(lora.A, a), (lora.B, b), (lora.SCALE, scale)]


def _whole(found: Iterable[Tensor]) -> list[Entry]:
    """The parameters that were saved whole, by the names that they have in this file."""
    saved: dict[str, list[Tensor]] = {}
    for tensor in found:
        if not tensor.part:
            saved.setdefault(tensor.entry.ours, []).append(tensor)
    return [
        tensors[0].entry._replace(theirs=tuple(t.name for t in sorted(tensors, key=lambda tensor: tensor.index)))
        for tensors in saved.values()
    ]


def _prompt(directory: epath.Path, base: Source, options: PromptOptions) -> model_json.PromptMetadata:
    """Options first, then what the adapter's directory says, then the base."""
    file = directory / PROMPT
    kept = unread.kept(read_json(file) if files.is_file(file) else {}, str(file))
    content = read_json(directory / "config.json") if files.is_file(directory / "config.json") else {}
    if llava.is_original(content):
        tiles = tiling.read_original(content, str(directory / "config.json"), base.config.vision.image_size)
        kept |= {"image_mode": original_mode(content, tiles), "tiling": anyres.to_json(tiles)}
        kept["image_start_end"] = bool(content.get("mm_use_im_start_end", False))
    fallback = base.metadata.prompt
    mode = options.image_mode or kept.get("image_mode", fallback.image_mode)
    prompt = model_json.PromptMetadata(
        options.template or kept.get("template", fallback.template),
        fallback.legacy if options.legacy is None else options.legacy,
        mode,
        kept.get("image_start_end", fallback.image_start_end),
        kept.get("tiling", fallback.tiling) if mode == anyres.ANYRES else None,
        kept.get("video", fallback.video),
    )
    anyres.check(anyres.from_json(mode, prompt.tiling), base.config.image_newline, base.config.image_features)
    ending.check(templates.get(prompt.template), base.words, str(base.directory), prompt.image_start_end)
    return prompt
