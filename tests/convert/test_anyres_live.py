"""LLaVA-1.6 and OneVision, live against transformers: pictures of any size, and files there and back."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from llava_jax import params
from llava_jax.batch import Corners, lay_images
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, llava, table
from llava_jax.convert.files import TensorFiles
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.prompt.conversation import Conversation, Turn
from tests.convert import tiny
from tests.prompt.chat_models import MODELS
from tests.prompt.test_anyres import sizes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TILE = 28  # pixels: 4 x 4 features of 7 pixels each
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 1024}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": TILE, "patch_size": 7}  # fmt: skip
NEXT_GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
ALL_GRIDS = [[TILE * y, TILE * x] for y in range(1, 7) for x in range(1, 7)]
IMAGE = 1000  # the id that the models made here take for a feature


class Kind(NamedTuple):
    """A LLaVA of transformers: what its classes' names begin with, its parts, its tiles, our template."""

    name: str
    vision: object
    text: object
    changes: dict
    template: str
    pixels: dict


CLIP = functools.partial(transformers.CLIPVisionConfig, **VISION)
SIGLIP = functools.partial(transformers.SiglipVisionConfig, **VISION, vision_use_head=False)
NEXT = {"image_grid_pinpoints": NEXT_GRIDS}
CROPPED = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
WHOLE = {"size": {"height": TILE, "width": TILE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
KINDS = {
    "next_clip_llama": Kind("LlavaNext", CLIP, transformers.LlamaConfig, NEXT, "v1", CROPPED),
    "next_clip_mistral": Kind("LlavaNext", CLIP, functools.partial(transformers.MistralConfig, sliding_window=None),
                              NEXT, "mistral", CROPPED),
    "onevision_siglip_qwen2": Kind("LlavaOnevision", SIGLIP, transformers.Qwen2Config,
                                   {"image_grid_pinpoints": ALL_GRIDS, "vision_aspect_ratio": "anyres_max_9"}, "qwen",
                                   WHOLE),
}  # fmt: skip


def theirs_of(kind, suffix):
    return getattr(transformers, kind.name + suffix)


def made_by_transformers(folder, kind, dtype="float32", loud=1):
    """A LLaVA of these parts, saved with all that an import wants.

    loud: how much more the decoder's layers do to a token; random weights of 0.2 hardly change what they are given.
    """
    torch.manual_seed(0)
    model = theirs_of(kind, "ForConditionalGeneration")(theirs_of(kind, "Config")(
        vision_config=kind.vision(), text_config=kind.text(**TEXT), image_token_index=IMAGE, **kind.changes,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for parameter in model.model.language_model.layers.parameters():
            parameter *= loud
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    pixels = theirs_of(kind, "ImageProcessorPil")(image_grid_pinpoints=kind.changes["image_grid_pinpoints"], resample=3,
                                                  **kind.pixels)  # fmt: skip
    pixels.save_pretrained(folder)
    if kind.template in MODELS:
        MODELS[kind.template].write(folder / "words")
        for file in (folder / "words").iterdir():
            file.rename(folder / file.name)
        (folder / "words").rmdir()
    else:
        tiny.write_tokenizer(folder)
    return model


def processor_of(folder, kind):
    """transformers' processor of an export; OneVision's wants torchvision for videos, which stills do without."""
    if kind.name == "LlavaNext":
        return transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *_: None)
        content = json.loads((folder / "processor_config.json").read_text())
        assert content.pop("processor_class") == "LlavaOnevisionProcessor"
        return transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder),
            chat_template=(folder / "chat_template.jinja").read_text(), **content,
        )  # fmt: skip


def there_and_back(folder, kind, loud=1):
    """transformers' model; the folder gets its files `in`, their import `ours` and its export `out`."""
    transformers.logging.set_verbosity_error()
    model = made_by_transformers(folder / "in", kind, loud=loud)
    importing.import_checkpoint(folder / "in", folder / "ours")
    exporting.export("hf", folder / "ours", folder / "out")
    return model


def random_picture(rng):
    width, height = np.exp(rng.uniform(np.log(6), np.log(300), 2)).astype(int)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def asked(pictures, question):
    """(our conversation, their messages) of a question about pictures."""
    marks = "<image>\n" * len(pictures)
    turn, several = Turn("user", marks + question), len(pictures) > 1
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return Conversation((turn,), tuple(pictures), images_in_place=several), messages


def prepared(processor, messages):
    """What transformers' model is given; pictures are resized rows first, as by every Pillow before 13."""
    resize = Image.Image.resize

    def rows_first(image, size, resample=3, **_):
        stripe = image.height > 100 * image.width and size[1] < image.height
        return resize(resize(image, (image.width, size[1]) if stripe else (size[0], image.height), resample), size,
                      resample)  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", rows_first)
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                             return_tensors="pt")  # fmt: skip


