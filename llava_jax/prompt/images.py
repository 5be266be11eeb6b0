"""Picture files to uint8 pixels, as CLIP's processor and LLaVA make them, and no file that could hurt us.

Everything up to the resize happens here, on uint8; scaling and normalising happen on the device. A picture's pixels
are the same under every Pillow.
"""

import io
import os
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from etils import epath
from PIL import Image

from llava_jax import files
from llava_jax.errors import MissingFile, UsageError

T = TypeVar("T")
MAX_PIXELS = 64_000_000  # decoded, a picture of this size takes 192 MB
MAX_ASPECT = 200  # a 1 x 5000 picture of 99 bytes would be resized to 336 x 1,680,000: 2.3 GB
MAX_FILE_BYTES = 256_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # PIL's other readers may start programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # of a folder's frames
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# A progressive JPEG of a few hundred kB may hold thousands of scans, each over all of its pixels (64 million: 0.1 s).
MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans; encoders write about 10 scans

# What PIL's readers raise on damaged files; a TIFF's tags of another type than its readers expect are TypeErrors.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_STRIP_ROWS = 256
_HEADER_BYTES = 65_536
# A JPEG's markers but those that stand alone: in a scan's data 0xFF is followed by 0 or by a restart's number.
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")


def open_image(ref: Any, root: epath.PathLike | None = None) -> Image.Image:
    """The picture, decoded, as RGB.

    As in LLaVA's training, transparency is dropped (hidden colours appear) and EXIF rotation is not applied.
    Differs from LLaVA: 16-bit grey is scaled by 1/257 where PIL would clip it to white.

    ref: path, encoded bytes or a PIL image. root: the folder that a path is relative to and may not leave.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a picture, damaged, too large, too long, or outside of `root`; names the file.
    """
    return _found(ref, root, _rgb)


def _found(
    ref: Any, root: epath.PathLike | None, use: Callable[[Image.Image, str], T], most_bytes: int = MAX_FILE_BYTES + 1
) -> T:
    """What `use` makes of a picture that was opened and is not yet decoded, and of its name.

    most_bytes: read of a file.
    """
    if isinstance(ref, Image.Image):
        return use(ref, "image given as an object")
    if isinstance(ref, bytes):
        return use(*_opened(ref, f"image given as {len(ref)} bytes"))
    if not isinstance(ref, str | os.PathLike):
        raise UsageError(f"image given as {type(ref).__name__}: want a path, a file's bytes or a PIL image "
                         "(PIL.Image.fromarray makes one of an array)")  # fmt: skip
    for path in spellings(os.fspath(ref), root):
        try:
            bucket = files.is_bucket(path)
            content = files.read_range(path, 0, most_bytes) if bucket else _read_local(path, root, most_bytes)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if len(content) > MAX_FILE_BYTES:
            raise UsageError(f"image {path!r}: over {MAX_FILE_BYTES} bytes, no more are read: make it smaller")
        return use(*_opened(content, f"image {path!r}"))
    raise MissingFile(f"image {path!r}: no such file")


def to_pixels(
    image: Image.Image, size: int, mode: str, mean: tuple[float, ...] = CLIP_MEAN, resample: str = "bicubic"
) -> np.ndarray:
    """uint8 [size, size, 3] of an RGB picture.

    mode: "square" resizes the shorter side to `size` and cuts the middle out, as transformers' CLIPImageProcessorPil;
      "pad" first centres the picture on a square of the colour `mean`; "squash" changes the aspect.
    mean: the tower's, of 0 to 1; its 255-fold is cut to integers. Source: LLaVA llava/train/train.py:702-716@c121f04.
    resample: "bicubic" or "bilinear".

    Raises:
      ValueError: the mode is unknown.
    """
    filter = FILTERS[resample]
    if mode == "pad":
        return np.asarray(_pad(image, size, tuple(int(255 * x) for x in mean), filter))
    modes = {"square": _square, "pad": _pad, "squash": _squash}
    if mode not in modes:
        raise UsageError(f"image_mode {mode!r} is unknown: choose one of {', '.join(modes)}")
    return np.asarray(modes[mode](image, size, filter))


