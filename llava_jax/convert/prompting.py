"""What a directory of others, or who imports it, says about prompts: template, image mode and tiles."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from llava_jax.checkpoint.model_json import PromptMetadata
from llava_jax.convert import llava, minigpt4, processor, tiling, unread
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models import registry
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres, video
from llava_jax.prompt.anyres import ANYRES, Tiling

OURS = "llava_jax"  # the key of an exported config.json that keeps what the format has no place for


class PromptOptions(NamedTuple):
    """What the user says about the prompt; None: what the source says."""

    template: str | None = None
    image_mode: str | None = None
    legacy: bool | None = None


UNSAID = PromptOptions()


def read(
    directory: epath.Path, content: Mapping[str, Any], options: PromptOptions, config: LlavaConfig
) -> PromptMetadata:
    """Options first, then what an export of ours kept, then what the format itself says.

    Args:
      content: config.json.

    Raises:
      UnusableCheckpoint: tiles that we cannot cut, or other ones in the image processor's file.
      UsageError: nobody says the image mode.
    """
    kept = unread.kept(content.get(OURS), f"{directory / 'config.json'}: {OURS}")
    if minigpt4.is_hub(content):
        usual = processor.read_settings(directory).mode or "squash"
        kept = {"template": minigpt4.TEMPLATES["qformer"], "image_mode": usual} | kept
    tiled = options.image_mode is None and not minigpt4.is_hub(content)
    tiles = _tiles(directory, content, kept, config) if tiled else None
    mode = options.image_mode or (ANYRES if tiles else None)
    if mode is None and kept.get("image_mode") != ANYRES:
        mode = kept.get("image_mode")
    if mode is None and llava.is_original(content):
        mode = original_mode(content, tiles)
    mode = mode or processor.read_settings(directory).mode
    if mode is None:
        raise UsageError(f"{directory}: no preprocessor_config.json in it; say --image-mode pad or square")
    marks = bool(kept.get("image_start_end", content.get("mm_use_im_start_end", False)))
    template = options.template or kept.get("template", registry.decoder_of(config.llm).template)
    return PromptMetadata(template, options.legacy, mode, marks, anyres.to_json(tiles),
                          kept.get("video", video.to_json(tiling.frame_rule(content, tiles))))  # fmt: skip


def original_mode(content: Mapping[str, Any], tiles: Tiling | None) -> str:
    """The image mode of the original code's config.json."""
    if tiles:
        return ANYRES
    return "pad" if content.get("image_aspect_ratio") == "pad" else "square"


def _tiles(
    directory: epath.Path, content: Mapping[str, Any], kept: Mapping[str, Any], config: LlavaConfig
) -> Tiling | None:
    where, side = str(directory / "config.json"), config.vision.image_size
    if llava.is_original(content):
        tiles = tiling.read_original(content, where, side)
        if tiles is None or "tiling" not in kept:
            return tiles
        return dataclasses.replace(tiles, several=kept["tiling"].get("several") == ANYRES)  # it has no key for that
    tiles, settings = tiling.read_hub(content, where, side), processor.read_settings(directory)
    wanted = tiling.hub_pinpoints(tiles, side) if tiles else None
    if settings.mode is not None and (settings.mode == ANYRES) != (tiles is not None):
        name = tiling.HUBS[content.get("model_type", tiling.PLAIN)].name
        raise UnusableCheckpoint(f"{directory}: its image processor's mode is {settings.mode!r}, but config.json is of "
                                 f"a {name}; wanted a {name}ImageProcessor")  # fmt: skip
    if settings.pinpoints not in (None, wanted):
        raise UnusableCheckpoint(
            f"{directory}: its image processor's image_grid_pinpoints are {str(settings.pinpoints)[:60]}, those of "
            f"config.json {str(wanted)[:60]}; one of the two files is of another model"
        )
    return tiles
