"""Our checkpoint into the files of others: the Hugging Face layout, the original code's, or the projector alone.

A parameter is read whole, taken apart and written as it comes; those that a checkpoint takes from its base are read
there, in the base's own dtype.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import (
    chat_template,
    exported,
    llama_cpp,
    llava,
    minigpt4,
    peft,
    processor,
    readme,
    table,
    tiling,
    tokenizer_files,
    torch_zip,
    views,
)  # fmt: skip
from llava_jax.convert.files import Spec, write_json, write_shards
from llava_jax.convert.importing import SIDE_TOWER
from llava_jax.convert.prompting import OURS
from llava_jax.convert.source import Source, adapted, merge_adapters, open_source
from llava_jax.errors import UsageError
from llava_jax.models import eva, lora, registry
from llava_jax.models.flamingo import PerceiverConfig
from llava_jax.models.parts import TowerConfig
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres, ending, templates


def export(
    format: str,
    source: epath.PathLike,
    destination: epath.PathLike,
    step: reader.Step = None,
    dtype: str | None = None,
    split_projector: bool = False,
) -> None:
    """Writes the checkpoint `source` as the new directory `destination`.

    Args:
      format: "hf", "llava", "projector", "gguf", or "peft". All but the last, and a MiniGPT-v2's projector, hold no
        adapters: these are merged.
      dtype: of all tensors ("float32", "float16", "bfloat16"); None leaves each in its own. Of "gguf": of its matrices,
        "f32", "f16" (None) or "q8_0".
      split_projector: of "peft": a model in `destination/base` that has all but the decoder's adapters, and these in
        `destination/adapter`.

    Raises:
      UnusableCheckpoint: the checkpoint cannot be read.
      ValueError: the format cannot hold this model, or `destination` exists or has an unfit name.
    """
    formats = {"hf": _export_hf, "llava": _export_llava, "projector": _export_projector, "peft": _export_peft,
               "gguf": functools.partial(llama_cpp.export, kind=dtype or "f16")}  # fmt: skip
    others = {"hf": _export_blip2, "projector": _export_llama_proj}
    if format not in formats:
        raise UsageError(f"format {format!r}: wanted one of {', '.join(formats)}")
    if split_projector and format != "peft":
        raise UsageError(f"--split-projector: the format {format} has one model and no adapter; wanted --format peft")
    dtypes = llama_cpp.KINDS if format == "gguf" else table.FLOATS
    if dtype is not None and dtype not in dtypes:
        raise UsageError(f"--dtype {dtype}: wanted one of {', '.join(dtypes)} for --format {format}")
    final = epath.Path(destination)
    opened = open_source(source, step)
    if minigpt4.is_blip2_family(opened.config):
        if format not in others:
            raise UsageError(
                f"--format {format}: {source} has the connector {opened.config.projector!r}, which that format lacks; "
                f"wanted one of {', '.join(others)}"
            )
        formats = others
    if dtype is not None and format != "gguf":
        opened = opened._replace(specs={
            name: jax.ShapeDtypeStruct(spec.shape, lora.running_dtype(name, spec.dtype, np.dtype(dtype)))
            for name, spec in opened.specs.items()
        })  # fmt: skip
    write = _export_split if split_projector else formats[format]
    with reader.staged(final) as partial:
        write(opened if write in _WITH_ADAPTERS else merge_adapters(opened), partial, final)


def _export_peft(source: Source, partial: epath.Path, final: epath.Path) -> None:
    peft.write(source, peft.adapter_of(source), partial, final.name, _base_name(source))
    write_json(partial / peft.PROMPT, _kept(source.metadata.prompt))


def _base_name(source: Source) -> str | None:
    """What a frozen decoder was imported from, for a reader of the adapter; nothing is decided by it."""
    for path in (path for base in source.metadata.base for path in model_json.candidates(source.directory, base)):
        if files.exists(path / model_json.FILE) and "imported_from" in model_json.read(path).source:
            return str(model_json.read(path).source["imported_from"])
    return None


def _export_split(source: Source, partial: epath.Path, final: epath.Path) -> None:
    """A whole model beside an adapter of the decoder alone: vLLM takes no other. Source: vLLM 0.33 lora/peft_helper."""
    adapter, rest = peft.text_adapter_of(source)
    files.make_directory(partial / "base")
    _export_hf(merge_adapters(source, rest), partial / "base", final / "base")
    files.make_directory(partial / "adapter")
    peft.write(source, adapter, partial / "adapter", f"{final.name}/adapter", str(reader.absolute(final / "base")))
    write_json(partial / "adapter" / peft.PROMPT, _kept(source.metadata.prompt))


class Vocabulary(NamedTuple):
    """What transformers has to know of the words. rows: of the embedding; ends: ids that begin and end a text."""

    words: tokenizer_files.Words
    rows: int
    image_id: int
    pad_id: int
    ends: tuple[int | None, int]


def _vocabulary(source: Source, *others: str) -> Vocabulary:
    """The tokenizer with a token for the image, and `others`, and as many rows as that takes."""
    folder, legacy = source.directory / model_json.TOKENIZER, source.metadata.prompt.legacy
    words = tokenizer_files.with_image_token(folder, legacy, *others)
    llm = source.config.llm
    rows = llm.vocab + llm.added_tokens
    rows = rows if rows >= words.tokenizer.size else -(-words.tokenizer.size // 64) * 64
    image_id, pad_id = (words.ids[text] for text in (tokenizer_files.IMAGE, words.pad))
    return Vocabulary(words, rows, image_id, pad_id, (source.words.bos_id, source.words.eos_id))


def _generation(source: Source, pad_id: int) -> dict[str, Any]:
    """generation_config.json: an answer ends where one of training ends."""
    ids, texts = ending.of(templates.get(source.metadata.prompt.template), source.words)
    ends = {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)} | ({"stop_strings": list(texts)} if texts else {})
    return {"bos_token_id": source.words.bos_id, "pad_token_id": pad_id} | ends


def _export_hf(source: Source, partial: epath.Path, final: epath.Path) -> None:
    config, prompt = source.config, source.metadata.prompt
    tiles = anyres.from_json(prompt.image_mode, prompt.tiling)
    kind = tiling.hub_kind(tiles)  # refuses before it writes
    if config.image_newline and kind == tiling.PLAIN:
        raise UsageError(
            f"{source.directory}: image mode {prompt.image_mode!r} and an image_newline, which transformers' Llava has "
            "not; use --format llava"
        )
    videos = (tokenizer_files.VIDEO,) if kind == tiling.ONEVISION else ()
    words, rows, image_id, pad_id, ends = _vocabulary(source, *videos)
    dtype = _write_tensors(source, partial, rows, llava.rows(llava.HUB, config), "")
    content = llava.hub_config_json(config, tiles, rows, dtype, image_id, pad_id, ends)
    if videos:
        content["video_token_index"] = words.ids[tokenizer_files.VIDEO]
        write_json(partial / "video_preprocessor_config.json", processor.video_json(config.vision))
    write_json(partial / "config.json", content | {OURS: _kept(prompt)})
    write_json(partial / "generation_config.json", _generation(source, pad_id))
    _write_bytes(partial, tokenizer_files.files(words, f"{tiling.HUBS[kind].name}Processor"))
    images = processor.preprocessor_json(config.vision, prompt.image_mode, tiles)
    write_json(partial / "preprocessor_config.json", images)
    write_json(partial / "processor_config.json", processor.processor_json(config.vision, tiles))
    text = None
    if not prompt.image_start_end:  # marks around images stand inside the text that the processor expands
        picture = chat_template.HUB_VIDEOS if videos else chat_template.HUB
        text = chat_template.render(templates.get(prompt.template), words.tokenizer, picture)
    if text is not None:
        files.write_whole(partial / "chat_template.jinja", text.encode())
        write_json(partial / "chat_template.json", {"chat_template": text})  # wins where both are read
    files.write_whole(partial / "README.md", readme.hub(config, prompt, final.name, text is not None).encode())


def _export_blip2(source: Source, partial: epath.Path, final: epath.Path) -> None:
    """A Blip2ForConditionalGeneration with a LLaMA."""
    config, prompt = source.config, source.metadata.prompt
    words, rows, image_id, pad_id, ends = _vocabulary(source)
    content = minigpt4.hub_config_json(config, rows, "float32", image_id, pad_id, ends)  # refuses before it writes
    if prompt.image_mode != "squash":
        raise UsageError(f"{source.directory}: image mode {prompt.image_mode!r}; BLIP-2's processor only squashes")
    dtype = _write_tensors(source, partial, rows, minigpt4.hub_rows(config), "")
    content = minigpt4.hub_config_json(config, rows, dtype, image_id, pad_id, ends)
    write_json(partial / "config.json", content | {OURS: _kept(prompt) | {"ln_vision_eps": config.ln_vision_eps}})
    write_json(partial / "generation_config.json", _generation(source, pad_id))
    _write_bytes(partial, tokenizer_files.files(words, None))  # Blip2Processor wants no image_token of its own
    write_json(partial / "preprocessor_config.json", processor.blip_json(config.vision))
    processing = {"processor_class": "Blip2Processor", "num_query_tokens": config.image_features}
    write_json(partial / "processor_config.json", processing)
    files.write_whole(partial / "README.md", readme.blip2(config, prompt, final.name).encode())


def _export_llama_proj(source: Source, partial: epath.Path, final: epath.Path) -> None:
    """`checkpoint.pth` as the original code's training leaves it, under "model": the linear layer and adapters."""
    decoder = [name for name in adapted(source) if name.startswith("llm/")]
    merged = merge_adapters(source, set(adapted(source)) - set(decoder))
    leaves = {name: spec for name, spec in merged.specs.items() if name.startswith("projector/")}
    no_place = isinstance(source.config.resampler, PerceiverConfig)  # a Q-Former is read from BLIP-2's own file
    if no_place or set(leaves) != {"projector/0/kernel", "projector/0/bias"}:
        raise UsageError(f"{source.directory}: the original code has no connector {source.config.projector!r}. "
                         "`convert merge` writes a whole checkpoint of our own")  # fmt: skip
    for kernel in decoder:
        _check_original_adapter(source, kernel)
        leaves |= {name: source.specs[name] for name in (lora.beside(kernel, lora.A), lora.beside(kernel, lora.B))}
    merged, tensors = merged._replace(specs=leaves), {}
    rows = [*minigpt4.projection_rows("llama_proj."), *minigpt4.adapter_rows()]
    for entry in table.entries(leaves, rows, {}, "conversion"):
        tensors |= dict(table.their_tensors(entry, merged.read(entry.ours)))
    torch_zip.write_torch(partial / "checkpoint.pth", tensors, within=torch_zip.TRAINER)


