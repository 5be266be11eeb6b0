"""SVG drawings of a record's pictures: as they are, and as the tower sees them, tiles and padding marked."""

import base64
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.data.inspection import Box, Line, Picture
from llava_jax.prompt.encode import Format
from llava_jax.prompt.images import Image, thumbnail

_PICTURE, _TILES = 220, 440  # pixels of the longer side
_GUTTER, _ROOM = 46, 16  # left of the tiles for positions; right of them for newlines

Size = tuple[float | int, float | int]


class View(NamedTuple):
    """A drawing and what it shows, in words."""

    svg: str
    caption: str
    tiles: bool = False


def frames(video: Picture, shown: Sequence[np.ndarray]) -> list[View]:
    """The frames of a video as the tower sees them. shown: of `Example.images`, those of this video."""
    each, first = video.base.features // video.frames, video.base.first
    return [
        View(_svg(frame, (_PICTURE, _PICTURE), ""),
             f"Frame {i + 1}: positions {first + i * each:,} to {first + (i + 1) * each - 1:,}")
        for i, frame in enumerate(shown)
    ]  # fmt: skip


def views(picture: Picture, image: Image.Image, tiles: Sequence[np.ndarray], format: Format) -> list[View]:
    """What there is to see of one picture: itself, what the tower sees of the whole, and the tiles.

    image: the picture, decoded. tiles: of `Example.images`, those of this picture.
    """
    width, height = picture.size
    drawn, side = _fitted(picture.size, _PICTURE), (_PICTURE, _PICTURE)
    oblong, square = width != height, format.image_mode == "square"
    shorter, longer = (min(picture.size),) * 2, (max(picture.size),) * 2
    cut = _around(_middle(shorter, picture.size, drawn), drawn) if square and oblong else ""
    note = "; the shaded ends are cut off" if cut else ""
    drawings = [View(_svg(np.asarray(image), drawn, cut), f"The picture, {width} x {height} pixels{note}")]
    padded = oblong and picture.grid is None and format.image_mode not in ("square", "squash")
    padding = _around(_middle(picture.size, longer, side), side) if padded else ""
    ends = _newlines([picture.base], side, _PICTURE / picture.base.box.height)
    note = "; shaded: padding, whose features count" if padded else ""
    name = "The whole" if picture.grid else "What the tower sees"
    drawings.append(View(_svg(tiles[0], side, padding + ends), f"{name}: {_positions([picture.base])}{note}"))
    return [*drawings, _grid(picture, picture.grid, tiles[1:])] if picture.grid else drawings


def _grid(picture: Picture, grid: tuple[int, int], tiles: Sequence[np.ndarray]) -> View:
    """The tiles side by side, their numbers, the lines of features and what of them is left out."""
    (columns, rows), side = grid, tiles[0].shape[0]
    pixels = np.reshape(tiles, (rows, columns, side, side, 3)).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    size = _fitted((columns, rows), _TILES)
    scale = size[0] / (columns * math.isqrt(picture.layout.features))
    box = Box(*(x * scale for x in picture.read))
    parts = [padding := _around(box, size), *_tile_marks(columns, rows, size)]
    parts += [*(_line(line, scale) for line in picture.lines), _newlines(picture.lines, size, scale)]
    parts += _starts(picture.lines, size[1] / rows, scale)
    note = "; shaded: features of the padding, left out" if padding else ""
    return View(_svg(pixels, size, "".join(parts), _GUTTER, 12),
                f"Tiles 1 to {columns * rows}: {_positions(picture.lines)}{note}", True)  # fmt: skip


def _positions(lines: Sequence[Line]) -> str:
    """Such as "positions 40 to 91: 4 lines of 12 features and a newline"."""
    if not lines:
        return "none of their features"
    count, features, box = len(lines), lines[0].features, lines[0].box
    each = "lines" if features <= box.width else "tiles"
    what = f"{count} {each} of {features:,} features" if count > 1 else f"{features:,} features"
    ends = " and a newline" if lines[0].newline else ""
    return f"positions {lines[0].first:,} to {lines[-1].end - 1:,}: {what}{ends}"


