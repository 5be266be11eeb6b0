"""What a record becomes for a model, for people to look at: its pictures' tiles and the positions of their features."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.batch import NEWLINE, Example, Layout, Span
from llava_jax.data.check import Checks, check_tokens, read
from llava_jax.data.packing import cut
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import UsageError
from llava_jax.prompt import anyres, video
from llava_jax.prompt.anyres import Size
from llava_jax.prompt.conversation import Conversation, Video
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import image_size

_MODES = {"square": "its middle", "pad": "padded to a square", "squash": "its aspect changed"}


class Box(NamedTuple):
    """A rectangle of features: its left and upper end, and its size."""

    left: float
    top: float
    width: float
    height: float


class Line(NamedTuple):
    """Features that follow each other in the row and lie in one line of the picture.

    first: the position of the first. newline: `image_newline` follows. box: where they lie, in features of the grid.
    """

    first: int
    features: int
    newline: bool
    box: Box

    @property
    def end(self) -> int:
        """The position behind them."""
        return self.first + self.features + self.newline


class Picture(NamedTuple):
    """One picture of a record.

    size: width and height in pixels. grid: columns and rows of tiles beside the whole picture; None: there are none.
    span: the positions of its features. read: what of the grid any of these positions reads, in features.
    base: the features of the whole picture, or of all frames. lines: those of the grid, in order of their positions.
    frames: how many are shown of a video; 0: it is a picture.
    """

    size: Size
    grid: Size | None
    layout: Layout
    span: Span
    read: Box | None
    base: Line
    lines: tuple[Line, ...]
    frames: int = 0

    @property
    def noun(self) -> str:
        return "video" if self.frames else "picture"

    @property
    def newlines(self) -> int:
        """How many of its positions are `image_newline`."""
        return int((self.layout.slots == NEWLINE).sum())

    def __str__(self) -> str:
        width, height = self.size
        tiles = f"{self.grid[0]} x {self.grid[1]} tiles and the whole" if self.grid else "one tile"
        tiles = f"{self.frames} frames" if self.frames else tiles
        ends = f" (newlines: {self.newlines:,})" if self.newlines else ""
        return (f"{width} x {height} pixels, {tiles}: {self.span.length:,} features{ends} at positions "
                f"{self.span.start:,} to {self.span.start + self.span.length - 1:,}")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        return {"size": list(self.size), "grid": self.grid and list(self.grid), "tiles": self.layout.tiles,
                "features": self.span.length, "newlines": self.newlines, "start": self.span.start,
                **({"frames": self.frames} if self.frames else {})}  # fmt: skip


class Inspection(NamedTuple):
    """A record as it is trained on.

    root: the folder of its pictures. kept: how many of its tokens a row takes. lost: supervised ones among the others.
    problems: what `validate` says.
    """

    record: Record
    root: epath.Path | None
    conversation: Conversation
    example: Example
    pictures: tuple[Picture, ...]
    kept: int
    lost: int
    problems: tuple[Problem, ...]

    @property
    def fatal(self) -> bool:
        """Whether training refuses the record."""
        return any(problem.fatal for problem in self.problems)

    def __str__(self) -> str:
        features = sum(picture.span.length for picture in self.pictures)
        return (f"{len(self.example.tokens):,} tokens, {features:,} of them features of pictures; "
                f"{self.example.learned.sum():,} supervised")  # fmt: skip


def examine(record: Record, checks: Checks, source: Source) -> Inspection:
    """Encodes a record of a source as training does, pictures decoded.

    checks: of the run, with its format.

    Raises:
      ValueError: the record cannot be encoded; names it and why.
    """
    reading, root = read(record, checks.rules, source.images), source.images
    conversation = record.conversation_in(root)
    example = encode(conversation, checks.format, root)
    layouts = example.layouts or [Layout(1, span.length, np.arange(span.length)) for span in example.image_spans]
    pictures = tuple(
        _shown(image, root, layout, span, checks.format)
        for image, layout, span in zip(conversation.images, layouts, example.image_spans)
    )
    kept, lost = cut(example, checks.row_tokens)
    problems = (*reading.problems, *check_tokens(conversation, checks, root))
    return Inspection(record, root, conversation, example, pictures, len(kept.tokens), lost, problems)


def select(sources: Sequence[Source], first: int | None, ids: Sequence[str]) -> Iterator[tuple[Source, Record]]:
    """The records of some sources in order, or the first one of each id; of these the first, where a number is given.

    Raises:
      UsageError: an id that no record has, after those that there are.
    """
    missing = set(ids)
    limit = min(len(missing), first or len(missing)) if ids else first
    every = ((source, record) for source in sources for record in source)
    pairs = (pair for pair in every if not ids or pair[1].id in missing)
    for source, record in itertools.islice(pairs, limit):
        missing.discard(record.id)
        yield source, record
    if missing and len(set(ids)) - len(missing) < limit:
        paths = ", ".join(source.path for source in sources)
        raise UsageError(f"--id {sorted(missing)[0]}: no record of {paths} has this id")


def shape_of(format: Format) -> str:
    """How the model takes a picture, in words."""
    side, tiling, features = format.image_size, format.tiling, format.image_features
    if tiling is None:
        return f"a picture becomes {side} x {side} pixels, {_MODES[format.image_mode]}: {features} features"
    grids = " ".join(f"{columns}x{rows}" for columns, rows in tiling.grids)
    limit = f", resized to the features of {tiling.max_tiles} tiles where there are more" if tiling.max_tiles else ""
    return (f"a picture is its whole and the tiles of a grid ({grids}), each of {side} pixels and "
            f"{features} features; merged {tiling.merge}{limit}")  # fmt: skip


def _shown(image: Any, root: epath.Path | None, layout: Layout, span: Span, format: Format) -> Picture:
    if not isinstance(image, Video):
        return _picture(image_size(image, root), layout, span, format)
    size, side = next(video.frames(image, format.video, root)).size, math.isqrt(layout.features)
    ends = NEWLINE in layout.slots
    base = Line(span.start, span.length - ends, ends, Box(0, 0, side, side))
    return Picture(size, None, layout, span, None, base, (), layout.tiles)


def _picture(size: Size, layout: Layout, span: Span, format: Format) -> Picture:
    side = math.isqrt(layout.features)
    base = Line(span.start, layout.features, layout.tiles == 1 and NEWLINE in layout.slots, Box(0, 0, side, side))
    if layout.tiles == 1 or format.tiling is None:
        return Picture(size, None, layout, span, None, base, ())
    grid = anyres.best_grid(size, format.tiling.grids, format.image_size)
    if format.tiling.merge == "flat":
        whole = Box(0, 0, grid[0] * side, grid[1] * side)
        lines = tuple(_tiles(base.end, grid, side))
        return Picture(size, grid, layout, span, whole, base, lines)
    read_box = _read_box(layout, grid, side)
    return Picture(size, grid, layout, span, read_box, base, tuple(_lines(layout, base.end, read_box)))


def _tiles(first: int, grid: Size, side: int) -> Iterator[Line]:
    """Of "flat" features: a tile after the other."""
    for tile in range(grid[0] * grid[1]):
        row, column = divmod(tile, grid[0])
        yield Line(first + tile * side * side, side * side, False, Box(column * side, row * side, side, side))


def _read_box(layout: Layout, grid: Size, side: int) -> Box:
    """The features of the grid that are read: all but the lines of the padding, which may be all lines of a stripe."""
    slots, weights = (layout.slots, None) if layout.corners is None else layout.corners
    slots = (slots if weights is None else slots[weights > 0]) - layout.features
    slots = slots[slots >= 0]
    if not len(slots):
        return Box(0, 0, 0, 0)
    tile, place = np.divmod(slots, layout.features)
    x, y = tile % grid[0] * side + place % side, tile // grid[0] * side + place // side
    return Box(*(int(n) for n in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)))


def _lines(layout: Layout, first: int, box: Box) -> Iterable[Line]:
    """Of features line by line over the grid; resized ones lie evenly within what is read."""
    ends = np.flatnonzero(layout.slots == NEWLINE)
    if len(ends):
        lengths = np.diff(ends, prepend=layout.features - 1) - 1
    else:
        lengths = np.full(int(box.height), int(box.width))
    step, at = box.height / max(1, len(lengths)), first
    for number, length in enumerate(lengths.tolist()):
        line = Line(at, length, len(ends) > 0, Box(box.left, box.top + number * step, box.width, step))
        at = line.end
        yield line