def _check_original_adapter(source: Source, kernel: str) -> None:
    """The original code has adapters of the attention only, and takes their alpha from its own settings."""
    rank = source.specs[lora.beside(kernel, lora.A)].shape[-1]
    alphas = rank * source.read(lora.beside(kernel, lora.SCALE))
    if not re.fullmatch("llm/blocks/[qkvo]/kernel", kernel) or not np.allclose(alphas, minigpt4.LORA_ALPHA):
        raise UsageError(
            f"{source.directory}: an adapter of {kernel} with alpha {alphas.max():g}; the original code reads adapters "
            f"of q, k, v and o with alpha {minigpt4.LORA_ALPHA}: train it so, or keep the whole with `convert merge`"
        )


def _export_llava(source: Source, partial: epath.Path, final: epath.Path) -> None:
    if "llava" not in final.name.lower():
        raise UsageError(
            f"{final}: the original code tells a model's kind by its directory's name; wanted one with 'llava' in it, "
            f"such as {final.parent / ('llava-' + final.name)}"
        )
    config, prompt = source.config, source.metadata.prompt
    if prompt.image_mode == "squash":
        raise UsageError(f"{source.directory}: image mode 'squash', which the original code has not; use --format hf")
    words = tokenizer_files.without_image_token(source.words)
    rows = tokenizer_files.kept_rows(source.words, config.llm.vocab + config.llm.added_tokens)
    table_rows = llava.rows(llava.ORIGINAL, config)
    tower, select_layer = _hub_tower(config)
    if tower is None:
        dtype = _write_tensors(source, partial, rows, table_rows, "llm/", "projector/", "image_newline")
        _write_side_tower(source, partial / SIDE_TOWER)
    else:
        dtype = _write_tensors(source, partial, rows, table_rows, "")
    name = tower or str(reader.absolute(final / SIDE_TOWER))
    content = llava.original_config_json(config, rows, dtype, name, tower is not None, select_layer, prompt)
    ends = {"bos_token_id": source.words.bos_id, "eos_token_id": source.words.eos_id}
    pad = {"pad_token_id": words.ids.get(words.pad, 0)}
    write_json(partial / "config.json", content | ends | pad | {OURS: _kept(prompt)})
    # The original code stops at texts by itself, and its transformers knows no stop_strings.
    generation = _generation(source, words.ids.get(words.pad, 0))
    write_json(partial / "generation_config.json", {key: generation[key] for key in (*ends, *pad)})
    _write_bytes(partial, tokenizer_files.files(words, None))
    mode = "square" if prompt.image_mode == anyres.ANYRES else prompt.image_mode  # of tiles nothing is cut
    write_json(partial / "preprocessor_config.json", processor.preprocessor_json(config.vision, mode))
    files.write_whole(partial / "README.md", readme.original(config, prompt, final.name, tower).encode())


