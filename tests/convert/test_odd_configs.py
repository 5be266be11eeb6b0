"""Odd values in others' config.json and image processor, for every decoder and tower: refused by key and value."""

import re

import pytest

from llava_jax import errors
from llava_jax.convert import peft_import, processor, unread
from llava_jax.convert.importing import UNSAID, assemble, import_checkpoint
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import registry
from tests.convert import adapters, tiny
from tests.convert.test_unread import changed

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
NO_SIZES = (0, -1, "48", 48.0, [48], None, True)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DECODERS = {
    **{key: [(value, f"{key} is ") for value in NO_SIZES] for key in (*SIZES, "vocab_size", "max_position_embeddings")},
    "num_key_value_heads": [*((value, "num_key_value_heads is ") for value in (0, -1, "2", 2.0, [2], True)),
                            (3, "num_key_value_heads is 3; wanted a divisor of num_attention_heads=4"),
                            (8, "num_key_value_heads is 8; wanted a divisor of num_attention_heads=4")],
    "head_dim": [*((value, "head_dim is ") for value in (0, -4, "12", [12], True)), (13, "13; wanted an even number")],
    "rms_norm_eps": [(value, "rms_norm_eps is ") for value in (0, -1, "1e-5", None, [1], float("nan"), True)]
    + [(1, r"text_config: model config eps=1.0: want between"), (float("inf"), "text_config: model config eps=inf")],
    "rope_theta": [(value, "rope_theta is ") for value in ("x", [1], 0, -1, True)] + [(1e300, "rope_theta=1e\\+300")],
    "rope_scaling": [
        *((value, "rope_scaling is .*wanted null or an object") for value in ("x", 5, ["linear"])),
        ({"type": "yarn", "factor": 2}, "rope_scaling: rope scaling 'yarn'; wanted one of default, linear, "),
        ({"type": ["a"], "factor": 2}, "rope scaling ['a']; wanted one of"), ({"type": None}, "rope scaling None; "),
        ({"type": "linear"}, "factor is missing; wanted a number for rope_type 'linear'"),
        ({"type": "linear", "factor": "x"}, "factor is 'x'"), ({"type": "dynamic", "factor": [2]}, "factor is [2]"),
        ({"type": "linear", "factor": 0}, "factor is 0"), ({"type": "linear", "factor": True}, "factor is True"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        (LLAMA3 | {"low_freq_factor": "a"}, "low_freq_factor is 'a'"),
        (LLAMA3 | {"high_freq_factor": 0.5}, "low_freq_factor=1.0: want less than high_freq_factor=0.5"),
        (LLAMA3 | {"original_max_position_embeddings": 64.0}, "is 64.0; wanted null or a whole number above 0"),
        ({"type": "default", "mrope_section": [1, 2, 3]}, "mrope_section is [1, 2, 3]; wanted no key but"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha is 1000.0; wanted no key but"),
    ],
    "rope_parameters": [
        *((value, "rope_parameters is .*wanted null or an object") for value in ("x", 5, [1])),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters: full_attention is {"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"), ({"rope_theta": 5e5}, "in rope_parameters and beside it; want one"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
    "partial_rotary_factor": [(value, "partial_rotary_factor is .*wanted 1") for value in (0.5, "x", [1])],
    "layer_types": [(value, "layer_types ") for value in ("x", 5, ["x"] * 3, [[1]] * 3)],
    "hidden_act": [(value, "hidden_act is .*wanted 'silu'") for value in ("gelu", None, 5, ["silu"])],
}  # fmt: skip
OF_ONE = {
    "llama": {"attention_bias": [(True, "attention_bias is True")], "sliding_window": [(64, "sliding_window is 64")]},
    "mistral": {"sliding_window": [(value, "sliding_window is .*wanted null or a ") for value in (0, "x", [1], 2.5)],
                "layer_types": [(["full_attention", "sliding_attention", "full_attention"], "for all layers")]},
    "qwen2": {"use_sliding_window": [(True, "sliding_window is 4096")]},
    "qwen3": {"attention_bias": [(True, "attention_bias is True")]},
}  # fmt: skip
ACTS = "hidden_act is .*wanted one of quick_gelu, gelu, gelu_pytorch_tanh"
TOWERS = {
    **{key: [(value, f"{key} is ") for value in NO_SIZES] for key in (*SIZES, "image_size", "patch_size")},
    "layer_norm_eps": [(value, "layer_norm_eps is ") for value in (0, "x", None, float("nan"))],
    "num_channels": [(value, "num_channels is .*wanted one of 3") for value in (1, "3", None, [3])],
}  # fmt: skip
OF_ONE_TOWER = {
    "clip": {"hidden_act": [(value, ACTS) for value in ("silu", None, 5, ["gelu"])],
             "image_size": [(30, "vision_config: model config image_size=30: want a multiple of patch_size=14")],
             "num_attention_heads": [(3, "hidden_size is 32; wanted a multiple of num_attention_heads=3")]},
    "siglip": {"hidden_act": [(value, ACTS) for value in ("silu", None, 5, ["gelu"])],
               "vision_use_head": [(value, "vision_use_head is ") for value in ("x", None, 1)],
               "image_size": [(13, "vision_config: model config image_size=13: want at least patch_size=14")],
               "num_attention_heads": [(3, "hidden_size is 32; wanted a multiple of num_attention_heads=3")]},
    "eva": {"hidden_act": [("silu", "hidden_act is 'silu'")], "qkv_bias": [(False, "qkv_bias is False")]},
}  # fmt: skip


def refused(part, content, where, words, *feature):
    with pytest.raises(UnusableCheckpoint) as found:
        unread.read_part(part, content, where, *feature)
    said = str(found.value)
    assert said.startswith(where) and "\n" not in said and errors.exit_code(found.value) == 66, said
    return said


def check(part, base, tables, where, *feature):
    for table in tables:
        for key, cases in table.items():
            for value, words in cases:
                said = refused(part, base | {key: value}, where, words, *feature)
                assert words in said or re.search(words, said), (key, value, said)


@pytest.mark.parametrize("kind", OF_ONE)
def test_an_odd_value_of_a_decoder_is_refused_by_its_key(kind):
    base = tiny.TEXT_CONFIG | {"model_type": kind, "head_dim": 12, "layer_types": None}
    part = registry.decoder(kind)
    assert part.read_config(base, "plain").kv_heads == 2
    check(part, base, (DECODERS, OF_ONE[kind]), "config.json: text_config")


@pytest.mark.parametrize("kind", OF_ONE_TOWER)
def test_an_odd_value_of_a_tower_is_refused_by_its_key(kind):
    part = registry.tower(kind)
    base = tiny.VISION_CONFIG | {"model_type": part.model_types[0]}
    feature = (-2, "patch")
    assert part.read_config(base, "plain", *feature).width == tiny.VISION_WIDTH
    check(part, base, (TOWERS, OF_ONE_TOWER[kind]), "config.json: vision_config", *feature)


PARTS = {
    "text_config": [(["llama"], "text model_type is ['llama']; wanted one of llama, mistral"),
                    ("qwen2_moe", "text model_type is 'qwen2_moe' (a mixture of experts); wanted one of llama")],
    "vision_config": [(["a"], "vision model_type is ['a']; wanted one of clip"), (None, "vision model_type is None"),
                      ("siglip2_vision_model", "(a SigLIP2 NaFlex, for pictures of any shape"),
                      ("siglip2", "a SigLIP2 of fixed resolution says 'siglip'); wanted one of clip")],
}  # fmt: skip
TOP = [
    ({"model_type": ["llava"]}, "model_type is ['llava']; wanted 'llava'"),
    ({"vision_feature_layer": True}, "vision_feature_layer True; wanted"),
    ({"vision_feature_layer": 0}, "vision_config: hidden state 0 is wanted of 3 layers; wanted one after"),
    ({"vision_feature_select_strategy": ["full"]}, "vision_feature_select_strategy ['full']"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; wanted true or false"),
    ({"text_config": tiny.TEXT_CONFIG | {"tie_word_embeddings": [1]}}, "tie_word_embeddings is [1]; wanted true"),
    ({"llava_jax": 5}, "config.json: llava_jax is 5; wanted an object of template"),
    ({"llava_jax": {"template": 5}}, "llava_jax: template is 5; no export of llava_jax has written that"),
    ({"llava_jax": {"image_mode": "squish"}}, "llava_jax: image_mode is 'squish'"),
    ({"llava_jax": {"image_start_end": "x"}}, "llava_jax: image_start_end is 'x'"),
]  # fmt: skip


def cases():
    for part, kinds in PARTS.items():
        base = {"text_config": tiny.TEXT_CONFIG, "vision_config": tiny.VISION_CONFIG}[part]
        yield from (({part: base | {"model_type": kind}}, words) for kind, words in kinds)
    yield from TOP


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny.write_hub(tmp_path_factory.mktemp("hub") / "model", tiny.hub_tensors())


@pytest.mark.parametrize("changes, words", [*cases()])
def test_an_odd_value_of_a_whole_model_is_one_line_with_what_it_calls_itself(hub, tmp_path, changes, words):
    source = changed(hub, tmp_path / "in", {})
    content = tiny.json.loads((source / "config.json").read_text()) | changes
    tiny.write_json(source / "config.json", content)
    with pytest.raises(UnusableCheckpoint) as found:
        import_checkpoint(source, tmp_path / "out")
    said = str(found.value)
    assert words in said and said.endswith(f"({unread.identity(content)})") and "\n" not in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, words", [
    ({"image_mean": "x"}, "image_mean 'x'; wanted three numbers"), ({"image_mean": [1, 2]}, "image_mean [1, 2]"),
    ({"image_mean": ["a", "b", "c"]}, "image_mean ['a', 'b', 'c']"), ({"image_mean": 5}, "image_mean 5"),
    ({"image_std": [0, 0, 0]}, "image_std [0, 0, 0]; wanted three numbers above 0"),
    ({"resample": [1]}, "resample [1]; wanted 2 or 3"),
    ({"rescale_factor": 1}, "rescale_factor 1; wanted 1/255"), ({"rescale_factor": "x"}, "rescale_factor 'x'"),
    ({"do_resize": "x"}, "do_resize 'x'; wanted True"),
])  # fmt: skip
def test_an_odd_value_of_an_image_processor_is_refused_by_its_key(tmp_path, changes, words):
    tiny.write_json(tmp_path / "preprocessor_config.json", tiny.PREPROCESSOR | changes)
    with pytest.raises(UnusableCheckpoint) as found:
        processor.read_settings(tmp_path)
    assert f"{tmp_path}: its image processor has {words}" in str(found.value)


def test_an_image_processor_that_is_no_object_is_refused(tmp_path):
    tiny.write_json(tmp_path / "processor_config.json", {"image_processor": 5})
    with pytest.raises(UnusableCheckpoint, match="processor_config.json: image_processor is 5; wanted an object"):
        processor.read_settings(tmp_path)


def test_parts_to_assemble_say_which_of_them_is_another_model(tmp_path):
    vision, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    for select_layer in (0, -4, 99):
        with pytest.raises(UnusableCheckpoint, match=f"config.json: hidden state {select_layer} is wanted of 3 layers"):
            assemble(tmp_path / "out", vision, llm, select_layer=select_layer)
    tiny.write_json(vision / "config.json", {"model_type": "siglip2", "vision_config": tiny.VISION_CONFIG})
    with pytest.raises(UnusableCheckpoint, match=r"the vision tower's model_type is 'siglip2' \(a SigLIP2 NaFlex"):
        assemble(tmp_path / "out", vision, llm)


@pytest.mark.parametrize("changes, words", [
    ({"r": True}, "r is True; wanted a number above 0"), ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"rank_pattern": 5}, "rank_pattern is 5; wanted an object of numbers"),
    ({"alpha_pattern": ["a"]}, "alpha_pattern is ['a']; wanted an object of numbers"),
    ({"rank_pattern": {"q_proj": "y"}}, "rank_pattern: q_proj is 'y'"), ({"alpha_pattern": {".*": 0}}, ": .* is 0"),
    ({"rank_pattern": {"(": 3}}, "'(' is no regular expression (missing )"), ({"use_rslora": "x"}, "use_rslora is 'x'"),
])  # fmt: skip
def test_an_odd_value_of_an_adapters_config_is_refused_by_its_key(tmp_path, changes, words):
    adapters.write_peft(tmp_path / "in", adapters.tensors(adapters.NEW), **changes)
    with pytest.raises(UnusableCheckpoint) as found:
        peft_import.import_adapter(tmp_path / "in", tmp_path / "out", tmp_path / "base", UNSAID)
    said = str(found.value)
    assert "in/adapter_config.json: " in said and words in said and "\n" not in said, said
