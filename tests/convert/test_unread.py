"""What config.json may say that nothing reads: refused by its name, with what the model calls itself."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from llava_jax.checkpoint import model_json
from llava_jax.convert import exporting, importing, peft_import, unread
from llava_jax.convert.__main__ import main
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models.presets import config_from_json
from llava_jax.prompt import tokenizer
from tests.convert import adapters, tiny
from tests.prompt import layouts

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
TEXT, VISION = tiny.TEXT_CONFIG, tiny.VISION_CONFIG
TILED = {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28]]}
ONEVISION = {"model_type": "llava_onevision", "vision_feature_select_strategy": "default"}
HUB = [
    ({"model_type": "llava_next_video"}, "model_type is 'llava_next_video'; wanted 'llava', 'llava_next', 'llava_one"),
    (TILED | {"image_grid_pinpoints": None}, r"image_grid_pinpoints 'None'; wanted a list of \[height, width\] in pix"),
    (TILED | {"image_grid_pinpoints": [[28, 56], [56]]}, "image_grid_pinpoints .*56.*; wanted a list"),
    (TILED | {"image_grid_pinpoints": [[28, 60]]}, "image_grid_pinpoints '60 x 28'; wanted multiples of the tower's"),
    (TILED | {"use_image_newline_parameter": False}, "use_image_newline_parameter is False; wanted True"),
    (TILED | {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full', .*wanted default"),
    (TILED | {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; wanted 'gelu'"),
    (TILED | {"multimodal_projector_bias": False}, "multimodal_projector_bias is False; wanted True"),
    (TILED, "its image processor's mode is 'pad', but config.json is of a LlavaNext; wanted a LlavaNextImageProcessor"),
    (TILED | ONEVISION | {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'; wanted 'anyres_max_'"),
    (TILED | ONEVISION | {"vision_aspect_ratio": "anyres_max_0"}, "'anyres_max_0' leaves no tile"),
    ({"architectures": ["LlavaNextForConditionalGeneration"]}, "wanted LlavaForConditionalGeneration"),
    ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "model_type is 'qwen2_vl'"),
    ({"model_type": "llama"}, "a language model alone; .*`convert assemble DST --vision TOWER_DIR --llm THIS_"),
    ({"vision_config": {**VISION, "model_type": "dinov2"}}, "vision model_type is 'dinov2'; wanted one of clip_visi"),
    ({"text_config": {**TEXT, "model_type": "gemma"}}, "text model_type is 'gemma'; wanted one of llama"),
    ({"text_config": {**TEXT, "sliding_window": 4096}}, "sliding_window is 4096"),
    ({"text_config": {**TEXT, "layer_types": ["sliding_attention"] * 3}}, r"layer_types \['sliding_attention'"),
    ({"text_config": None}, "text_config is missing"),
    ({"quantization_config": FOUR_BITS}, "holds bitsandbytes 4-bit weights: import the float model it was made of"),
    ({"quantization_config": {"load_in_8bit": True}}, "holds bitsandbytes 8-bit weights"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "holds gptq 4-bit weights"),
    ({"text_config": {**TEXT, "quantization_config": {"quant_method": "awq", "bits": 4}}}, "holds awq 4-bit weights"),
    ({"quantization_config": {"quant_method": "fp8"}}, "holds fp8 weights"),
    ({"quantization_config": ["odd"]}, "holds quantised weights"),
]  # fmt: skip
ORIGINAL = [
    ({"image_aspect_ratio": "anyres"}, r"image_grid_pinpoints 'None'; wanted a list of \[width, height\] in pixels"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(3x3),...,(2x2)"}, "wanted .*1x1.,...,.6x6"),
    ({"image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "[(28, 56), 28]"}, "wanted .*width, height"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "maxpool2x2"}, "mm_patch_merge_type is 'maxpool2x2'"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[28, 56]]},
     "model.image_newline is missing"),
    ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    ({"s2": True, "s2_scales": "336,672"}, "s2 is True: an image is seen at several scales"),
    ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type is 'spatial_pool'"),
    ({"model_type": "llava_mpt", "architectures": None}, "model_type is 'llava_mpt'; wanted one of llava, "),
    ({"model_type": "llava_qwen"}, "model_type is 'llava_qwen', architectures name a LlavaLlamaForCausalLM"),
    ({"architectures": ["LlavaMptForCausalLM"]}, r"architectures \['LlavaMptForCausalLM'\]; wanted one of LlavaLlama"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"quantization_config": FOUR_BITS}, "holds bitsandbytes 4-bit weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny.write_hub(tmp_path_factory.mktemp("hub") / "model", tiny.hub_tensors())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    tiny.write_clip(folder / "clip")
    return tiny.write_original(folder / "llava-x", tiny.renamed(tiny.hub_tensors(), "original")), folder / "clip"


def changed(source, folder, changes):
    """The directory with other words in its config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    content = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def identity(folder):
    return unread.identity(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("changes, message", HUB)
def test_a_hugging_face_model_of_another_kind_is_refused_by_name(tmp_path, hub, changes, message):
    place = changed(hub, tmp_path / "in", changes)
    with pytest.raises(UnusableCheckpoint, match=message) as error:
        importing.import_checkpoint(place, tmp_path / "out")
    assert f"({identity(place)})" in str(error.value) and "model_type" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", ORIGINAL)
def test_an_original_model_of_another_kind_is_refused_by_name(tmp_path, original, changes, message):
    place = changed(original[0], tmp_path / "llava-x", changes)
    with pytest.raises(UnusableCheckpoint, match=message) as error:
        importing.import_checkpoint(place, tmp_path / "out", original[1])
    assert f"({identity(place)})" in str(error.value) and "mm_vision_tower 'some/clip'" in str(error.value)


def test_every_refusal_says_what_the_model_its_parts_and_its_tower_are(tmp_path, hub):
    vision = {**VISION, "model_type": "siglip_vision_model"}
    place = changed(hub, tmp_path / "in", {"architectures": ["LlavaForConditionalGeneration"], "vision_config": vision})
    with pytest.raises(UnusableCheckpoint) as error:
        importing.import_checkpoint(place, tmp_path / "out")
    assert str(error.value).endswith(
        "(config.json: model_type 'llava', architectures \"['LlavaForConditionalGeneration']\", "
        "text_config.model_type 'llama', vision_config.model_type 'siglip_vision_model')"
    )
    place = changed(hub, tmp_path / "other", {})
    (place / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights here.*\(config.json: model_type 'llava'"):
        importing.import_checkpoint(place, tmp_path / "out")


def test_values_that_mean_llava_on_a_llama_pass(original):
    content = json.loads((original[0] / "config.json").read_text())
    for change in ({}, {"image_aspect_ratio": "square"}, {"model_type": "llava_llama"}, {"s2": False},
                   {"mm_patch_merge_type": "flat"}, {"quantization_config": None}):  # fmt: skip
        unread.refuse_original(content | change, "here")
        unread.refuse_quantised(content | change, "here")


def test_marks_around_images_that_the_tokenizer_lacks_are_refused(tmp_path, original):
    place = changed(original[0], tmp_path / "llava-x", {"mm_use_im_start_end": True})
    with pytest.raises(UsageError, match="mm_use_im_start_end.* is true, but <im_start> is no token of the tokenizer"):
        importing.import_checkpoint(place, tmp_path / "out", original[1])


def test_a_template_that_the_tokenizer_cannot_write_is_refused_by_import_and_assemble(tmp_path, hub, capsys):
    assert main(["import", str(hub), str(tmp_path / "out"), "--template", "mpt"]) == 64
    assert "template 'mpt' is written with <|im_end|> and <|im_start|>, no token of" in capsys.readouterr().err
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    command = ["assemble", str(tmp_path / "out"), "--vision", str(clip), "--llm", str(llm), "--template", "mpt"]
    assert main(command) == 64 and "no token of the tokenizer" in capsys.readouterr().err


def test_the_parts_of_an_assembly_may_not_be_quantised(tmp_path):
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    content = json.loads((llm / "config.json").read_text())
    tiny.write_json(llm / "config.json", content | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UnusableCheckpoint, match="llm holds gptq 4-bit weights"):
        importing.assemble(tmp_path / "out", clip, llm)


def test_the_shared_case_of_a_four_bit_save_is_refused_in_one_line(tmp_path, shared, hub, capsys):
    importing.import_checkpoint(hub, tmp_path / "ours")
    exporting.export("hf", tmp_path / "ours", tmp_path / "exported")
    script = shared / "cases" / "15" / "make.py"
    subprocess.run([sys.executable, script, "exported", "q4"], cwd=tmp_path, check=True, timeout=120)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert main(["import", "q4", "imported"]) == 66
    finally:
        os.chdir(here)
    (line,) = capsys.readouterr().err.strip().splitlines()
    told = "q4 holds bitsandbytes 4-bit weights: import the float model it was made of, or dequantise and save it "
    assert told + "with transformers first" in line


def test_an_adapter_of_our_own_export_has_a_remedy_that_works(tmp_path, hub):
    """It keeps lm_head, which the export has given rows for <image> and <pad>."""
    importing.import_checkpoint(hub, tmp_path / "base")
    exporting.export("hf", tmp_path / "base", tmp_path / "exported")
    head = load_file(tmp_path / "exported" / "model.safetensors")["language_model.lm_head.weight"] + 1
    saved = adapters.tensors(adapters.NEW) | {adapters.PREFIX + "lm_head.weight": head}
    name = str(tmp_path / "exported")
    made = adapters.write_peft(tmp_path / "in", saved, base_model_name_or_path=name)
    with pytest.raises(UnusableCheckpoint) as error:
        peft_import.import_adapter(made, tmp_path / "ours", tmp_path / "base", importing.UNSAID)
    remedy = f"`convert import {name} DST`, and say --base DST"
    assert f"trained on a model with {len(head)} rows of vocabulary, --base has 960" in str(error.value)
    assert str(error.value).endswith(remedy)
    assert main(["import", name, str(tmp_path / "DST")]) == 0
    assert main(["import", str(made), str(tmp_path / "ours"), "--base", str(tmp_path / "DST")]) == 0
    assert config_from_json(dict(model_json.read(tmp_path / "ours").model)).llm.vocab == len(head)


@pytest.mark.parametrize("template, ends, texts", [
    ("v1", 2, None), ("llava_v0", 2, ["###"]), ("chatml_direct", [2, 961], None),
])  # fmt: skip
def test_an_export_ends_answers_where_training_does(tmp_path, template, ends, texts):
    place = tiny.write_hub(tmp_path / "hub", tiny.hub_tensors(vocab=1024), vocab=1024)
    words = {960: layouts.word("<|im_start|>"), 961: layouts.word("<|im_end|>"), 962: layouts.word("<tool>", False)}
    layouts.directory(place, words, legacy=False)
    importing.import_checkpoint(place, tmp_path / "ours", options=importing.PromptOptions(template))
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"], found.get("stop_strings")) == (1, ends, texts)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ('Answers end with "###", which is no token' in text) == (texts is not None)
    assert "puts transparent pictures on white, and its `load_image` turns them" in text
    kept = tokenizer.load(tmp_path / "out")
    assert [(word.text, word.id, word.special) for word in kept.words[3:]] == [
        ("<|im_start|>", 960, True), ("<|im_end|>", 961, True), ("<tool>", 962, False), ("<image>", 963, True),
        ("<pad>", 964, True),
    ]  # fmt: skip
    importing.import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert tokenizer.load(tmp_path / "again" / "tokenizer").words == kept.words
