"""Adapters in and out again, in every naming, and what is refused; no torch and no peft."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, peft_import, reports, torch_zip
from llava_jax.convert.__main__ import main
from llava_jax.convert.importing import UNSAID, PromptOptions
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import lora
from tests.convert import adapters, tiny
from tests.convert.adapters import ALPHA, NEW, OLD, ORIGINAL, PREFIX, RANK

Q = "llm/blocks/q"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA of ours, float32; not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    importing.import_checkpoint(tiny.write_hub(folder / "hub", tiny.hub_tensors()), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """What a LoRA run on it left, with a projector; not to be written to."""
    return adapters.write_run(tmp_path_factory.mktemp("run") / "run", base, "llm/")


def imported(folder, base, content, options=UNSAID, **config):
    """The checkpoint of ours that an adapter with these tensors becomes."""
    peft_import.import_adapter(adapters.write_peft(folder / "in", content, **config), folder / "ours", base, options)
    return folder / "ours"


def written(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def leaves(directory):
    return params.flatten(reader.load_params(directory))


@pytest.mark.parametrize("prefix", [NEW, OLD, ORIGINAL], ids=["new", "old", "plain"])
def test_every_naming_comes_in_the_same_and_goes_out_as_the_new_one(tmp_path, base, prefix):
    ours = imported(tmp_path, base, adapters.tensors(prefix))
    theirs, found = adapters.tensors(NEW), leaves(ours)
    for layer in range(tiny.LAYERS):
        name = f"{PREFIX}{NEW}{layer}.mlp.up_proj.lora_"
        np.testing.assert_array_equal(found["llm/blocks/up/lora_a"][layer], theirs[f"{name}A.weight"].T)
        np.testing.assert_array_equal(found["llm/blocks/up/lora_b"][layer], theirs[f"{name}B.weight"].T)
    np.testing.assert_array_equal(found[f"{Q}/lora_scale"], np.full(tiny.LAYERS, ALPHA / RANK, np.float32))
    assert found[f"{Q}/kernel"].tobytes() == leaves(base)[f"{Q}/kernel"].tobytes()
    assert set(reader.own_specs(ours)) == {name for name in found if lora.kernel_of(name)}
    exporting.export("peft", ours, tmp_path / "out")
    again, config = written(tmp_path / "out")
    assert set(again) == set(theirs) and all(again[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (RANK, ALPHA, None)
    assert reports.verify(ours).endswith("all as they were written")


@pytest.mark.parametrize("dtype", tiny.DTYPES)
def test_our_run_goes_out_and_in_bit_for_bit(tmp_path, base, run, dtype):
    exporting.export("peft", run, tmp_path / "out", dtype=dtype)
    content, config = written(tmp_path / "out")
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert f"{PREFIX}model.multi_modal_projector.linear_1.weight" in content
    assert {str(tensor.dtype) for tensor in content.values()} == {dtype}
    peft_import.import_adapter(tmp_path / "out", tmp_path / "again", base, UNSAID)
    one, two = leaves(run), leaves(tmp_path / "again")
    assert set(one) == set(two)
    for name in reader.own_specs(tmp_path / "again"):
        wanted = one[name] if name.endswith(lora.SCALE) else one[name].astype(tiny.DTYPES[dtype])
        assert two[name].dtype == wanted.dtype and two[name].tobytes() == wanted.tobytes(), name
    assert model_json.read(tmp_path / "again").prompt == model_json.read(run).prompt  # not those of the base


def test_an_original_lora_directory_brings_its_projector_and_its_settings(tmp_path, base):
    folder = adapters.write_peft(tmp_path / "llava-lora", {})
    (folder / "adapter_model.safetensors").unlink()
    half = tiny.as_dtype(adapters.tensors(ORIGINAL), "float16")
    torch_zip.write_torch(folder / "adapter_model.bin", half)
    rng = np.random.default_rng(3)
    projector = tiny.projector_tensors(rng, "model.mm_projector.0", "model.mm_projector.2")
    torch_zip.write_torch(folder / "non_lora_trainables.bin", {PREFIX + n: t for n, t in projector.items()})
    tiny.write_json(folder / "config.json", {"image_aspect_ratio": "square", "mm_use_im_start_end": False})
    assert main(["import", str(folder), str(tmp_path / "ours"), "--base", str(base), "--template", "llava_v1"]) == 0
    found = leaves(tmp_path / "ours")
    assert found[f"{Q}/lora_a"].dtype == np.float16
    np.testing.assert_array_equal(found["projector/2/kernel"], projector["model.mm_projector.2.weight"].T)
    prompt = model_json.read(tmp_path / "ours").prompt
    assert (prompt.template, prompt.image_mode) == ("llava_v1", "square")


def test_layers_and_ranks_may_differ_and_come_out_as_they_went_in(tmp_path, base):
    """Two layers of three, one of a lower rank; peft counts what is missing as nothing, and so do zeros."""
    content = {n: t for n, t in adapters.tensors(NEW).items() if "q_proj" in n and ".layers.1." not in n}
    low = f"{PREFIX}{NEW}2.self_attn.q_proj.lora_"
    content[f"{low}A.weight"] = content[f"{low}A.weight"][:2]
    content[f"{low}B.weight"] = content[f"{low}B.weight"][:, :2].copy()
    patterns = {"rank_pattern": {"layers.2.self_attn.q_proj": 2}, "alpha_pattern": {"layers.2.self_attn.q_proj": 3}}
    ours = imported(tmp_path, base, content, **patterns)
    found = leaves(ours)
    assert not found[f"{Q}/lora_a"][1].any() and not found[f"{Q}/lora_a"][2][:, 2:].any()
    np.testing.assert_array_equal(found[f"{Q}/lora_scale"], np.array([2, 2, 1.5], np.float32))
    exporting.export("peft", ours, tmp_path / "out")
    again, config = written(tmp_path / "out")
    assert set(again) == set(content) and all(again[name].tobytes() == content[name].tobytes() for name in content)
    key = r"language_model\.layers\.2\.self_attn\.q_proj"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({key: 2}, {key: 3})
    assert config["target_modules"] == r"(?:.*\.)?(?:language_model\.layers\.(?:0|2)\.self_attn\.q_proj)"
    with pytest.raises(ValueError, match="rank 2 scale 1.5, rank 4 scale 2; vLLM"):
        exporting.export("peft", ours, tmp_path / "split", split_projector=True)


def test_a_scale_keeps_its_digits_in_an_export_of_fewer(tmp_path, base):
    ours = imported(tmp_path, base, adapters.tensors(NEW), lora_alpha=1.3)
    exporting.export("peft", ours, tmp_path / "out", dtype="bfloat16")
    assert written(tmp_path / "out")[1]["lora_alpha"] == pytest.approx(1.3, rel=1e-7)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, base):
    ours = imported(tmp_path, base, adapters.tensors(NEW), use_rslora=True)
    np.testing.assert_array_equal(leaves(ours)[f"{Q}/lora_scale"], np.full(tiny.LAYERS, ALPHA / 2, np.float32))


def test_merged_and_unmerged_give_the_same_logits(tmp_path, base):
    whole = adapters.write_run(tmp_path / "run", base)
    ours, plain = adapters.logits(whole), adapters.logits(base)
    reports.merge(whole, tmp_path / "merged")
    assert set(reader.own_specs(tmp_path / "merged")) == set(reader.tensor_specs(base))
    assert model_json.read(tmp_path / "merged").base == ()
    assert np.abs(adapters.logits(tmp_path / "merged") - ours).max() <= 1e-5 * np.abs(ours).max()
    assert np.abs(plain - ours).max() > 0.1 * np.abs(ours).max()


def test_a_whole_format_holds_the_merged_weights(tmp_path, run):
    """The user asked for a model that others load, and no other model is the one that was trained."""
    reports.merge(run, tmp_path / "merged")
    for format, name in (("hf", "hf"), ("llava", "llava-out")):
        exporting.export(format, run, tmp_path / name)
        exporting.export(format, tmp_path / "merged", tmp_path / "again" / name)
        one, two = (load_file(place / name / "model.safetensors") for place in (tmp_path, tmp_path / "again"))
        assert set(one) == set(two) and all(one[n].tobytes() == two[n].tobytes() for n in one)
    kernel, a, b = (leaves(run)[f"{Q}/{leaf}"][1] for leaf in ("kernel", "lora_a", "lora_b"))
    exported = load_file(tmp_path / "hf" / "model.safetensors")["language_model.model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(exported.T, kernel + ALPHA / RANK * a @ b, atol=1e-6)


def test_a_merge_is_summed_before_it_is_rounded(tmp_path):
    """Into a float16 base, and out of it in float32: the sum that is written has the wider dtype's digits."""
    hub = tiny.write_hub(tmp_path / "hub", tiny.as_dtype(tiny.hub_tensors(), "float16"))
    importing.import_checkpoint(hub, tmp_path / "base")
    whole = adapters.write_run(tmp_path / "run", tmp_path / "base", Q)
    kernel, a, b = (leaves(whole)[f"{Q}/{leaf}"] for leaf in ("kernel", "lora_a", "lora_b"))
    wanted = kernel.astype(np.float32) + np.float32(ALPHA / RANK) * np.matmul(a, b)
    reports.merge(whole, tmp_path / "merged")
    np.testing.assert_allclose(leaves(tmp_path / "merged")[f"{Q}/kernel"], wanted.astype(np.float16), rtol=1e-3)
    exporting.export("hf", whole, tmp_path / "hf", dtype="float32")
    name = "language_model.model.layers.2.self_attn.q_proj.weight"
    np.testing.assert_allclose(load_file(tmp_path / "hf" / "model.safetensors")[name].T, wanted[2], atol=1e-6)


