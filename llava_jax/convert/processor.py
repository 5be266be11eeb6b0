"""The image and processor files of a Hugging Face directory, both ways."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.convert import tiling
from llava_jax.convert.files import read_json
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import registry
from llava_jax.models.parts import NUMBERS, TowerConfig
from llava_jax.prompt.anyres import ANYRES, Tiling

_BICUBIC = 3
_TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")  # and with the endings Fast and Pil
RESAMPLE = {2: "bilinear", _BICUBIC: "bicubic"}  # PIL's numbers


class ImageSettings(NamedTuple):
    """What an image processor does; mode and side (pixels) None: the directory has none, or does not say.

    Attributes:
      numbers: `mean`, `std` and `resample` of a TowerConfig, as far as it says them.
      pinpoints: [height, width] in pixels of each grid of tiles, of mode "anyres".
    """

    mode: str | None
    side: int | None
    numbers: dict[str, Any]
    pinpoints: list[list[int]] | None = None


def read_settings(directory: epath.PathLike) -> ImageSettings:
    """The image processor of a directory; transformers 5 nests it in processor_config.json.

    Raises:
      UnusableCheckpoint: a processor whose pixels this model would not see the same.
    """
    directory = epath.Path(directory)
    nested, alone = directory / "processor_config.json", directory / "preprocessor_config.json"
    content = read_json(nested).get("image_processor") if files.is_file(nested) else None
    if content is not None and not isinstance(content, Mapping):
        raise UnusableCheckpoint(f"{nested}: image_processor is {content!r}; wanted an object")
    if content is None:  # transformers takes the nested one where both are there
        content = read_json(alone) if files.is_file(alone) else None
    if content is None:
        return ImageSettings(None, None, {})
    fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    for key, value in fixed.items():
        if content.get(key, value) != value:
            raise UnusableCheckpoint(f"{directory}: its image processor has {key} {content[key]!r}; wanted {value!r}")
    rescale = content.get("rescale_factor")
    if rescale is not None and not (type(rescale) in NUMBERS and math.isclose(rescale, 1 / 255, rel_tol=1e-3)):
        raise UnusableCheckpoint(f"{directory}: its image processor has rescale_factor {rescale!r}; wanted 1/255")
    resample = content.get("resample", _BICUBIC)
    if resample not in list(RESAMPLE):
        raise UnusableCheckpoint(f"{directory}: its image processor has resample {resample!r}; wanted 2 or 3")
    numbers = {"resample": RESAMPLE[resample]}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value = content.get(theirs)
        if value is not None:
            fits = isinstance(value, list) and len(value) == 3 and all(type(number) in NUMBERS for number in value)
            if not fits or (ours == "std" and not min(value) > 0):
                wish = "three numbers above 0" if ours == "std" else "three numbers"
                raise UnusableCheckpoint(f"{directory}: its image processor has {theirs} {value!r}; wanted {wish}")
            numbers[ours] = tuple(map(float, value))
    mode, side = _mode(content, str(directory)), _side(content)
    if mode != ANYRES:
        return ImageSettings(mode, side, numbers)
    _check_tiles(content, side, str(directory))
    return ImageSettings(mode, side, numbers, content.get("image_grid_pinpoints"))


def _check_tiles(content: Mapping[str, Any], side: int | None, where: str) -> None:
    """Tiles of the crop's size are resized to `size` once more, and cropped again."""
    size = content.get("size")
    sides = size.values() if isinstance(size, Mapping) else [size]
    if size is not None and any(one != side for one in sides):
        raise UnusableCheckpoint(f"{where}: its image processor has size {size!r} and tiles of {side!r} pixels; wanted "
                                 "the same")  # fmt: skip


def _mode(content: Mapping[str, Any], where: str) -> str:
    if str(content.get("image_processor_type", "")).startswith(_TILED):
        return ANYRES
    # CLIPImageProcessor knows no do_pad and passes over the key.
    if str(content.get("image_processor_type", "")).startswith("Llava") and content.get("do_pad"):
        return "pad"
    # Neither BlipImageProcessor nor SigLIP's knows a crop, and their files seldom speak of one.
    if content.get("do_center_crop", not str(content.get("image_processor_type", "")).startswith(("Blip", "Siglip"))):
        return "square"
    size = content.get("size")
    if isinstance(size, Mapping) and size.get("height", 0) == size.get("width", 1):
        return "squash"
    raise UnusableCheckpoint(f"{where}: its image processor makes no square of a picture: size {size!r}")


def _side(content: Mapping[str, Any]) -> int | None:
    """Old files write 224, newer ones {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    size = content.get("crop_size") or content.get("size")
    return next(iter(size.values())) if isinstance(size, Mapping) else size


def preprocessor_json(config: TowerConfig, mode: str, tiles: Tiling | None = None) -> dict[str, Any]:
    """preprocessor_config.json that makes the very pixels of `prompt.images.to_pixels(..., mode)`, or of its tiles.

    transformers' LlavaImageProcessor with `do_pad` pads as the original code does; the hub's LLaVA-1.5 crops.
    """
    side, name = config.image_size, tiling.HUBS[tiling.hub_kind(tiles)].name
    own = registry.tower_of(config).processor
    crops = "CLIPImageProcessor"  # SigLIP's own and BLIP's only squash
    kind = {"pad": "LlavaImageProcessor", "square": crops, ANYRES: f"{name}ImageProcessor"}.get(mode, own)
    square, whole = {"height": side, "width": side}, tiling.hub_kind(tiles) == tiling.ONEVISION or mode == "squash"
    content = {
        "image_processor_type": kind,
        "processor_class": f"{name}Processor",
        **_sizes_json(config),
        "size": square if whole else {"shortest_edge": side},
        "do_center_crop": not whole,
        "crop_size": square,
    }
    if tiles is not None:
        content["image_grid_pinpoints"] = tiling.hub_pinpoints(tiles, side)
    return content | ({"do_pad": True} if mode in ("pad", ANYRES) else {})


def video_json(config: TowerConfig) -> dict[str, Any]:
    """video_preprocessor_config.json, without which transformers opens no OneVision's processor."""
    return {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        **_sizes_json(config),
        "size": {"height": config.image_size, "width": config.image_size},
    }


def blip_json(config: TowerConfig) -> dict[str, Any]:
    """preprocessor_config.json of BLIP-2, which makes the pixels of `prompt.images.to_pixels(..., "squash")`."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        **_sizes_json(config),
        "size": {"height": config.image_size, "width": config.image_size},
        "do_center_crop": False,
    }


def _sizes_json(config: TowerConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": next(number for number, name in RESAMPLE.items() if name == config.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def processor_json(config: TowerConfig, tiles: Tiling | None = None) -> dict[str, Any]:
    """processor_config.json: how many image tokens the processor writes for one image."""
    tower, kind = registry.tower_of(config), tiling.hub_kind(tiles)
    whole = config.select_feature == "cls_patch" or not tower.class_token
    content = {
        "processor_class": f"{tiling.HUBS[kind].name}Processor",
        "image_token": "<image>",
        "vision_feature_select_strategy": "full" if whole else "default",
    }
    # The class token is counted and, for "default", taken off again.
    if tiles is not None and kind == tiling.ONEVISION:
        count = config.patches + tower.class_token
        return content | {"num_image_tokens": count, "vision_aspect_ratio": tiling.aspect_ratio(tiles)}
    return content | {"patch_size": config.patch_size, "num_additional_image_tokens": int(tower.class_token)}
