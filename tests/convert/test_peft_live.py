"""Live parity with peft, on transformers 5.x and 4.57: what goes out loads there, and what it saves comes in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_jax.checkpoint import model_json
from llava_jax.convert import exporting, importing, peft_import
from llava_jax.convert.importing import UNSAID, PromptOptions
from llava_jax.convert.source import open_source
from llava_jax.models.presets import config_from_json
from llava_jax.models.vit import normalise
from tests.convert import adapters, tiny

pytest.importorskip("torch")
pytest.importorskip("peft")

SCRIPT = Path(__file__).with_name("use_adapter.py")
OTHER = "LLAVA_JAX_TRANSFORMERS4_PYTHON"
TEXT = 7 * tiny.LAYERS  # linear layers of the decoder
TOWER = 6 * 2  # of the blocks that run
THEIRS = {
    "suffixes": {"target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["multi_modal_projector"]},
    "patterns": {"target_modules": r".*language_model.*\.(k_proj|up_proj)", "use_rslora": True,
                 "rank_pattern": {r"layers.1\..*k_proj": 2}, "alpha_pattern": {"up_proj": 3}},
}  # fmt: skip


@pytest.fixture(scope="module", params=["5", "4"])
def python(request):
    if request.param == "5":
        return sys.executable
    other = os.environ.get(OTHER)
    if not other or subprocess.run([other, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip(f"{OTHER} names no interpreter with transformers 4.57 and peft (.ci/run makes one)")
    return other


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `base`, a checkpoint of ours, `model`, the same for transformers, and two LoRA runs on it."""
    folder = tmp_path_factory.mktemp("peft")
    importing.import_checkpoint(tiny.write_hub(folder / "hub", tiny.hub_tensors()), folder / "base")
    exporting.export("hf", folder / "base", folder / "model")
    vision = config_from_json(dict(model_json.read(folder / "base").model)).vision
    pixels = np.asarray(normalise(jnp.asarray(adapters.PIXELS)[None], vision)).transpose(0, 3, 1, 2)
    np.savez(folder / "inputs.npz", ids=adapters.IDS, pixels=pixels)
    adapters.write_run(folder / "text", folder / "base", "llm/")
    adapters.write_run(folder / "all", folder / "base", projector=False)
    return folder


@pytest.fixture(scope="module")
def done(models, python, tmp_path_factory):
    """A folder in which peft has loaded what we exported, and saved adapters of its own; what it saw, by name."""
    folder = tmp_path_factory.mktemp("done")
    jobs = {name: job(models / "model", folder / name) for name in ("text", "all")}
    for name in jobs:
        exporting.export("peft", models / name, folder / name)
    exporting.export("peft", models / "all", folder / "split", split_projector=True)
    jobs["split"] = job(folder / "split" / "base", folder / "split" / "adapter")
    for name, config in THEIRS.items():
        jobs[name] = job(models / "model", folder / name, {"r": 4, "lora_alpha": 6, **config})
    return folder, run(python, models, jobs)


def job(model, adapter, config=None):
    return {"model": str(model), "adapter": str(adapter), "config": config}