def _svg(pixels: np.ndarray, size: Size, parts: str, left: int = 0, top: int = 0) -> str:
    """A picture of some size with parts drawn over it, and room around it."""
    (width, height), longest = size, round(max(size) * 1.5)  # for screens with more pixels
    url = "data:image/jpeg;base64," + base64.b64encode(thumbnail(pixels, longest)).decode()
    whole = left + width + _ROOM
    image = f'<image href="{url}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'
    return f'<svg viewBox="{-left} {-top} {whole:g} {top + height + 2:g}" width="{whole:g}">{image}{parts}</svg>'


def _fitted(size: Size, longest: int) -> Size:
    """The size at which a picture is drawn."""
    return tuple(max(2, round(x * longest / max(size), 1)) for x in size)


def _middle(inner: Size, outer: Size, drawn: Size) -> Box:
    """Where a rectangle in the middle of an outer one lies when that is drawn at some size."""
    x, y = drawn[0] / outer[0], drawn[1] / outer[1]
    return Box((outer[0] - inner[0]) / 2 * x, (outer[1] - inner[1]) / 2 * y, inner[0] * x, inner[1] * y)


def _around(box: Box, size: Size) -> str:
    """Shades all but a box."""
    right, bottom = box.left + box.width, box.top + box.height
    shades = (Box(0, 0, size[0], box.top), Box(0, bottom, size[0], size[1] - bottom),
              Box(0, box.top, box.left, box.height), Box(right, box.top, size[0] - right, box.height))  # fmt: skip
    shades = [shade for shade in shades if min(shade.width, shade.height) > 0.5]  # a feature is larger
    return "".join(f'<rect class="shade" {_place(shade)}/>' for shade in shades)


def _place(box: Box) -> str:
    names = ("x", "y", "width", "height")
    return " ".join(f'{name}="{round(number, 2):g}"' for name, number in zip(names, box))


def _tile_marks(columns: int, rows: int, size: Size) -> Iterator[str]:
    width, height = size[0] / columns, size[1] / rows
    for tile in range(columns * rows):
        row, column = divmod(tile, columns)
        yield f'<rect class="tile" {_place(Box(column * width, row * height, width, height))}/>'
        x, y = column * width + 6, row * height + 18
        yield f'<text class="number" x="{x:.1f}" y="{y:.1f}">{tile + 1}</text>'


def _line(line: Line, scale: float) -> str:
    """A line of features, drawn where the mouse is."""
    end = ", then a newline" if line.newline else ""
    return (f'<rect class="line" data-first="{line.first}" data-features="{line.features}" '
            f'{_place(Box(*(x * scale for x in line.box)))}><title>positions {line.first:,} to '
            f"{line.first + line.features - 1:,}{end}</title></rect>")  # fmt: skip


def _newlines(lines: Sequence[Line], size: Size, scale: float) -> str:
    """A mark at the right of each line that ends with one, at its lowest features."""
    ends = [(line.box.top + line.box.height - min(1.0, line.box.height) / 2) * scale for line in lines if line.newline]
    return "".join(f'<path class="newline" d="M{size[0] + 12:g} {y - 2:.1f}v3h-8"/>' for y in ends)


def _starts(lines: Sequence[Line], tile: float, scale: float) -> Iterator[str]:
    """The position of the first line in each row of tiles, and that of the last line.

    tile: its height as drawn.
    """
    if not lines:
        return
    rows = [int((line.box.top + line.box.height / 2) * scale / tile) for line in lines]
    shown = {rows.index(row) for row in rows} | {len(lines) - 1}
    for number in sorted(shown):
        line = lines[number]
        if line.box.left == lines[0].box.left:
            y = (line.box.top + min(1.0, line.box.height) / 2) * scale + 4
            yield f'<text class="start" x="-6" y="{y:.1f}">{line.first:,}</text>'
