"""Live parity with transformers: checkpoints that it made come in, and what goes out loads in 5.x and in 4.57."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, processor
from llava_jax.models.llava import Llava
from llava_jax.models.presets import config_from_json, get
from llava_jax.models.vit import normalise
from llava_jax.prompt import encode, templates, tokenizer
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.images import to_pixels
from tests.convert import tiny

torch = pytest.importorskip("torch")
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SCRIPT = Path(__file__).with_name("load_export.py")
OTHER = "LLAVA_JAX_TRANSFORMERS4_PYTHON"
QUESTION = "What is this?"
REPLY = 8  # tokens
VISION = {key: value for key, value in tiny.VISION_CONFIG.items() if key != "model_type"}
TEXT = {key: value for key, value in tiny.TEXT_CONFIG.items() if key not in ("model_type", "rope_theta")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaVA made and saved by transformers, its import and its export, and a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT))
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "in")
    tiny.write_tokenizer(folder / "in")
    tiny.write_json(folder / "in" / "preprocessor_config.json", tiny.PREPROCESSOR)
    importing.import_checkpoint(folder / "in", folder / "ours")
    exporting.export("hf", folder / "ours", folder / "out")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)).save(folder / "picture.png")
    return folder, model, our_run(folder)


def run_script(python, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    out = folder / f"{Path(python).parent.parent.name}.npz"
    command = [str(python), str(SCRIPT), str(folder / "out"), str(folder / "picture.png"), QUESTION, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(out))


def our_run(folder):
    """(ids with one -200, pixels, logits, greedy ids) of the imported checkpoint, by our own code."""
    opened = model_json.read(folder / "ours")
    config = config_from_json(dict(opened.model))
    params = reader.load_params(folder / "ours", put=lambda name, leaf: jnp.asarray(leaf))
    words = tokenizer.load(folder / "ours" / "tokenizer")
    form = encode.Format(templates.get("v1"), words, config.vision.image_size, config.vision.features, "pad")
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "A small one."), Turn("user", "Which colour?"))
    example = encode.encode(Conversation(turns, (str(folder / "picture.png"),)), form, reply=True)
    count, total = len(example.tokens), len(example.tokens) + REPLY
    tokens, slots = np.zeros(total, np.int32), np.full(total, -1, np.int32)
    tokens[:count] = example.tokens
    slots[slice(*np.cumsum(example.image_spans[0]))] = np.arange(example.image_spans[0].length)
    fixed = [jnp.asarray(row, jnp.int32)[None] for row in (np.arange(total), np.ones(total), slots)]

    @jax.jit
    def forward(tokens):  # what comes after a token cannot change its logits
        model, pixels = Llava(config), jnp.asarray(example.images[0])[None, None]
        return model.apply({"params": params}, model.apply({"params": params}, tokens, *fixed, pixels), method="head")

    for end in range(count, total):
        logits = np.asarray(forward(jnp.asarray(tokens)[None]))[0]
        tokens[end] = logits[end - 1].argmax()
    replies = tokens[count:].tolist()
    replies = replies[: replies.index(words.eos_id) + 1] if words.eos_id in replies else replies
    logits = logits[:count]
    return encode.with_labels(example)[0].tolist(), example.images[0], logits, replies


def check_against_ours(made, seen, arrays):
    folder, _, (ids, pixels, logits, replies) = made
    assert (seen["missing"], seen["unexpected"], seen["mismatched"]) == ([], [], [])
    assert seen["padding_side"] == "left"
    collapsed = [number for i, number in enumerate(seen["ids"]) if number != 960 or seen["ids"][i - 1] != 960]
    assert [-200 if number == 960 else number for number in collapsed] == ids
    numbers = processor.read_settings(folder / "out").numbers
    mean, std = (np.asarray(numbers[name], np.float32) for name in ("mean", "std"))
    ours = ((pixels * np.float32(1 / 255)) - mean) / std
    np.testing.assert_allclose(arrays["pixels"][0].transpose(1, 2, 0), ours, atol=1e-6)
    theirs = arrays["logits"][0][:, : tiny.PIECES]
    assert np.abs(theirs - logits).max() <= 1e-5 * np.abs(theirs).max()
    assert seen["reply"][: len(replies)] == replies
    assert seen["text"] == tokenizer.load(folder / "ours" / "tokenizer").decode(replies)


def test_an_export_loads_in_this_transformers_with_our_ids_pixels_logits_and_words(made):
    folder, model, _ = made
    seen, arrays = run_script(sys.executable, folder)
    assert seen["version"].startswith("5.")
    check_against_ours(made, seen, arrays)
    saved = LlavaForConditionalGeneration.from_pretrained(folder / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name][: len(tensor)], tensor), name  # new rows of the vocabulary come last


def test_an_export_loads_in_transformers_4_the_same_way(made):
    python = os.environ.get(OTHER)
    if not python:
        pytest.skip(f"{OTHER} names no interpreter with transformers 4.57 (.ci/run makes one)")
    seen, arrays = run_script(python, made[0])
    assert seen["version"].startswith("4.")
    assert seen["classes"][2] == "LlavaImageProcessor"
    check_against_ours(made, seen, arrays)


def test_parts_made_by_transformers_are_assembled(tmp_path):
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).half().save_pretrained(tmp_path / "clip")
    LlamaForCausalLM(LlamaConfig(**TEXT)).bfloat16().save_pretrained(tmp_path / "llm", max_shard_size="100KB")
    tiny.write_tokenizer(tmp_path / "llm")
    torch.save(
        {f"model.mm_projector.{n}": t for n, t in projector().state_dict().items()}, tmp_path / "mm_projector.bin"
    )
    importing.assemble(tmp_path / "ours", tmp_path / "clip", tmp_path / "llm", tmp_path / "mm_projector.bin")
    specs = reader.tensor_specs(tmp_path / "ours")
    assert [str(specs[name].dtype) for name in ("vision/cls", "llm/norm/scale", "projector/2/bias")] == [
        "float16", "bfloat16", "float32"
    ]  # fmt: skip
    exporting.export("projector", tmp_path / "ours", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    for name, tensor in torch.load(tmp_path / "mm_projector.bin", weights_only=True).items():
        assert torch.equal(written[name], tensor)


def projector():
    return torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))


def test_the_side_tower_of_a_llava_export_loads_as_a_clip_model(made, tmp_path):
    folder, model, _ = made
    exporting.export("llava", folder / "ours", tmp_path / "llava-out")
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "llava-out" / "vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, model.model.vision_tower(pixels).last_hidden_state)


@pytest.mark.usefixtures("rows_first")
@pytest.mark.parametrize("mode", ["pad", "square", "squash"])
def test_the_written_image_processor_makes_our_pixels(tmp_path, mode):
    from PIL import Image
    from transformers import AutoImageProcessor

    config = get("tiny").vision
    tiny.write_json(tmp_path / "preprocessor_config.json", processor.preprocessor_json(config, mode))
    guest = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for size in ((61, 40), (20, 90), (28, 28), (300, 299)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        theirs = guest(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = normalise(jnp.asarray(to_pixels(picture, config.image_size, mode)), config)
        np.testing.assert_allclose(theirs, ours, atol=1e-6)
