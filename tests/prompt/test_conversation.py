"""Records of LLaVA JSON become conversations, or say what is wrong with them."""

import pytest

from llava_jax.prompt.conversation import Conversation, Turn, from_record

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}


def test_a_record_becomes_a_conversation():
    record = {"id": 7, "image": "a/cat.jpg", "conversations": [HUMAN, GPT], "model": ""}
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert from_record(record, "x.json:3") == Conversation(turns, ("a/cat.jpg",), "7")


def test_a_list_of_images_stays_in_place_and_a_system_turn_becomes_the_system_text():
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "")]
    rows = [{"from": speaker, "value": text} for speaker, text in said]
    conversation = from_record({"image": ["a", "b"], "conversations": rows}, "x.json:3")
    assert conversation.images_in_place and conversation.images == ("a", "b")
    assert (conversation.id, conversation.system, len(conversation.turns)) == ("x.json:3", "Be brief.", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "conversations=None: want a list"),
        ({"conversations": []}, r"conversations=\[\]"),
        ({"conversations": [HUMAN, "x"]}, r"conversations\[1\]='x'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, r"conversations\[1\].value=3: want a string"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\].from='bot'"),
        ({"conversations": [HUMAN, {"from": "system", "value": "x"}]}, r"conversations\[1\].from='system'"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "system turn only"),
        ({"conversations": [{"from": "human", "value": "a\ud83d"}]}, r"conversations\[0\].value.*surrogate"),
        ({"image": None}, "image=None: want a path"),
        ({"image": ["a", 3]}, "image=.*want a path"),
    ],
)
def test_a_bad_record_is_named_with_the_path_inside_it(change, message):
    record = {"id": "r1", "conversations": [HUMAN, GPT]} | change
    with pytest.raises(ValueError, match=f"'r1' \\(x.json:3\\).*{message}"):
        from_record(record, "x.json:3")


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"'x.json:3': want a JSON object.*list"):
        from_record([HUMAN, GPT], "x.json:3")
