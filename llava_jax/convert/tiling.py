"""How a config.json of others says that pictures are cut into tiles, both ways, and transformers' LLaVAs by that."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.prompt.anyres import ANYRES, MERGES, Size, Tiling
from llava_jax.prompt.video import RELEASED, FrameRule

_MAX = re.compile(r"anyres_max_(\d{1,6})")
_GRIDS = 99  # tiles along a side at most


# How `prompt.video` lays frames out, in the original code's words; it has a default for the last alone.
ORIGINAL_VIDEO = {"mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2, "mm_newline_position": "one_token"}
ORIGINAL_TIMES = "add_time_instruction"


class Hub(NamedTuple):
    """A LLaVA of transformers.

    Attributes:
      name: what its classes' names begin with.
      vision, text, layer, strategy: its defaults: model types of the parts, `vision_feature_layer` and
        `vision_feature_select_strategy`. Source: transformers 4.57.6 and 5.24.0, configuration_llava*.py.
    """

    name: str
    vision: str
    text: str
    layer: int
    strategy: str


PLAIN, NEXT, ONEVISION = "llava", "llava_next", "llava_onevision"
HUBS = {
    PLAIN: Hub("Llava", "clip_vision_model", "llama", -2, "default"),
    NEXT: Hub("LlavaNext", "clip_vision_model", "llama", -2, "default"),
    ONEVISION: Hub("LlavaOnevision", "siglip_vision_model", "qwen2", -1, "full"),
}


def read_hub(content: Mapping[str, Any], where: str, tile: int) -> Tiling | None:
    """The tiling of a Hugging Face config.json; None for a "llava".

    OneVision pads each of several pictures of a conversation to a square, LlavaNext cuts each into tiles. Source:
    transformers image_processing_llava_onevision.py (`batch_num_images`), image_processing_llava_next.py.

    Args:
      tile: pixels a side of the tower's picture.

    Raises:
      UnusableCheckpoint: names the key.
    """
    kind = content.get("model_type", PLAIN)
    if kind == PLAIN:
        return None
    if content.get("use_image_newline_parameter", True) is not True:
        value = content["use_image_newline_parameter"]
        raise UnusableCheckpoint(f"{where}: use_image_newline_parameter is {value!r}; wanted True")
    pinpoints = pixel_sizes(content.get("image_grid_pinpoints"), where, "[height, width]")
    grids = _grids([(width, height) for height, width in pinpoints], where, tile)
    if kind == NEXT:
        return Tiling(grids)
    ratio = content.get("vision_aspect_ratio", "anyres_max_9")
    match = _MAX.fullmatch(str(ratio))
    if not match:
        raise UnusableCheckpoint(f"{where}: vision_aspect_ratio is {ratio!r}; wanted 'anyres_max_' and a number")
    return Tiling(grids, max_tiles=_limit(grids, int(match[1]), where), several=False)


def read_original(content: Mapping[str, Any], where: str, tile: int) -> Tiling | None:
    """The tiling of the original code's config.json; None where pictures are not cut.

    Only where `image_aspect_ratio` is "anyres_max_N" are several pictures padded, as OneVision was trained; LLaVA-1.6
    cuts each. Source: LLaVA llava/mm_utils.py and llava_arch.py@c121f04; LLaVA-NeXT llava/train/train.py (several).

    Args:
      tile: pixels a side of the tower's picture.

    Raises:
      UnusableCheckpoint: names the key.
    """
    ratio, merge = content.get("image_aspect_ratio"), content.get("mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise UnusableCheckpoint(f"{where}: mm_patch_merge_type is {merge!r}; wanted one of {', '.join(MERGES)}")
    match = _MAX.fullmatch(str(ratio))
    if ratio not in (None, "square", "pad", ANYRES) and not match:
        raise UnusableCheckpoint(f"{where}: image_aspect_ratio is {ratio!r}; wanted 'square', 'pad', {ANYRES!r}, or "
                                 "'anyres_max_' and a number")  # fmt: skip
    if ratio != ANYRES and not match:
        if merge == "spatial_unpad":
            raise UnusableCheckpoint(
                f"{where}: mm_patch_merge_type is {merge!r} with image_aspect_ratio {ratio!r}: each picture would end "
                f"with image_newline; wanted 'flat', or image_aspect_ratio {ANYRES!r}"
            )
        return None
    grids = _original_grids(content.get("image_grid_pinpoints"), where, tile)
    limited = match and merge == "spatial_unpad"  # the other merges know no limit
    return Tiling(grids, merge, _limit(grids, int(match[1]), where) if limited else 0, several=not match)


def frame_rule(content: Mapping[str, Any], tiling: Tiling | None) -> FrameRule | None:
    """Which frames of a video a model of these tiles is shown; None where it was trained without videos, or with others
    than `prompt.video` makes: pooled in another way, or with a newline after each frame or line (LLaVA-Video).

    Of several pictures only OneVision pads each, which is how one is known. No config.json says how many frames.
    """
    onevision = tiling is not None and not tiling.several
    pooled = all(content.get(key, value) == value for key, value in ORIGINAL_VIDEO.items())
    rule = dataclasses.replace(RELEASED, time_stamps=content.get(ORIGINAL_TIMES) is True)
    return rule if onevision and pooled else None


def original_video_json(video: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of the original code's config.json. video: of a model.json."""
    if video is None:
        return {}
    return ORIGINAL_VIDEO | ({ORIGINAL_TIMES: True} if video.get("time_stamps") else {})


