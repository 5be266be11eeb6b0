"""Each decoder on each tower, live against transformers: numbers, gradients, and files there and back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, llava, table
from llava_jax.convert.files import open_tensors
from llava_jax.convert.importing import PromptOptions
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets, registry
from llava_jax.models.clip import ClipTower
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import config_from_json
from llava_jax.models.vit import normalise
from llava_jax.prompt.conversation import Conversation, Turn
from tests.convert import tiny
from tests.prompt.chat_models import MODELS

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
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS]


TEMPLATES = {"llama": "v1", "llama3": "llama_3", "mistral": "mistral", "qwen2": "qwen", "qwen3": "qwen_3"}


def made_by_transformers(folder, decoder, tower, dtype="float32", loud=1):
    """A LLaVA of these parts, saved with all that an import wants.

    loud: how much more its layers do to a token; random weights of 0.2 hardly change what they are given.
    """
    (text, own), (vision, sizes, strategy) = DECODERS[decoder], TOWERS[tower]
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision(**VISION, **sizes), text_config=text(**SIZES, **own), image_token_index=IMAGE,
        vision_feature_select_strategy=strategy, tie_word_embeddings=own.get("tie_word_embeddings", False),
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for parameter in model.model.language_model.layers.parameters():
            parameter *= loud
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    side = sizes["image_size"]
    tiny.write_json(folder / "preprocessor_config.json", tiny.PREPROCESSOR | {
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3})  # fmt: skip
    return model


def read(directory):
    config = config_from_json(dict(model_json.read(directory).model))
    return config, reader.load_params(directory, put=lambda name, leaf: jnp.asarray(leaf))


def close(ours, theirs, what):
    theirs = np.asarray(theirs)
    limit = 1e-5 * max(1.0, np.abs(theirs).max())
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= limit, (what, np.abs(ours - theirs).max())


@pytest.mark.parametrize("decoder, tower", [*PAIRS, *SLOW])
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
@pytest.mark.parametrize("decoder, tower", [*PAIRS, *SLOW])
def test_what_was_imported_goes_out_and_in_again_bit_for_bit(tmp_path, decoder, tower, dtype):
    model = made_by_transformers(tmp_path / "in", decoder, tower, dtype)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "one", options=PromptOptions(template="v1"))
    formats = {"hf": tmp_path / "out", "llava": tmp_path / f"llava-{decoder}"}
    for format, place in formats.items():
        exporting.export(format, tmp_path / "one", place)
        importing.import_checkpoint(place, tmp_path / f"from {format}")
        assert model_json.read(tmp_path / f"from {format}").model == model_json.read(tmp_path / "one").model
        one, two = (dict(reader.load_params(path, put=lambda name, leaf: leaf))
                    for path in (tmp_path / "one", tmp_path / f"from {format}"))  # fmt: skip
        for name, leaf in params.flatten(one).items():
            np.testing.assert_array_equal(leaf.view("u1"), params.flatten(two)[name].view("u1"))
    theirs, ours = open_tensors(tmp_path / "in"), open_tensors(tmp_path / "out")
    assert theirs.path != ours.path and len(theirs.specs) == len(ours.specs)
    loaded, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {str(tensor.dtype) for tensor in loaded.parameters()} == {f"torch.{dtype}"}
    for (name, tensor), (other, made) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(tensor[: len(made)], made)  # new rows of the vocabulary come last


@pytest.mark.parametrize(
    "decoder, tower",
    [PAIRS[3], *[pytest.param(*pair, marks=pytest.mark.slow) for pair in [*PAIRS, *OTHERS] if pair != PAIRS[3]]],
)
def test_an_export_answers_twenty_questions_about_pictures_with_our_ids(tmp_path, decoder, tower):
    from PIL import Image

    made_by_transformers(tmp_path / "in", decoder, tower, loud=4)
    template = TEMPLATES[decoder]
    if template in MODELS:  # the tokenizer that the template is of
        MODELS[template].write(tmp_path / "words")
        for old in [*(tmp_path / "in").glob("tokenizer*"), *(tmp_path / "words").iterdir()]:
            old.unlink() if old.parent.name == "in" else shutil.copy(old, tmp_path / "in" / old.name)
    options = PromptOptions(template=template) if decoder == "llama3" else importing.UNSAID  # others: by the decoder
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours", options=options)
    exporting.export("hf", tmp_path / "ours", tmp_path / "out")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assistant, rng = Assistant.open(tmp_path / "ours"), np.random.default_rng(1)
    assert assistant.format.template.name == template
    pictures = [Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), np.uint8)) for i in range(20)]
    questions = [f"What is in picture {i}? Describe it." for i in range(20)]
    turns = [Conversation((Turn("user", f"<image>\n{question}"),), (picture,))
             for question, picture in zip(questions, pictures)]  # fmt: skip
    replies, some = assistant.replies(turns, max_new_tokens=6), set()
    wordless = list(range(assistant.format.tokenizer.size, SIZES["vocab_size"]))  # random weights may prefer these
    for question, picture, reply in zip(questions, pictures, replies):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")  # fmt: skip
        found = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=wordless)
        found = found[0, inputs["input_ids"].shape[1] :].tolist()
        ours = list(reply.ids)
        assert found[: len(ours)] == ours, (question, found, ours)
        some.add(tuple(ours))
    assert len(some) > 1  # the pictures are seen


def test_positions_of_another_size_are_those_that_transformers_interpolates(tmp_path):
    sizes = {**VISION, "image_size": 28, "patch_size": 14}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).eval()
    tower.save_pretrained(tmp_path / "clip")
    tiny.write_json(tmp_path / "clip" / "preprocessor_config.json", tiny.PREPROCESSOR)
    importing.assemble(tmp_path / "ours", tmp_path / "clip", tiny.write_llama(tmp_path / "llm"), image_size=56)
    config, weights = read(tmp_path / "ours")
    assert config.image_features == 16
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3), np.uint8))
    normal = torch.tensor(np.asarray(normalise(pixels, config.vision))).permute(0, 3, 1, 2)
    wanted = tower(normal, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
    found = ClipTower(config.vision).apply({"params": weights["vision"]}, pixels)
    close(np.asarray(found), wanted[:, 1:].detach(), "interpolated")


PUBLISHED = {  # preset -> config.json of its decoder, as far as it decides names and shapes
    "llava_llama3_8b_siglip": (transformers.LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}),
    "llava_qwen25_7b_siglip": (transformers.Qwen2Config, {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6}),
    "llava_qwen3_8b_siglip": (transformers.Qwen3Config, {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6}),
}  # fmt: skip
SO400M = {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_names_and_shapes_of_transformers_model(name):
    text, sizes = PUBLISHED[name]
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            vision_config=transformers.SiglipVisionConfig(**SO400M), text_config=text(**sizes),
            vision_feature_select_strategy="full",
        ))  # fmt: skip
    config = presets.get(name)
    leaves = params.flatten(abstract_params(config))
    found = table.entries(leaves, llava.rows(llava.NEW5, config), llava.first_layers(config), "test")
    ours = {theirs: entry.their_shape for entry in found for theirs in entry.theirs}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    written = registry.decoder_of(config.llm).config_json(config.llm, config.llm.vocab, "bfloat16")
    assert registry.decoder_of(config.llm).read_config(written, "written") == config.llm
    assert registry.decoder_of(config.llm).read_config(text(**sizes).to_dict(), "theirs") == config.llm
