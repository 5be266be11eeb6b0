"""MiniGPT-4 in and out: the released files, BLIP-2 directories, the original's checkpoints; bit for bit, no torch."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, files, importing, minigpt4, table, views
from llava_jax.convert.__main__ import main
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import EvaConfig, QFormerConfig, config_from_json
from tests.convert import tiny, tiny_blip2
from tests.convert.test_files import Evil
from tests.convert.test_roundtrip import loaded, read_all, same

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(eva_vit_g.pth, blip2_pretrained.pth, minigpt4.pth, a LLaMA directory); not to be written to."""
    folder = tmp_path_factory.mktemp("released")
    return (*tiny_blip2.released(folder / "files"), tiny.write_llama(folder / "llm"))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory, released):
    """A checkpoint of the released files."""
    vision, connector, projector, llm = released
    place = tmp_path_factory.mktemp("assembled") / "ours"
    importing.assemble(place, vision, llm, projector, connector=connector)
    return place


def test_a_checkpoint_with_lavis_names_comes_back_bit_for_bit_with_nothing_missing_or_left_over():
    rng = np.random.default_rng(0)
    theirs = tiny_blip2.tower(rng) | tiny_blip2.connector(rng) | tiny_blip2.projection(rng)
    tower = EvaConfig(image_size=28, patch_size=14, width=88, mlp_width=96, layers=3, heads=1)
    config = config_from_json(_card(tower))
    leaves = {name: leaf for name, leaf in params.flatten(abstract_params(config)).items() if name[:4] != "llm/"}
    found = table.entries(leaves, minigpt4.lavis_rows(config), {}, "conversion")
    assert sorted(name for entry in found for name in entry.theirs) == sorted(theirs)
    back = {}
    for entry in found:
        parts = [entry.axes.ours(theirs[name]) for name in entry.theirs]
        leaf = np.stack(parts) if entry.stacked else parts[0]
        assert leaf.shape == entry.shape
        back |= dict(table.their_tensors(entry, leaf))
    assert same(back, theirs)


def _card(tower):
    qformer = QFormerConfig(queries=5, width=64, mlp_width=80, layers=4, heads=1)
    return {
        "vision": vars(tower) | {"kind": "eva"}, "projector": "qformer", "image_newline": False, "ln_vision_eps": 1e-5,
        "resampler": vars(qformer),
        "llm": {"vocab": 960, "width": 48, "mlp_width": 96, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 12,
                "eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "max_positions": 1024, "added_tokens": 0,
                "tie_embeddings": False},
    }  # fmt: skip


def test_the_released_files_become_one_checkpoint_without_the_last_block(released, assembled):
    vision, connector, projector, _ = (read_all(path) for path in released)
    leaves, found = loaded(assembled), model_json.read(assembled)
    config = config_from_json(dict(found.model))
    assert config == config_from_json(_card(config.vision)) and config.vision.layers == 3 and config.vision.heads == 1
    assert (found.prompt.template, found.prompt.image_mode) == ("minigpt4_chat", "squash")
    assert same({"q": leaves["vision/blocks/qkv/kernel"][2]}, {"q": vision["blocks.2.attn.qkv.weight"].T})
    assert same({"b": leaves["vision/blocks/v/bias"][1]}, {"b": vision["blocks.1.attn.v_bias"]})
    assert same({"c": leaves["vision/cls"]}, {"c": vision["cls_token"][0, 0]})
    cross = leaves["resampler/cross/k/kernel"]
    assert len(cross) == 2 and len(leaves["resampler/attention/k/kernel"]) == 4
    key = connector["Qformer.bert.encoder.layer.2.crossattention.self.key.weight"]
    assert same({"k": cross[1]}, {"k": key.T})
    assert same({"q": leaves["resampler/queries"]}, {"q": connector["query_tokens"][0]})
    assert same({"p": leaves["projector/0/kernel"]}, {"p": projector["llama_proj.weight"].T})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hub_directory_goes_in_and_out_and_in_again_bit_for_bit(tmp_path, dtype):
    hub = tiny.as_dtype(tiny_blip2.hub_tensors(vocab=1024), dtype)
    importing.import_checkpoint(tiny_blip2.write_hub(tmp_path / "in", hub, vocab=1024), tmp_path / "ours")
    first = loaded(tmp_path / "ours")
    assert {str(leaf.dtype) for leaf in first.values()} == {dtype}
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    assert same(read_all(tmp_path / "out"), hub)
    importing.import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert same(loaded(tmp_path / "again"), first)
    one, two = (model_json.read(tmp_path / name) for name in ("ours", "again"))
    assert (one.model, one.prompt) == (two.model, two.prompt)
    assert (one.prompt.template, one.prompt.image_mode) == ("minigpt4_chat", "squash")