def test_split_projector_gives_what_vllm_takes(tmp_path, base, run):
    code = main(["export", "--format", "peft", "--split-projector", str(run), str(tmp_path / "out")])
    content, config = written(tmp_path / "out" / "adapter")
    assert code == 0 and all(".language_model.layers." in name for name in content)
    assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
    model = load_file(tmp_path / "out" / "base" / "model.safetensors")
    own, untouched = leaves(run), leaves(base)
    np.testing.assert_array_equal(model["multi_modal_projector.linear_2.weight"].T, own["projector/2/kernel"])
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(model[name].T, untouched[f"{Q}/kernel"][0])
    assert "--max-lora-rank 4" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    with pytest.raises(ValueError, match="wanted --format peft"):
        exporting.export("hf", run, tmp_path / "no", split_projector=True)


def test_a_run_that_moved_can_be_read_where_it_lies_now(tmp_path, base):
    """Its scales lie in its own `random`, which its metadata names relative to itself."""
    whole = adapters.write_run(tmp_path / "run", base, Q)
    assert model_json.read(whole).base[0].path == "random" and model_json.read(whole).base[1].origin == str(base)
    before = leaves(whole)
    shutil.move(whole, tmp_path / "elsewhere")
    after = leaves(tmp_path / "elsewhere")
    assert set(before) == set(after) and all(before[n].tobytes() == after[n].tobytes() for n in before)


