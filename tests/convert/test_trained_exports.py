"""Tiny checkpoints made by transformers: imported, trained for ten steps, exported and loaded back, by the commands."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import reader
from llava_jax.convert.__main__ import main as convert
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.train import metrics
from llava_jax.train.__main__ import main as train
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
QUICK = "qwen2 with siglip"
CONFIG = """
from llava_jax.config import Source, default

def get_config():
    config = default()
    config.model.update(base={base!r}, dtype="float32", remat="none")
    config.prompt.update(template={template!r}, image_mode="pad")
    config.data.update(sources=(Source({records!r}, {images!r}),), batch_samples=4, row_tokens=128, threads=2)
    config.train.update(steps=10, lr=2e-3, vision_lr={vision_lr!r}, warmup_ratio=0.0)
    config.checkpoint.update(every=5, keep=1)
    config.log.update(every=4, tensorboard=False)
    config.rates = (
        ("vision/tail/.*", None), ("vision/.*", config.train.get_ref("vision_lr")),
        ("(projector|llm)/.*", config.train.get_ref("lr")),
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


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SYSTEMS if n != QUICK)])
def test_a_checkpoint_of_transformers_is_imported_trained_exported_and_answers_there_as_here(tmp_path, name):
    from PIL import Image

    system = SYSTEMS[name]
    template = write_source(tmp_path / "in", system)
    assert convert(["import", str(tmp_path / "in"), str(tmp_path / "base"), "--template", template]) == 0
    records = write_data(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(
        base=str(tmp_path / "base"), template=template, records=str(records), images=str(tmp_path / "images"),
        vision_lr=system.vision_lr,
    ))  # fmt: skip
    assert train(["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]) == 0
    losses = [row["loss"] for row in metrics.read(tmp_path / "run")]
    assert len(losses) == 10 and np.mean(losses[-3:]) < np.mean(losses[:3])
    before, after = flat(tmp_path / "base"), flat(tmp_path / "run")
    moved = {name.partition("/")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"projector", "llm"} | ({"vision"} if system.vision_lr else set())

    assert convert(["export", "--format", "hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
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
        found = theirs.eval().generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=wordless)
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == list(ours), question
        answers.add(tuple(ours))
    assert len(answers) > 1  # the pictures are seen
