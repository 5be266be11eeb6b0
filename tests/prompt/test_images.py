"""Pictures: bit for bit what CLIP's processor and LLaVA make of them, and what is refused."""

import base64
import hashlib
import io
import json
import os
import re
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax import files
from llava_jax.errors import MissingFile, UsageError
from llava_jax.prompt import images
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import open_image, to_pixels
from llava_jax.prompt.templates import get
from llava_jax.prompt.tokenizer import load
from tests import buckets

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = [(200, 120), (120, 200), (40, 90), (336, 336), (335, 337), (1, 1), (1, 60), (700, 513), (513, 700), (336, 20)]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def digest(pixels):
    return hashlib.sha256(np.asarray(pixels).tobytes()).hexdigest()[:16]


def padded(image):
    """The whole square, as the reference makes it before it resizes."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.fixture(scope="module")
def processor():
    pytest.importorskip("torch")  # transformers' image processors want it
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_rescale=False, do_normalize=False
    )


@pytest.mark.usefixtures("rows_first")
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_bit_equal_to_transformers_and_to_the_reference(processor, size):
    picture = noise(*size)
    for mode, given in (("square", picture), ("pad", padded(picture))):
        theirs = processor(given, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = to_pixels(picture, 336, mode)
        assert ours.dtype == np.uint8 and np.array_equal(ours, theirs), mode


@pytest.mark.usefixtures("rows_first")
@pytest.mark.parametrize("side", [224, 449, 27])
@pytest.mark.parametrize("size", SIZES)
def test_squashed_pixels_are_bit_equal_to_transformers_blip_processor(size, side):
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    theirs = module.BlipImageProcessorPil(size={"height": side, "width": side}, do_rescale=False, do_normalize=False)
    picture = noise(*size)
    wanted = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = to_pixels(picture, side, "squash")
    assert ours.dtype == np.uint8 and np.array_equal(ours, wanted)


@pytest.mark.parametrize("size", [(700, 513), (513, 700), (90, 1100), (1100, 90), (28, 28)])
def test_padding_in_strips_is_bit_equal_to_padding_the_square(size):
    picture = noise(*size)
    whole = padded(picture).resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(to_pixels(picture, 28, "pad"), np.asarray(whole))


@pytest.mark.parametrize("mode", ["square", "pad", "squash"])
def test_pixels_are_those_of_pillow_12_whatever_is_installed(mode):
    recorded = json.loads((GOLDEN / "pixels.json").read_text())
    place = recorded["columns"].index(mode)
    assert len(recorded["cases"]) == 200
    for seed, case in enumerate(recorded["cases"]):
        width, height, side = case[:3]
        assert digest(to_pixels(noise(width, height, seed), side, mode)) == case[place], case


def test_files_of_every_kind_become_the_rgb_of_pillow_12():
    files = json.loads((GOLDEN / "pixels.json").read_text())["files"]
    assert len(files) >= 14
    for name, (content, wanted) in files.items():
        assert digest(open_image(base64.b64decode(content))) == wanted, name


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_normalised_pixels_equal_the_recording(mode):
    recorded = json.loads((GOLDEN / "misc.json").read_text())["image_preproc"][mode]
    pixels = (to_pixels(noise(200, 120), 336, mode).astype(np.float32) / 255 - MEAN) / STD
    assert abs(pixels.mean(dtype=np.float64) - recorded["mean"]) < 1e-6
    assert abs(pixels.std(dtype=np.float64, ddof=1) - recorded["std"]) < 1e-5
    np.testing.assert_allclose(pixels[0, 0], recorded["corner"], atol=1e-6)
    np.testing.assert_allclose(pixels[168, 168], recorded["center"], atol=1e-6)


def test_squash_changes_the_aspect_and_unknown_modes_are_refused():
    assert to_pixels(noise(40, 20), 28, "squash").shape == (28, 28, 3)
    with pytest.raises(ValueError, match="image_mode 'anyres' is unknown: choose one of square, pad, squash"):
        to_pixels(noise(4, 4), 28, "anyres")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_common_modes_become_rgb_as_pil_converts_them(mode, tmp_path):
    picture = noise(9, 7).convert("L" if mode in ("LA",) else "RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(path)
    assert np.array_equal(open_image(path), np.asarray(picture.convert("RGB")))


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert np.asarray(open_image("x.png", tmp_path))[0, :, 1].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="f.tif.*mode F .*save it with 8 or 16 bits"):
        open_image("f.tif", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture that can be read.*0 bytes"),
        (b"<html><body>404</body></html>", "not a picture.*<html>"),
        (encoded(noise(64, 64), "JPEG")[:700], "damaged picture"),
        (encoded(noise(64, 64))[:700], "damaged picture"),
        (encoded(Image.new("1", (9000, 9000))), "9000 x 9000 pixels, want 1 to 64000000"),
        (encoded(Image.new("1", (1, 5000))), "1 x 5000 pixels, one side more than 200 times"),
        (encoded(Image.new("1", (20000, 20000))), "more than 64000000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a picture"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused_by_path(tmp_path, content, message):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.jpg.*{message}"):
        open_image("bad.jpg", tmp_path)
    with pytest.raises(ValueError, match=message):
        open_image(content)


@pytest.mark.parametrize("kind", [b"\x02\0", b"\x05\0", b"\x07\0", b"\x0c\0"])
def test_a_tiff_whose_offsets_are_of_another_type_is_refused(kind):
    """A text, a fraction, bytes and a double where PIL expects a number of bytes: a TypeError of PIL's."""
    content = encoded(noise(24, 20), "TIFF")
    strips = content.index(struct.pack("<HH", 273, 4))  # StripOffsets, of type LONG
    with pytest.raises(ValueError, match="damaged picture .*cannot be interpreted as an integer"):
        open_image(content[: strips + 2] + kind + content[strips + 4 :])


