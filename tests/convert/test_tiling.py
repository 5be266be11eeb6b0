"""Tiles in config.json of others, both ways, and the original code's files with tiles."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, llava, peft_import, readme, table, tiling
from llava_jax.convert.__main__ import main
from llava_jax.convert.files import Spec, TensorFiles
from llava_jax.convert.importing import PromptOptions
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets, registry, siglip
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import config_from_json
from llava_jax.prompt import anyres, video
from llava_jax.prompt.anyres import Tiling
from tests.convert import adapters, tiny

V16_PIXELS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # width first in LLaVA-1.6, height in HF
V16 = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
RANGE = tuple((x, y) for x in range(1, 7) for y in range(1, 7))


@pytest.mark.parametrize("pinpoints, grids", [
    (V16_PIXELS, V16), (str([tuple(size) for size in V16_PIXELS]), V16), ("[[336,672]]", ((1, 2),)),
    ("((336, 672), (672, 336),)", ((1, 2), (2, 1))), ("(1x1),...,(6x6)", RANGE), ("(1x1),...,(1x2)", ((1, 1), (1, 2))),
])  # fmt: skip
def test_the_original_codes_grids_are_read_width_first_in_their_order(pinpoints, grids):
    found = tiling.read_original(ANYRES | {"image_grid_pinpoints": pinpoints}, "here", 336)
    assert found == Tiling(grids)


def test_hugging_faces_grids_are_read_height_first_in_their_order():
    found = tiling.read_hub({"model_type": "llava_next", "image_grid_pinpoints": V16_PIXELS}, "here", 336)
    assert found == Tiling(((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)))
    pixels = [[384 * x, 384 * y] for x, y in RANGE]
    found = tiling.read_hub({"model_type": "llava_onevision", "image_grid_pinpoints": pixels}, "here", 384)
    assert found == Tiling(tuple((x, y) for y, x in RANGE), max_tiles=9, several=False)


@pytest.mark.parametrize("content, wanted", [
    ({}, None), ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, None),
    ({"image_aspect_ratio": "square", "mm_patch_merge_type": "spatial"}, None),
    ({"image_aspect_ratio": "anyres"}, Tiling(V16, "flat")),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, Tiling(V16, "spatial")),
    (ANYRES | {"mm_newline_position": "one_token"}, Tiling(V16)),  # of videos alone
    (ANYRES | {"image_aspect_ratio": "anyres_max_3"}, Tiling(V16, max_tiles=3, several=False)),
    (ANYRES | {"image_aspect_ratio": "anyres_max_4"}, Tiling(V16, several=False)),  # no grid has more tiles
    ({"image_aspect_ratio": "anyres_max_3"}, Tiling(V16, "flat", several=False)),
])  # fmt: skip
def test_merges_and_limits_of_the_original_code(content, wanted):
    assert tiling.read_original(content | {"image_grid_pinpoints": V16_PIXELS}, "here", 336) == wanted


@pytest.mark.parametrize("tiles, kind", [
    (None, "llava"), (Tiling(V16), "llava_next"), (Tiling(V16, max_tiles=3, several=False), "llava_onevision"),
    (Tiling(V16, several=False), "llava_onevision"),
])  # fmt: skip
def test_what_is_written_is_read_as_it_was(tiles, kind):
    assert tiling.hub_kind(tiles) == kind
    content = {"model_type": kind, **tiling.hub_json(tiles, 336)}
    assert tiling.read_hub(content, "here", 336) == tiles
    assert tiling.read_original(tiling.original_json(tiles, 336), "here", 336) == tiles


def test_time_stamps_of_videos_go_through_the_original_format():
    """LLaVA-NeXT keeps `add_time_instruction` of a training in config.json."""
    tiles = Tiling(V16, max_tiles=3, several=False)
    for stamps, keys in ((True, {"add_time_instruction": True}), (False, {})):
        rule = dataclasses.replace(video.RELEASED, time_stamps=stamps)
        content = tiling.original_video_json(video.to_json(rule))
        assert content == tiling.ORIGINAL_VIDEO | keys
        assert tiling.frame_rule(content, tiles) == rule
    assert tiling.frame_rule({"add_time_instruction": False}, tiles) == video.RELEASED
    assert tiling.original_video_json(None) == {}


def test_a_readme_of_an_export_says_that_no_chat_template_writes_time_stamps():
    prompt = model_json.PromptMetadata("qwen_2", None, "pad", False, video={"frames": 4, "fps": 0.0})
    stamped = dataclasses.replace(prompt, video=dict(prompt.video, time_stamps=True))
    plain, found = (readme.hub(presets.get("tiny"), one, "out", True) for one in (prompt, stamped))
    assert "The\nvideo lasts for 2.00 seconds" in found and "lasts for" not in plain


@pytest.mark.parametrize("tiles, message", [
    (Tiling(V16, "flat"), "no merge='flat', only 'spatial_unpad'; use --format llava"),
    (Tiling(V16, max_tiles=3), "no max_tiles=3 with several='anyres': .*; use --format llava"),
])  # fmt: skip
def test_tiles_that_hugging_face_has_not_are_refused_with_a_remedy(tiles, message):
    with pytest.raises(UsageError, match=message):
        tiling.hub_kind(tiles)


def leaves_of(folder):
    return params.flatten(reader.load_params(folder, put=lambda name, leaf: leaf))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What `convert assemble --newline` makes."""
    folder = tmp_path_factory.mktemp("base")
    clip, llm = tiny.write_clip(folder / "clip"), tiny.write_llama(folder / "llm")
    command = ["assemble", str(folder / "ours"), "--vision", str(clip), "--llm", str(llm), "--seed", "3"]
    assert main([*command, "--newline"]) == 0
    importing.assemble(folder / "without", clip, llm, seed=3)
    return folder


