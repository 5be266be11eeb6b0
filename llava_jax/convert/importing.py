"""Their weights into our checkpoint: a whole LLaVA or BLIP-2, or one put together from its parts.

Tensors are read and written one at a time, and the directory gets its name when all are there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llava_jax import files, params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import llava, minigpt4, processor, prompting, table, unread, views
from llava_jax.convert.files import TensorFiles, open_tensors, read_json
from llava_jax.convert.prompting import OURS, UNSAID, PromptOptions
from llava_jax.convert.table import Part
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models import eva, lora, registry
from llava_jax.models.flamingo import CrossConfig
from llava_jax.models.llava import abstract_params, init_params
from llava_jax.models.parts import Decoder, DecoderConfig, Tower, TowerConfig
from llava_jax.models.presets import LlavaConfig, config_to_json
from llava_jax.models.qformer import QFormerConfig
from llava_jax.prompt import anyres, ending, templates, tokenizer

SIDE_TOWER = "vision_tower"  # where `export --format llava` puts a tower that no hub name stands for


def import_checkpoint(
    source: epath.PathLike,
    destination: epath.PathLike,
    vision: epath.PathLike | None = None,
    options: PromptOptions = UNSAID,
) -> None:
    """Makes the checkpoint `destination` of a LLaVA directory, Hugging Face's or the original code's, or of a BLIP-2
    directory with a LLaMA.

    Args:
      vision: a CLIP directory; the original format names its tower but seldom holds it.

    Raises:
      FileNotFoundError: a directory or a file of it is missing.
      UnusableCheckpoint: the files are damaged or are not what they should be; names the tensor or the key.
      ValueError: `destination` exists, or an option is wrong.
    """
    directory = epath.Path(source)
    if files.exists(directory / model_json.FILE):
        raise UnusableCheckpoint(f"{directory} is a llava_jax checkpoint already ({model_json.FILE}): import nothing")
    content = read_json(directory / "config.json")
    try:
        config, parts, layout = _read(directory, content, vision)
        tensors = [str(part.tensors.path) for part in parts]
        origin = {"imported_from": str(directory), "layout": layout, "tensors": tensors}
        prompt = prompting.read(directory, content, options, config)
        _write(destination, config, parts, {}, prompt, directory, origin)
    except UnusableCheckpoint as error:  # what it calls itself says most to who asks for help
        raise type(error)(f"{error} ({unread.identity(content)})") from None


def _read(
    directory: epath.Path, content: Mapping[str, Any], vision: epath.PathLike | None
) -> tuple[LlavaConfig, list[Part], str]:
    """(the model, its parts, the name of their layout) of a directory whose config.json is `content`."""
    where = str(directory / "config.json")
    unread.refuse_quantised(content, str(directory))
    if llava.is_original(content):
        config, parts = _original(directory, content, vision)
        return config, parts, llava.ORIGINAL.name
    _refuse_vision(vision, directory)
    if minigpt4.is_hub(content):
        tensors = open_tensors(directory)
        ln_eps = unread.kept(content.get(OURS), f"{where}: {OURS}").get("ln_vision_eps")
        config = minigpt4.read_hub(content, where, tensors, ln_eps)
        return _seen(config, directory), [minigpt4.hub_part(config, tensors)], minigpt4.HUB_TYPE
    tower, _ = llava.hub_parts(content, where)
    tensors = open_tensors(directory)
    layout = llava.find_layout(tensors, tower)
    config = _seen(llava.read_hub_config(content, where, layout, tensors), directory)
    return config, [Part(("",), tensors, llava.rows(layout, config))], layout.name


def _refuse_vision(vision: epath.PathLike | None, directory: epath.Path) -> None:
    if vision is not None:
        raise UsageError(f"--vision {vision}: {directory} is in the Hugging Face format, which holds its own tower")


def assemble(
    destination: epath.PathLike,
    vision: epath.PathLike,
    llm: epath.PathLike,
    projector: epath.PathLike | None = None,
    projector_type: str | None = None,
    select_layer: int | None = None,
    seed: int = 0,
    options: PromptOptions = UNSAID,
    connector: epath.PathLike | None = None,
    image_size: int | None = None,
    newline: bool = False,
    cut_tower: bool = False,
) -> None:
    """Makes a fresh checkpoint of a tower, a language model's directory and a connector: a LLaVA or a MiniGPT-4.

    Args:
      vision: a directory of a CLIP or a SigLIP, `eva_vit_g.pth`, or a BLIP-2 directory.
      projector: a file with `mm_projector` tensors (`mm_projector.bin`, or safetensors), or a checkpoint of MiniGPT-4's
        (`llama_proj`); None draws a new one.
      projector_type: the connector; None is that of `projector` or `connector`, else concat4_linear on an EVA,
        mlp2x_gelu on all others. Its linear layers start like torch's nn.Linear; all that is drawn comes from `seed`,
        in float32.
      select_layer: of a CLIP or a SigLIP; None is -2.
      options: where nothing is said, the decoder's template and images padded; of a MiniGPT-4 its chat's template,
        squashed, and the words of a LLaMA cut as by the transformers that it was trained with.
      connector: the Q-Former with the norm before it: `blip2_pretrained_*.pth`, or a BLIP-2 directory.
      image_size: pixels a side, to which the tower's positions are interpolated; None is the tower's own. MiniGPT-v2's
        file does not say it.
      newline: with an `image_newline`, drawn from `seed` too: what a training with tiles begins with.
      cut_tower: a SigLIP without the last block and the head, as OneVision keeps it; neither is behind any feature.

    Raises:
      As `import_checkpoint`.
    """
    llm_directory, is_eva = epath.Path(llm), minigpt4.holds_eva(vision)
    parts, given = [], projector_type
    if projector is not None:
        kind, parts = _projector_parts(open_tensors(projector))
        given = kind or projector_type
    added = minigpt4.adapters(parts)
    if added and is_eva and image_size is None:
        raise UsageError(
            f"--projector {projector}: a MiniGPT-v2's, since it has adapters of the decoder; it does not say how large "
            "the pictures were: give --image-size (448 as released)"
        )
    pretrained = None if connector is None else minigpt4.connector(epath.Path(connector))
    kind = given or ("qformer" if pretrained else "concat4_linear" if is_eva else "mlp2x_gelu")
    if pretrained is not None:
        if kind != "qformer":
            raise UsageError(f"--connector {connector}: a Q-Former, which the connector {kind!r} has not")
        parts.append(pretrained.part)
    tower, part = _tower(vision, kind, select_layer, image_size, cut_tower)
    decoder, content, llm_tensors = _open_decoder(llm_directory)
    head = "lm_head.weight"
    where = str(llm_directory / "config.json")
    content = llava.with_head(content, where, llm_tensors, head)
    parts += [part, Part(("llm/",), llm_tensors, decoder.rows("model.", head))]
    config = _assembled(
        tower, kind, unread.read_part(decoder, content, where),
        None if pretrained is None else pretrained.config, newline,
    )  # fmt: skip
    fresh = _fresh(config, parts, seed) | _scales(added, config)
    origin = {"vision": str(vision), "llm": str(llm_directory), "projector": str(projector or f"seed {seed}")}
    origin |= {} if connector is None else {"connector": str(connector)}
    prompt = _assembled_prompt(options, kind, is_eva, bool(added), llm_directory, decoder.template)
    _write(destination, config, parts, fresh, prompt, llm_directory, origin, added)


def _assembled_prompt(
    options: PromptOptions, kind: str, is_eva: bool, adapted: bool, llm: epath.Path, template: str
) -> model_json.PromptMetadata:
    mode, legacy = "pad", options.legacy
    if is_eva:
        template = minigpt4.V2_TEMPLATE if adapted else minigpt4.TEMPLATES.get(kind, template)
        mode, legacy = "squash", minigpt4.legacy(llm) if legacy is None else legacy
    return model_json.PromptMetadata(options.template or template, legacy, options.image_mode or mode, False)


def _tower(
    vision: epath.PathLike, kind: str, select_layer: int | None, image_size: int | None, cut: bool
) -> tuple[TowerConfig, Part]:
    directory = epath.Path(vision)
    if minigpt4.holds_eva(vision):
        if select_layer is not None or cut:
            option = "--cut-tower" if cut else f"--select-layer {select_layer}"
            raise UsageError(f"{option}: of {vision} every block runs; leave it out")
        return minigpt4.tower(directory, "cls_patch" if kind == "qformer" else "patch", image_size)
    part, content, tensors, prefix = _open_tower(directory)
    layer, feature = -2 if select_layer is None else select_layer, "patch"
    config = unread.read_part(part, content, str(directory / "config.json"), layer, feature)
    config, rows = _with_image_numbers(config, directory), part.rows(prefix)
    if image_size is not None and image_size != config.image_size:
        config = dataclasses.replace(config, image_size=image_size)
        (name,) = [theirs for ours, (theirs, _) in rows if ours == "vision/pos"]
        tensors = views.resized(tensors, name, round(config.patches**0.5), part.class_token)
    ignored: tuple[str, ...] = ()
    if cut:
        config, ignored = _cut(part, config, f"--cut-tower of {vision}", select_layer)
    return config, Part(("vision/",), tensors, rows, ignored)


def _cut(
    part: Tower, config: TowerConfig, what: str, select_layer: int | None
) -> tuple[TowerConfig, tuple[str, ...]]:
    """The tower as the original code keeps it, and patterns over the names that are left out."""
    kept = part.kept(config)
    if kept == config or select_layer is not None:
        raise UsageError(f"{what}: wanted a SigLIP without --select-layer; leave one of the two out")
    blocks = "|".join(map(str, range(kept.layers, config.layers)))
    return kept, (rf".*\bencoder\.layers\.({blocks})\..*", r".*\bhead\..*")


def _open_tower(directory: epath.Path) -> tuple[Tower, dict[str, Any], TensorFiles, str]:
    """(kind, config.json, tensors, beginning of their names) of a directory with a tower, alone or beside its text's.

    Raises:
      UnusableCheckpoint: no tower that is known here is in it.
    """
    content = read_json(directory / "config.json")
    unread.refuse_quantised(content, str(directory))
    known = {name: part for part in registry.towers().values() for name in part.model_types}
    part = unread.part_of(content.get("model_type", next(iter(known))), known, f"{directory}: the vision tower's")
    tensors = open_tensors(directory)
    # transformers 5.6 and later write a lone vision model without "vision_model.".
    found = [prefix for prefix in ("vision_model.", "") if prefix + part.mark in tensors.specs]
    if not found:
        shown = ", ".join(list(tensors.specs)[:3])
        raise UnusableCheckpoint(f"{directory}: no vision tower of {part.label} here; its tensors are such as {shown}")
    return part, content, tensors, found[0]


def _open_decoder(directory: epath.Path) -> tuple[Decoder, dict[str, Any], TensorFiles]:
    """(kind, config.json, tensors) of a language model's directory. Raises UnusableCheckpoint on an unknown family."""
    content, known = read_json(directory / "config.json"), registry.decoders()
    unread.refuse_quantised(content, str(directory))
    part = unread.part_of(content.get("model_type"), known, f"{directory}: the language model's")
    return part, content, open_tensors(directory)