def test_a_jpeg_with_an_absurd_number_of_scans_is_refused_before_it_is_decoded():
    flat = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    last = [match.start() for match in re.finditer(b"\xff\xda", flat)][-1]
    with pytest.raises(ValueError, match="a JPEG of 506 scans for 4000 x 4000 pixels: save it anew"):
        open_image(flat[:-2] + 500 * flat[last:-2] + flat[-2:])
    assert open_image(flat + 500 * flat[last:-2]).size == (4000, 4000)  # what follows the picture is not looked at
    assert open_image(encoded(noise(300, 200), "JPEG", progressive=True, quality=95)).size == (300, 200)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about what is wrong
def test_a_damaged_file_never_raises_anything_else():
    rng = np.random.RandomState(0)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        good = np.frombuffer(encoded(noise(24, 20), format), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[rng.randint(0, len(bad), 3)] = rng.randint(0, 256, 3)
            try:
                assert open_image(bad.tobytes()).mode == "RGB"
            except ValueError:
                continue


def test_a_path_may_not_leave_its_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    noise(4, 4).save(tmp_path / "secret.png")
    noise(4, 4).save(root / "ok.png")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "dir")
    os.symlink(root / "ok.png", root / "inner.png")
    for name in (str(tmp_path / "secret.png"), "../secret.png", "a/../../secret.png", "gs://b/x.png", "file:///x.png"):
        with pytest.raises(ValueError, match="want a path inside the image folder"):
            open_image(name, root)
    for name in ("link.png", "dir/secret.png"):
        with pytest.raises(ValueError, match="is a link to .*outside of the image folder"):
            open_image(name, root)
    assert open_image("ok.png", root).size == open_image("inner.png", root).size == (4, 4)
    assert open_image(tmp_path / "secret.png").size == (4, 4)


def test_missing_files_folders_and_pipes_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(ValueError, match="not a regular file"):
            open_image(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="gone.png': no such file"):
        open_image("gone.png", tmp_path)
    with pytest.raises(ValueError, match="not a path"):
        open_image("a\0.png", tmp_path)


def test_a_picture_whose_owner_has_no_name_opens(tmp_path):
    noise(4, 4).save(tmp_path / "a.png")
    if os.geteuid() == 0:
        os.chown(tmp_path / "a.png", 54321, 54321)  # as in a container, or on a disk of another machine
    assert open_image("a.png", tmp_path).size == (4, 4)


def test_an_address_is_no_picture(tmp_path):
    with pytest.raises(UsageError, match="'https://x.org/a.png': want a file or gs://BUCKET/FILE; download it first"):
        open_image("https://x.org/a.png")


def test_a_picture_of_a_bucket_is_one_request_and_its_errors_are_those_of_a_disk(tmp_path, bucket, bucket_proxy):
    small, large = encoded(noise(4, 4)), encoded(noise(30, 20))
    accent = unicodedata.normalize("NFD", "café.png")
    contents = {"a.png": large, "dir/b.png": small, "cut.png": large[:99], "empty.png": b"", accent: small}
    for name, content in contents.items():
        files.write_whole(tmp_path / name, content)
        files.write_whole(f"{bucket}/{name}", content)

    def outcome(name, root):
        try:
            return np.asarray(open_image(name, root)).tolist()
        except ValueError as error:
            return type(error), str(error).replace(str(root), "ROOT")

    names = [*contents, unicodedata.normalize("NFC", "café.png"), "gone.png", "../a.png", "gs://other/a.png"]
    for name in names:
        assert outcome(name, bucket) == outcome(name, tmp_path), name
    assert outcome("dir", bucket) == (MissingFile, "image 'ROOT/dir': no such file")
    with buckets.faults(bucket_proxy, lambda method, path: None):
        open_image("a.png", bucket)
        open_image(f"{bucket}/dir/b.png")
        assert [request.method for request in bucket_proxy.requests] == ["GET", "GET"]


def test_a_picture_with_too_many_bytes_is_refused(place, monkeypatch):
    files.write_whole(place / "a.png", encoded(noise(30, 20)))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 99)
    with pytest.raises(UsageError, match="a.png': over 99 bytes, no more are read: make it smaller"):
        open_image("a.png", place)


def test_both_spellings_of_an_accent_find_the_file(tmp_path):
    noise(4, 4).save(tmp_path / unicodedata.normalize("NFD", "café.png"))
    assert open_image(unicodedata.normalize("NFC", "café.png"), tmp_path).size == (4, 4)


def test_encode_opens_images_and_names_the_record_of_a_bad_one(tmp_path):
    format = Format(get("v1"), load(GOLDEN / "tiny_llama.model", legacy=False), 28, 4, "pad")
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "Noise."))
    for given in ("x.png", noise(30, 20), encoded(noise(30, 20))):
        noise(30, 20).save(tmp_path / "x.png")
        (pixels,) = encode(Conversation(turns, (given,), "r1"), format, image_root=tmp_path).images
        assert np.array_equal(pixels, to_pixels(noise(30, 20), 28, "pad"))
    with pytest.raises(ValueError, match="record 'r1': image .*gone.png': no such file"):
        encode(Conversation(turns, ("gone.png",), "r1"), format, image_root=tmp_path)


def test_wide_pictures_stay_small_in_memory(monkeypatch):
    largest = []
    new = Image.new
    monkeypatch.setattr(images.Image, "new", lambda mode, size, color: largest.append(size) or new(mode, size, color))
    to_pixels(Image.new("RGB", (6000, 40), 0), 28, "pad")
    assert max(width * height for width, height in largest) <= 6000 * 256