def test_an_assembly_with_a_newline_draws_it_and_nothing_else_anew(base):
    with_newline, without = leaves_of(base / "ours"), leaves_of(base / "without")
    newline = with_newline.pop("image_newline")
    assert newline.shape == (tiny.WIDTH,) and 0.5 < newline.std() * tiny.WIDTH**0.5 < 1.5
    assert with_newline.keys() == without.keys()
    for name, leaf in without.items():
        np.testing.assert_array_equal(leaf, with_newline[name], err_msg=name)
    config = config_from_json(dict(model_json.read(base / "ours").model))
    anyres.check(Tiling(V16), config.image_newline, config.image_features)


def test_a_siglip_is_assembled_as_onevision_keeps_it(base, tmp_path, capsys):
    """Without the last block and the head, which are behind no feature."""
    config = siglip.SiglipConfig(image_size=28, patch_size=14, width=32, mlp_width=64, layers=3, heads=2)
    whole = dataclasses.replace(presets.get("tiny"), vision=config)
    tower = tmp_path / "siglip"
    tower.mkdir()
    rng, rows = np.random.default_rng(0), siglip.rows("vision_model.")
    tensors = {
        name: rng.normal(size=entry.their_shape).astype(np.float32)
        for entry in table.entries(vision_leaves(whole), rows, llava.first_layers(whole), "test")
        for name in entry.theirs
    }
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    tiny.write_json(tower / "config.json", siglip.config_json(config))
    for name, options in (("whole", []), ("cut", ["--cut-tower"])):
        command = ["assemble", str(tmp_path / name), "--vision", str(tower), "--llm", str(base / "llm"), *options]
        assert main(command) == 0
    assert config_from_json(dict(model_json.read(tmp_path / "cut").model)).vision == siglip.kept(config)
    one, two = leaves_of(tmp_path / "whole"), leaves_of(tmp_path / "cut")
    assert {name for name in one if name not in two} == {
        name for name in one if name.startswith(("vision/tail/blocks", "vision/tail/head"))
    }
    for name, leaf in two.items():
        np.testing.assert_array_equal(leaf, one[name], err_msg=name)
    wrong = ["assemble", str(tmp_path / "no"), "--llm", str(base / "llm"), "--cut-tower", "--vision"]
    for vision, option in ((base / "clip", []), (tower, ["--select-layer", "-2"])):
        assert main([*wrong, str(vision), *option]) == 64
        assert "wanted a SigLIP without --select-layer" in capsys.readouterr().err


def vision_leaves(config):
    return {name: leaf for name, leaf in params.flatten(abstract_params(config)).items() if name.startswith("vision/")}


def tiled(base, folder, tiles):
    """The base as a training with tiles leaves it."""
    metadata = model_json.read(base / "ours")
    prompt = dataclasses.replace(metadata.prompt, image_mode="anyres", tiling=anyres.to_json(tiles))
    folder.mkdir()
    (folder / "0").symlink_to(base / "ours" / "0")
    words = model_json.read_tokenizer_files(base / "ours")
    model_json.write(folder, dataclasses.replace(metadata, prompt=prompt), words)
    return folder


