"""Records in pixels.json what Pillow 12 makes of 200 random sizes, and of files of every kind.

Run by hand, in an environment of its own: `pip install pillow==12.2.* numpy && python tests/golden/make_pixels.py`.
Pillow up to 12 resizes the rows of a picture, rounds, and then resizes the columns (of stripes the other way round);
13 begins with the columns of many upright pictures. Each mode is written here in one resize, without the code under
test.
"""

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

SIDES = (28, 112, 224, 336)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def square(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    longer = int(side * max(width, height) / min(width, height))
    image = image.resize((side, longer) if width <= height else (longer, side), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pad(image: Image.Image, side: int) -> Image.Image:
    whole = Image.new("RGB", (max(image.size), max(image.size)), (122, 116, 104))
    whole.paste(image, ((whole.width - image.width) // 2, (whole.height - image.height) // 2))
    return whole.resize((side, side), Image.Resampling.BICUBIC)


def squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def digest(image: Image.Image) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:16]


def sizes() -> list[tuple[int, int]]:
    """A hundred like photographs and a hundred of any shape, points and stripes among them."""
    rng = np.random.RandomState(7)
    photographs, others = rng.randint(60, 640, (100, 2)), np.exp(rng.uniform(0, np.log(800), (150, 2))).astype(int)
    thin = others.max(axis=1) > 200 * others.min(axis=1)  # such pictures are refused
    return [(int(w), int(h)) for w, h in (*photographs, *others[~thin][:100])]


def files() -> dict[str, bytes]:
    """One small file of each kind and mode that can be told apart by how it becomes RGB."""
    picture, found = noise(9, 7, 1), {}
    alpha = Image.fromarray(np.random.RandomState(2).randint(0, 256, (7, 9), np.uint8))
    rgba, grey = picture.copy(), picture.convert("L")
    rgba.putalpha(alpha)
    two = Image.merge("LA", (grey, alpha))
    palette = picture.quantize(16)
    for name, image, kind, options in (
        ("rgb", picture, "PNG", {}), ("rgba", rgba, "PNG", {}), ("grey", grey, "PNG", {}), ("la", two, "PNG", {}),
        ("palette", palette, "PNG", {}), ("hidden", palette, "PNG", {"transparency": 3}),
        ("bits", picture.convert("1"), "PNG", {}), ("gif", palette, "GIF", {"transparency": 3}),
        ("bmp", picture, "BMP", {}),
        ("ppm", picture, "PPM", {}), ("tiff", rgba, "TIFF", {}), ("cmyk", picture.convert("CMYK"), "TIFF", {}),
        ("lab", picture.convert("LAB"), "TIFF", {}),
        ("webp", rgba, "WEBP", {"lossless": True, "exact": True}),
    ):  # fmt: skip
        out = io.BytesIO()
        image.save(out, kind, **options)
        found[name] = out.getvalue()
    return found


def main() -> None:
    modes = {"square": square, "pad": pad, "squash": squash}
    cases = []
    for seed, (width, height) in enumerate(sizes()):
        side, image = SIDES[seed % len(SIDES)], noise(width, height, seed)
        cases.append([width, height, side, *(digest(mode(image, side)) for mode in modes.values())])
    shown = {}
    for name, content in files().items():
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        shown[name] = [base64.b64encode(content).decode(), hashlib.sha256(pixels.tobytes()).hexdigest()[:16]]
    found = {"pillow": PIL.__version__, "columns": ["width", "height", "side", *modes], "cases": cases, "files": shown}
    text = json.dumps(found).replace("], [", "],\n[").replace('], "', '],\n"')
    (Path(__file__).parent / "pixels.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
