"""Weights in and out again, bit for bit, through every layout and dtype; no torch."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exported, exporting, files, importing, readme, reports
from llava_jax.convert.importing import PromptOptions
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import clip, mistral, presets, qwen
from llava_jax.models.presets import config_from_json
from llava_jax.prompt import tokenizer
from tests.convert import tiny

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def same(one, two):
    return set(one) == set(two) and all(
        one[n].dtype == two[n].dtype and one[n].shape == two[n].shape and one[n].tobytes() == two[n].tobytes()
        for n in one
    )


def read_all(directory):
    opened = files.open_tensors(directory)
    return {name: opened.read(name) for name in opened.specs}


def loaded(directory):
    return params.flatten(reader.load_params(directory))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A float16 LLaVA in the hub's layout (960 rows) and the directory of its import; not to be written to."""
    hub, folder = tiny.as_dtype(tiny.hub_tensors(), "float16"), tmp_path_factory.mktemp("half")
    importing.import_checkpoint(tiny.write_hub(folder / "in", hub), folder / "ours")
    return hub, folder / "ours"


@pytest.mark.parametrize("layout, dtype", [
    ("hub", "float32"), ("hub", "float16"), ("hub", "bfloat16"),
    ("new4", "float16"), ("leg5", "bfloat16"), ("new5", "float32"),
])  # fmt: skip
def test_import_export_import_is_bit_exact_in_every_layout_and_dtype(tmp_path, layout, dtype):
    hub = tiny.as_dtype(tiny.hub_tensors(vocab=1024), dtype)  # rows enough for <image> and <pad>
    tiny.write_hub(tmp_path / "in", tiny.renamed(hub, layout), vocab=1024)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    first = loaded(tmp_path / "ours")
    assert {str(leaf.dtype) for leaf in first.values()} == {dtype}
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    assert same(read_all(tmp_path / "out"), hub)
    importing.import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert same(loaded(tmp_path / "again"), first)
    one, two = (model_json.read(tmp_path / name) for name in ("ours", "again"))
    assert (one.model, one.prompt, one.source["layout"]) == (two.model, two.prompt, layout)
    assert reports.verify(tmp_path / "again").endswith("tensors read, all as they were written")


def test_verify_is_not_content_with_what_it_cannot_compare(half, tmp_path):
    shutil.copytree(half[1], tmp_path / "ours")
    (tmp_path / "ours" / "0" / "params" / "_CHECKSUMS").unlink()
    with pytest.raises(UnusableCheckpoint, match="tensors have no checksum, such as .*convert merge"):
        reports.verify(tmp_path / "ours")
    reports.merge(tmp_path / "ours", tmp_path / "whole")
    assert reports.verify(tmp_path / "whole").endswith("all as they were written")


def test_verify_is_not_content_with_an_older_step_than_the_damaged_newest(half, tmp_path):
    shutil.copytree(half[1], tmp_path / "ours")
    shutil.copytree(tmp_path / "ours" / "0", tmp_path / "ours" / "5")
    assert reports.verify(tmp_path / "ours").endswith("all as they were written")
    (tmp_path / "ours" / "5" / "params" / "_METADATA").write_text("{")
    with pytest.raises(UnusableCheckpoint, match="step 5 is damaged, .*--step 0"):
        reports.verify(tmp_path / "ours")
    assert reports.verify(tmp_path / "ours", 0).endswith("all as they were written")