@pytest.mark.parametrize("tiles", [
    Tiling(V16), Tiling(V16, "flat"), Tiling(V16, "spatial"), Tiling(V16, max_tiles=3), Tiling(V16, several=False),
    Tiling(V16, max_tiles=3, several=False),
])  # fmt: skip
def test_every_tiling_goes_through_the_original_format(base, tmp_path, tiles):
    exporting.export("llava", tiled(base, tmp_path / "trained", tiles), tmp_path / "llava-x")
    importing.import_checkpoint(tmp_path / "llava-x", tmp_path / "again")
    one, two = model_json.read(tmp_path / "trained"), model_json.read(tmp_path / "again")
    assert (one.model, one.prompt) == (two.model, two.prompt)
    newlines = [leaves_of(place)["image_newline"] for place in (tmp_path / "again", base / "ours")]
    np.testing.assert_array_equal(*newlines)
    importing.import_checkpoint(tmp_path / "llava-x", tmp_path / "padded", options=PromptOptions(image_mode="pad"))
    assert model_json.read(tmp_path / "padded").prompt.tiling is None


def test_a_checkpoint_of_tiles_without_its_newline_is_refused_by_name(base, tmp_path):
    """Of Hugging Face's format, of the original one, and of our own."""
    trained = tiled(base, tmp_path / "trained", Tiling(V16))
    for name in ("hf", "llava"):
        place = tmp_path / f"llava-{name}"
        exporting.export(name, trained, place)
        (path,) = (path for path in place.glob("*.safetensors") if "image_newline" in path.read_bytes()[:20_000].decode(
            errors="ignore"))  # fmt: skip
        tensors = {key: one for key, one in load_file(path).items() if "image_newline" not in key}
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UnusableCheckpoint, match="image_newline is missing"):
            importing.import_checkpoint(place, tmp_path / "again")
    metadata = model_json.read(trained)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "0").symlink_to(base / "without" / "0")
    model_json.write(bare, metadata, model_json.read_tokenizer_files(trained))
    with pytest.raises(UnusableCheckpoint, match="image_newline"):
        Assistant.open(bare)
    wanting = dataclasses.replace(metadata, model=model_json.read(base / "without").model)
    model_json.write(bare, wanting, model_json.read_tokenizer_files(trained))
    with pytest.raises(UsageError, match="each line ends with image_newline, which this model has not"):
        Assistant.open(bare)


def test_a_newline_without_tiles_has_no_hugging_face_format(base, tmp_path):
    with pytest.raises(UsageError, match="image mode 'pad' and an image_newline, .*; use --format llava"):
        exporting.export("hf", base / "ours", tmp_path / "out")


def test_a_processor_with_other_grids_is_refused(base, tmp_path):
    exporting.export("hf", tiled(base, tmp_path / "trained", Tiling(V16)), tmp_path / "out")
    file = tmp_path / "out" / "preprocessor_config.json"
    content = json.loads(file.read_text())
    for change, message in (
        ({"image_grid_pinpoints": [[28, 56]]}, r"pinpoints are \[\[28, 56\]\], those of config.json \[\[56, 28"),
        ({"size": {"shortest_edge": 56}}, "size {'shortest_edge': 56} and tiles of 28 pixels; wanted the same"),
    ):
        tiny.write_json(file, content | change)
        with pytest.raises(UnusableCheckpoint, match=message):
            importing.import_checkpoint(tmp_path / "out", tmp_path / "again")


def test_a_tower_that_the_original_code_cut_comes_in_and_goes_out_under_its_name(base, tmp_path, monkeypatch):
    """LLaVA-NeXT drops SigLIP's last block and its head, and names the whole tower with layer -2."""
    name = "google/siglip-so400m-patch14-384"
    whole = siglip.SiglipConfig(image_size=28, patch_size=14, width=32, mlp_width=64, layers=3, heads=2)
    monkeypatch.setitem(registry._towers, "siglip", dataclasses.replace(siglip.PART, hub={name: whole}))
    tensors = tiny.renamed(tiny.hub_tensors(), "original")
    tensors = {key: one for key, one in tensors.items() if "layers.2." not in key or "vision_tower" not in key}
    start = "model.vision_tower.vision_tower.vision_model."
    del tensors[start + "embeddings.class_embedding"], tensors[start + "pre_layrnorm.weight"]
    del tensors[start + "pre_layrnorm.bias"]
    tensors[start + "embeddings.position_embedding.weight"] = np.ones((4, 32), np.float32)
    tensors |= {start + "embeddings.patch_embedding.bias": np.ones(32, np.float32),
                "model.image_newline": np.ones(tiny.WIDTH, np.float32)}  # fmt: skip
    pinpoints = {"image_grid_pinpoints": "(1x1),...,(2x2)", "image_aspect_ratio": "anyres_max_3"}
    tiny.write_original(tmp_path / "in", tensors, mm_vision_tower=name, **ANYRES | pinpoints)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    vision = config_from_json(dict(model_json.read(tmp_path / "ours").model)).vision
    assert (vision.layers, vision.select_layer, vision.run_layers, vision.pooled) == (2, -1, 2, False)
    exporting.export("llava", tmp_path / "ours", tmp_path / "llava-x")
    content = json.loads((tmp_path / "llava-x" / "config.json").read_text())
    assert (content["mm_vision_tower"], content["mm_vision_select_layer"]) == (name, -2)
    assert content["image_grid_pinpoints"] == [[28, 28], [28, 56], [56, 28], [56, 56]]
    written = load_file(tmp_path / "llava-x" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)