def _export_projector(source: Source, partial: epath.Path, final: epath.Path) -> None:
    """`mm_projector.bin` and `config.json`, as the first stage of the original code leaves them."""
    config = source.config
    leaves = {name: spec for name, spec in source.specs.items() if name.startswith("projector/")}
    if not leaves:
        raise UsageError(f"{source.directory}: projector {config.projector!r} has no weights to export")
    found = table.entries(leaves, llava.projector_rows(llava.ORIGINAL, config.projector), {}, "conversion")
    tensors = {}
    for entry in found:
        tensors |= dict(table.their_tensors(entry, source.read(entry.ours)))
    torch_zip.write_torch(partial / "mm_projector.bin", tensors)
    dtype = str(next(iter(leaves.values())).dtype)
    vocab = config.llm.vocab + config.llm.added_tokens
    name, select_layer = _hub_tower(config)
    name, prompt = name or SIDE_TOWER, source.metadata.prompt
    content = llava.original_config_json(config, vocab, dtype, name, False, select_layer, prompt)
    write_json(partial / "config.json", content | {OURS: _kept(source.metadata.prompt)})


def _write_tensors(source: Source, partial: epath.Path, vocab: int, rows: Sequence[table.Row], *leaves: str) -> str:
    """Writes the shards of the parameters that begin with one of `leaves`; returns the dtype of most of the bytes."""
    specs = exported.specs_of(source, vocab)
    specs = {name: spec for name, spec in specs.items() if name.startswith(leaves)}
    found = table.entries(specs, rows, llava.first_layers(source.config), "conversion")
    theirs = {name: Spec(e.their_shape, specs[e.ours].dtype) for e in found for name in e.theirs}
    tensors = exported.tensors_of(source, found, specs)
    if registry.tower_of(source.config.vision) is eva.PART:
        theirs, tensors = views.joined_specs(theirs), views.joined(tensors)
    write_shards(partial, theirs, tensors)
    sizes: dict[str, int] = {}
    for spec in specs.values():
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + table.nbytes(spec)
    return max(sizes, key=lambda name: sizes[name])


