"""Tiles of pictures: geometry against recorded tables and transformers, pixels against transformers' processors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.batch import NEWLINE, Corners, alone
from llava_jax.errors import UsageError
from llava_jax.prompt import anyres, images, templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode

GOLDEN = Path(__file__).parent.parent / "golden"
TABLES = json.loads((GOLDEN / "misc.json").read_text())
V16 = Tiling(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
ONEVISION = Tiling(tuple((x, y) for x in range(1, 7) for y in range(1, 7)), max_tiles=9, several=False)
KINDS = {"anyres_336_v16": (V16, 336, 576), "anyres_max9_384": (ONEVISION, 384, 729)}


@pytest.mark.parametrize("name", KINDS)
def test_grids_and_numbers_of_features_are_the_recorded_ones(name):
    tiling, tile, features = KINDS[name]
    for row in TABLES[name]:
        size = tuple(row["size_wh"])
        found = anyres.layout(size, tiling, tile, features)
        assert anyres.best_grid(size, tiling.grids, tile) == tuple(row["grid_wh"]), size
        assert len(found.slots) == row["tokens"] and found.tiles == 1 + row["grid_wh"][0] * row["grid_wh"][1], size


def test_each_merge_in_a_drawing():
    """4 features a tile, 2 x 1 tiles: a picture twice as wide as high, and one that leaves a column at each side empty.

    spatial_unpad: base, then lines that each end with the newline (/).
    """

    def drawn(size, merge):
        found = anyres.layout(size, Tiling(((2, 1),), merge), 28, 4)
        return " ".join("/" if slot == NEWLINE else str(slot) for slot in found.slots.tolist())

    assert drawn((56, 28), "spatial_unpad") == "0 1 2 3 4 5 8 9 / 6 7 10 11 /"
    assert drawn((28, 28), "spatial_unpad") == "0 1 2 3 5 8 / 7 10 /"
    assert drawn((56, 28), "spatial") == "0 1 2 3 4 5 8 9 6 7 10 11"
    assert drawn((56, 28), "flat") == "0 1 2 3 4 5 6 7 8 9 10 11"


def sizes(count):
    """Widths and heights of 1 x 1 to 4,000 x 300 or 300 x 4,000, both on a logarithmic scale; no aspect is refused."""
    rng, found = np.random.default_rng(5), [(1, 1), (4000, 300), (300, 4000), (1, images.MAX_ASPECT)]
    while len(found) < count:
        long, short = (int(np.exp(rng.uniform(0, np.log(most)))) for most in (4000, 300))
        if images.MAX_ASPECT * min(long, short) >= max(long, short):
            found.append((long, short) if len(found) % 2 else (short, long))
    return found[:count]


# {what: (pixels a side of a tile and of a patch, of LLaVA-1.6 and OneVision; sizes of pictures)}
SMALL = ({"llava_next": (28, 7), "llava_onevision": (28, 7)}, 40)
RELEASED = ({"llava_next": (336, 14), "llava_onevision": (384, 14)}, 500)
GEOMETRIES = [pytest.param(*SMALL, id="small"), pytest.param(*RELEASED, id="released", marks=pytest.mark.slow)]


@pytest.mark.parametrize("sides, count", GEOMETRIES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_features_are_packed_as_transformers_packs_them(name, sides, count):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[name]
    tile, patch = sides[name]
    side = tile // patch
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": tile, "patch_size": patch}  # fmt: skip
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "vocab_size": 32}  # fmt: skip
    tiling = V16 if name == "llava_next" else ONEVISION
    grids = [[rows * tile, columns * tile] for columns, rows in tiling.grids]
    config = getattr(transformers, kind + "Config")(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
        image_grid_pinpoints=grids, image_token_index=31,
    )  # fmt: skip
    model = getattr(transformers, kind + "ForConditionalGeneration")(config).model
    newline, rng = np.linspace(1, 2, 8, dtype=np.float32), np.random.default_rng(1)
    for width, height in sizes(count):
        found = anyres.layout((width, height), tiling, tile, side * side)
        features = rng.normal(size=(found.tiles, side * side, 8)).astype(np.float32)
        more = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
        theirs, _ = model.pack_image_features(
            [torch.tensor(features)], torch.tensor([[height, width]]), image_newline=torch.tensor(newline), **more
        )
        rows = np.concatenate([features.reshape(-1, 8), newline[None]])
        slots, weights = found.corners or alone(found.slots)
        ours = (rows[np.where(slots == NEWLINE, len(rows) - 1, slots)] * weights[..., None]).sum(1)
        np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-5, err_msg=f"{width} x {height}")


@pytest.mark.parametrize("sides, count", GEOMETRIES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_pixels_of_tiles_are_those_of_transformers(name, sides, count, monkeypatch):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = {"llava_next": "LlavaNextImageProcessorPil", "llava_onevision": "LlavaOnevisionImageProcessorPil"}[name]
    tiling, tile = (V16 if name == "llava_next" else ONEVISION), sides[name][0]
    grids = [[rows * tile, columns * tile] for columns, rows in tiling.grids]
    side = {"height": tile, "width": tile}
    size = {"size": {"shortest_edge": tile}, "crop_size": side} if name == "llava_next" else {"size": side}
    theirs = getattr(transformers, kind)(
        image_grid_pinpoints=grids, do_rescale=False, do_normalize=False, resample=3, **size
    )
    resize = Image.Image.resize

    def rows_first(image, size, resample=3, **others):  # as every Pillow before 13
        stripe = image.height > 100 * image.width and size[1] < image.height
        first = (image.width, size[1]) if stripe else (size[0], image.height)
        return resize(resize(image, first, resample), size, resample)

    for width, height in sizes(count):
        picture = images._rgb(Image.effect_noise((width, height), 90), "noise")
        grid = anyres.best_grid((width, height), tiling.grids, tile)
        ours = images.to_tiles(picture, tile, grid, anyres.resized((width, height), grid, tile))
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", rows_first)
            found = theirs(picture, return_tensors="np")["pixel_values"][0]
        assert found.shape[0] == len(ours)
        np.testing.assert_array_equal(np.stack(ours), np.moveaxis(found, 1, -1), err_msg=f"{width} x {height}")


def _format(tiling):
    words = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)
    return Format(templates.get("v1"), words, 28, 4, "anyres", tiling=tiling)


def test_an_example_has_the_tiles_of_its_pictures_and_the_same_tokens_unopened():
    wide, high = Image.new("RGB", (120, 40), "red"), Image.new("RGB", (40, 90), "blue")
    turns = (Turn("user", "<image>\nand <image>\nWhat is there?"), Turn("assistant", "A cat."))
    for tiling, tiles in ((V16, [4, 4]), (ONEVISION, [1, 1])):
        talk = Conversation(turns, (wide, high), images_in_place=True)
        opened, unopened = (encode(talk, _format(tiling), open_images=look) for look in (True, False))
        assert [layout.tiles for layout in opened.layouts] == tiles and opened.tiles == len(opened.images)
        assert unopened.images == () and unopened.tiles == opened.tiles
        np.testing.assert_array_equal(opened.tokens, unopened.tokens)
        assert [span.length for span in opened.image_spans] == [span.length for span in unopened.image_spans]


def test_a_size_is_read_from_the_header_alone(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((700, 500), 90).save(path, quality=95)
    content = path.read_bytes()
    assert len(content) > 2 * images._HEADER_BYTES
    path.write_bytes(content[: images._HEADER_BYTES + 10])  # its pixels are cut off
    assert images.image_size(path) == (700, 500)
    with pytest.raises(ValueError, match="damaged picture"):
        images.open_image(path)
    with pytest.raises(FileNotFoundError):
        images.image_size(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grids": ""}, "want columns x rows of each grid of tiles"),
        ({"grids": "2x2 0x1"}, "want columns x rows"),
        ({"merge": "unpad"}, "choose one of flat, spatial, spatial_unpad"),
        ({"max_tiles": -1}, "prompt.max_tiles=-1: want 0"),
        ({"max_tiles": 4, "merge": "flat"}, 'want 0 .no limit., or a number with merge="spatial_unpad"'),
        ({"several": "tiles"}, 'want "anyres" or "pad"'),
    ],
)
def test_words_that_describe_no_tiles_are_refused(changes, message):
    words = {"grids": "2x2", "merge": "spatial_unpad", "max_tiles": 0, "several": "anyres"}
    assert anyres.to_json(anyres.from_json("anyres", words)) == words
    with pytest.raises(UsageError, match=message):
        anyres.from_json("anyres", words | changes)


def test_grids_belong_to_anyres_and_a_newline_to_the_model():
    with pytest.raises(UsageError, match='prompt.grids=.2x2. with prompt.image_mode="pad"'):
        anyres.tiling("pad", "2x2", "flat", 0, "pad")
    with pytest.raises(UsageError, match=r"tiling of keys .'grids'.: want grids, merge, max_tiles, several"):
        anyres.from_json("anyres", {"grids": "2x2"})
    with pytest.raises(UsageError, match="`convert assemble --newline` makes a base with one"):
        anyres.check(V16, False, 4)
    with pytest.raises(UsageError, match="5 features a tile are no square"):
        anyres.check(V16, True, 5)
    assert isinstance(anyres.layout((2000, 2000), ONEVISION, 28, 4).corners, Corners)
