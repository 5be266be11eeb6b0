"""The assistant: from disk as from memory, alone as in a batch, in pieces as whole, and clear about what is wrong."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llava_jax.errors import UnusableCheckpoint
from llava_jax.generate.assistant import Assistant
from llava_jax.models.llava import Llava
from llava_jax.prompt import templates
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import encode
from tests.generate import tiny
from tests.generate.tiny import question

NEW = 20


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny.assistant()


def with_stops(assistant: Assistant, *stops: str) -> Assistant:
    template = replace(assistant.format.template, stops=stops)
    return replace(assistant, format=replace(assistant.format, template=template))


def test_a_checkpoint_answers_as_its_parameters_in_memory(assistant, tmp_path):
    opened = Assistant.open(tiny.save(tmp_path / "c"), slots=4, dtype="float32")
    assert opened.reply(question(), NEW) == assistant.reply(question(), NEW)
    assert "tail" not in opened.params["vision"]


def test_each_of_many_is_answered_as_if_alone(assistant):
    talk = (Turn("user", "<image>\nWho?"), Turn("assistant", "A cat."), Turn("user", "Where?"))
    many = [question(seed=seed) for seed in range(6)]
    many[1] = Conversation((Turn("user", "No picture at all."),))
    many[3] = Conversation(talk, (tiny.picture(9),))
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 4}, {"repetition_penalty": 1.5}):
        replies = assistant.replies(many, NEW, **settings)
        assert replies == [assistant.reply(one, NEW, **settings) for one in many]
        assert len({reply.text for reply in replies}) == len(many)


def test_no_conversations_give_no_replies(assistant):
    assert assistant.replies([]) == []


def test_seeds_differ_and_repeat(assistant):
    texts = [assistant.reply(question(), NEW, temperature=1.0, seed=seed).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_pieces_come_while_it_speaks_and_add_up_to_the_text(assistant):
    pieces = []
    reply = assistant.reply(question(), NEW, on_piece=pieces.append)
    assert reply == assistant.reply(question(), NEW)
    assert "".join(pieces) == reply.text
    assert len(pieces) >= 3
    assert all(pieces)


def test_a_reply_says_how_it_ended_and_what_the_prompt_took(assistant):
    reply = assistant.reply(question(), NEW)
    assert reply.ended_by == "length"
    assert len(reply.ids) == NEW
    assert reply.prompt_tokens == len(encode(question(), assistant.format, reply=True).tokens)


def test_a_stop_string_inside_the_answer_ends_it_there(assistant):
    whole = assistant.reply(question(), NEW)
    stop = whole.text[6:9]
    stopped = with_stops(assistant, stop).reply(question(), NEW)
    assert stopped.text == whole.text[: whole.text.index(stop)].rstrip()
    assert stopped.ended_by == "stop"
    assert stopped.ids == whole.ids[: len(stopped.ids)]
    assert len(stopped.ids) < NEW
    pieces = []
    with_stops(assistant, stop).reply(question(), NEW, on_piece=pieces.append)
    assert "".join(pieces) == stopped.text


def test_a_stop_string_ends_one_row_and_leaves_the_others_alone(assistant):
    two = [question(), question(seed=1)]
    whole = assistant.replies(two, NEW)
    stop = whole[0].text[6:9]
    assert stop not in whole[1].text
    stopped = with_stops(assistant, stop).replies(two, NEW)
    assert stopped[0].text == whole[0].text[: whole[0].text.index(stop)].rstrip()
    assert stopped[1] == whole[1]


def test_a_stop_that_is_one_special_token_ends_the_answer_on_the_device(assistant):
    """The model's most likely id, made a special token and a stop: the answer ends with it and does not show it."""
    llm = replace(tiny.CONFIG.llm, added_tokens=1)
    model = Llava(replace(tiny.CONFIG, llm=llm))
    ahead = {"embed": {"added": np.zeros((1, llm.width), np.float32)}, "head": {"added": np.zeros((llm.width, 1))}}
    params = {**assistant.params, "llm": {name: {**leaf, **ahead.get(name, {})} if isinstance(leaf, dict) else leaf
                                          for name, leaf in assistant.params["llm"].items()}}  # fmt: skip
    format = tiny.wording(templates.get("chatml_direct"), ("<|im_end|>",))
    speaks = Assistant(model, params, format)
    assert speaks._engine().ends == (format.tokenizer.eos_id, 960)
    first = speaks.reply(question(), 1).ids[0]
    params["llm"]["head"]["added"] = 2 * params["llm"]["head"]["kernel"][:, first, None]
    reply = speaks.reply(question(), NEW)
    assert reply.ids == (960,)
    assert (reply.text, reply.ended_by) == ("", "stop")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(assistant):
    with pytest.raises(ValueError, match="the tokenizer has 961 tokens, the model 960"):
        replace(assistant, format=tiny.wording(templates.get("v1"), ("<|im_end|>",)))


def test_two_pictures_keep_their_places(assistant):
    turns = (Turn("user", "First <image> then <image>."),)
    one, two = tiny.picture(1), tiny.picture(2)
    there = Conversation(turns, (one, two), images_in_place=True)
    back = Conversation(turns, (two, one), images_in_place=True)
    assert assistant.reply(there, 8) != assistant.reply(back, 8)


def test_pictures_are_found_below_the_image_root(assistant, tmp_path):
    tiny.picture().save(tmp_path / "it.png")
    named = replace(question(), images=("it.png",))
    assert assistant.reply(named, 8, image_root=tmp_path) == assistant.reply(question(), 8)
    with pytest.raises(ValueError, match=r"'q0'.*no such file"):
        assistant.reply(named, 8)


def test_too_long_a_conversation_is_refused_by_name_before_any_is_answered(assistant):
    endless = Conversation((Turn("user", "word " * 2000),), id="endless")
    with pytest.raises(ValueError, match=r"'endless'.*the model has 1024: shorten the conversation"):
        assistant.replies([question(), endless], NEW)
    with pytest.raises(ValueError, match=r"'q0'.*lower max_new_tokens"):
        assistant.reply(question(), 1024)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"top_k": -2}])
def test_settings_out_of_range_are_refused(assistant, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        assistant.reply(question(), **settings)


def test_what_is_no_checkpoint_is_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(UnusableCheckpoint, match=r"no model\.json"):
        Assistant.open(tmp_path)
    tiny.save(tmp_path / "c")
    with pytest.raises(UnusableCheckpoint, match="step 5"):
        Assistant.open(tmp_path / "c", step=5)
    with pytest.raises(ValueError, match="dtype 'int8': choose one of float32, bfloat16"):
        Assistant.open(tmp_path / "c", dtype="int8")


def test_parameters_that_do_not_fit_the_card_are_refused_by_name(tmp_path):
    leaves = jax.tree.map(np.asarray, tiny.weights())
    llm = {**leaves["llm"], "norm": {"scale": leaves["llm"]["norm"]["scale"][:-1]}}
    with pytest.raises(UnusableCheckpoint, match="llm/norm/scale has shape"):
        Assistant.open(tiny.save(tmp_path / "a", leaves={**leaves, "llm": llm}))
    with pytest.raises(UnusableCheckpoint, match="projector/0/bias is missing"):
        Assistant.open(tiny.save(tmp_path / "b", leaves={k: v for k, v in leaves.items() if k != "projector"}))


def test_weights_are_held_in_the_dtype_asked_for(tmp_path):
    opened = Assistant.open(tiny.save(tmp_path / "c"), dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened.params)} == {"bfloat16"}
    assert opened.model.dtype == jax.numpy.bfloat16
