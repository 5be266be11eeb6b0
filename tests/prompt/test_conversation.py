"""What a conversation holds beside its words: what is learned of it, and how much it counts."""

from dataclasses import replace

import numpy as np
import pytest

from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.conversation import Conversation, Turn, check_text
from llava_jax.prompt.encode import Format, encode
from tests.data.conftest import GOLDEN

TALK = Conversation(
    (Turn("user", "What is it?"), Turn("assistant", "A dog."), Turn("user", "Look again."), Turn("assistant", "A cat."))
)


@pytest.fixture(scope="module")
def words():
    return tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)


def marked(talk: Conversation, supervised: tuple[bool, ...]) -> Conversation:
    marks = iter(supervised)
    turns = [replace(turn, supervised=next(marks)) if turn.role == "assistant" else turn for turn in talk.turns]
    return replace(talk, turns=tuple(turns))


@pytest.mark.parametrize("name", [name for name, one in templates.TEMPLATES.items() if not one.images_only])
def test_an_answer_that_is_not_supervised_stands_in_the_prompt_and_is_not_learned(words, name):
    """With its end mark, wherever the template writes that; the other answers are learned as ever."""
    format = Format(templates.get(name), words, 8, 4, "pad")
    whole = encode(TALK, format)
    found = {marks: encode(marked(TALK, marks), format) for marks in [(True, False), (False, True), (False, False)]}
    for example in found.values():
        assert np.array_equal(example.tokens, whole.tokens) and not (example.learned & ~whole.learned).any()
    first, second, none = found.values()
    assert np.array_equal(first.learned | second.learned, whole.learned)
    assert np.array_equal(first.learned & second.learned, none.learned)  # v0 learns a "###" before the first question
    said = {marks: words.decode(example.tokens[example.learned].tolist()) for marks, example in found.items()}
    assert "dog" in said[True, False] and "cat" not in said[True, False]
    assert "cat" in said[False, True] and "dog" not in said[False, True]


def test_the_weight_of_a_conversation_is_that_of_its_example(words):
    format = Format(templates.get("v1"), words, 8, 4, "pad")
    assert encode(replace(TALK, weight=0.25), format).weight == 0.25 and encode(TALK, format).weight == 1.0


def test_half_a_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"here: character 1 is a lone surrogate \(U\+D83D\)"):
        check_text("a\ud83d", "here")