def test_an_adapter_has_the_tiles_of_its_own_config_or_of_its_base(base, tmp_path):
    trained = tiled(base, tmp_path / "trained", Tiling(V16))
    made = adapters.write_peft(tmp_path / "in", adapters.tensors(adapters.NEW))
    peft_import.import_adapter(made, tmp_path / "one", trained, importing.UNSAID)
    assert model_json.read(tmp_path / "one").prompt.tiling == anyres.to_json(Tiling(V16))
    pinpoints = {"image_grid_pinpoints": [[28, 56]], "mm_projector_type": "mlp2x_gelu"}
    tiny.write_json(made / "config.json", ANYRES | pinpoints)
    peft_import.import_adapter(made, tmp_path / "two", base / "ours", importing.UNSAID)
    assert model_json.read(tmp_path / "two").prompt.tiling == anyres.to_json(Tiling(((1, 2),)))
    with pytest.raises(UsageError, match="`convert assemble --newline` makes a base with one"):
        peft_import.import_adapter(made, tmp_path / "three", base / "without", importing.UNSAID)
    tiny.write_json(made / "config.json", {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"})
    peft_import.import_adapter(made, tmp_path / "four", trained, importing.UNSAID)
    assert model_json.read(tmp_path / "four").prompt.tiling is None


ORIGINALS = {  # preset -> what the original code's config.json says beside the decoder's sizes, and its tiling
    "llava16_7b": ("openai/clip-vit-large-patch14-336", ANYRES | {"image_grid_pinpoints": V16_PIXELS}, Tiling(V16)),
    "llava16_mistral_7b": ("openai/clip-vit-large-patch14-336", ANYRES | {"image_grid_pinpoints": V16_PIXELS},
                           Tiling(V16)),
    "llava_onevision_7b": ("google/siglip-so400m-patch14-384", ANYRES | {
        "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": [[384 * x, 384 * y] for x, y in RANGE],
        "mm_newline_position": "one_token", "mm_resampler_type": None, "mm_spatial_pool_mode": "bilinear",
    }, Tiling(RANGE, max_tiles=9, several=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINALS)
def test_config_files_of_the_released_original_models_are_the_presets(name):
    tower, own, tiles = ORIGINALS[name]
    wanted = presets.get(name)
    decoder, part = registry.decoder_of(wanted.llm), registry.tower_of(wanted.vision)
    content = decoder.config_json(wanted.llm, wanted.llm.vocab, "bfloat16") | own | {
        "architectures": [decoder.original[0]], "model_type": decoder.original[1], "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    }  # fmt: skip
    stored = TensorFiles(Path("released"), {})
    names = table.entries(params.flatten(abstract_params(wanted)), llava.rows(llava.ORIGINAL, wanted),
                          llava.first_layers(wanted), "test")  # fmt: skip
    stored.specs.update({one: Spec(entry.their_shape, np.dtype("f2")) for entry in names for one in entry.theirs})
    sizes = part.config_json(part.hub[tower])  # of the whole tower
    assert llava.read_original_config(content, "config.json", part, sizes, stored) == wanted
    assert tiling.read_original(content, "config.json", wanted.vision.image_size) == tiles


def test_tiles_of_an_edited_export_are_those_of_its_config(base, tmp_path):
    exporting.export("llava", tiled(base, tmp_path / "trained", Tiling(V16, max_tiles=3)), tmp_path / "llava-x")
    file = tmp_path / "llava-x" / "config.json"
    content = json.loads(file.read_text())
    tiny.write_json(file, content | {"image_grid_pinpoints": [[28, 56], [84, 84]]})
    importing.import_checkpoint(tmp_path / "llava-x", tmp_path / "tiles")
    assert model_json.read(tmp_path / "tiles").prompt.tiling == anyres.to_json(Tiling(((1, 2), (3, 3)), max_tiles=3))
    tiny.write_json(file, content | {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"})
    importing.import_checkpoint(tmp_path / "llava-x", tmp_path / "padded")
    found = model_json.read(tmp_path / "padded").prompt
    assert (found.image_mode, found.tiling) == ("pad", None)
