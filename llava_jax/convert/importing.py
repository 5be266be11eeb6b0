"""Their weights into our checkpoint: a whole LLaVA, or one put together from a tower, a decoder and a projector.

Leaves are read and written one at a time, and the directory gets its name when all are there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llava_jax import params
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint import store
from llava_jax.checkpoint.card import UnusableCheckpoint
from llava_jax.convert import clip, llama, llava, processor, table
from llava_jax.convert.files import TensorFiles, open_tensors, read_json
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import LlavaConfig, config_to_json
from llava_jax.models.projectors import Projector
from llava_jax.prompt import templates, tokenizer

SIDE_TOWER = "vision_tower"  # where `export --format llava` puts a tower that no hub name stands for
OURS = "llava_jax"  # the key of an exported config.json that keeps what the format has no place for


class PromptOptions(NamedTuple):
    """What the user says about the prompt; None: what the source says."""

    template: str | None = None
    image_mode: str | None = None
    legacy: bool | None = None


UNSAID = PromptOptions()


class Part(NamedTuple):
    """Some leaves, the files that hold them and the table between the two.

    Attributes:
      leaves: beginnings of our names; "" is all.
    """

    leaves: tuple[str, ...]
    tensors: TensorFiles
    rows: list[table.Row]


def import_checkpoint(
    source: epath.PathLike,
    destination: epath.PathLike,
    vision: epath.PathLike | None = None,
    options: PromptOptions = UNSAID,
) -> None:
    """Makes the checkpoint `destination` of a LLaVA directory, Hugging Face's or the original code's.

    Args:
      vision: a CLIP directory; the original format names its tower but seldom holds it.

    Raises:
      FileNotFoundError: a directory or a file of it is missing.
      UnusableCheckpoint: the files are damaged or are not what they should be; names the tensor or the key.
      ValueError: `destination` exists, or an option is wrong.
    """
    directory = Path(source)
    content = read_json(directory / "config.json")
    tensors = open_tensors(directory)
    where = str(directory / "config.json")
    if llava.is_original(content):
        config, parts = _original(directory, content, tensors, vision)
        layout = llava.ORIGINAL.name
    elif vision is not None:
        raise ValueError(f"--vision {vision}: {directory} is in the Hugging Face format, which holds its own tower")
    else:
        found = llava.find_layout(tensors)
        config, layout = llava.read_hub_config(content, where, found, tensors), found.name
        config = _with_image_numbers(config, directory)
        parts = [Part(("",), tensors, llava.rows(found, config.projector))]
    origin = {"imported_from": str(directory), "layout": layout, "tensors": [str(part.tensors.path) for part in parts]}
    prompt = _prompt(directory, content, options)
    _write(destination, config, parts, {}, prompt, directory, origin)


def assemble(
    destination: epath.PathLike,
    vision: epath.PathLike,
    llm: epath.PathLike,
    projector: epath.PathLike | None = None,
    projector_type: str = "mlp2x_gelu",
    select_layer: int = -2,
    seed: int = 0,
    options: PromptOptions = UNSAID,
) -> None:
    """Makes a fresh LLaVA checkpoint of a CLIP directory, a LLaMA directory and a projector.

    Args:
      projector: a file with `mm_projector` tensors (`mm_projector.bin`, or safetensors); None draws a new one.
      projector_type: the new one's kind; it starts like torch's nn.Linear, from `seed`, in float32.
      options: template v1 and images padded where nothing is said.

    Raises:
      As `import_checkpoint`.
    """
    clip_directory, llm_directory = Path(vision), Path(llm)
    tower, clip_tensors, prefix = clip.open_directory(clip_directory)
    decoder, llm_tensors = llama.open_directory(llm_directory)
    head = "lm_head.weight"
    decoder = llama.with_head(decoder, bool(decoder.get("tie_word_embeddings")), llm_tensors, head)
    parts = [
        Part(("vision/",), clip_tensors, clip.rows(prefix)),
        Part(("llm/",), llm_tensors, llama.rows("model.", head)),
    ]
    if projector is not None:
        tensors = open_tensors(projector)
        projector_type, layout = _projector_file(tensors)
        parts.append(Part(("projector/",), tensors, llava.projector_rows(layout, projector_type)))
    config = LlavaConfig(
        vision=clip.read_config(tower, str(clip_directory / "config.json"), select_layer, "patch"),
        projector=projector_type,
        llm=llama.read_config(decoder, str(llm_directory / "config.json")),
    )
    config = _with_image_numbers(config, clip_directory)
    fresh = {} if projector is not None else _fresh_projector(config, seed)
    origin = {"vision": str(clip_directory), "llm": str(llm_directory), "projector": str(projector or f"seed {seed}")}
    prompt = cards.PromptCard(options.template or "v1", options.legacy, options.image_mode or "pad", False)
    _write(destination, config, parts, fresh, prompt, llm_directory, origin)


def _original(
    directory: Path, content: Mapping[str, Any], tensors: TensorFiles, vision: epath.PathLike | None
) -> tuple[LlavaConfig, list[Part]]:
    """The model in the original code's files, whose tower may lie among them or elsewhere."""
    layout, where = llava.ORIGINAL, str(directory / "config.json")
    in_file = layout.vision + "embeddings.class_embedding" in tensors.specs
    if vision is None and (directory / SIDE_TOWER).is_dir():
        vision = directory / SIDE_TOWER
    name = content.get("mm_vision_tower")
    if vision is None and not (in_file and name in clip.HUB_TOWERS):
        raise ValueError(
            f"{directory}: its vision tower {name!r} is not in it; download that CLIP model and give it as --vision"
        )
    kind = llava.projector_kind(list(tensors.specs), layout.projector)
    content = llama.with_head(content, bool(content.get("tie_word_embeddings")), tensors, layout.head)
    if vision is None:
        tower = clip.config_json(clip.HUB_TOWERS[name])
        config = llava.read_original_config(content, where, tower, kind)
        return config, [Part(("",), tensors, llava.rows(layout, kind))]
    tower, clip_tensors, prefix = clip.open_directory(Path(vision))
    config = llava.read_original_config(content, where, tower, kind)
    config = _with_image_numbers(config, Path(vision))
    if in_file:  # a tower that was trained on; the original code's own is preferred to the one it came from
        return config, [Part(("",), tensors, llava.rows(layout, kind))]
    rest = Part(("llm/", "projector/"), tensors, llava.rows(layout, kind))
    return config, [Part(("vision/",), clip_tensors, clip.rows(prefix)), rest]


