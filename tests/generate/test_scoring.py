"""What an assistant says of answers that are given, of token ids and of pictures, and its shorter ways to ask."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import llava_jax
from llava_jax import params, sharding
from llava_jax.data.packing import padded
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets
from llava_jax.models.llava import Llava
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import encode
from tests.generate import tiny

TALK = (Turn("user", "<image>\nWho?"), Turn("assistant", "A cat."), Turn("user", "Where?"),
        Turn("assistant", "On the mat."))  # fmt: skip
GIVEN = [
    Conversation(TALK, (tiny.picture(1),), "talk"),
    Conversation((Turn("user", "Hi."), Turn("assistant", "Hello to you, and to you.")), (), "text"),
    Conversation((TALK[0], dataclasses.replace(TALK[1], supervised=False), *TALK[2:]), (tiny.picture(2),), "partly"),
    Conversation(TALK[:2], (tiny.picture(3),), "short", weight=3.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny.assistant()


@pytest.fixture(scope="module")
def scored(assistant):
    return assistant.logps(GIVEN)


def test_logps_are_those_of_the_training_forward_at_the_supervised_tokens(assistant, scored):
    """float32, 1e-5: the same sums in another order."""
    examples = [encode(one, assistant.format) for one in GIVEN]
    batch, lost = padded(examples, 128, 1, assistant.format.image_size)
    forward = jax.jit(lambda fields: Llava(tiny.CONFIG).apply({"params": tiny.weights()}, *fields))
    hidden = forward((batch.tokens, batch.positions, batch.segments, batch.image_slots, batch.pixels))
    logits = assistant.model.apply({"params": tiny.weights()}, hidden, method="head")
    wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], -1)[..., 0]
    assert not lost
    for row, example, found in zip(wanted, examples, scored):
        assert found.dtype == np.float32 and found.shape == (example.learned.sum(),)
        np.testing.assert_allclose(found, row[: len(example.tokens) - 1][example.learned[1:]], atol=1e-5)
    assert len(scored[2]) < len(scored[0]) and (scored[2] != scored[0][-len(scored[2]) :]).all()


def test_each_conversation_is_scored_as_if_alone(assistant, scored):
    for one, found in zip(GIVEN, scored):
        np.testing.assert_array_equal(assistant.logps([one])[0], found)


def test_what_cannot_be_scored_is_refused_by_name(assistant):
    with pytest.raises(ValueError, match=r"'q0': no supervised token; want an assistant's turn"):
        assistant.logps([GIVEN[0], tiny.question()])
    endless = Conversation((Turn("user", "Hi."), Turn("assistant", "word " * 2000)), id="endless")
    with pytest.raises(ValueError, match=r"'endless': its \d+ tokens are more than the model's 1024 positions"):
        assistant.logps([endless])


def test_encode_is_what_the_model_reads(assistant):
    example = assistant.encode(GIVEN[0])
    assert example.image_spans[0].length == assistant.format.image_features and example.images[0].shape == (28, 28, 3)
    assert assistant.format.tokenizer.decode(example.tokens[example.learned].tolist()).split() == [
        "A", "cat.", "On", "the", "mat."]  # fmt: skip
    asked = assistant.encode(tiny.question(), reply=True)
    assert not asked.learned.any() and len(asked.tokens) == assistant.reply(tiny.question(), 8).prompt_tokens


def test_features_of_pictures_are_the_connectors_and_no_picture_sees_another(assistant, tmp_path):
    pictures = [tiny.picture(seed) for seed in range(5)]  # of four slots
    found = assistant.image_features(pictures)
    assert found.shape == (5, 4, 48) and found.dtype == np.float32
    shown = [Conversation((Turn("user", "<image>"),), (one,)) for one in pictures]
    pixels = jax.numpy.stack([assistant.encode(one, reply=True).images[0] for one in shown])
    wanted = assistant.model.apply({"params": tiny.weights()}, pixels[:, None], method="encode_images")
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(assistant.image_features(pictures[3:4])[0], found[3])
    pictures[0].save(tmp_path / "it.png")
    np.testing.assert_array_equal(assistant.image_features(["it.png"], image_root=tmp_path)[0], found[0])
    with pytest.raises(ValueError, match="want at least one picture"):
        assistant.image_features([])
    with pytest.raises(ValueError, match="image given as ndarray: want a path, a file's bytes or a PIL image"):
        assistant.image_features([np.zeros((28, 28, 3), np.uint8)])


def test_the_newline_row_behind_a_pictures_features_is_none_of_them():
    config = dataclasses.replace(presets.get("tiny"), image_newline=True)
    weights = params.unflatten(params.flatten(tiny.weights(config)))
    with_row = Assistant(Llava(config), weights, tiny.assistant().format)
    assert with_row.image_features([tiny.picture()]).shape == (1, 4, 48)


def test_a_question_and_its_pictures_are_asked_as_their_conversation(assistant):
    picture, other = tiny.picture(0), tiny.picture(1)
    assert assistant.generate("What is it?", [picture], 8) == assistant.reply(tiny.question(), 8)
    assert assistant.generate(tiny.question(), max_new_tokens=8) == assistant.reply(tiny.question(), 8)
    two = Conversation((Turn("user", "Is <image> like <image>?"),), (picture, other), images_in_place=True)
    assert assistant.generate("Is <image> like <image>?", [picture, other], 8) == assistant.reply(two, 8)
    with pytest.raises(ValueError, match=r"1 <image> for 2 picture\(s\): want one each, or none"):
        assistant.generate("Is <image> a cat?", [picture, other])
    with pytest.raises(ValueError, match="beside a Conversation"):
        assistant.generate(tiny.question(), [picture])


def test_a_stream_comes_in_pieces_that_add_up_and_refuses_before_the_first(assistant):
    pieces = assistant.stream("What is it?", [tiny.picture()], 20)
    begun = list(itertools.islice(pieces, 2))
    whole = assistant.reply(tiny.question(), 20)
    assert all(begun) and "".join([*begun, *pieces]) == whole.text
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        assistant.stream("What is it?", [tiny.picture()], 0)


def test_load_opens_a_checkpoint_on_a_mesh_that_is_given(assistant, scored, tmp_path):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
    model = llava_jax.load(tiny.save(tmp_path / "c"), mesh, slots=4, dtype="float32")
    assert model.mesh is mesh and model.slots == 4
    for found, wanted in zip(model.logps(GIVEN), scored):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(
        model.image_features([tiny.picture()]), assistant.image_features([tiny.picture()]), atol=1e-5
    )  # fmt: skip
