"""A corpus of pictures of every kind: each is the RGB that its file says, or is refused in one line that names it."""

import functools
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_jax import errors
from llava_jax.prompt import images
from llava_jax.prompt.images import open_image

NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 24, 3), np.uint8))
ALPHA = Image.fromarray(np.random.RandomState(1).randint(0, 256, (20, 24), np.uint8))
NOT, DAMAGED = "not a picture that can be read", "damaged picture|not a picture that can be read"


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def in_mode(mode):
    if mode in ("RGBA", "LA"):
        image = NOISE.convert("RGB" if mode == "RGBA" else "L")
        image.putalpha(ALPHA)
        return image
    return NOISE.quantize(16) if mode == "P" else NOISE.convert(mode)


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


# ---- pictures as they should be: name -> file. What is wanted is what PIL decodes.
WRITTEN = {
    "PNG": {"": ("1", "L", "LA", "P", "RGB", "RGBA"), "optimize": ("RGB",), "compress_level": ("L",)},
    "JPEG": {"": ("L", "RGB", "CMYK"), "progressive": ("RGB", "L"), "keep_rgb": ("RGB",)},
    "WEBP": {"": ("RGB", "RGBA"), "lossless": ("RGB", "RGBA")},
    "GIF": {"": ("1", "L", "P", "RGB"), "interlace": ("P",)},
    "BMP": {"": ("1", "L", "P", "RGB", "RGBA")},
    "TIFF": {"": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr")},
    "PPM": {"": ("1", "L", "RGB")},
}  # fmt: skip


def sound():
    found = {f"{kind} {mode} {option}": encoded(in_mode(mode), kind, **({option: True} if option else {}))
             for kind, options in WRITTEN.items() for option, modes in options.items() for mode in modes}  # fmt: skip
    found |= {f"JPEG that EXIF {i} turns": encoded(NOISE, "JPEG", exif=exif(i)) for i in range(1, 9)}
    found |= {f"JPEG {q} {s}": encoded(NOISE, "JPEG", quality=q, subsampling=s) for q in (1, 100) for s in (0, 2)}
    found |= {f"TIFF {name}": encoded(NOISE, "TIFF", compression=name)
              for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")}  # fmt: skip
    found |= {
        "TIFF group4": encoded(in_mode("1"), "TIFF", compression="group4"),
        "TIFF of two pages": encoded(NOISE, "TIFF", save_all=True, append_images=[ALPHA]),
        "GIF that moves": encoded(NOISE, "GIF", save_all=True, append_images=[ALPHA.convert("RGB")] * 2),
        "GIF with transparency": encoded(in_mode("P"), "GIF", transparency=3),
        "WEBP that moves": encoded(NOISE, "WEBP", save_all=True, append_images=[ALPHA.convert("RGB")], lossless=True),
        "PNG that moves": encoded(NOISE, "PNG", save_all=True, append_images=[ALPHA.convert("RGB")]),
        "PNG of a colour that is transparent": encoded(NOISE, "PNG", transparency=(1, 2, 3)),
        "PNG with more behind": encoded(NOISE, "PNG") + b"<html>",
        "JPEG with more behind": encoded(NOISE, "JPEG") + bytes(1000),
        "PNG of one pixel": encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
        "PNG of 16 bits a colour": png(2, 1, 16, 2, b"\0" + bytes(range(12))),
        "PPM in letters": b"P3 2 1 255\n1 2 3 250 251 252\n",
        "PNG with a comment": png(2, 1, 8, 2, b"\0abcdef", chunk(b"tEXt", b"Comment\0" + b"x" * 5000)),
        "PNG with a damaged profile": png(2, 1, 8, 2, b"\0abcdef", chunk(b"iCCP", b"k\0\0" + zlib.compress(b"none"))),
    }  # fmt: skip
    return found


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, bits, color, rows, more=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---- files that are none, or that are damaged: name -> (file, words of the refusal)


@functools.cache
def refused():
    found = {name: (content, NOT) for name, content in FOREIGN.items()}
    for kind in WRITTEN:
        good = encoded(NOISE, kind)
        found |= {
            f"{kind}: its head": (good[:20], DAMAGED), f"{kind}: a quarter": (good[: len(good) // 4], DAMAGED),
            f"{kind}: half": (good[: len(good) // 2], DAMAGED),
            f"{kind}: another first byte": (b"?" + good[1:], NOT),
            f"{kind}: noise behind its head": (good[:16] + np.random.RandomState(2).bytes(len(good)), DAMAGED),
        }  # fmt: skip
    found["PPM: noise behind its head"] = (b"P6 24 20 255\n" + bytes(100), DAMAGED)  # every byte is a colour
    found["BMP: noise behind its head"] = (b"BM" + np.random.RandomState(3).bytes(2000), DAMAGED)
    broken, bomb = bytearray(encoded(NOISE, "PNG")), b"k\0\0" + zlib.compress(bytes(2 * 10**7))
    floats, integers = (Image.fromarray(np.ones((4, 4), kind)) for kind in (np.float32, np.int32))
    upside_down = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 4, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
    broken[60] ^= 255
    found |= {
        "PNG whose sum is wrong": (bytes(broken), DAMAGED),
        "PNG without width": (png(0, 1, 8, 2, b"\0"), NOT),
        "PNG of 2**62 pixels": (png(2**31 - 1, 2**31 - 1, 8, 0, b"\0"), "more than 64000000 pixels"),
        "PNG of 81 million pixels": (encoded(Image.new("1", (9000, 9000)), "PNG"), "9000 x 9000 pixels, want 1 to"),
        "PNG of a line": (encoded(Image.new("1", (1, 5000)), "PNG"), "1 x 5000 pixels, one side more than 200 times"),
        "PNG of a row": (encoded(Image.new("1", (5000, 1)), "PNG"), "5000 x 1 pixels, one side more than 200 times"),
        "PNG whose text is 20 MB": (png(2, 1, 8, 2, b"\0abcdef", chunk(b"zTXt", bomb)), NOT),
        "PNG whose profile is 20 MB": (png(2, 1, 8, 2, b"\0abcdef", chunk(b"iCCP", bomb)), NOT),
        "PNG whose rows are missing": (png(600, 600, 8, 0, b"\0"), DAMAGED),
        "GIF without a screen": (b"GIF89a" + bytes(7) + b";", NOT),
        "GIF without a picture": (b"GIF89a\x08\0\x08\0\0\0\0;", DAMAGED),
        "TIFF of floats": (encoded(floats, "TIFF"), "mode F .*save it with 8 or 16"),
        "TIFF of integers": (encoded(integers, "TIFF"), "mode I .*save it with 8 or 16"),
        "TIFF without tags": (b"II*\0\x08\0\0\0\0\0" + bytes(20), NOT),
        "TIFF whose tags are far away": (b"II*\0\xff\xff\xff\x7f", NOT),
        "PPM without pixels": (b"P6 100 100 255\n", DAMAGED),
        "PPM of a size that is no number": (b"P6 1e9 1 255\n", NOT),
        "PPM without height": (b"P6 10 0 255\n", DAMAGED),
        "BMP of a height below zero": (b"BM" + upside_down, f"pixels|{DAMAGED}"),
    }  # fmt: skip
    return found


FOREIGN = {
    "nothing": b"", "a zero": b"\0", "white space": b" \n" * 50, "a page": b"<!DOCTYPE html><html>404</html>",
    "JSON": b'{"error": "no such image"}', "text": b"The picture is not here.", "UTF-16": "kein Bild".encode("utf-16"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "PSD": b"8BPS\0\1" + bytes(40),
    "ICO": b"\0\0\1\0\1\0\x08\x08" + bytes(60), "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(40), "MP4": b"\0\0\0\x18ftypmp42" + bytes(40), "ZIP": b"PK\3\4" + bytes(40),
    "gzip": b"\x1f\x8b\x08\0" + bytes(40), "tar": bytes(257) + b"ustar\x0000" + bytes(250),
    "NumPy": b"\x93NUMPY\1\0" + bytes(60), "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "Targa": bytes([0, 0, 2]) + bytes(9) + b"\x08\0\x08\0\x18\0" + bytes(192), "FITS": b"SIMPLE  =  T" + bytes(80),
    "DDS": b"DDS \x7c\0\0\0" + bytes(120), "PCX": b"\n\5\1\x08" + bytes(124), "a program": b"\x7fELF\2" + bytes(60),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\n", "XBM": b"#define x_width 8\n#define x_height 8\n",
}  # fmt: skip
# What a record may say in the place of a file of the folder -> words of the refusal.
PATHS = {
    "gone.png": "no such file", "": "not a path", ".": "not a regular file", "folder": "not a regular file",
    "../outside.png": "without '..'", "folder/../../outside.png": "without '..'", "/etc/hostname": "inside the image",
    "\\\\server\\a.png": "inside the image", "link.png": "is a link to", "pipe.png": "not a regular file",
    "a\0.png": "not a path", "https://example.org/a.png": "inside the image", "gs://bucket/a.png": "inside the image",
    "file:///etc/hostname": "inside the image", "data:image/png;base64,iVBORw0KGgo=": "no such file",
    "b" * 300 + ".png": "too long", "\udcff.png": "no such file", "good.png/x.png": "no such file",
    "GOOD.PNG": "no such file", "good.png ": "no such file", "C:\\a.png": "no such file", "~/a.png": "no such file",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "folder").mkdir(parents=True)
    for path in (root / "good.png", root.parent / "outside.png"):
        path.write_bytes(encoded(NOISE, "PNG"))
    (root / "link.png").symlink_to(root.parent / "outside.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_the_corpus_has_more_than_120_pictures():
    assert len(sound()) >= 55 and len(refused()) >= 75 and len(PATHS) >= 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sound_file_of_every_kind_is_the_rgb_that_pil_decodes():
    for name, content in sound().items():
        wanted = Image.open(io.BytesIO(content), formats=images.FORMATS).convert("RGB")
        assert np.array_equal(open_image(content), wanted), name
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert np.array_equal(open_image(encoded(NOISE, kind)), NOISE), kind


def test_grey_of_sixteen_bits_is_scaled_whatever_its_file():
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    picture = Image.fromarray(grey)
    letters = b"P5 4 1 65535\n" + grey.astype(">u2").tobytes()
    for content in (encoded(picture, "PNG"), encoded(picture, "TIFF"), letters):
        assert np.asarray(open_image(content))[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_or_a_damaged_one_is_refused_in_one_line(tmp_path):
    wrong = []
    for name, (content, words) in refused().items():
        (tmp_path / "bad.jpg").write_bytes(content)
        try:
            wrong.append(f"{name}: read as {open_image('bad.jpg', tmp_path).size}")
        except ValueError as error:
            if not re.search(f"bad.jpg.*({words})", str(error)) or errors.exit_code(error) != 64 or "\n" in str(error):
                wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_path_that_leads_to_no_picture_is_refused_in_one_line(folder):
    for path, words in PATHS.items():
        with pytest.raises((ValueError, OSError), match=words) as found:
            open_image(path, folder)
        assert errors.exit_code(found.value) == 64 and "\n" not in str(found.value), path
