"""The table: full-size presets have the hub's very names and shapes, and what does not fit is named."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_jax import params
from llava_jax.checkpoint import reader
from llava_jax.convert import files, llava, table
from llava_jax.convert.files import TensorFiles, open_tensors
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import clip, llama
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import get
from tests.convert import tiny

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hub_tensors.json").read_text())["models"]


def found_in(config, layout):
    leaves = params.flatten(abstract_params(config))
    return table.entries(leaves, llava.rows(layout, config), llava.first_layers(config), "conversion")


@pytest.mark.parametrize("preset, hub", [
    ("llava15_7b", "llava-1.5-7b"), ("llava15_13b", "llava-1.5-13b"), ("llava16_7b", "llava-1.6-vicuna-7b"),
    ("llava16_mistral_7b", "llava-1.6-mistral-7b"),
])  # fmt: skip
def test_full_size_presets_have_the_hubs_names_and_shapes(preset, hub):
    config = get(preset)
    ours = {name: entry.their_shape for entry in found_in(config, llava.HUB) for name in entry.theirs}
    wanted = {name: tuple(shape) for name, shape in GOLDEN[hub]["hub_layout"].items()}
    # The hub's conversion adds <image> and <pad> and fills up to a multiple of 64.
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert (ours[name], wanted[name]) == ((32000, config.llm.width), (32064, config.llm.width))
        ours[name] = wanted[name]
    assert ours == wanted
    assert len(ours) == GOLDEN[hub]["n_tensors"]
    assert sum(int(np.prod(shape)) for shape in ours.values()) == GOLDEN[hub]["n_params"]


def test_the_original_layout_has_the_names_of_the_original_code():
    names = {name for entry in found_in(get("llava15_7b"), llava.ORIGINAL) for name in entry.theirs}
    assert {
        "model.mm_projector.2.bias", "lm_head.weight", "model.norm.weight", "model.layers.31.mlp.gate_proj.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.bias",
    } <= names  # fmt: skip
    linear = {name for entry in found_in(get("llava10_7b"), llava.ORIGINAL) for name in entry.theirs}
    assert {"model.mm_projector.weight", "model.mm_projector.bias"} <= linear
    with pytest.raises(ValueError, match="no projector 'linear', only mlp2x_gelu; use --format llava"):
        llava.projector_rows(llava.HUB, "linear")


def test_whatever_does_not_fit_is_named(tmp_path):
    entries = found_in(get("tiny"), llava.HUB)
    good = {name: np.zeros(entry.their_shape, np.float16) for entry in entries for name in entry.theirs}
    name, layer = "language_model.model.norm.weight", "language_model.model.layers.1.mlp.up_proj.weight"
    cases = [
        ({k: v for k, v in good.items() if k != name}, rf"{name} is missing \(for llm/norm/scale\)"),
        (good | {"model.extra": np.zeros(3, np.float16)}, r"model.extra \(3,\) is not known"),
        (good | {name: np.zeros(3, np.float16)}, rf"{name} has shape \(3,\), wanted \(48,\)"),
        (good | {layer: good[layer].T.copy()}, f"{layer} has shape"),
        (good | {name: np.zeros(48, np.int64)}, f"{name} has dtype int64, wanted one of float32, float16, bfloat16"),
        (
            good | {layer: good[layer].astype(np.float32)},
            "up_proj.weight and the other layers have dtypes float16, float32",
        ),
    ]
    for tensors, message in cases:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UnusableCheckpoint, match=message):
            table.check(entries, open_tensors(tmp_path), llava.ignored(get("tiny")))
    save_file(good | {"vision_tower.vision_model.embeddings.position_ids": np.zeros(3, np.int64),
                      "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3)},
              tmp_path / "model.safetensors")  # fmt: skip
    assert set(table.check(entries, open_tensors(tmp_path), llava.ignored(get("tiny"))).values()) == {np.dtype("f2")}


def test_import_holds_one_stacked_leaf_and_one_tensor_of_theirs(tmp_path):
    layers, width = 8, 512  # a stack of 8 MB
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((width, width), np.float32) for i in range(layers)}
    tensors |= {f"model.layers.{i}.mlp.gate_proj.weight": np.ones((width, width), np.float32) for i in range(layers)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    leaves = {
        f"llm/blocks/{name}/kernel": np.broadcast_to(np.float32(0), (layers, width, width)) for name in ("up", "gate")
    }
    entries = table.entries(leaves, llama.rows("model.", "lm_head.weight"), {}, "conversion")
    opened = open_tensors(tmp_path)
    tracemalloc.start()
    with reader.TensorWriter(tmp_path / "params") as writer:
        table.write_leaves(writer, [(entry, opened) for entry in entries])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    leaf, theirs = layers * width * width * 4, width * width * 4
    assert peak < leaf + 2 * theirs + 2**20, f"{peak} bytes for a leaf of {leaf}"


def test_a_leaf_and_its_tensors_are_inverse_for_every_row():
    rng = np.random.default_rng(0)

    class Memory(TensorFiles):
        def __init__(self, tensors):
            self.path, self.tensors = Path("memory"), tensors
            self.specs = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            self.specs = {name: table.Spec(*spec) for name, spec in self.specs.items()}

        def read(self, name):
            return self.tensors[name]

    for entry in found_in(get("tiny"), llava.HUB):
        leaf = rng.standard_normal(entry.shape).astype(np.float32)
        tensors = dict(table.their_tensors(entry, leaf))
        assert {tensor.shape for tensor in tensors.values()} == {entry.their_shape}
        np.testing.assert_array_equal(table.read_tensor(entry, Memory(tensors)), leaf)


def test_defaults_that_config_files_leave_out_are_those_of_transformers():
    pytest.importorskip("torch")  # transformers' model configs come with it
    from transformers import CLIPVisionConfig, LlamaConfig

    theirs = {"dtype": None, **LlamaConfig().to_dict()}
    assert llama.read_config({}, "empty") == llama.read_config(theirs, "LlamaConfig()")
    empty = clip.read_config({}, "empty", -2, "patch")
    assert empty == clip.read_config(CLIPVisionConfig().to_dict(), "CLIPVisionConfig()", -2, "patch")


@pytest.mark.parametrize("changes, message", [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "in rope_parameters and beside"),
])  # fmt: skip
def test_a_decoder_that_is_no_llama_is_refused(changes, message):
    with pytest.raises(UnusableCheckpoint, match=message):
        llama.read_config(tiny.TEXT_CONFIG | changes, "config.json")


def test_rope_settings_of_transformers_4_and_5_are_the_same():
    base = {key: value for key, value in tiny.TEXT_CONFIG.items() if key != "rope_theta"}
    old = base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    config = llama.read_config(old, "old")
    assert config == llama.read_config(new, "new") and config.rope_theta == 5e5 and config.rope_scaling.factor == 4.0
    written = llama.config_json(config, config.vocab, "float32")
    assert llama.read_config(written, "written") == config


def test_a_written_decoder_config_means_the_same_to_transformers():
    pytest.importorskip("torch")
    from transformers import LlamaConfig

    scaled = llama.read_config(
        tiny.TEXT_CONFIG | {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ""
    )
    theirs = LlamaConfig(**llama.config_json(scaled, 960, "float32"))
    assert {**theirs.rope_parameters} == {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}
    assert llama.read_config(theirs.to_dict(), "theirs") == scaled


def test_config_files_of_the_released_models_are_the_presets():
    """What the hub's config.json hold: Hugging Face's leaves out every default, the original's says everything."""
    tensors = TensorFiles(Path("hub"), {})
    for name in ("language_model.lm_head.weight", "model.mm_projector.0.weight", "model.mm_projector.2.weight"):
        tensors.specs[name] = files.Spec((32064, 4096), np.dtype("f2"))
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    }  # fmt: skip
    hub = {
        "model_type": "llava", "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "text_config": text,
        "vision_config": vision,
    }  # fmt: skip
    wanted = get("llava15_7b")
    padded = dataclasses.replace(wanted, llm=dataclasses.replace(wanted.llm, vocab=32064))
    assert llava.read_hub_config(hub, "config.json", llava.HUB, tensors) == padded
    original = llama.config_json(wanted.llm, 32000, "float16") | {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad",
    }  # fmt: skip
    tower = clip.config_json(clip.PART.hub[original["mm_vision_tower"]])
    assert llava.is_original(original) and not llava.is_original(hub)
    assert llava.read_original_config(original, "config.json", clip.PART, tower, tensors) == wanted
    for change, message in [
        ({"architectures": ["LlavaMptForCausalLM"]}, "wanted one of LlavaLlamaForCausalLM"),
        ({"s2": True}, "s2 is True: an image is seen at several scales"),
        ({"mm_projector_type": "linear"}, "but the tensors are 'mlp2x_gelu'"),
    ]:
        with pytest.raises(UnusableCheckpoint, match=message):
            llava.read_original_config(original | change, "config.json", clip.PART, tower, tensors)
    for change, message in [
        ({"model_type": "llava_next_video"}, "model_type is 'llava_next_video'; wanted 'llava'"),
        ({"vision_feature_layer": [-2, -5]}, "one number"),
        ({"text_config": text | {"model_type": "gemma"}}, "text model_type is 'gemma'"),
        ({"vision_config": vision | {"model_type": "dinov2"}}, "vision model_type is 'dinov2"),
        ({"vision_config": None}, "vision_config is missing"),
    ]:
        with pytest.raises(UnusableCheckpoint, match=message):
            llava.read_hub_config(hub | change, "config.json", llava.HUB, tensors)
