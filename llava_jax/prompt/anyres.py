"""Any resolution: the tiles that a picture is cut into, and which of their features stand for it, in which order.

A picture gives its base, the whole at the tower's size, then the tiles of a grid, row by row. All of it follows from
the picture's size alone, so rows can be planned without decoding a picture. Source: LLaVA-1.6 llava/mm_utils.py and
llava_arch.py, LLaVA-NeXT's for `max_tiles`; transformers image_processing_llava_next.py (rounding of `_unpadded`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_jax.batch import NEWLINE, Corners, Layout, alone
from llava_jax.errors import UsageError

ANYRES = "anyres"
MERGES = ("flat", "spatial", "spatial_unpad")
_RESIZED_ABOVE = 1.1  # features are resized where their number is more than 1.1 ** 2 times that of `max_tiles`

Size = tuple[int, int]  # width and height, or columns and rows


@dataclass(frozen=True)
class Tiling:
    """How pictures become tiles.

    grids: (columns, rows) of tiles that a picture may have; of two that fit alike the first is taken.
    merge: "flat" takes all features tile by tile, "spatial" line by line over the whole grid, "spatial_unpad" also
      drops the lines of the padding and ends each line with `image_newline`.
    max_tiles: a picture with more features than so many tiles is resized (bilinear) to as many; 0: never.
    several: each of several pictures of a conversation has its tiles too; False: it is padded to a square.
    """

    grids: tuple[Size, ...]
    merge: str = "spatial_unpad"
    max_tiles: int = 0
    several: bool = True

    @property
    def newline(self) -> bool:
        """Whether the model must have an `image_newline`."""
        return self.merge == "spatial_unpad"


def tiling(image_mode: str, grids: Any, merge: Any, max_tiles: Any, several: Any) -> Tiling | None:
    """The tiling that a config describes; None where pictures are not tiled.

    Args:
      grids: such as "1x2 2x1 2x2", columns x rows. The others as in `Tiling`; several: "anyres" or "pad".

    Raises:
      UsageError: grids that are none, an unknown merge, or grids without image_mode="anyres".
    """
    if image_mode != ANYRES:
        if grids:
            raise UsageError(f'prompt.grids={grids!r} with prompt.image_mode="{image_mode}": want "{ANYRES}", or no '
                             "grids")  # fmt: skip
        return None
    found = [re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grid) for grid in str(grids).split()]
    if not found or not all(found):
        raise UsageError(f"prompt.grids={grids!r}: want columns x rows of each grid of tiles, such as "
                         '"1x2 2x1 2x2 3x1 1x3"')  # fmt: skip
    if merge not in MERGES:
        raise UsageError(f"prompt.merge={merge!r}: choose one of {', '.join(MERGES)}")
    if type(max_tiles) is not int or max_tiles < 0 or (max_tiles and merge != "spatial_unpad"):
        raise UsageError(f'prompt.max_tiles={max_tiles!r}: want 0 (no limit), or a number with merge="spatial_unpad"')
    if several not in (ANYRES, "pad"):
        raise UsageError(f'prompt.several={several!r}: want "{ANYRES}" or "pad"')
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match)
    return Tiling(sizes, merge, max_tiles, several == ANYRES)


def from_json(image_mode: str, content: Mapping[str, Any] | None) -> Tiling | None:
    """The tiling of a model.json, as `to_json` wrote it. Raises UsageError where it is none."""
    content = content or {"grids": "", "merge": MERGES[-1], "max_tiles": 0, "several": ANYRES}
    wanted = ("grids", "merge", "max_tiles", "several")
    if set(content) != set(wanted):
        raise UsageError(f"tiling of keys {sorted(content)}: want {', '.join(wanted)}")
    return tiling(image_mode, *(content[key] for key in wanted))


def to_json(tiling: Tiling | None) -> dict[str, Any] | None:
    """What a model.json says of a tiling; None where pictures are not tiled."""
    if tiling is None:
        return None
    grids = " ".join(f"{columns}x{rows}" for columns, rows in tiling.grids)
    several = ANYRES if tiling.several else "pad"
    return {"grids": grids, "merge": tiling.merge, "max_tiles": tiling.max_tiles, "several": several}


def check(tiling: Tiling | None, newline: bool, features: int) -> None:
    """Raises UsageError where a model cannot have such tiles.

    newline: it has an `image_newline`. features: N, of a tile.
    """
    if tiling is None:
        return
    if tiling.newline and not newline:
        raise UsageError(f'prompt.merge="{tiling.merge}": each line ends with image_newline, which this model has not; '
                         "`convert assemble --newline` makes a base with one; prompt.merge=spatial needs none")
    if math.isqrt(features) ** 2 != features:
        raise UsageError(f'prompt.image_mode="{ANYRES}": {features} features a tile are no square; want '
                         'select_feature="patch" and a connector that keeps the square')  # fmt: skip


def best_grid(size: Size, grids: tuple[Size, ...], tile: int) -> Size:
    """The grid of tiles of `tile` pixels a side that shows most of a picture, and of those the least empty one."""

    def fit(grid: Size) -> tuple[int, int]:
        width, height = grid[0] * tile, grid[1] * tile
        scale = min(width / size[0], height / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - width * height

    return max(grids, key=fit)


def resized(size: Size, grid: Size, tile: int) -> Size:
    """The picture's size within its grid, in pixels: as large as fits, its aspect kept."""
    width, height = grid[0] * tile, grid[1] * tile
    across, down = width / size[0], height / size[1]
    if across < down:
        return width, min(math.ceil(size[1] * across), height)
    return min(math.ceil(size[0] * down), width), height