def run(python, models, jobs):
    """{name: (what the script saw, the logits with the adapter and those without)}."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    command = [python, str(SCRIPT), str(models / "inputs.npz"), json.dumps(list(jobs.values()))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = [np.load(one["adapter"] + ".npz") for one in jobs.values()]
    logits = [(one["logits"][0][:, : tiny.PIECES], one["plain"][0][:, : tiny.PIECES]) for one in found]
    return dict(zip(jobs, zip(json.loads(ended.stdout.splitlines()[-1]), logits)))


@pytest.mark.parametrize("name, source, wrapped", [
    ("text", "text", TEXT), ("all", "all", TEXT + TOWER + 2), ("split", "all", TEXT),
])  # fmt: skip
def test_what_goes_out_is_loaded_whole_and_gives_our_logits(models, done, python, name, source, wrapped):
    seen, (theirs, plain) = done[1][name]
    assert seen["version"].startswith("5." if python == sys.executable else "4.")
    assert (seen["warnings"], seen["wrapped"]) == ([], wrapped)
    assert error(theirs, adapters.logits(models / source)) < 1e-5 < 0.1 < error(theirs, plain)


def test_what_peft_saves_comes_in_and_goes_out_again(models, done, python):
    folder, ran = done
    jobs = {name: job(models / "model", folder / f"{name}-again") for name in THEIRS}
    for name in THEIRS:
        theirs, plain = ran[name][1]
        peft_import.import_adapter(folder / name, folder / f"{name}-ours", models / "base", UNSAID)
        assert error(adapters.logits(folder / f"{name}-ours"), theirs) < 1e-5 < 0.05 < error(theirs, plain)
        exporting.export("peft", folder / f"{name}-ours", folder / f"{name}-again")
        made, again = (load_file(folder / n / "adapter_model.safetensors") for n in (name, f"{name}-again"))
        # transformers 5 leaves "vision_model." out; the tower's third block never runs: its adapters stay behind.
        made = {n.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"): x for n, x in made.items()}
        made = {n: tensor for n, tensor in made.items() if "vision_model.encoder.layers.2." not in n}
        assert set(made) == set(again)
        assert all(again[n].tobytes() == tensor.tobytes() for n, tensor in made.items())
    for name, (_, (again, _)) in run(python, models, jobs).items():
        assert error(again, ran[name][1][0]) < 1e-5


def error(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("decoder, tower", [
    ("qwen2", "siglip"), pytest.param("qwen3", "siglip_headless", marks=pytest.mark.slow),
    pytest.param("mistral", "siglip", marks=pytest.mark.slow),
])  # fmt: skip
def test_adapters_of_other_decoders_and_towers_go_out_and_come_in(tmp_path, decoder, tower):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaForConditionalGeneration

    from tests.convert.test_parts_live import made_by_transformers

    made_by_transformers(tmp_path / "in", decoder, tower)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "base", options=PromptOptions(template="v1"))
    adapters.write_run(tmp_path / "run", tmp_path / "base", projector=False)
    exporting.export("hf", tmp_path / "base", tmp_path / "model")
    exporting.export("peft", tmp_path / "run", tmp_path / "out")

    def load(name):
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / name).eval()

    plain = load("model")
    side, patch = plain.config.vision_config.image_size, plain.config.vision_config.patch_size
    features = [plain.config.image_token_id] * (side // patch) ** 2
    inputs = {"input_ids": torch.tensor([[1, 5, 9, *features, 17, 300]]), "pixel_values": torch.randn(1, 3, side, side)}

    @torch.no_grad()
    def check_same(adapted, checkpoint):
        exporting.export("hf", tmp_path / checkpoint, tmp_path / f"{checkpoint} merged")
        wanted = load(f"{checkpoint} merged")(**inputs).logits
        assert (adapted(**inputs).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (plain_logits - wanted).abs().max() > 0.1

    with torch.no_grad():
        plain_logits = plain(**inputs).logits
    check_same(PeftModel.from_pretrained(load("model"), tmp_path / "out").eval(), "run")
    peft_import.import_adapter(tmp_path / "out", tmp_path / "back", tmp_path / "base", UNSAID)
    one, two = (open_source(tmp_path / name) for name in ("run", "back"))
    for name in one.specs:
        np.testing.assert_array_equal(one.read(name), two.read(name))

    # Of all linear layers with such names, in the tower and in the decoder.
    targets = ["q_proj", "out_proj", "fc2", "up_proj"]
    theirs = get_peft_model(load("model"), LoraConfig(r=3, lora_alpha=6, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    peft_import.import_adapter(tmp_path / "theirs", tmp_path / "ours", tmp_path / "base", UNSAID)
    check_same(theirs, "ours")
