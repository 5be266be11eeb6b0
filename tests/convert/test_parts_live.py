"""Each decoder on each tower, live against transformers: numbers, gradients, and files there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import card, store
from llava_jax.convert import exporting, importing, llava, table
from llava_jax.convert.files import open_tensors
from llava_jax.convert.importing import PromptOptions
from llava_jax.models import registry
from llava_jax.models.llava import Llava
from llava_jax.models.presets import config_from_json
from llava_jax.models.vit import normalise
from tests.convert import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
DECODERS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 128, "head_dim": 12}),
    "qwen2": (transformers.Qwen2Config, {"rms_norm_eps": 1e-6}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWERS = {
    "clip": (transformers.CLIPVisionConfig, {"image_size": 28, "patch_size": 14}, "default"),
    "siglip": (transformers.SiglipVisionConfig, {"image_size": 32, "patch_size": 14}, "full"),  # an edge is not seen
    "siglip_headless": (transformers.SiglipVisionConfig, {"image_size": 32, "patch_size": 16, "vision_use_head": False},
                        "full"),
}  # fmt: skip
IMAGE = 1000  # the id that transformers' model takes for a feature
PAIRS = [(decoder, list(TOWERS)[i % 3]) for i, decoder in enumerate(DECODERS)]
OTHERS = [(decoder, tower) for decoder in DECODERS for tower in TOWERS if (decoder, tower) not in PAIRS]


def made_by_transformers(folder, decoder, tower, dtype="float32"):
    """A LLaVA of these parts, saved with all that an import wants."""
    (text, own), (vision, sizes, strategy) = DECODERS[decoder], TOWERS[tower]
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision(**VISION, **sizes), text_config=text(**SIZES, **own), image_token_index=IMAGE,
        vision_feature_select_strategy=strategy, tie_word_embeddings=own.get("tie_word_embeddings", False),
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    side = sizes["image_size"]
    tiny.write_json(folder / "preprocessor_config.json", tiny.PREPROCESSOR | {
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3})  # fmt: skip
    return model


def read(directory):
    config = config_from_json(dict(card.read_card(directory).model))
    return config, store.load_params(directory, put=lambda name, leaf: jnp.asarray(leaf))


def close(ours, theirs, what):
    theirs = np.asarray(theirs)
    limit = 1e-5 * max(1.0, np.abs(theirs).max())
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= limit, (what, np.abs(ours - theirs).max())


@pytest.mark.parametrize(
    "decoder, tower", [*PAIRS, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS]]
)
def test_numbers_and_every_gradient_are_those_of_transformers_and_the_files_come_back(tmp_path, decoder, tower):
    theirs = made_by_transformers(tmp_path / "in", decoder, tower)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours", options=PromptOptions(template="v1"))
    config, weights = read(tmp_path / "ours")
    model, features = Llava(config), config.image_features
    rng = np.random.default_rng(0)
    side = config.vision.image_size
    pixels = rng.integers(0, 256, (1, 1, side, side, 3), np.uint8)
    tokens = rng.integers(3, tiny.PIECES, (1, features + 100))
    tokens[0, 5 : 5 + features] = IMAGE
    slots = np.where(tokens == IMAGE, np.cumsum(tokens == IMAGE, axis=1) - 1, -1).astype(np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    fixed = (jnp.asarray(positions), None, jnp.asarray(slots), jnp.asarray(pixels))

    normal = torch.tensor(np.asarray(normalise(jnp.asarray(pixels[0]), config.vision))).permute(0, 3, 1, 2)
    ids = torch.tensor(tokens)
    out = theirs(input_ids=ids, pixel_values=normal, labels=torch.where(ids == IMAGE, -100, ids))
    out.loss.backward()

    @jax.jit
    def forward(weights):
        hidden = model.apply({"params": weights}, jnp.asarray(tokens), *fixed)
        logits = model.apply({"params": weights}, hidden, method="head")
        logp = jax.nn.log_softmax(logits[:, :-1])
        target = jnp.asarray(tokens[:, 1:])
        kept = target != IMAGE
        return -jnp.sum(jnp.take_along_axis(logp, target[..., None], -1)[..., 0] * kept) / jnp.sum(kept), logits

    (loss, logits), gradients = jax.value_and_grad(forward, has_aux=True)(weights)
    close(np.asarray(logits), out.logits.detach(), "logits")
    assert abs(float(loss) - out.loss.item()) <= 1e-5
    states = theirs.model.vision_tower(normal, output_hidden_states=True).hidden_states
    ours = registry.tower_of(config.vision).module(config.vision).apply(
        {"params": weights["vision"]}, jnp.asarray(pixels[0]), method="hidden_states"
    )
    for one, other in zip(ours, states):
        close(np.asarray(one), other.detach(), "hidden state of the tower")

    leaves = {name: np.asarray(leaf) for name, leaf in params.flatten(gradients).items()}
    trained = {name: leaf for name, leaf in leaves.items() if not name.startswith("vision/tail/")}
    wanted = {name: tensor.grad for name, tensor in theirs.named_parameters() if tensor.grad is not None}
    layout = llava.NEW5 if "model.vision_tower.embeddings.patch_embedding.weight" in wanted else llava.NEW4
    for entry in table.entries(trained, llava.rows(layout, config), llava.first_layers(config), "test"):
        for name, gradient in table.their_tensors(entry, leaves[entry.ours]):
            close(gradient, wanted.pop(name), name)
    assert not wanted

    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    _, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("decoder, tower", PAIRS)
def test_what_was_imported_goes_out_and_in_again_bit_for_bit(tmp_path, decoder, tower, dtype):
    made_by_transformers(tmp_path / "in", decoder, tower, dtype)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "one", options=PromptOptions(template="v1"))
    formats = {"hf": tmp_path / "out", "llava": tmp_path / "llava"}
    for format, place in formats.items():
        exporting.export(format, tmp_path / "one", place)
        importing.import_checkpoint(place, tmp_path / f"from {format}")
        assert card.read_card(tmp_path / f"from {format}").model == card.read_card(tmp_path / "one").model
        one, two = (dict(store.load_params(path, put=lambda name, leaf: leaf))
                    for path in (tmp_path / "one", tmp_path / f"from {format}"))  # fmt: skip
        for name, leaf in params.flatten(one).items():
            np.testing.assert_array_equal(leaf.view("u1"), params.flatten(two)[name].view("u1"))
    theirs, ours = open_tensors(tmp_path / "in"), open_tensors(tmp_path / "out")
    assert theirs.path != ours.path and len(theirs.specs) == len(ours.specs)
