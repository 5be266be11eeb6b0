"""A BLIP-2 that transformers saved, through our checkpoint and back: equal logits, and it loads what we write."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing
from llava_jax.models.llava import Llava
from llava_jax.models.presets import config_from_json
from llava_jax.prompt import images
from tests.convert import tiny
from tests.golden import make_models as golden
from tests.models import blip2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = replace(blip2.CONFIG, llm=replace(blip2.CONFIG.llm, vocab=1024))  # room for <image> and <pad>


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers' model, the folder with `in`, `ours` and `out`)"""
    folder = tmp_path_factory.mktemp("live")
    model = blip2.hf_model(CONFIG, seed=4)
    model.float().save_pretrained(folder / "in")
    tiny.write_tokenizer(folder / "in")
    importing.import_checkpoint(folder / "in", folder / "ours")
    exporting.export("hf", folder / "ours", folder / "out")
    return model.double(), folder


def test_the_imported_model_has_the_logits_of_transformers(made):
    model, folder = made
    config = config_from_json(dict(model_json.read(folder / "ours").model))
    assert config == CONFIG
    batch = golden.inputs(CONFIG, seed=3)
    wanted = blip2.expected(model, batch, CONFIG)["logits"]
    tree = reader.load_params(folder / "ours", put=lambda name, leaf: jnp.asarray(leaf))
    fields = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments", "image_slots", "pixels")]

    @jax.jit
    def logits(tree, *fields):
        hidden = Llava(config).apply({"params": tree}, *fields)
        return Llava(config).apply({"params": tree}, hidden, method="head")

    assert np.abs(np.asarray(logits(tree, *fields)) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert params.count(tree) == sum(leaf.numel() for leaf in model.parameters()) - 3 * 44  # no bias of keys


def test_transformers_loads_the_export_whole_and_equal(made):
    model, folder = made
    kind = transformers.Blip2ForConditionalGeneration
    loaded, info = kind.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    for name, tensor in model.float().state_dict().items():
        assert torch.equal(state[name], tensor), name
    made[0].double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.convert_tokens_to_ids("<image>") == loaded.config.image_token_index == 960


def test_blips_image_processor_makes_our_pixels_of_the_export(made):
    module = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8))
    processor = module.BlipImageProcessorPil.from_pretrained(made[1] / "out")
    theirs = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = images.to_pixels(picture, 28, "squash")
    wanted = (ours.astype(np.float32) / 255 - CONFIG.vision.mean) / CONFIG.vision.std
    np.testing.assert_allclose(theirs, wanted, atol=1e-5)