def to_tiles(
    image: Image.Image, tile: int, grid: tuple[int, int], within: tuple[int, int], resample: str = "bicubic"
) -> list[np.ndarray]:
    """uint8 [tile, tile, 3] each: the whole picture squashed to a tile, then the tiles of a grid, row by row.

    grid: columns and rows. within: the size that the picture is resized to, in the middle of the grid's black canvas.
    """
    filter, columns, rows = FILTERS[resample], *grid
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    canvas.paste(_resized(image, within, filter), ((canvas.width - within[0]) // 2, (canvas.height - within[1]) // 2))
    cut = np.asarray(canvas).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return [np.asarray(_squash(image, tile, filter)), *cut]


def image_size(ref: Any, root: epath.PathLike | None = None) -> tuple[int, int]:
    """Width and height of a picture as `open_image` decodes it; its header alone is read, where that tells.

    Arguments and errors as there.
    """
    try:
        return _found(ref, root, _size, _HEADER_BYTES)
    except UsageError:
        return _found(ref, root, _size)


def thumbnail(pixels: np.ndarray, longest: int) -> bytes:
    """A JPEG file of uint8 [H, W, 3], whose longer side is made `longest` where it is longer."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest))
    return encode_jpeg(np.asarray(image), quality=80)


def encode_jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    """A JPEG file of uint8 [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _square(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    image = _resized(image, (size, longer) if width <= height else (longer, size), filter)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, border: tuple[int, ...], filter: Image.Resampling) -> Image.Image:
    """As padding to the full square and resizing that, without ever holding the square.

    Rows are resized first, each by itself, so they can be padded and resized in strips. 20000 x 100 pixels would fill
    1.6 GB as a square.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), border)
    if image.width == side:
        narrow.paste(image.resize((size, image.height), filter), (0, top))
        return narrow.resize((size, size), filter)
    for row in range(0, image.height, _STRIP_ROWS):
        strip = Image.new("RGB", (side, min(_STRIP_ROWS, image.height - row)), border)
        strip.paste(image.crop((0, row, image.width, row + strip.height)), (left, 0))
        narrow.paste(strip.resize((size, strip.height), filter), (0, row))
    return narrow.resize((size, size), filter)


def _squash(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    return _resized(image, (size, size), filter)


def _resized(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """The rows resized and rounded to uint8, then the columns; of stripes the columns first.

    So does every Pillow that the released models were trained with. Pillow 13 begins with the columns of many upright
    pictures, which rounds to other pixels. Source: Pillow 12.2 Image.resize and Resample.c (order of the passes).
    """
    stripe = image.height > 100 * image.width and size[1] < image.height
    first = (image.width, size[1]) if stripe else (size[0], image.height)
    return image.resize(first, filter).resize(size, filter)


def spellings(ref: str, root: epath.PathLike | None, noun: str = "image") -> list[str]:
    """The paths that `ref` may mean, under `root` if there is one.

    macOS writes é as two characters where Linux data sets write one: as given, then both spellings.

    Raises:
      UsageError: it leaves `root`, or is no path; calls it a `noun`.
    """
    parts = ref.replace("\\", "/").split("/")
    if root is not None and ("://" in ref or ref.startswith(("/", "\\")) or ".." in parts):
        raise UsageError(f"{noun} {ref!r}: want a path inside the image folder {str(root)!r}, without '..'")
    if not ref or "\0" in ref:
        raise UsageError(f"{noun} {ref!r}: not a path")
    if files.is_bucket(ref) and not ref.startswith("gs://"):
        raise UsageError(f"{noun} {ref!r}: want a file or gs://BUCKET/FILE; download it first")
    forms = dict.fromkeys((ref, unicodedata.normalize("NFC", ref), unicodedata.normalize("NFD", ref)))
    return [os.fspath(epath.Path(one) if root is None else epath.Path(root) / one) for one in forms]


def _read_local(path: str, root: epath.PathLike | None, most_bytes: int) -> bytes:
    """What a file holds, at most `most_bytes` of it."""
    return files.read_range(path, 0, min(local_bytes(path, root) + 1, most_bytes))


def local_bytes(path: str, root: epath.PathLike | None, noun: str = "image") -> int:
    """The size of a file on a disk, after it has been found harmless.

    Raises:
      OSError: there is none.
      UsageError: a link that leaves `root`, or no regular file; calls it a `noun`.
    """
    found = os.stat(path)
    if root is not None and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise UsageError(
            f"{noun} {path!r}: is a link to {str(Path(path).resolve())!r}, outside of the image folder: name the "
            f"folder that really holds the {noun}s, or copy them"
        )
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise UsageError(f"{noun} {path!r}: not a regular file")
    return found.st_size


def _opened(content: bytes, name: str) -> tuple[Image.Image, str]:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except _DAMAGE as error:
        raise UsageError(f"{name}: {_reason(content, error)}: replace the file or drop the record") from error
    if "progressive" in image.info and (scans := _scans(content)) * image.width * image.height > MAX_SCANNED:
        raise UsageError(f"{name}: a JPEG of {scans} scans for {image.width} x {image.height} pixels: save it anew")
    return image, name


def _scans(jpeg: bytes) -> int:
    """How often a JPEG file goes over its first picture."""
    scans, at = 0, 2
    while (found := _SEGMENT.search(jpeg, at)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    return scans


def _reason(content: bytes, error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    return f"not a picture that can be read ({len(content)} bytes that start with {content[:16]!r})"


def _size(image: Image.Image, name: str) -> tuple[int, int]:
    """Width and height, after they have been found harmless."""
    width, height = image.size
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise UsageError(f"{name}: {width} x {height} pixels, want 1 to {MAX_PIXELS} in all: resize it")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(f"{name}: {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut it")
    return width, height


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of 16-bit grey, a strip at a time: whole arrays of 32 bits would be most of what a picture takes."""
    grey = np.empty((image.height, image.width), np.uint8)
    for row in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, row, image.width, min(row + _STRIP_ROWS, image.height)))
        grey[row : row + strip.height] = (np.asarray(strip).astype(np.uint32) + 128) // 257
    return grey


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Decodes `image`, after its header has been found harmless."""
    _size(image, name)
    sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise UsageError(f"{name}: mode {image.mode} (32 bits a pixel) has no known range: save it with 8 or 16 bits")
    try:
        if sixteen_bits:
            image = Image.fromarray(_eight_bits(image))
        return image.convert("RGB")
    except _DAMAGE as error:
        raise UsageError(f"{name}: damaged picture ({error}): replace the file or drop the record") from error