def _projector_file(tensors: TensorFiles) -> tuple[str, llava.Layout]:
    """(kind, layout) of a file of `mm_projector` tensors, whatever stands before that word."""
    first = next(iter(tensors.specs), "")
    prefix, mark, _ = first.partition("mm_projector.")
    if not mark:
        raise UnusableCheckpoint(f"{tensors.path}: begins with tensor {first!r}; wanted mm_projector's weights only")
    layout = llava.ORIGINAL._replace(projector=prefix + mark)
    return llava.projector_kind(list(tensors.specs), layout.projector), layout


def _fresh_projector(config: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    module = Projector(config.projector, config.llm.width)
    variables = module.init(jax.random.key(seed), jnp.zeros((1, config.vision.width)))
    leaves = params.flatten(variables["params"]) if "params" in variables else {}
    return {f"projector/{name}": np.asarray(leaf) for name, leaf in leaves.items()}


def _with_image_numbers(config: LlavaConfig, directory: Path) -> LlavaConfig:
    settings = processor.read_settings(directory)
    if settings.side not in (None, config.vision.image_size):
        raise UnusableCheckpoint(
            f"{directory}: its image processor makes {settings.side} pixels a side, its tower takes "
            f"{config.vision.image_size}; one of the two files is of another model"
        )
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, mean=settings.mean, std=settings.std))


def _prompt(directory: Path, content: Mapping[str, Any], options: PromptOptions) -> cards.PromptCard:
    """Options first, then what an export of ours kept, then what the format itself says."""
    kept = content.get(OURS) or {}
    mode = options.image_mode or kept.get("image_mode")
    if mode is None and llava.is_original(content):
        mode = "pad" if content.get("image_aspect_ratio") == "pad" else "square"
    mode = mode or processor.read_settings(directory).mode
    if mode is None:
        raise ValueError(f"{directory}: no preprocessor_config.json in it; say --image-mode pad or square")
    marks = bool(kept.get("image_start_end", content.get("mm_use_im_start_end", False)))
    return cards.PromptCard(options.template or kept.get("template", "v1"), options.legacy, mode, marks)


def _write(
    destination: epath.PathLike,
    config: LlavaConfig,
    parts: Sequence[Part],
    fresh: Mapping[str, np.ndarray],
    prompt: cards.PromptCard,
    words_directory: Path,
    origin: Mapping[str, Any],
) -> None:
    """Checks that everything fits, then writes the checkpoint."""
    templates.get(prompt.template)
    words = tokenizer.load(words_directory, prompt.legacy)
    if words.size > config.llm.vocab:
        raise UnusableCheckpoint(
            f"{words_directory}: its tokenizer has {words.size} tokens, its embeddings {config.llm.vocab} rows; "
            "wanted a row for each, so one of the two files is of another model"
        )
    leaves = params.flatten(abstract_params(config))
    sources, dtypes = [], {}
    for part in parts:
        mine = {name: leaf for name, leaf in leaves.items() if name.startswith(part.leaves) and name not in fresh}
        found = table.entries(mine, part.rows, clip.first_layers(config.vision), "conversion")
        dtypes |= table.check(found, part.tensors, llava.IGNORED)
        sources += [(entry, part.tensors) for entry in found]
    dtypes |= {name: leaf.dtype for name, leaf in fresh.items()}
    store.check_specs({entry.ours: leaves[entry.ours] for entry, _ in sources} | dict(fresh), leaves, str(destination))
    source = {**origin, "dtypes": {name: str(dtype) for name, dtype in sorted(dtypes.items())}}
    prompt = dataclasses.replace(prompt, legacy=words.legacy)
    with store.staged(destination) as partial:
        with store.LeafWriter(partial / "0" / store.PARAMS) as writer:
            table.write_leaves(writer, sources)
            for name, leaf in fresh.items():
                writer.write(name, leaf)
        cards.write_card(partial, cards.Card(config_to_json(config), prompt, (), source), words.files())
