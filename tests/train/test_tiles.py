"""Pictures of any resolution train: packed as padded, resumed, and answered as they were trained."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import ResizedBatch
from llava_jax.checkpoint import model_json, reader
from llava_jax.data.packing import packed
from llava_jax.errors import DataError, UsageError
from llava_jax.generate import engine
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode
from llava_jax.train import step
from llava_jax.train.trainer import Trainer
from tests.train import tiny

MODEL = replace(presets.get("tiny"), image_newline=True)
WORDS = tokenizer.load(tiny.TOKENIZER, legacy=True)
SIZES = [(60, 20), (20, 90), (28, 28), (200, 150), (300, 310), (28, 100)]


def conversations(folder=None):
    rng = np.random.default_rng(3)
    for i, size in enumerate(SIZES):
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        if folder is not None:
            picture.save(folder / f"{i}.png")
        turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", f"A thing of {sum(size)}."))
        yield Conversation(turns, (picture,), str(i))


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), abstract_params(MODEL))


@pytest.mark.parametrize("max_tiles", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_tiles_in_packed_rows_give_the_loss_and_the_gradients_of_rows_of_their_own(parameters, max_tiles):
    """Six pictures of 2 to 5 tiles, of which two are resized where more than two tiles are; 1e-6 of each gradient."""
    tiling = Tiling(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), max_tiles=max_tiles)
    format = Format(templates.get("v1"), WORDS, 28, MODEL.image_features, "anyres", tiling=tiling)
    one, model = [encode(talk, format) for talk in conversations()], Llava(MODEL)
    assert (max(len(example.layouts[0].slots) for example in one) < 20) == bool(max_tiles)

    def batch(rows, tokens, images):
        return jax.tree.map(jnp.asarray, packed([rows[:1], rows[1:]], tokens, images, 28, format.resizes)[0])

    together = batch([one[:3], one[3:]], 300, 14)
    apart = [batch([[example], []], 96, 5) for example in one]
    assert isinstance(together, ResizedBatch) == bool(max_tiles)
    supervised = together.weights.sum()
    assert supervised == sum(each.weights.sum() for each in apart) > 20

    @jax.jit
    @jax.value_and_grad
    def loss_of(leaves, batch):
        return step.weighted_loss(model, leaves, batch, batch.weights / supervised)

    loss, gradients = loss_of(parameters, together)
    parts = [loss_of(parameters, each) for each in apart]
    assert abs(loss - sum(part[0] for part in parts)) <= 1e-6 * abs(loss)
    summed = jax.tree.map(lambda *each: sum(each), *(part[1] for part in parts))
    assert float(jnp.abs(params.flatten(gradients)["image_newline"]).max()) > 0
    for name, ours in params.flatten(gradients).items():
        apart_ = params.flatten(summed)[name]
        assert float(jnp.abs(ours - apart_).max()) <= 1e-6 * max(1, float(jnp.abs(apart_).max())), name


def write_run(folder):
    """The config of a run whose base has a newline."""
    tiny.write_run(folder)
    rng = np.random.default_rng(0)
    with reader.TensorWriter(folder / "tiled" / "0" / reader.PARAMS) as writer:
        for name, x in params.flatten(abstract_params(MODEL)).items():
            writer.write(name, rng.normal(name.endswith("scale"), 0.1, x.shape).astype(np.float32))
    metadata = model_json.Metadata(presets.config_to_json(MODEL), model_json.PromptMetadata("v1", True, "pad", False))
    model_json.write(folder / "tiled", metadata, WORDS.files())
    records = [
        {"id": talk.id, "image": f"{talk.id}.png",
         "messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns]}
        for talk in conversations(folder / "images")
    ]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(records))
    text = (folder / "config.py").read_text().replace(str(folder / "base"), str(folder / "tiled"))
    text = text.replace('image_mode="square"', 'image_mode="anyres", grids="1x2 2x1 2x2 3x1 1x3", max_tiles=2')
    text = text.replace('(("projector/.*"', '(("projector/.*|image_newline"')
    text = text.replace("batch_samples=4, row_tokens=96", 'layout="packed", rows_per_chip=2, rows_per_group=2, '
                        "images_per_group=12, row_tokens=160")  # fmt: skip
    (folder / "config.py").write_text(text)
    return folder / "config.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("tiles"))


def test_a_run_trains_the_newline_and_answers_as_it_was_trained(run, tmp_path):
    whole = tmp_path / "whole"
    trainer = Trainer(configs.load(run, {"train.steps": 3}), workdir=whole)
    trainer.fit()
    newline, loss = reader.read_tensor(whole, None, "image_newline"), trainer.evaluate()
    assert np.abs(newline - reader.read_tensor(run.parent / "tiled", None, "image_newline")).max() > 1e-3
    assert model_json.read(whole).prompt.tiling == {
        "grids": "1x2 2x1 2x2 3x1 1x3", "merge": "spatial_unpad", "max_tiles": 2, "several": "anyres"
    }
    assistant = Assistant.open(whole, slots=3)
    logps = assistant.logps(list(conversations()))
    assert abs(-np.concatenate(logps).mean() - loss) < 2e-5
    asked = [replace(talk, turns=talk.turns[:1]) for talk in conversations()]
    together = assistant.replies(asked, max_new_tokens=4)
    assert [reply.ids for reply in together] == [assistant.reply(one, max_new_tokens=4).ids for one in asked]
    relative = [replace(talk, images=(f"{talk.id}.png",)) for talk in asked]
    found = assistant.replies(relative, max_new_tokens=4, image_root=run.parent / "images")
    assert [reply.ids for reply in found] == [reply.ids for reply in together]
    named = [replace(talk, images=(f"{talk.id}.png",)) for talk in conversations()]
    np.testing.assert_array_equal(np.concatenate(assistant.logps(named, run.parent / "images")), np.concatenate(logps))


def test_features_of_a_picture_are_those_that_its_prompt_shows(run):
    """Of each picture alone, and of all together; lines with newlines, and those of more than two tiles resized."""
    tiling = Tiling(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), max_tiles=2)
    assistant = Assistant.open(run.parent / "tiled", slots=3)
    assistant = replace(assistant, format=replace(assistant.format, image_mode="anyres", tiling=tiling))

    @jax.jit
    def embedded(batch):
        def embed(model, batch):
            return model.embed(batch.tokens, batch.image_slots, model.encode_images(batch.pixels), batch.corners)

        return Llava(MODEL).apply({"params": assistant.params}, batch, method=embed)

    places = [f"{i}.png" for i in range(len(SIZES))]
    together = assistant.image_features(places, run.parent / "images")
    for place, talk, found in zip(places, conversations(), together, strict=True):
        example = assistant.encode(talk)
        ((start, length),) = example.image_spans
        wanted = embedded(packed([[[example]]], 128, 5, 28, resizes=True)[0])[0, start : start + length]
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        np.testing.assert_array_equal(found, assistant.image_features([place], run.parent / "images")[0])


def test_prefill_compiles_nothing_for_the_sizes_of_200_pictures_beyond_its_buckets(run):
    """Prompts of 64 or 96 positions with 2, 4 or 8 tiles serve all of them."""
    tiling = Tiling(tuple((x, y) for x in range(1, 4) for y in range(1, 3)), max_tiles=4)
    assistant = Assistant.open(run.parent / "tiled", slots=8)
    assistant = replace(assistant, format=replace(assistant.format, image_mode="anyres", tiling=tiling))

    def ask(sizes):
        talks = [Conversation((Turn("user", "<image>\nWhat is it?"),), (Image.new("RGB", size),)) for size in sizes]
        assistant.replies(talks, max_new_tokens=1)
        return {assistant._shape(talk, 1, None) for talk in talks}

    before = engine._start._cache_size()
    buckets = ask([(width, height) for width in (9, 28, 50, 80, 300) for height in (9, 28, 50, 80, 300)])
    assert engine._start._cache_size() - before == len(buckets) <= 8
    sides = np.exp(np.random.default_rng(0).uniform(np.log(6), np.log(900), (200, 2))).astype(int)
    found = ask([(int(width), int(height)) for width, height in sides])
    assert engine._start._cache_size() - before == len(buckets) and found <= buckets
    assert {shape.prompt_tokens for shape in found} <= {64, 96} and {shape.images for shape in found} <= {2, 4, 8}


def test_a_model_without_a_newline_and_a_pool_too_small_are_refused(run, tmp_path):
    config = configs.load(run, {"model.base": str(run.parent / "base")})
    with pytest.raises(UsageError, match="each line ends with image_newline, which this model has not"):
        Trainer(config, workdir=tmp_path / "a").fit()
    with pytest.raises(DataError, match="5 images for images_per_group=4: set data.images_per_group=5"):
        Trainer(configs.load(run, {"data.images_per_group": 4}), workdir=tmp_path / "b").fit()