def _write_side_tower(source: Source, directory: epath.Path) -> None:
    """A tower of unknown name as a directory of its own, which the original code loads by its path."""
    files.make_directory(directory)
    tower = registry.tower_of(source.config.vision)
    _write_tensors(source, directory, source.config.llm.vocab, tower.rows("vision_model."), "vision/")
    content = {"architectures": [tower.hub_class], **tower.config_json(source.config.vision)}
    write_json(directory / "config.json", content)
    write_json(directory / "preprocessor_config.json", processor.preprocessor_json(source.config.vision, "square"))


def _hub_tower(config: LlavaConfig) -> tuple[str | None, int]:
    """(the name under which the original code fetches a tower of these sizes, or None; `select_layer` in that one)."""
    part, vision = registry.tower_of(config.vision), config.vision
    for name, tower in part.hub.items():
        for form in (tower, part.kept(tower)):
            if _fetched(form) == _fetched(vision):
                return name, vision.select_layer - (tower.layers - form.layers)
    return None, vision.select_layer


def _fetched(tower: TowerConfig) -> dict[str, Any]:
    """What a tower's own files say; which of its features are taken, the LLaVA's config says."""
    return {name: value for name, value in vars(tower).items() if name not in ("select_layer", "select_feature")}


def _kept(prompt: model_json.PromptMetadata) -> dict[str, Any]:
    """What the formats have no key for; a later `convert import` reads it, others pass over it."""
    kept = {"template": prompt.template, "image_mode": prompt.image_mode, "image_start_end": prompt.image_start_end}
    parts = {"tiling": prompt.tiling, "video": prompt.video}
    return kept | {key: dict(part) for key, part in parts.items() if part is not None}


def _write_bytes(directory: epath.Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        files.write_whole(directory / name, content)


# They say what becomes of adapters themselves; for all others these are merged.
_WITH_ADAPTERS = (_export_peft, _export_split, _export_llama_proj)