def _original_grids(pinpoints: Any, where: str, tile: int) -> tuple[Size, ...]:
    """Grids of a list of [width, height] in pixels, of the same as text, or of LLaVA-NeXT's range of grids.

    "(1x1),...,(2x3)" is 1x1, 1x2, 1x3, 2x1, 2x2, 2x3. Source: LLaVA-NeXT llava/mm_utils.py process_anyres_image.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        found = [(int(width), int(height)) for width, height in re.findall(r"\((\d{1,6})x(\d{1,6})\)", pinpoints)]
        first, last = (found[0], found[-1]) if found else ((0, 0), (0, 0))
        if not all(1 <= a <= b <= _GRIDS for a, b in zip(first, last)):
            raise _no_grids(pinpoints, where, '"(1x1),...,(6x6)"')
        return tuple((x, y) for x in range(first[0], last[0] + 1) for y in range(first[1], last[1] + 1))
    if isinstance(pinpoints, str):
        pair = r"[(\[]\s*(\d{1,6})\s*,\s*(\d{1,6})\s*[)\]]"
        if not re.fullmatch(rf"\s*[\[(]\s*{pair}(\s*,\s*{pair})*\s*,?\s*[\])]\s*", pinpoints):
            raise _no_grids(pinpoints, where, '"[(width, height), ...]"')
        pinpoints = [[int(width), int(height)] for width, height in re.findall(pair, pinpoints)]
    return _grids(pixel_sizes(pinpoints, where, "[width, height]"), where, tile)


def pixel_sizes(pinpoints: Any, where: str, order: str) -> tuple[Size, ...]:
    """`image_grid_pinpoints`, a list of pairs of pixels, checked to be one. order: what a pair is, for messages."""
    pairs = pinpoints if isinstance(pinpoints, list | tuple) else ()
    fine = all(isinstance(pair, list | tuple) and [type(x) for x in pair] == [int, int] for pair in pairs)
    if not pairs or not fine:
        raise _no_grids(pinpoints, where, f"a list of {order} in pixels")
    return tuple((first, second) for first, second in pairs)


def _grids(sizes: Any, where: str, tile: int) -> tuple[Size, ...]:
    """(columns, rows) of sizes in pixels, in their order: of two that fit a picture alike the first is taken."""
    for size in sizes:
        if not all(side % tile == 0 and 1 <= side // tile <= _GRIDS for side in size):
            raise _no_grids(f"{size[0]} x {size[1]}", where, f"multiples of the tower's {tile} pixels")
    return tuple((width // tile, height // tile) for width, height in sizes)


def _no_grids(pinpoints: Any, where: str, wish: str) -> UnusableCheckpoint:
    return UnusableCheckpoint(f"{where}: image_grid_pinpoints {str(pinpoints)[:60]!r}; wanted {wish}")


def _limit(grids: tuple[Size, ...], most: int, where: str) -> int:
    """`max_tiles`; 0 where no grid has more tiles, so that no picture is ever resized."""
    if most < 1:
        raise UnusableCheckpoint(f"{where}: 'anyres_max_{most}' leaves no tile; wanted a number above 0")
    return most if most < _largest(grids) else 0


def _largest(grids: tuple[Size, ...]) -> int:
    return max(columns * rows for columns, rows in grids)


def hub_kind(tiling: Tiling | None) -> str:
    """Which LLaVA of transformers cuts pictures like that.

    Raises:
      UsageError: none does.
    """
    if tiling is None:
        return PLAIN
    if tiling.merge != "spatial_unpad":
        raise UsageError(f"the Hugging Face format has no merge={tiling.merge!r}, only 'spatial_unpad'; use --format "
                         "llava")  # fmt: skip
    if tiling.max_tiles and tiling.several:
        raise UsageError(
            f"the Hugging Face format has no max_tiles={tiling.max_tiles} with several={ANYRES!r}: LlavaOnevision pads "
            "several pictures, LlavaNext resizes no features; use --format llava"
        )
    return NEXT if tiling.several else ONEVISION


def hub_json(tiling: Tiling | None, tile: int) -> dict[str, Any]:
    """The keys of a Hugging Face config.json; none for a "llava"."""
    if tiling is None:
        return {}
    content = {"image_grid_pinpoints": hub_pinpoints(tiling, tile), "use_image_newline_parameter": True}
    return content | ({"vision_aspect_ratio": aspect_ratio(tiling)} if hub_kind(tiling) == ONEVISION else {})


def hub_pinpoints(tiling: Tiling, tile: int) -> list[list[int]]:
    """[height, width] in pixels of each grid, in order."""
    return [[rows * tile, columns * tile] for columns, rows in tiling.grids]


def aspect_ratio(tiling: Tiling) -> str:
    """OneVision's words for `max_tiles`, which always has a limit."""
    return f"anyres_max_{tiling.max_tiles or _largest(tiling.grids)}"


def original_json(tiling: Tiling | None, tile: int) -> dict[str, Any]:
    """The keys of the original code's config.json, but `image_aspect_ratio` where pictures are not cut."""
    if tiling is None:
        return {"mm_patch_merge_type": "flat"}
    return {
        "image_aspect_ratio": aspect_ratio(tiling) if tiling.max_tiles or not tiling.several else ANYRES,
        "mm_patch_merge_type": tiling.merge,
        "image_grid_pinpoints": [[columns * tile, rows * tile] for columns, rows in tiling.grids],
    }