def test_what_else_moved_wants_another_form(tmp_path, base, run):
    ours = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(ours / "12")
    with reader.TensorWriter(ours / "12" / "params") as writer:
        for name, leaf in leaves(run).items():
            if name in reader.own_specs(run) or name == "llm/norm/scale":
                writer.write(name, leaf)
    with pytest.raises(ValueError, match="llm/norm/scale was trained too .*use --split-projector, whose base has"):
        exporting.export("peft", ours, tmp_path / "out")
    with pytest.raises(ValueError, match="no adapters in it, so there is nothing for --format peft"):
        exporting.export("peft", base, tmp_path / "out")


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora is True; wanted False"),
    ({"bias": "all"}, "bias is 'all'; wanted 'none'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"r": 0}, "r is 0; wanted a number above 0"),
    ({"r": 8}, r"down_proj.lora_A.weight has shape \(4, 96\) .*wanted \(8, 96\)"),
    ({"rank_pattern": {r"layers.0.*q_proj": 2}}, r"layers.0.self_attn.q_proj.lora_A.* wanted \(2, 48\)"),
])  # fmt: skip
def test_a_config_that_means_another_function_is_refused(tmp_path, base, change, message):
    with pytest.raises(UnusableCheckpoint, match=message):
        imported(tmp_path, base, adapters.tensors(NEW), **change)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name, replacement, message", [
    (f"{PREFIX}{NEW}0.self_attn.q_proj.lora_B.weight", None, "q_proj.lora_A.weight has no other half"),
    (f"{NEW}0.self_attn.q_proj.lora_A.weight", (4, 48), "is not known"),
    (f"{PREFIX}{NEW}3.self_attn.q_proj.lora_A.weight", (4, 48), r"layers.3.* is not known"),
    (f"{PREFIX}{OLD}0.self_attn.q_proj.lora_A.weight", (4, 48), "are the same"),
    (f"{PREFIX}lm_head.lora_A.weight", (4, 48), "no adapter can be there"),
    (f"{PREFIX}model.multi_modal_projector.linear_1.weight", (9, 32), r"has shape \(9, 32\) .*wanted \(48, 32\)"),
    (f"{PREFIX}{NEW}0.self_attn.q_proj.lora_magnitude_vector", (48,), "is not known"),
    (f"{PREFIX}{NEW}0.input_layernorm.weight", (48,), "llm/blocks/ln1/scale lacks layer 1"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, base, name, replacement, message):
    content = adapters.tensors(NEW)
    if replacement is None:
        content.pop(name)
    else:
        content[name] = np.zeros(replacement, np.float32)
    with pytest.raises(UnusableCheckpoint, match=message):
        imported(tmp_path, base, content)