def layout(size: Size, tiling: Tiling, tile: int, features: int) -> Layout:
    """The features that stand for a picture of `size` pixels.

        2 x 1 tiles of 2 x 2 features, a picture twice as wide as high: slots of base, tile 1, tile 2 and the newline
        spatial_unpad   0 1 2 3   4 5 8 9 /   6 7 10 11 /
        flat            0 1 2 3   4 5 6 7   8 9 10 11

    Args:
      tile: pixels a side of a tile. features: N, of a tile after the connector; a square number.
    """
    columns, rows = best_grid(size, tiling.grids, tile)
    tiles, side = 1 + columns * rows, math.isqrt(features)
    if tiling.merge == "flat":
        return Layout(tiles, features, np.arange(tiles * features, dtype=np.int32))
    y, x = np.mgrid[: rows * side, : columns * side]
    lines = ((1 + y // side * columns + x // side) * features + y % side * side + x % side).astype(np.int32)
    base = np.arange(features, dtype=np.int32)
    if tiling.merge == "spatial":
        return Layout(tiles, features, np.concatenate([base, lines.ravel()]))
    lines = _unpadded(lines, size)
    ratio = math.sqrt(lines.size / (tiling.max_tiles * features)) if tiling.max_tiles else 0.0
    if ratio <= _RESIZED_ABOVE:
        lines = np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return Layout(tiles, features, np.concatenate([base, lines.ravel()]))
    resized = bilinear(lines, int(lines.shape[0] // ratio), int(lines.shape[1] // ratio))
    ends = alone(np.full((len(resized.slots), 1), NEWLINE, np.int32))
    resized = [np.concatenate(pair, axis=1).reshape(-1, 4) for pair in zip(resized, ends)]
    corners = Corners(*(np.concatenate(pair) for pair in zip(alone(base), resized)))
    return Layout(tiles, features, corners.slots[:, 0], corners)


def single(tiling: Tiling, features: int) -> Layout:
    """The features of one of several pictures that are not tiled."""
    ending = [NEWLINE] if tiling.newline else []
    return Layout(1, features, np.array([*range(features), *ending], np.int32))


def _unpadded(lines: np.ndarray, size: Size) -> np.ndarray:
    """The lines without those that are padding alone, at both ends alike."""
    height, width = lines.shape
    if size[0] / size[1] > width / height:
        empty = (height - int(round(size[1] * (width / size[0]), 7))) // 2
        return lines[empty : height - empty]
    empty = (width - int(round(size[0] * (height / size[1]), 7))) // 2
    return lines[:, empty : width - empty]


def bilinear(lines: np.ndarray, height: int, width: int) -> Corners:
    """[height, width, 4]: the corners that torch's `interpolate(mode="bilinear")` mixes."""
    (top, bottom, down), (left, right, across) = (_ends(n, m) for n, m in zip(lines.shape, (height, width)))
    slots = [lines[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    weights = [np.outer(a, b) for a in (1 - down, down) for b in (1 - across, across)]
    return Corners(np.stack(slots, -1), np.stack(weights, -1).astype(np.float32))


def _ends(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `new` places along a line of `size`: the place before, the one after, and the latter's share."""
    scale = np.float32(size) / np.float32(new)  # in float32, as torch computes places
    at = np.maximum((np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    before = at.astype(np.int64)
    return before, np.minimum(before + 1, size - 1), at - before
