"""Talks: each turn reads only what is new, and answers as the assistant does, which has what pages cannot hold."""

from dataclasses import replace

import pytest

from llava_jax.generate import talk as talks
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.talk import Talk
from llava_jax.models.llava import Llava
from llava_jax.models.paged import PAGE
from llava_jax.models.presets import CrossConfig, PerceiverConfig
from llava_jax.prompt.conversation import Conversation, Turn
from tests.generate import tiny

QUESTIONS = ("What is that red thing on the left of the big blue one?", "Why?", "How many of them do you see there?")


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny.assistant(slots=1)


@pytest.fixture(scope="module")
def talk(assistant) -> Talk:
    return Talk(assistant)


def test_each_turn_reads_only_what_is_new_and_answers_as_with_nothing_kept(assistant, talk, monkeypatch):
    reads, towers, batching = [], [], type(talk._scheduler.batching)
    read, features = batching.read, batching.features
    monkeypatch.setattr(batching, "read", lambda *inputs: reads.append(inputs[3].start.copy()) or read(*inputs))
    monkeypatch.setattr(batching, "features", lambda *inputs: towers.append(len(inputs[2])) or features(*inputs))
    turns, before = (), 0
    for number, question in enumerate(QUESTIONS):
        turns += (Turn("user", "<image>\n" * (not number) + question),)
        conversation = Conversation(turns, (tiny.picture(),))
        pieces: list[str] = []
        del reads[:], towers[:]
        reply = talk.reply(conversation, 20, on_piece=pieces.append)
        assert reads[0] == before // PAGE * PAGE and len(towers) == (not number)
        assert "".join(pieces) == reply.text
        assert reply == assistant.reply(conversation, 20) == Talk(assistant).reply(conversation, 20)
        turns, before = (*turns, Turn("assistant", reply.text)), reply.prompt_tokens


def test_what_pages_cannot_hold_is_answered_by_the_assistant(assistant, talk, monkeypatch):
    question = tiny.question()
    assert talk.reply(question, 8, repetition_penalty=1.5) == assistant.reply(question, 8, repetition_penalty=1.5)
    for limit in (0, 2000):
        with pytest.raises(ValueError, match=f"max_new_tokens={limit}"):
            talk.reply(question, limit)
    monkeypatch.setattr(talks, "MOST_POSITIONS", 128)
    long = tiny.question(" ".join(QUESTIONS * 6))
    assert Talk(assistant).reply(long, 8) == assistant.reply(long, 8)
    cross = CrossConfig(tiny.CONFIG.vision.width, every=1, heads=2, head_width=8)
    latents = PerceiverConfig(latents=4, layers=1, heads=2, head_width=8)
    config = replace(tiny.CONFIG, projector="flamingo_xattn", resampler=latents, cross=cross)
    looking = Assistant(Llava(config), tiny.weights(config), replace(assistant.format, image_features=4))
    assert Talk(looking).reply(question, 8) == looking.reply(question, 8)


def test_an_interrupted_answer_leaves_nothing_behind(assistant, talk):
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.reply(tiny.question("Where?"), 30, on_piece=interrupt)
    expected = assistant.reply(tiny.question("Where?"), 12)
    assert talk.reply(tiny.question("Where?"), 12) == expected