def test_leaves_are_theirs_transposed_and_stacked(half):
    hub, ours = half
    leaves = loaded(ours)
    tower, text = "vision_tower.vision_model.", "language_model.model."
    patch = hub[tower + "embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(leaves["vision/patch/kernel"], patch.transpose(2, 3, 1, 0))
    for i in range(2):  # select_layer -2 of three blocks runs two, the tail keeps the third
        q = hub[f"{tower}encoder.layers.{i}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(leaves["vision/blocks/q/kernel"][i], q.T)
    last = hub[tower + "encoder.layers.2.mlp.fc1.weight"]
    np.testing.assert_array_equal(leaves["vision/tail/blocks/fc1/kernel"], last.T[None])
    for i in range(3):
        down = hub[f"{text}layers.{i}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(leaves["llm/blocks/down/kernel"][i], down.T)
    np.testing.assert_array_equal(leaves["llm/embed/table"], hub[EMBED])
    np.testing.assert_array_equal(leaves["llm/head/kernel"], hub[HEAD].T)
    np.testing.assert_array_equal(leaves["projector/2/kernel"], hub["multi_modal_projector.linear_2.weight"].T)


@pytest.mark.parametrize("select_layer, runs", [(-1, 3), (-3, 1), (2, 2), (3, 3)])
def test_any_selected_layer_comes_back(tmp_path, select_layer, runs):
    hub = tiny.hub_tensors(vocab=1024)
    tiny.write_hub(tmp_path / "in", hub, vocab=1024, vision_feature_layer=select_layer)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    leaves = reader.tensor_specs(tmp_path / "ours")
    assert leaves["vision/blocks/q/kernel"].shape[0] == runs
    assert ("vision/tail/blocks/q/kernel" in leaves) == (runs < 3)
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    assert same(read_all(tmp_path / "out"), hub)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_feature_layer"] == select_layer


def test_hf_export_adds_image_and_pad_and_llava_export_takes_them_off(tmp_path, half):
    hub, ours = half
    exporting.export("hf", ours, tmp_path / "hf")
    out, config = read_all(tmp_path / "hf"), json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (960, 961)
    assert config["text_config"]["vocab_size"] == 1024
    for name in (EMBED, HEAD):
        assert out[name].shape == (1024, 48) and out[name][:960].tobytes() == hub[name].tobytes()
    importing.import_checkpoint(tmp_path / "hf", tmp_path / "again")
    words = tokenizer.load(tmp_path / "again" / "tokenizer")
    assert (words.size, words.specials["<image>"], words.specials["<pad>"], words.pad_id) == (962, 960, 961, 961)
    exporting.export("llava", tmp_path / "again", tmp_path / "llava-back")
    original = tiny.renamed(hub, "original")
    start = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(start): original.pop(name) for name in list(original) if name.startswith(start)}
    assert same(read_all(tmp_path / "llava-back"), original)
    assert same(read_all(tmp_path / "llava-back" / "vision_tower"), tower)
    words = tokenizer.load(tmp_path / "llava-back")
    assert (words.size, len(words.words), words.pad_id) == (960, 3, 0)  # pads with <unk>


@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_new_rows_are_the_mean_row_and_cut_ones_are_gone(dtype, axis):
    leaf = np.random.default_rng(0).standard_normal((5, 7)).astype(tiny.DTYPES[dtype])
    more = exported.fit_axis([leaf], axis, leaf.shape[axis] + 3)
    kept, new = np.split(more, [leaf.shape[axis]], axis)
    mean = leaf.astype(np.float64).mean(axis, keepdims=True).astype(leaf.dtype)
    assert kept.tobytes() == leaf.tobytes() and (new == mean).all() and new.shape[axis] == 3
    assert exported.fit_axis([leaf], axis, 2).tobytes() == leaf.take([0, 1], axis).tobytes()
    joined = exported.fit_axis([leaf, leaf], axis, 2 * leaf.shape[axis])
    assert joined.tobytes() == np.concatenate([leaf, leaf], axis).tobytes() and joined.dtype == leaf.dtype


@pytest.mark.parametrize("shards, binary", [(1, False), (3, False), (1, True), (3, True)])
def test_the_original_format_is_read_with_its_tower_from_a_clip_directory(tmp_path, shards, binary):
    tensors = tiny.as_dtype(tiny.renamed(tiny.hub_tensors(), "original"), "float16")
    tensors = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    tiny.write_original(tmp_path / "in", tensors, shards, binary)
    with pytest.raises(ValueError, match="vision tower 'some/clip' is not in it.*give it as --vision"):
        importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    tower = tiny.write_clip(tmp_path / "clip", prefix="" if binary else "vision_model.")
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours", tower)
    leaves = loaded(tmp_path / "ours")
    assert (leaves["vision/cls"].dtype, leaves["llm/norm/scale"].dtype) == (np.float32, np.float16)
    exporting.export("llava", tmp_path / "ours", tmp_path / "llava-out")
    assert same(read_all(tmp_path / "llava-out"), tensors)
    importing.import_checkpoint(tmp_path / "llava-out", tmp_path / "again")  # finds the tower beside
    assert same(loaded(tmp_path / "again"), leaves)
    assert model_json.read(tmp_path / "again").prompt == model_json.PromptMetadata("v1", False, "pad", False)


def test_a_tower_among_the_original_files_is_preferred_to_the_clip_directory(tmp_path):
    tensors = tiny.renamed(tiny.hub_tensors(), "original")
    tiny.write_original(tmp_path / "in", tensors)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours", tiny.write_clip(tmp_path / "clip"))
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    np.testing.assert_array_equal(loaded(tmp_path / "ours")["vision/cls"], tensors[name])


def test_a_tower_that_the_hub_has_goes_into_the_original_files_themselves(tmp_path, half, monkeypatch):
    config = config_from_json(dict(model_json.read(half[1]).model))
    monkeypatch.setitem(clip.PART.hub, "openai/tiny", config.vision)
    exporting.export("llava", half[1], tmp_path / "llava-out")
    assert same(read_all(tmp_path / "llava-out"), tiny.renamed(half[0], "original"))
    content = json.loads((tmp_path / "llava-out" / "config.json").read_text())
    # The original code passes over a tower in the files unless it is told that it was trained.
    assert (content["mm_vision_tower"], content["unfreeze_mm_vision_tower"]) == ("openai/tiny", True)
    importing.import_checkpoint(tmp_path / "llava-out", tmp_path / "again")
    assert same(loaded(tmp_path / "again"), loaded(half[1]))


@pytest.mark.parametrize("decoder, name, words", [
    ("llama", "llava-mistral", "give it one without 'mistral', which is of another language model."),
    ("mistral", "llava-x", "give it one with 'mistral' in it."), ("qwen2", "llava", "give it one with 'qwen' in it."),
    ("llama", "LLaVA-v1.5", ""), ("mistral", "llava-v1.6-Mistral-7b", ""), ("qwen2", "llava-qwen2.5", ""),
    ("qwen3", "llava-qwen3", ""),
])  # fmt: skip
def test_a_readme_of_the_original_format_says_what_name_the_original_code_knows_the_decoder_by(decoder, name, words):
    llm = {"llama": presets.get("tiny").llm, "mistral": mistral.MISTRAL_7B, "qwen2": qwen.QWEN25_7B,
           "qwen3": qwen.QWEN3_8B}[decoder]  # fmt: skip
    config = dataclasses.replace(presets.get("tiny"), llm=llm)
    text = readme.original(config, model_json.PromptMetadata("v1", None, "pad", False), name, None)
    assert words in text and bool(words) == ("That code chooses" in text)


@pytest.mark.parametrize("preset, tower, words", [
    ("llava15_7b", "openai/clip-vit-large-patch14-336", "Read by haotian-liu/LLaVA and LLaVA-NeXT."),
    ("llava_qwen25_7b_siglip", "google/siglip-so400m-patch14-384", "Read by LLaVA-NeXT."),
    ("llava_qwen25_7b_siglip", None, "Only llava_jax reads it"),
    ("llava_qwen3_8b_siglip", "google/siglip-so400m-patch14-384", "Only llava_jax reads it"),
])  # fmt: skip
def test_a_readme_of_the_original_format_says_which_code_reads_it(preset, tower, words):
    text = readme.original(presets.get(preset), model_json.PromptMetadata("v1", None, "pad", False), "llava-x", tower)
    assert words in text


def test_a_linear_projector_goes_through_the_original_format(tmp_path):
    tensors = {n: t for n, t in tiny.renamed(tiny.hub_tensors(), "original").items() if ".mm_projector.2" not in n}
    tensors = {n.replace("mm_projector.0.", "mm_projector."): t for n, t in tensors.items()}
    tiny.write_original(tmp_path / "in", tensors, mm_projector_type="linear")
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours", tiny.write_clip(tmp_path / "clip"))
    assert config_from_json(dict(model_json.read(tmp_path / "ours").model)).projector == "linear"
    exporting.export("llava", tmp_path / "ours", tmp_path / "llava-out")
    importing.import_checkpoint(tmp_path / "llava-out", tmp_path / "again")
    assert same(loaded(tmp_path / "again"), loaded(tmp_path / "ours"))
    with pytest.raises(ValueError, match="only mlp2x_gelu; use --format llava"):
        exporting.export("hf", tmp_path / "ours", tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_assemble_joins_a_tower_a_decoder_and_a_projector(tmp_path):
    vision, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm", binary=True)
    importing.assemble(tmp_path / "a", vision, llm, seed=3)
    leaves = loaded(tmp_path / "a")
    for name, fan_in in (("0", 32), ("2", 48)):
        for leaf in (leaves[f"projector/{name}/kernel"], leaves[f"projector/{name}/bias"]):
            bound = fan_in**-0.5
            assert leaf.dtype == np.float32 and 0.9 * bound < np.abs(leaf).max() <= bound
    assert leaves["llm/embed/table"].dtype == np.float16
    assert model_json.read(tmp_path / "a").prompt == model_json.PromptMetadata("v1", False, "pad", False)
    exporting.export("projector", tmp_path / "a", tmp_path / "projector")
    file, options = tmp_path / "projector" / "mm_projector.bin", PromptOptions("llava_v0", "square", True)
    importing.assemble(tmp_path / "b", vision, llm, projector=file, seed=9, options=options)
    assert same(loaded(tmp_path / "b"), leaves)
    assert model_json.read(tmp_path / "b").prompt == model_json.PromptMetadata("llava_v0", True, "square", False)
    importing.assemble(tmp_path / "c", vision, llm, projector_type="linear", select_layer=-1)
    specs = reader.tensor_specs(tmp_path / "c")
    assert "projector/2/bias" not in specs and specs["vision/blocks/q/kernel"].shape[0] == 3


def test_a_projector_alone_comes_back_as_the_connector_that_its_config_names(tmp_path):
    vision, llm, kind = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm"), "pixel_shuffle2_linear"
    importing.assemble(tmp_path / "a", vision, llm, projector_type=kind)
    exporting.export("projector", tmp_path / "a", tmp_path / "projector")
    importing.assemble(tmp_path / "b", vision, llm, projector=tmp_path / "projector" / "mm_projector.bin", seed=9)
    assert model_json.read(tmp_path / "b").model["projector"] == kind
    assert same(loaded(tmp_path / "b"), loaded(tmp_path / "a"))


def test_tied_embeddings_have_no_output_matrix_either_way(tmp_path):
    hub = tiny.hub_tensors(vocab=1024)
    hub.pop(HEAD)
    tiny.write_hub(tmp_path / "in", hub, vocab=1024, tie_word_embeddings=True)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    assert "llm/head/kernel" not in reader.tensor_specs(tmp_path / "ours")
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    assert same(read_all(tmp_path / "out"), hub)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["tie_word_embeddings"] is True


def stage_one(tmp_path, half):
    """A checkpoint that holds only a projector and takes the rest from `base`, a copy of `half`."""
    shutil.copytree(half[1], tmp_path / "base")
    below = model_json.read(tmp_path / "base")
    base = model_json.Base("../base", 0, reader.fingerprint(tmp_path / "base"), (".*",))
    shapes = {"0/kernel": (32, 48), "0/bias": (48,), "2/kernel": (48, 48), "2/bias": (48,)}
    moved = {f"projector/{name}": np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    with reader.TensorWriter(tmp_path / "run" / "20" / "params") as writer:
        for name, leaf in moved.items():
            writer.write(name, leaf)
    words = model_json.read_tokenizer_files(tmp_path / "base")
    model_json.write(tmp_path / "run", model_json.Metadata(below.model, below.prompt, (base,)), words)
    return moved


def test_frozen_leaves_are_exported_from_the_base_in_its_own_dtype(tmp_path, half):
    hub, moved = half[0], stage_one(tmp_path, half)
    exporting.export("hf", tmp_path / "run", tmp_path / "out")
    out = read_all(tmp_path / "out")
    frozen = {name: tensor for name, tensor in hub.items() if "projector" not in name and name not in (EMBED, HEAD)}
    assert same({name: out[name] for name in frozen}, frozen)
    np.testing.assert_array_equal(out["multi_modal_projector.linear_1.weight"], moved["projector/0/kernel"].T)
    assert out["multi_modal_projector.linear_1.weight"].dtype == np.float32
    lines = list(reports.inspect(tmp_path / "run"))
    assert any(line.startswith("base ../base step 0 sums:") for line in lines)


def test_merge_writes_a_checkpoint_that_needs_no_base(tmp_path, half):
    stage_one(tmp_path, half)
    reports.merge(tmp_path / "run", tmp_path / "whole")
    whole = loaded(tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    assert same(loaded(tmp_path / "whole"), whole)
    assert model_json.read(tmp_path / "whole").base == () and reader.steps(tmp_path / "whole") == [20]
    with pytest.raises(UnusableCheckpoint, match="is not there .*Put it back"):
        exporting.export("hf", tmp_path / "run", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_added_rows_of_the_vocabulary_are_joined_to_the_others(tmp_path, half):
    shutil.copytree(half[1], tmp_path / "ours")
    opened = model_json.read(tmp_path / "ours")
    model = {**opened.model, "llm": {**opened.model["llm"], "added_tokens": 2}}
    words = tokenizer.load(tmp_path / "ours" / "tokenizer", added=("<im_start>", "<im_end>"))
    base = model_json.Base("../ours", 0, reader.fingerprint(tmp_path / "ours"), (".*",))
    added = {"llm/embed/added": np.full((2, 48), 2.0, np.float32), "llm/head/added": np.full((48, 2), 3.0, np.float32)}
    with reader.TensorWriter(tmp_path / "run" / "1" / "params") as writer:
        for name, leaf in added.items():
            writer.write(name, leaf)
    prompt = model_json.PromptMetadata("v1", False, "pad", True)
    model_json.write(tmp_path / "run", model_json.Metadata(model, prompt, (base,)), words.files())
    for name, directory, rows in (("hf", "hf", 1024), ("llava", "llava-x", 962)):
        exporting.export(name, tmp_path / "run", tmp_path / directory)
        out = read_all(tmp_path / directory)
        embed = out[EMBED if name == "hf" else "model.embed_tokens.weight"]
        head = out[HEAD if name == "hf" else "lm_head.weight"]
        assert embed.shape == head.shape == (rows, 48) and (embed[960:962] == 2).all() and (head[960:962] == 3).all()
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert "there is no chat template" in (tmp_path / "hf" / "README.md").read_text()
    assert load_file(tmp_path / "hf" / "model.safetensors")[EMBED].shape == (1024, 48)


def test_export_casts_to_a_dtype_that_is_asked_for_and_refuses_what_does_not_fit(tmp_path, half):
    _, ours = half
    exporting.export("hf", ours, tmp_path / "out", dtype="bfloat16")
    assert {str(tensor.dtype) for tensor in read_all(tmp_path / "out").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    hub = tiny.as_dtype(tiny.hub_tensors(), "float32")
    hub[EMBED][0, 0] = 1e6
    importing.import_checkpoint(tiny.write_hub(tmp_path / "large", hub), tmp_path / "large_ours")
    with pytest.raises(ValueError, match="llm/embed/table does not fit in float16"):
        exporting.export("llava", tmp_path / "large_ours", tmp_path / "llava", dtype="float16")
    assert not (tmp_path / "llava").exists()