def fields(example, row_tokens, images):
    """Arrays of a row of one example, for `Llava.__call__`."""
    tokens, slots = np.zeros((1, row_tokens), np.int32), np.full((1, row_tokens), -1, np.int32)
    corners = Corners(np.zeros((1, row_tokens, 4), np.int32), np.zeros((1, row_tokens, 4), np.float32))
    count = len(example.tokens)
    tokens[0, :count] = example.tokens
    lay_images(example, slots[0, :count], Corners(*(x[0, :count] for x in corners)), 0, images)
    pixels = np.zeros((1, images, TILE, TILE, 3), np.uint8)
    pixels[0, : len(example.images)] = example.images
    segments = (np.arange(row_tokens) < count).astype(np.int32)[None]
    return tokens, np.arange(row_tokens, dtype=np.int32)[None], segments, slots, pixels, corners


def distance(ours, theirs):
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("name", KINDS)
def test_ids_logits_and_every_gradient_are_those_of_transformers(tmp_path, name):
    kind, worst = KINDS[name], {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    theirs = there_and_back(tmp_path, kind)
    assistant, processor = Assistant.open(tmp_path / "ours"), processor_of(tmp_path / "out", kind)
    assert assistant.format.template.name == kind.template
    image_id = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    model, rng = Llava(assistant.model.config), np.random.default_rng(3)

    def loss(weights, tokens, fixed, targets):
        hidden = model.apply({"params": weights}, tokens, *fixed)
        logits = model.apply({"params": weights}, hidden, method="head")
        kept, chosen = targets >= 0, jnp.maximum(targets, 0)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], -1)[..., 0]
        return -jnp.sum(logp * kept) / jnp.sum(kept), logits

    graded, run = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(loss)
    weights = reader.load_params(tmp_path / "ours", put=lambda name, leaf: jnp.asarray(leaf))
    for number in range(10):
        pictures = [random_picture(rng) for _ in range(1 + number % 2)]
        conversation, messages = asked(pictures, f"What is in picture {number}?")
        example, inputs = assistant.encode(conversation, reply=True), prepared(processor, messages)
        ids, ours = inputs["input_ids"], example.tokens.copy()
        for span in example.image_spans:
            ours[span.start : span.start + span.length] = image_id
        assert ids[0].tolist() == ours.tolist(), number
        ids = torch.where(ids == image_id, IMAGE, ids)
        labels = torch.where(ids == IMAGE, -100, ids)
        out = theirs(**{**inputs, "input_ids": ids}, labels=labels)
        tokens, *fixed = fields(example, row_tokens=512, images=40)
        targets = np.pad(labels[:, 1:].numpy(), ((0, 0), (0, 513 - len(ours))), constant_values=-100)
        (value, logits), gradients = graded(weights, tokens, fixed, targets) if number < 2 else (
            run(weights, tokens, fixed, targets), None)  # fmt: skip
        found = {"logits": distance(logits[0, : len(ours)], out.logits[0].detach().numpy()),
                 "loss": abs(float(value) - out.loss.item())}  # fmt: skip
        if gradients is not None:
            theirs.zero_grad()
            out.loss.backward()
            found["gradients"] = worst_gradient(theirs, gradients, model.config)
        worst |= {key: max(worst[key], one) for key, one in found.items()}
    print(f"{kind.name}, {kind.template}: largest relative distance {worst}")
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_ids_of_pictures_of_500_sizes_are_those_of_transformers_processor(tmp_path, name):
    kind = KINDS[name]
    there_and_back(tmp_path, kind)
    assistant, processor = Assistant.open(tmp_path / "ours"), processor_of(tmp_path / "out", kind)
    image_id = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    for size in sizes(500):
        conversation, messages = asked([Image.new("RGB", size)], "What is it?")
        example = assistant.encode(conversation, reply=True)
        ours = example.tokens.copy()
        ((start, length),) = example.image_spans
        ours[start : start + length] = image_id
        assert prepared(processor, messages)["input_ids"][0].tolist() == ours.tolist(), size


def worst_gradient(theirs, gradients, config):
    leaves = {name: np.asarray(leaf) for name, leaf in params.flatten(gradients).items()}
    trained = {name: leaf for name, leaf in leaves.items() if not name.startswith("vision/tail/")}
    wanted = {name: tensor.grad for name, tensor in theirs.named_parameters() if tensor.grad is not None}
    found = 0.0
    for entry in table.entries(trained, llava.rows(llava.NEW5, config), llava.first_layers(config), "test"):
        for name, gradient in table.their_tensors(entry, leaves[entry.ours]):
            found = max(found, distance(gradient, wanted.pop(name).numpy()))
    assert not wanted and "image_newline" in trained
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("onevision") else pytest.mark.slow) for name in KINDS]
)
def test_an_export_answers_questions_about_pictures_with_our_ids(tmp_path, name):
    kind, rng, some = KINDS[name], np.random.default_rng(1), set()
    there_and_back(tmp_path, kind, loud=4)
    processor, assistant = processor_of(tmp_path / "out", kind), Assistant.open(tmp_path / "ours")
    classes = theirs_of(kind, "ForConditionalGeneration")
    theirs, report = classes.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wordless = list(range(assistant.format.tokenizer.size, TEXT["vocab_size"]))
    for number in range(6):
        pictures = [random_picture(rng) for _ in range(1 + number // 4)]
        conversation, messages = asked(pictures, "Describe it.")
        inputs = prepared(processor, messages)
        found = theirs.eval().generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=wordless)
        ours = assistant.replies([conversation], max_new_tokens=5)[0].ids
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == list(ours)
        some.add(ours)
    assert len(some) > 1  # the pictures are seen


def in_layout(tensors, layout):
    """Tensors that transformers 5 saved, under the names of another layout."""
    hub = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in tensors.items()}
    found = tiny.renamed(hub, layout)
    return {name.replace("image_newline", "model.image_newline") if layout == "original" else name: one
            for name, one in found.items()}  # fmt: skip


