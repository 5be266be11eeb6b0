"""OneVision with videos, live against transformers: ids, features, logits, gradients; the rule's way through files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing, tiling
from llava_jax.generate.assistant import Assistant
from llava_jax.models.llava import Llava
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn, Video
from tests.convert.test_anyres_live import (
    IMAGE,
    KINDS,
    TILE,
    distance,
    fields,
    made_by_transformers,
    prepared,
    processor_of,
    random_picture,
    worst_gradient,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VIDEO = IMAGE + 1
ONEVISION = KINDS["onevision_siglip_qwen2"]
KIND = ONEVISION._replace(changes=ONEVISION.changes | {"video_token_index": VIDEO})


class Frames:
    """In place of transformers' video processor, which wants torchvision: its numbers, on PIL's pixels."""

    def __call__(self, videos, **_):
        size = (TILE, TILE)
        squashed = [np.stack([np.asarray(frame.resize(size, 3)) for frame in video]) for video in videos]
        pixels = torch.tensor(np.stack(squashed)).permute(0, 1, 4, 2, 3).float()
        return transformers.BatchFeature({"pixel_values_videos": (pixels / 255 - 0.5) / 0.5})


def made(folder, loud):
    """The folder of transformers' files `in`, their import `ours` and its export `out`; their model; a processor."""
    transformers.logging.set_verbosity_error()
    theirs = made_by_transformers(folder / "in", KIND, loud=loud)
    importing.import_checkpoint(folder / "in", folder / "ours")
    exporting.export("hf", folder / "ours", folder / "out")
    processor = processor_of(folder / "out", KIND)
    processor.video_processor = Frames()
    return folder, theirs, processor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made(tmp_path_factory.mktemp("onevision"), loud=1)


def asked(kinds, question, rng):
    """(our conversation, their messages) of a question about videos and pictures, by the number of frames (0: one)."""
    shown, content = [], []
    for frames in kinds:
        pictures = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(frames)]
        one = Video(pictures) if frames else random_picture(rng)
        shown.append(one)
        content.append({"type": "video", "video": pictures} if frames else {"type": "image", "image": one})
    turn = Turn("user", "<image>\n" * len(shown) + question)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return Conversation((turn,), tuple(shown), images_in_place=len(shown) > 1), messages


def given(processor, messages):
    """What transformers' model is given; a message's videos are taken out of it, as its loader wants torchvision."""
    videos = [part["video"] for part in messages[0]["content"] if part["type"] == "video"]
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    bare = [{"role": "user", "content": [{key: part[key] for key in part if key != "video"}
                                         for part in messages[0]["content"]]}]  # fmt: skip
    if not videos:
        return prepared(processor, messages)
    text = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[pictures] if pictures else None, videos=videos, return_tensors="pt")


def ids_of(example, conversation, image_id, video_id):
    ids = example.tokens.copy()
    for span, shown in zip(example.image_spans, conversation.images):
        ids[span.start : span.start + span.length] = video_id if isinstance(shown, Video) else image_id
    return ids