def _assembled(
    tower: TowerConfig, kind: str, llm: DecoderConfig, qformer: QFormerConfig | None, newline: bool
) -> LlavaConfig:
    """The config of parts; what no file says has the sizes of the published connectors."""
    connector = registry.connector(kind)
    resampler = qformer or (connector.resampler() if connector.resampler else None)
    normed = registry.tower_of(tower) is eva.PART or kind == "qformer"
    return LlavaConfig(
        vision=tower, projector=kind, llm=llm, ln_vision_eps=minigpt4.LN_EPS if normed else None, resampler=resampler,
        cross=CrossConfig(media_width=tower.width) if connector.gated else None, image_newline=newline,
    )  # fmt: skip


def _projector_parts(tensors: TensorFiles) -> tuple[str | None, list[Part]]:
    """(the connector, as far as the tensors say it; the parts) of a file given as --projector."""
    found = minigpt4.projection(tensors)
    if found is not None:
        return None, found
    kind, layout = _projector_file(tensors)
    return kind, [Part(("projector/",), tensors, llava.projector_rows(layout, kind))]


def _original(
    directory: epath.Path, content: Mapping[str, Any], vision: epath.PathLike | None
) -> tuple[LlavaConfig, list[Part]]:
    """The model in the original code's files, whose tower may lie among them or elsewhere."""
    layout, where = llava.ORIGINAL, str(directory / "config.json")
    llava.original_decoder(content, where)
    tensors = open_tensors(directory)
    hub = {name: (part, sizes) for part in registry.towers().values() for name, sizes in part.hub.items()}
    if vision is None and files.is_dir(directory / SIDE_TOWER):
        vision = directory / SIDE_TOWER
    name = content.get("mm_vision_tower")
    known = name in list(hub) and layout.vision + hub[name][0].mark in tensors.specs
    if vision is None and not known:
        raise UsageError(
            f"{directory}: its vision tower {name!r} is not in it; download that model and give it as --vision"
        )
    content = llava.with_head(content, where, tensors, layout.head)
    if vision is None:
        part, sizes = hub[name]
        config = llava.read_original_config(content, where, part, part.config_json(sizes), tensors)
        return config, [Part(("",), tensors, llava.rows(layout, config))]
    part, sizes, tower_tensors, prefix = _open_tower(epath.Path(vision))
    config = llava.read_original_config(content, where, part, sizes, tensors)
    config = _seen(config, epath.Path(vision))
    if layout.vision + part.mark in tensors.specs:  # a tower that was trained on; the original code prefers it too
        return config, [Part(("",), tensors, llava.rows(layout, config))]
    rest = Part(("llm/", "projector/", "image_newline"), tensors, llava.rows(layout, config))
    return config, [Part(("vision/",), tower_tensors, part.rows(prefix)), rest]


