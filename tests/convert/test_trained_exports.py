"""Tiny checkpoints made by transformers: imported, trained a little, exported and loaded back, by the commands."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert.__main__ import main as convert
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.train import metrics
from llava_jax.train.__main__ import main as train
from tests.convert import test_anyres_live as live
from tests.convert import tiny
from tests.convert.test_parts_live import SIZES, TEMPLATES, made_by_transformers
from tests.prompt.chat_models import MODELS

transformers = pytest.importorskip("transformers")

System = namedtuple("System", "decoder, tower, resample, vision_lr")
SYSTEMS = {
    "llama 3 with clip": System("llama3", "clip", 3, None),
    "mistral with clip": System("mistral", "clip", 3, None),
    "qwen2 with siglip": System("qwen2", "siglip", 3, 2e-3),
    "qwen3 with siglip2": System("qwen3", "siglip_headless", 2, None),
    "llama with siglip": System("llama", "siglip", 3, None),
}
TILED = {
    "LLaVA-1.6 with llama": "next_clip_llama", "LLaVA-1.6 with mistral": "next_clip_mistral",
    "OneVision with qwen2": "onevision_siglip_qwen2",
}  # fmt: skip
QUICK = ("qwen2 with siglip", "OneVision with qwen2")
CONFIG = """
from llava_jax.config import Source, default

def get_config():
    config = default()
    config.model.update(base={base!r}, dtype="float32", remat="none")
    config.prompt.update({prompt!r})
    config.data.update(sources=(Source({records!r}, {images!r}),), batch_samples=4, threads=2, **{rows!r})
    config.train.update(steps={steps!r}, lr=2e-3, vision_lr={vision_lr!r}, warmup_ratio=0.0)
    config.checkpoint.update(every=5, keep=1)
    config.log.update(every=4, tensorboard=False)
    config.rates = (
        ("vision/tail/.*", None), ("vision/.*", config.train.get_ref("vision_lr")),
        ("(projector|llm)/.*{newline}", config.train.get_ref("lr")),
    )
    config.init = ((".*", config.model.get_ref("base")),)
    return config
"""


def write_data(folder):
    """Eight noisy pictures and a question about each; the path of the records."""
    from PIL import Image

    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"A cat and {i} dogs."),
                 ("human", "Describe it."), ("gpt", "Red, near the sea.")]  # fmt: skip
        records.append({"id": f"r{i}", "image": f"{i}.png",
                        "conversations": [{"from": role, "value": text} for role, text in turns]})  # fmt: skip
    tiny.write_json(folder / "records.json", records)
    return folder / "records.json"


def write_source(folder, system):
    """A checkpoint of transformers with the tokenizer and the image processor of its kind."""
    made_by_transformers(folder, system.decoder, system.tower, loud=4)
    template = TEMPLATES[system.decoder]
    if template in MODELS:
        for old in folder.glob("tokenizer*"):
            old.unlink()
        words = MODELS[template].write(folder.parent / "words")
        for file in words.iterdir():
            shutil.copy(file, folder / file.name)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    tiny.write_json(folder / "preprocessor_config.json", content | {"resample": system.resample})
    return template


def flat(directory):
    return params.flatten(reader.load_params(directory, put=lambda name, leaf: leaf))


def trained(tmp_path, template, prompt, vision_lr, steps, tiled):
    """The names of the parts that a run of so many steps changed; it goes from `in` to `out` and lasts in `run`."""
    assert convert(["import", str(tmp_path / "in"), str(tmp_path / "base"), "--template", template]) == 0
    tiling = {**model_json.read(tmp_path / "base").prompt.tiling} if tiled else {}
    (tmp_path / "config.py").write_text(CONFIG.format(
        base=str(tmp_path / "base"), prompt={"template": template, **prompt, **tiling}, steps=steps,
        records=str(write_data(tmp_path)), images=str(tmp_path / "images"), vision_lr=vision_lr,
        rows={"row_tokens": 256, "images_per_group": 8} if tiled else {"row_tokens": 128},
        newline="|image_newline" if tiled else "",
    ))  # fmt: skip
    assert train(["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]) == 0
    losses = [row["loss"] for row in metrics.read(tmp_path / "run")]
    assert len(losses) == steps and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert convert(["export", "--format", "hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    before, after = flat(tmp_path / "base"), flat(tmp_path / "run")
    return {name.partition("/")[0] for name in before if not np.array_equal(before[name], after[name])}


def loaded(kind, folder):
    """transformers' model of an export, of which nothing is missing or left over."""
    theirs, report = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()


def parametrized(names):
    return pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                            for name in names])  # fmt: skip


@parametrized(SYSTEMS)
def test_a_checkpoint_of_transformers_is_imported_trained_exported_and_answers_there_as_here(tmp_path, name):
    from PIL import Image

    system = SYSTEMS[name]
    template = write_source(tmp_path / "in", system)
    moved = trained(tmp_path, template, {"image_mode": "pad"}, system.vision_lr, steps=10, tiled=False)
    assert moved == {"projector", "llm"} | ({"vision"} if system.vision_lr else set())
    theirs = loaded("Llava", tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assistant, rng = Assistant.open(tmp_path / "run"), np.random.default_rng(1)
    answers = set()
    wordless = list(range(assistant.format.tokenizer.size, SIZES["vocab_size"]))
    for i in range(4):
        picture, question = Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), np.uint8)), f"What is {i}?"
        ours = assistant.reply(Conversation((Turn("user", f"<image>\n{question}"),), (picture,)), max_new_tokens=6).ids
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")  # fmt: skip
        found = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=wordless)
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == list(ours), question
        answers.add(tuple(ours))
    assert len(answers) > 1  # the pictures are seen


@parametrized(TILED)
def test_a_checkpoint_with_tiles_is_imported_trained_exported_and_answers_there_as_here(tmp_path, name):
    kind, rng, answers = live.KINDS[TILED[name]], np.random.default_rng(1), set()
    live.made_by_transformers(tmp_path / "in", kind, loud=4)
    moved = trained(tmp_path, kind.template, {"image_mode": "anyres"}, 2e-3, steps=20, tiled=True)
    assert moved == {"projector", "llm", "vision", "image_newline"}
    theirs, processor = loaded(kind.name, tmp_path / "out"), live.processor_of(tmp_path / "out", kind)
    assistant = Assistant.open(tmp_path / "run")
    wordless = list(range(assistant.format.tokenizer.size, live.TEXT["vocab_size"]))
    for i in range(4):
        conversation, messages = live.asked([live.random_picture(rng) for _ in range(1 + i // 3)], f"What is {i}?")
        inputs = live.prepared(processor, messages)
        found = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=wordless)
        ours = assistant.replies([conversation], max_new_tokens=6)[0].ids
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == list(ours), i
        answers.add(ours)
    assert len(answers) > 1  # the pictures are seen