def test_ids_logits_and_every_gradient_of_videos_are_those_of_transformers(model, rows_first):
    folder, theirs, processor = model
    assistant, rng = Assistant.open(folder / "ours"), np.random.default_rng(3)
    content = json.loads((folder / "out" / "config.json").read_text())
    image_id, video_id = content["image_token_index"], content["video_token_index"]
    ours = Llava(assistant.model.config)

    def loss(weights, tokens, fixed, targets):
        hidden = ours.apply({"params": weights}, tokens, *fixed)
        logits = ours.apply({"params": weights}, hidden, method="head")
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -jnp.sum(logp * (targets >= 0)) / jnp.sum(targets >= 0), logits

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    weights = reader.load_params(folder / "ours", put=lambda name, leaf: jnp.asarray(leaf))
    worst = {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    for kinds in ((5,), (1,), (3, 3), (0, 4), (4, 0, 0), (32,)):
        conversation, messages = asked(kinds, "Which came first?", rng)
        example, inputs = assistant.encode(conversation, reply=True), given(processor, messages)
        assert inputs["input_ids"][0].tolist() == ids_of(example, conversation, image_id, video_id).tolist(), kinds
        ids = torch.where(inputs["input_ids"] == image_id, IMAGE, inputs["input_ids"])
        ids = torch.where(inputs["input_ids"] == video_id, VIDEO, ids)
        labels = torch.where((ids == IMAGE) | (ids == VIDEO), -100, ids)
        out = theirs(**{**inputs, "input_ids": ids}, labels=labels)
        tokens, *fixed = fields(example, row_tokens=512, images=40)
        targets = np.pad(labels[:, 1:].numpy(), ((0, 0), (0, 513 - ids.shape[1])), constant_values=-100)
        (value, logits), gradients = graded(weights, tokens, fixed, targets)
        theirs.zero_grad()
        out.loss.backward()
        found = {"logits": distance(logits[0, : ids.shape[1]], out.logits[0].detach().numpy()),
                 "loss": abs(float(value) - out.loss.item()),
                 "gradients": worst_gradient(theirs, gradients, ours.config)}  # fmt: skip
        worst = {key: max(one, found[key]) for key, one in worst.items()}
    print(f"videos: largest relative distance {worst}")
    assert max(worst.values()) <= 1e-5, worst


def test_features_of_a_video_are_those_of_transformers(model, rows_first):
    folder, theirs, processor = model
    assistant, rng = Assistant.open(folder / "ours"), np.random.default_rng(5)
    conversation, messages = asked((6,), "What?", rng)
    example, inputs = assistant.encode(conversation, reply=True), given(processor, messages)
    with torch.no_grad():
        layer, strategy = theirs.config.vision_feature_layer, theirs.config.vision_feature_select_strategy
        wanted = theirs.model.get_video_features(
            inputs["pixel_values_videos"], vision_feature_layer=layer, vision_feature_select_strategy=strategy
        ).pooler_output[0]
    tokens, _, _, slots, pixels, corners = fields(example, row_tokens=128, images=6)
    apply = {"params": reader.load_params(folder / "ours", put=lambda name, leaf: jnp.asarray(leaf))}
    features = Llava(assistant.model.config).apply(apply, jnp.asarray(pixels), method="encode_images")
    laid = jax.tree.map(jnp.asarray, (tokens, slots, features, corners))
    row = Llava(assistant.model.config).apply(apply, *laid, method="embed")[0]
    span = example.image_spans[0]
    assert span.length == 6 * 4 + 1
    assert distance(np.asarray(row[span.start : span.start + span.length]), wanted.numpy()) <= 1e-5


def test_an_export_answers_questions_about_videos_with_our_ids(tmp_path, rows_first):
    folder, _, processor = made(tmp_path, loud=4)
    assistant, rng, some = Assistant.open(folder / "ours"), np.random.default_rng(1), set()
    theirs = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "out").eval()
    wordless = list(range(assistant.format.tokenizer.size, theirs.config.text_config.vocab_size))
    for kinds in ((4,), (4,), (0, 4)):
        conversation, messages = asked(kinds, "Where did it go?", rng)
        inputs = given(processor, messages)
        found = theirs.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=wordless)
        ours = assistant.replies([conversation], max_new_tokens=5)[0].ids
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == list(ours)
        some.add(ours)
    assert len(some) > 1  # the frames are seen


def test_the_rule_goes_out_and_comes_in_again(model, tmp_path):
    folder = model[0]
    assert model_json.read(folder / "ours").prompt.video == {"frames": 32, "fps": 0.0}
    for format in ("hf", "llava"):
        exporting.export(format, folder / "ours", tmp_path / f"llava-{format}")
        importing.import_checkpoint(tmp_path / f"llava-{format}", tmp_path / format)
        assert model_json.read(tmp_path / format).prompt == model_json.read(folder / "ours").prompt
    content = json.loads((tmp_path / "llava-llava" / "config.json").read_text())
    assert {key: content[key] for key in tiling.ORIGINAL_VIDEO} == tiling.ORIGINAL_VIDEO


@pytest.mark.parametrize(
    ("content", "several", "reads"),
    [
        ({}, False, True), ({"mm_newline_position": "one_token", "mm_spatial_pool_mode": "bilinear"}, False, True),
        ({"mm_newline_position": "grid"}, False, False), ({"mm_newline_position": "frame"}, False, False),
        ({"mm_spatial_pool_mode": "average"}, False, False), ({"mm_spatial_pool_stride": 4}, False, False),
        ({}, True, False),
    ],
)  # fmt: skip
def test_a_model_that_was_trained_on_other_videos_has_no_rule(content, several, reads):
    found = tiling.frame_rule(content, Tiling(((1, 1),), several=several))
    assert (found is not None) == reads and tiling.frame_rule(content, None) is None