def _projector_file(tensors: TensorFiles) -> tuple[str, llava.Layout]:
    """(kind, layout) of a file of `mm_projector` tensors, whatever stands before that word. A config.json beside it, as
    stage 1 of the original code and `export --format projector` leave one, names connectors that are no mere layers."""
    first = next(iter(tensors.specs), "")
    prefix, mark, _ = first.partition("mm_projector.")
    if not mark:
        raise UnusableCheckpoint(f"{tensors.path}: begins with tensor {first!r}; wanted mm_projector's or llama_proj's")
    layout = llava.ORIGINAL._replace(projector=prefix + mark)
    beside = tensors.path.parent / "config.json"
    content = read_json(beside) if files.is_file(beside) else {}
    return llava.projector_kind(list(tensors.specs), layout.projector, content), layout


def _fresh(config: LlavaConfig, parts: Sequence[Part], seed: int) -> dict[str, np.ndarray]:
    """All parameters that are in no file."""
    read = tuple(start for part in parts for start in part.leaves)
    fresh = {}
    if "projector/" not in read:
        connector = registry.connector(config.projector)
        module = connector.module(config.projector, config.llm.width)
        variables = module.init(jax.random.key(seed), jnp.zeros(_connected(config)))
        leaves = params.flatten(variables["params"]) if "params" in variables else {}
        fresh = {f"projector/{name}": leaf for name, leaf in leaves.items()}
    others = [start for start in ("resampler/", "ln_vision/") if start not in read] + ["llm/cross/", "image_newline"]
    names = [name for name in params.flatten(abstract_params(config)) if name.startswith(tuple(others))]
    if names:

        def draw(key: jax.Array) -> dict[str, jax.Array]:  # compiled, so that nothing else is drawn
            flat = params.flatten(init_params(config, key))
            return {name: flat[name] for name in names}

        fresh |= jax.jit(draw)(jax.random.key(seed))
    return {name: np.asarray(leaf) for name, leaf in fresh.items()}


