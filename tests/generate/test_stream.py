"""Text in pieces: they add up to the whole, split no character and show nothing of a stop string."""

from pathlib import Path

import numpy as np
import pytest

from llava_jax.generate import stream
from llava_jax.generate.stream import Text
from llava_jax.prompt import templates, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=False)


def spoken(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    """Every piece on the way, the last one included."""
    text, pieces = Text(), []
    for token in ids:
        text, piece = stream.push(text, token, WORDS, stops)
        pieces.append(piece)
        if text.stopped:
            break
    text, piece = stream.finish(text, WORDS, stops)
    return [*pieces, piece], text


def letters(text: str) -> list[int]:
    """`text` in the smallest tokens: one a byte."""
    return [WORDS.processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("text", ["The cat sat.", "naïve café – 你好, 🐈‍⬛!", "two\n\nlines  and   spaces", "x"])
@pytest.mark.parametrize("cut", [WORDS.encode, lambda text, bos: letters(text)])
def test_pieces_add_up_to_the_text(text, cut):
    pieces, whole = spoken(cut(text, False))
    assert "".join(pieces) == whole.said == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_whole_or_not_yet():
    pieces, _ = spoken(letters("a🐈b"))
    assert pieces == ["a", "", "", "", "🐈", "b", ""]


def test_pieces_of_random_ids_add_up_to_what_the_tokenizer_decodes():
    rng = np.random.default_rng(0)
    stops = ("###", "the", "\n\n")
    for _ in range(200):
        ids = rng.integers(3, WORDS.size, 12).tolist() + letters(rng.choice(["##", "\n", " é ", "th"]))
        pieces, whole = spoken(ids, stops)
        decoded = WORDS.decode(ids)
        ends = [at for at in (decoded.find(stop) for stop in stops) if at >= 0]
        assert "".join(pieces) == whole.said
        assert whole.said == (decoded[: min(ends)] if ends else decoded).strip()
        assert whole.stopped == bool(ends)


def test_a_stop_string_across_tokens_never_shows():
    pieces, text = spoken(letters("No.###Human"), ("###",))
    assert text.stopped
    assert text.said == "No."
    assert not any("#" in piece for piece in pieces)


@pytest.mark.parametrize("hashes", [[835], [2277, 29937]], ids=["one token", "two"])
def test_both_ways_in_which_llama_writes_three_hashes_end_minigpt4s_answer(shared, hashes):
    """Source: Vision-CAIR/MiniGPT-4 demo.py @ d94738a, which stops at these ids."""
    words = tokenizer.load(shared / "data" / "llama_tokenizer.model", legacy=True)
    assert words.decode(hashes) == "###"
    text, pieces = Text(), []
    for token in [*words.encode("A cat.", False), *hashes]:
        assert not text.stopped
        text, piece = stream.push(text, token, words, templates.get("minigpt4_chat").stops)
        pieces.append(piece)
    assert text.stopped and text.said == "".join(pieces) == "A cat."


def test_what_only_looked_like_a_stop_string_is_shown():
    pieces, text = spoken(letters("C## is ## one#"), ("###",))
    assert not text.stopped
    assert "".join(pieces) == text.said == "C## is ## one#"
    assert pieces[:4] == ["C", "", "", "## i"[:3].rstrip()]


def test_white_space_around_an_answer_is_left_out_and_inside_it_kept():
    pieces, text = spoken(letters(" \n a  b \n\n"))
    assert text.said == "a  b"
    assert "".join(pieces) == "a  b"


def test_a_stop_string_of_white_space_counts_at_the_very_front():
    _, text = spoken(letters("\nmore"), ("\n",))
    assert text.stopped
    assert text.said == ""


def test_a_character_that_never_ends_is_shown_as_broken_at_the_end():
    pieces, _ = spoken(letters("a🐈")[:-1])
    assert pieces[:-1] == ["a", "", "", ""]
    assert set(pieces[-1]) == {"\ufffd"}


def test_special_tokens_are_silent():
    pieces, text = spoken([WORDS.bos_id, *WORDS.encode("cat", False), WORDS.eos_id])
    assert text.said == "cat"