def leaves_of(folder):
    return params.flatten(reader.load_params(folder, put=lambda name, leaf: leaf))


def same(one, two):
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        assert leaf.dtype == two[name].dtype, name
        np.testing.assert_array_equal(leaf.view("u1"), two[name].view("u1"), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_what_was_imported_goes_out_and_in_again_bit_for_bit(tmp_path, name, dtype):
    made_by_transformers(tmp_path / "in", KINDS[name], dtype)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "one")
    wanted, leaves = model_json.read(tmp_path / "one"), leaves_of(tmp_path / "one")
    for format in ("hf", "llava"):
        exporting.export(format, tmp_path / "one", tmp_path / f"llava-{format}")
        importing.import_checkpoint(tmp_path / f"llava-{format}", tmp_path / f"from {format}")
        found = model_json.read(tmp_path / f"from {format}")
        assert (found.model, found.prompt) == (wanted.model, wanted.prompt)
        same(leaves_of(tmp_path / f"from {format}"), leaves)
    theirs, ours = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("in", "llava-hf"))
    for key in ("architectures", "model_type", "image_grid_pinpoints", "vision_aspect_ratio", "vision_feature_layer",
                "vision_feature_select_strategy"):  # fmt: skip
        assert theirs.get(key) == ours.get(key), key


@pytest.mark.parametrize("layout", ["hub", "new4", "new5"])
def test_every_layout_of_names_is_read_alike(tmp_path, layout):
    place = tmp_path / "in"
    made_by_transformers(place, KINDS["onevision_siglip_qwen2"])  # in the layout leg5
    importing.import_checkpoint(place, tmp_path / "one")
    tensors = in_layout(load_file(place / "model.safetensors"), layout)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    importing.import_checkpoint(place, tmp_path / "two")
    assert model_json.read(tmp_path / "two").source["layout"] == layout
    same(leaves_of(tmp_path / "one"), leaves_of(tmp_path / "two"))


CLIP_336 = transformers.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                         num_attention_heads=16, image_size=336, patch_size=14)  # fmt: skip
VICUNA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
          "rms_norm_eps": 1e-5}  # fmt: skip
QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
PUBLISHED = {  # preset -> the decoder's config.json, as far as it decides names and shapes; tower: OneVision's default
    "llava16_7b": ("LlavaNext", transformers.LlamaConfig, VICUNA),
    "llava16_13b": ("LlavaNext", transformers.LlamaConfig, VICUNA | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40}),
    "llava16_mistral_7b": ("LlavaNext", transformers.MistralConfig, VICUNA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "sliding_window": None}),
    "llava_onevision_05b": ("LlavaOnevision", transformers.Qwen2Config, QWEN2 | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llava_onevision_7b": ("LlavaOnevision", transformers.Qwen2Config, QWEN2 | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_names_and_shapes_of_transformers_model(name):
    kind, text, sizes = PUBLISHED[name]
    vision = {"vision_config": CLIP_336} if kind == "LlavaNext" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text(**sizes), **vision)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    ours = presets.get(name)
    found = table.entries(params.flatten(abstract_params(ours)), llava.rows(llava.NEW5, ours),
                          llava.first_layers(ours), "test")  # fmt: skip
    assert {one: entry.their_shape for entry in found for one in entry.theirs} == {
        one: tuple(tensor.shape) for one, tensor in theirs.named_parameters()
    }
    stored = TensorFiles("theirs", {})
    stored.specs = {} if ours.llm.tie_embeddings else {llava.NEW5.head: None}
    assert llava.read_hub_config(config.to_dict(), "theirs", llava.NEW5, stored) == ours


def test_what_transformers_saves_anew_of_an_export_is_read_alike(tmp_path):
    """transformers 5 nests the image processor in processor_config.json."""
    kind = KINDS["next_clip_mistral"]
    there_and_back(tmp_path, kind)
    model = theirs_of(kind, "ForConditionalGeneration").from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    processor_of(tmp_path / "out", kind).save_pretrained(tmp_path / "again")
    assert "image_processor" in json.loads((tmp_path / "again" / "processor_config.json").read_text())
    importing.import_checkpoint(tmp_path / "again", tmp_path / "two")
    one, two = (model_json.read(tmp_path / name) for name in ("ours", "two"))
    assert two.prompt.image_mode == "anyres" and two.prompt.tiling == one.prompt.tiling and two.model == one.model
    same(leaves_of(tmp_path / "two"), leaves_of(tmp_path / "ours"))