def _connected(config: LlavaConfig) -> tuple[int, int, int]:
    """[1, P, C] of one image's features where the connector's own layers begin."""
    if config.resampler is None:
        return 1, config.vision.features, config.vision.width
    module = registry.connector(config.projector).resampler_module(config.resampler)
    features = jnp.zeros((1, config.vision.features, config.vision.width))
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], features).shape


def _scales(added: Mapping[str, tuple[int, int]], config: LlavaConfig) -> dict[str, np.ndarray]:
    """The constant of each adapter, which files leave to their readers."""
    return {
        lora.beside(kernel, lora.SCALE): np.full(config.llm.layers, alpha / rank, np.float32)
        for kernel, (rank, alpha) in added.items()
    }


def _with_image_numbers(config: TowerConfig, directory: epath.Path) -> TowerConfig:
    settings = processor.read_settings(directory)
    if settings.side not in (None, config.image_size):
        raise UnusableCheckpoint(
            f"{directory}: its image processor makes {settings.side} pixels a side, its tower takes "
            f"{config.image_size}; one of the two files is of another model"
        )
    return dataclasses.replace(config, **settings.numbers)


def _seen(config: LlavaConfig, directory: epath.Path) -> LlavaConfig:
    """The model with the image numbers of a directory's processor."""
    return dataclasses.replace(config, vision=_with_image_numbers(config.vision, directory))