def test_adapters_of_blocks_that_never_run_stay_behind(tmp_path, base):
    content = adapters.tensors(NEW)
    for letter, shape in (("A", (RANK, 32)), ("B", (32, RANK))):
        for block in (1, 2):  # the tower runs two of its three
            name = f"{PREFIX}model.vision_tower.encoder.layers.{block}.self_attn.q_proj.lora_{letter}.weight"
            content[name] = np.ones(shape, np.float32)
    ours = imported(tmp_path, base, content)
    assert leaves(ours)["vision/blocks/q/lora_a"].any(axis=(1, 2)).tolist() == [False, True]
    assert model_json.read(ours).source["left_out"] == 2


def test_the_base_is_the_users_to_name(tmp_path, base, run, capsys):
    folder = adapters.write_peft(tmp_path / "in", adapters.tensors(NEW))
    assert main(["import", str(folder), str(tmp_path / "out")]) == 64
    assert "holds an adapter: say --base CHECKPOINT" in capsys.readouterr().err
    assert main(["import", str(folder), str(tmp_path / "out"), "--base", str(run)]) == 64
    assert "has adapters of its own: `convert merge" in capsys.readouterr().err
    assert main(["import", str(base.parent / "hub"), str(tmp_path / "out"), "--base", str(base)]) == 64
    assert "holds no adapter_config.json; leave --base out" in capsys.readouterr().err
    save_file({"x": np.zeros(1)}, folder / "other.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    assert main(["import", str(folder), str(tmp_path / "out"), "--base", str(base)]) == 66
    assert "wanted adapter_model.safetensors or adapter_model.bin" in capsys.readouterr().err


def test_the_prompt_is_the_options_then_the_adapters_then_the_bases(tmp_path, base):
    ours = imported(tmp_path, base, adapters.tensors(NEW), PromptOptions("v1_mmtag", "squash", None))
    said = model_json.read(ours).prompt
    assert (said.template, said.image_mode) == ("v1_mmtag", "squash")
