"""The image and processor files of a Hugging Face directory, both ways."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.convert.files import read_json
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import CLIP_MEAN, CLIP_STD, TowerConfig, VisionConfig


class ImageSettings(NamedTuple):
    """What an image processor does; mode and side (pixels) None: the directory has none, or does not say."""

    mode: str | None
    side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_settings(directory: epath.PathLike) -> ImageSettings:
    """The image processor of a directory; transformers 5 nests it in processor_config.json.

    Raises:
      UnusableCheckpoint: a processor whose pixels this model would not see the same.
    """
    directory = epath.Path(directory)
    nested, alone = directory / "processor_config.json", directory / "preprocessor_config.json"
    content = read_json(nested).get("image_processor") if files.is_file(nested) else None
    if content is None:  # transformers takes the nested one where both are there
        content = read_json(alone) if files.is_file(alone) else None
    if content is None:
        return ImageSettings(None, None, CLIP_MEAN, CLIP_STD)
    fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    for key, value in fixed.items():
        if content.get(key, value) != value:
            raise UnusableCheckpoint(f"{directory}: its image processor has {key} {content[key]!r}; wanted {value!r}")
    mean, std = content.get("image_mean") or CLIP_MEAN, content.get("image_std") or CLIP_STD
    return ImageSettings(_mode(content, str(directory)), _side(content), tuple(mean), tuple(std))


def _mode(content: Mapping[str, Any], where: str) -> str:
    # CLIPImageProcessor knows no do_pad and passes over the key.
    if str(content.get("image_processor_type", "")).startswith("Llava") and content.get("do_pad"):
        return "pad"
    # BlipImageProcessor knows no crop, and its files seldom speak of one.
    if content.get("do_center_crop", not str(content.get("image_processor_type", "")).startswith("Blip")):
        return "square"
    size = content.get("size")
    if isinstance(size, Mapping) and size.get("height", 0) == size.get("width", 1):
        return "squash"
    raise UnusableCheckpoint(f"{where}: its image processor makes no square of a picture: size {size!r}")


def _side(content: Mapping[str, Any]) -> int | None:
    """Old files write 224, newer ones {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    size = content.get("crop_size") or content.get("size")
    return next(iter(size.values())) if isinstance(size, Mapping) else size


def preprocessor_json(config: VisionConfig, mode: str) -> dict[str, Any]:
    """preprocessor_config.json that makes the very pixels of `prompt.images.to_pixels(..., mode)`.

    transformers' LlavaImageProcessor with `do_pad` pads as the original code does; the hub's LLaVA-1.5 crops.
    """
    side = config.image_size
    squash = mode == "squash"
    content = {
        "image_processor_type": "LlavaImageProcessor" if mode == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": not squash,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    return content | ({"do_pad": True} if mode == "pad" else {})


def blip_json(config: TowerConfig) -> dict[str, Any]:
    """preprocessor_config.json of BLIP-2, which makes the pixels of `prompt.images.to_pixels(..., "squash")`."""
    side = config.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def processor_json(config: VisionConfig) -> dict[str, Any]:
    """processor_config.json: how many image tokens the processor writes for one image."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": "default" if config.select_feature == "patch" else "full",
        # The class token is counted and, for "default", taken off again.
        "num_additional_image_tokens": 1,
    }