def _write(
    destination: epath.PathLike,
    config: LlavaConfig,
    parts: Sequence[Part],
    fresh: Mapping[str, np.ndarray],
    prompt: model_json.PromptMetadata,
    words_directory: epath.Path,
    origin: Mapping[str, Any],
    adapters: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Checks that everything fits, then writes the checkpoint. A parameter is of the first part that can hold it."""
    anyres.check(anyres.from_json(prompt.image_mode, prompt.tiling), config.image_newline, config.image_features)
    words = tokenizer.load(words_directory, prompt.legacy)
    ending.check(templates.get(prompt.template), words, str(words_directory), prompt.image_start_end)
    if words.size > config.llm.vocab:
        raise UnusableCheckpoint(
            f"{words_directory}: its tokenizer has {words.size} tokens, its embeddings {config.llm.vocab} rows; "
            "wanted a row for each, so one of the two files is of another model"
        )
    leaves = params.flatten(lora.add(abstract_params(config), adapters or {}))
    sources, dtypes = [], {}
    for part in parts:
        open_ = {name: leaf for name, leaf in leaves.items() if name not in fresh and name not in dtypes}
        mine = {name: leaf for name, leaf in open_.items() if name.startswith(part.leaves)}
        found = table.entries(mine, part.rows, llava.first_layers(config), "conversion")
        dtypes |= table.check(found, part.tensors, (*llava.ignored(config), *part.ignored))
        sources += [(entry, part.tensors) for entry in found]
    dtypes |= {name: leaf.dtype for name, leaf in fresh.items()}
    reader.check_specs({entry.ours: leaves[entry.ours] for entry, _ in sources} | dict(fresh), leaves, str(destination))
    source = {**origin, "dtypes": {name: str(dtype) for name, dtype in sorted(dtypes.items())}}
    prompt = dataclasses.replace(prompt, legacy=words.legacy)
    with reader.staged(destination) as partial:
        with reader.TensorWriter(partial / "0" / reader.PARAMS) as writer:
            table.write_leaves(writer, sources)
            for name, leaf in fresh.items():
                writer.write(name, leaf)
        model_json.write(partial, model_json.Metadata(config_to_json(config), prompt, (), source), words.files())