def test_an_export_keeps_the_original_eps_for_our_own_import(tmp_path, assembled):
    exporting.export("hf", assembled, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["vision_config"]["layer_norm_eps"] == 1e-6 and content["num_query_tokens"] == 5
    importing.import_checkpoint(tmp_path / "out", tmp_path / "again")
    config = config_from_json(dict(model_json.read(tmp_path / "again").model))
    assert (config.ln_vision_eps, config.vision.eps) == (1e-5, 1e-6)


def test_tower_and_q_former_can_be_had_of_a_hub_directory_of_any_decoder(tmp_path, released):
    hub = tiny_blip2.hub_tensors()
    bias = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    hub[bias][88:176] = 7  # trained on with transformers: no softmax sees it
    place = tiny_blip2.write_hub(tmp_path / "in", hub, text="t5")
    with pytest.raises(UnusableCheckpoint, match="text model_type is 't5'.*assemble --vision DIR --connector DIR"):
        importing.import_checkpoint(place, tmp_path / "no")
    importing.assemble(tmp_path / "ours", place, released[3], released[2], connector=place)
    leaves = loaded(tmp_path / "ours")
    np.testing.assert_array_equal(leaves["vision/blocks/q/bias"][1], hub[bias][:88])
    np.testing.assert_array_equal(leaves["vision/blocks/v/bias"][1], hub[bias][176:])
    np.testing.assert_array_equal(leaves["ln_vision/scale"], hub["vision_model.post_layernorm.weight"])


def test_the_linear_layer_goes_out_as_the_original_code_saves_it(tmp_path, released, assembled):
    exporting.export("projector", assembled, tmp_path / "out")
    out = tmp_path / "out" / "checkpoint.pth"
    assert same(read_all(out), read_all(released[2]))
    torch = pytest.importorskip("torch")
    content = torch.load(out, weights_only=True)
    assert set(content) == {"model"} and set(content["model"]) == {"llama_proj.weight", "llama_proj.bias"}
    torch.save({"model": content["model"], "optimizer": {"state": {0: {"step": 5.0}}, "param_groups": [{"lr": 1e-4}]},
                "config": {"run": {"amp": True}}, "scaler": {}, "epoch": 3}, tmp_path / "torch.pth")  # fmt: skip
    assert same(read_all(tmp_path / "torch.pth"), read_all(out))


@pytest.fixture(scope="module", params=[".default", ""], ids=["peft 0.3 and newer", "older"])
def v2(request, tmp_path_factory, released):
    """(what is in its file, a MiniGPT-v2 assembled of it at another size): adapters lie beside the linear layer."""
    folder, rng = tmp_path_factory.mktemp("v2"), np.random.default_rng(5)
    file = tiny_blip2.projection(rng, 4 * 88) | tiny_blip2.adapters(rng, default=request.param)
    buffers = {"llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    tiny.torch_zip.write_torch(folder / "v2.pth", file | buffers, within="model")
    importing.assemble(folder / "ours", released[0], released[3], folder / "v2.pth", image_size=56)
    return file, folder / "ours"


def test_without_a_q_former_four_tokens_are_joined_and_adapters_come_along(v2):
    file, place = v2
    found = model_json.read(place)
    config = config_from_json(dict(found.model))
    assert (config.projector, config.vision.select_feature, config.image_features) == ("concat4_linear", "patch", 4)
    # The older way of cutting words, whatever the LLaMA's files say (here: the newer): the original knows no other.
    assert (found.prompt.template, found.prompt.image_mode, found.prompt.legacy) == ("minigptv2", "squash", True)
    leaves = loaded(place)
    assert leaves["vision/pos"].shape == (17, 88) and (leaves["ln_vision/scale"] == 1).all()
    (name,) = (name for name in file if "layers.2.self_attn.v_proj.lora_B" in name)
    np.testing.assert_array_equal(leaves["llm/blocks/v/lora_b"][2], file[name].T)
    np.testing.assert_array_equal(leaves["llm/blocks/q/lora_scale"], np.full(3, 16 / 2, np.float32))


def test_the_adapters_of_minigptv2_are_added_as_peft_does(tmp_path, v2, released):
    """W + alpha / r * B A, of queries and values only."""
    file, place = v2
    assert main(["merge", str(place), str(tmp_path / "merged")]) == 0
    leaves, llm = loaded(tmp_path / "merged"), read_all(released[3])
    assert not any("lora" in name for name in leaves)
    for layer in range(3):
        for letter in "qkvo":
            wanted = llm[f"model.layers.{layer}.self_attn.{letter}_proj.weight"]
            halves = {name[: name.index("lora_") + 6][-1]: tensor for name, tensor in file.items()
                      if f"layers.{layer}.self_attn.{letter}_proj" in name}  # fmt: skip
            assert bool(halves) == (letter in "qv")
            if halves:  # summed in float32, kept as the LLaMA is
                wanted = (wanted + 16 / 2 * halves["B"] @ halves["A"]).astype(wanted.dtype)
            np.testing.assert_allclose(leaves[f"llm/blocks/{letter}/kernel"][layer], wanted.T, rtol=1e-3, atol=1e-6)


def test_minigptv2s_file_goes_out_whole_and_comes_in_again(tmp_path, v2, released):
    file, place = v2
    exporting.export("projector", place, tmp_path / "out")
    out = read_all(tmp_path / "out" / "checkpoint.pth")
    assert same(out, {name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"): tensor
                      for name, tensor in file.items()})  # fmt: skip
    importing.assemble(tmp_path / "again", released[0], released[3], tmp_path / "out" / "checkpoint.pth", image_size=56)
    assert same(loaded(tmp_path / "again"), loaded(place))


def test_adapters_that_the_original_would_scale_otherwise_are_not_exported(tmp_path, v2, monkeypatch):
    monkeypatch.setattr(minigpt4, "LORA_ALPHA", 8)
    with pytest.raises(ValueError, match="adapter of llm/blocks/q/kernel with alpha 16; the original .* alpha 8"):
        exporting.export("projector", v2[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_minigptv2_the_size_of_the_pictures_has_to_be_said(tmp_path, capsys, v2, released):
    exporting.export("projector", v2[1], tmp_path / "out")
    words = ["--vision", released[0], "--llm", released[3], "--projector", tmp_path / "out" / "checkpoint.pth"]
    assert main(["assemble", str(tmp_path / "dst"), *map(str, words)]) == 64
    assert "give --image-size (448 as released)" in capsys.readouterr().err


@pytest.mark.parametrize("size, side", [(16, 32), (4, 7), (7, 4)])
def test_positions_are_interpolated_as_torch_does(size, side):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).standard_normal((1, size * size + 1, 6)).astype(np.float32)
    grid = torch.tensor(positions[:, 1:]).reshape(1, size, size, 6).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    found = views.interpolated(positions, side, True)
    np.testing.assert_array_equal(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:], wanted[0].permute(1, 2, 0).reshape(-1, 6).numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", ["perceiver", "concat4_linear", "flamingo_xattn"])
def test_a_clip_takes_any_connector_drawn_anew(tmp_path, kind):
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    text = {"num_hidden_layers": 4}
    if kind == "flamingo_xattn":  # a gated block before each fourth layer
        _four_layers(llm, text)
    importing.assemble(tmp_path / "ours", clip, llm, projector_type=kind)
    leaves = loaded(tmp_path / "ours")
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    gates = [leaf for name, leaf in leaves.items() if name.endswith("gate") and name.startswith("llm/cross/")]
    assert (len(gates) == 2) == (kind == "flamingo_xattn") and not any(gate.any() for gate in gates)
    assert ("resampler/latents" in leaves) == (kind != "concat4_linear")


def _four_layers(folder, change):
    tensors = read_all(folder)
    more = {name.replace("layers.0.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.0." in name}
    tiny.save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.write_json(folder / "config.json", tiny.TEXT_CONFIG | change)


@pytest.mark.parametrize("arguments, code, message", [
    (["--vision", "EVA", "--connector", "EVA"], 66, "no Q-Former of BLIP-2 here"),
    (["--vision", "BLIP2", "--connector", "BLIP2"], 66, "no EVA ViT here"),
    (["--vision", "EVA", "--connector", "BLIP2", "--select-layer", "-2"], 64, "every block runs; leave it out"),
    (["--vision", "CLIP", "--image-size", "450"], 64, "image_size=450: want a multiple of patch_size=14"),
    (["--vision", "EVA", "--connector", "BLIP2", "--projector-type", "perceiver"], 64, "a Q-Former, which"),
    (["--vision", "EVA", "--projector", "PROJ"], 66, "llama_proj.weight has shape (48, 64), wanted (48, 352)"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_one_line_and_a_code(tmp_path, capsys, released, arguments, code, message):
    clip = tiny.write_clip(tmp_path / "clip")
    places = dict(zip(("EVA", "BLIP2", "PROJ"), map(str, released))) | {"CLIP": str(clip)}
    given = [places.get(argument, argument) for argument in arguments]
    found = main(["assemble", str(tmp_path / "dst"), "--llm", str(released[3]), *given])
    error = capsys.readouterr().err
    assert (found, message in error, error.count("\n")) == (code, True, 1), error
    assert not (tmp_path / "dst").exists()


_LAYER = "Qformer.bert.encoder.layer."
_ADAPTER = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("part, changes, message", [
    ("EVA", {"blocks.1.attn.q_bias": None}, "damaged.pth does not fit its config: blocks.1.attn.q_bias is missing"),
    ("EVA", {"blocks.1.mlp.fc1.weight": (95, 88)}, "fc1.weight has shape (95, 88), wanted (96, 88)"),
    ("EVA", {"blocks.x.norm1.bias": (88,)}, "blocks.x.norm1.bias (88,) is not known"),
    ("EVA", {"pos_embed": (5,)}, "damaged.pth: no EVA ViT here"),
    ("EVA", {"pos_embed": (1, 4, 88)}, "4 positions, width 88, 3 blocks to run; wanted a square and one more"),
    ("BLIP2", {"query_tokens": (5,)}, "damaged.pth: no Q-Former of BLIP-2 here"),
    ("BLIP2", {_LAYER + "0.intermediate_query.dense.weight": (80, 70)}, "a Q-Former of width 70"),
    ("BLIP2", {_LAYER + "3.crossattention.self.key.bias": (64,)}, "layers [0, 2, 3] of 4 look at the image"),
    ("BLIP2", {_LAYER + "0.crossattention.self.key.weight": (64, 96)}, "has shape (64, 96), wanted (64, 88)"),
    ("PROJ", {"llama_proj.bias": None}, "llama_proj.bias is missing"),
    ("PROJ", {"extra": (3,)}, "extra (3,) is not known"),
    ("PROJ", {_ADAPTER: ()}, "has shape (); wanted a matrix"),
])  # fmt: skip
def test_a_file_with_other_tensors_is_refused_by_the_tensors_name(tmp_path, capsys, released, part, changes, message):
    places = dict(zip(("EVA", "BLIP2", "PROJ"), released))
    tensors = read_all(places[part]) | {n: np.zeros(shape or (), np.float32) for n, shape in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, ()) is not None}
    places[part] = tmp_path / "damaged.pth"
    tiny.torch_zip.write_torch(places[part], kept, within="model")
    assert _assemble(tmp_path / "dst", places, released[3]) == 66
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("part", ["EVA", "BLIP2", "PROJ"])
def test_no_pickle_is_run_and_a_missing_or_broken_file_is_named(tmp_path, capsys, released, part):
    places = dict(zip(("EVA", "BLIP2", "PROJ"), released))
    whole = places[part].read_bytes()
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as file:
        evil = Evil(os.system, (f"touch {tmp_path / 'owned'}",))
        file.writestr("evil/data.pkl", pickle.dumps({"model": {"llama_proj.weight": evil}}))
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_bytes(b"<html>Google Drive can't scan this file for viruses</html>")
    for name, message in (("evil", "which could run any code; ask for safetensors"), ("half", "download it again"),
                          ("page", "download it again"), ("gone", "gone.pth")):  # fmt: skip
        assert _assemble(tmp_path / "dst", places | {part: tmp_path / f"{name}.pth"}, released[3]) == 66
        error = capsys.readouterr().err
        assert f"{name}.pth" in error and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "owned").exists() and not (tmp_path / "dst").exists()


def _assemble(to, places, llm):
    words = ["--vision", places["EVA"], "--connector", places["BLIP2"], "--projector", places["PROJ"], "--llm", llm]
    return main(["assemble", str(to), *map(str, words)])


@pytest.mark.parametrize("section, key, value, message", [
    ("vision_config", "hidden_size", "wide", "vision_config: hidden_size is 'wide'; wanted a whole number above 0"),
    ("vision_config", "layer_norm_eps", "small", "layer_norm_eps is 'small'; wanted a number above 0"),
    ("vision_config", "hidden_act", "relu", "hidden_act is 'relu'; wanted 'gelu', BLIP-2 as released"),
    ("qformer_config", "cross_attention_frequency", 0, "cross_attention_frequency is 0; wanted a whole number above 0"),
    ("text_config", "num_attention_heads", 0, "text_config: num_attention_heads is 0; wanted a whole number above 0"),
    (None, "num_query_tokens", None, "num_query_tokens is None"),
    (None, "num_query_tokens", 4, "query_tokens has shape (1, 5, 64), wanted (1, 4, 64)"),
    (None, "qformer_config", [], "qformer_config is missing"),
])  # fmt: skip
def test_a_hub_config_that_says_nonsense_is_refused_by_key(tmp_path, capsys, section, key, value, message):
    place = tiny_blip2.write_hub(tmp_path / "in", tiny_blip2.hub_tensors())
    content = json.loads((place / "config.json").read_text())
    (content[section] if section else content)[key] = value
    (place / "config.json").write_text(json.dumps(content))
    assert main(["import", str(place), str(tmp_path / "dst")]) == 66
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "dst").exists()


def test_what_other_formats_cannot_hold_is_refused(tmp_path, assembled):
    with pytest.raises(ValueError, match="--format llava: .*'qformer', which that format lacks; wanted one of hf"):
        exporting.export("llava", assembled, tmp_path / "llava")
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    importing.assemble(tmp_path / "perceiver", clip, llm, projector_type="perceiver")
    with pytest.raises(ValueError, match="no model with the connector 'perceiver' on this tower"):
        exporting.export("hf", tmp_path / "perceiver", tmp_path / "out")
    with pytest.raises(ValueError, match="the original code has no connector 'perceiver'"):
        exporting.export("projector", tmp_path / "perceiver", tmp_path / "out")  # its latents would be lost
    assert not (tmp_path / "out").exists() and reader.latest_step(tmp_path / "perceiver") == 0
    assert files.open_tensors(clip).specs
