"""Tokenizers of Qwen and Llama 3: byte-level BPE, with tokenizer.json or without."""

import pytest

from llava_jax.prompt import tokenizer as tokenizers
from tests.prompt import chat_models

TEXTS = [talk.texts[0] for talk in chat_models.talks(60, blanks=True, seed=3)]
TEXTS += ["", " ", "\r\n\t é", "<|im_start|>user\nHi<|im_end|>\n", "<|eot_id|> 12345 it's", "<think>\n</think>\n\nYes"]
WRITERS = (chat_models.write_qwen, chat_models.write_qwen_3, chat_models.write_slow_qwen, chat_models.write_llama_3)
NAMED = ((None, "<|im_end|>", "<|endoftext|>"),) * 3 + (("<|begin_of_text|>", "<|eot_id|>", None),)


@pytest.fixture(scope="module", params=range(len(WRITERS)), ids=lambda index: WRITERS[index].__name__)
def case(request, tmp_path_factory):
    """(directory, (bos, eos, pad) of its files)."""
    return WRITERS[request.param](tmp_path_factory.mktemp("words") / "it"), NAMED[request.param]


def test_ids_are_those_of_transformers(case):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    directory, (bos, eos, pad) = case
    ours, theirs = tokenizers.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.encode(text, bos=True) == theirs(text).input_ids, text
    assert ours.size == len(theirs) and ours.adds_bos == (bos is not None)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.piece(ours.eos_id) == eos and (pad is None or ours.piece(ours.pad_id) == pad)


def test_a_checkpoint_keeps_the_tokenizer_as_it_is(case, tmp_path):
    found = tokenizers.load(case[0])
    tokenizers.save(found, tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.words == found.words and again.size == found.size
    assert (again.bos_id, again.eos_id, again.pad_id) == (found.bos_id, found.eos_id, found.pad_id)
    assert all(again.encode(text, bos=True) == found.encode(text, bos=True) for text in TEXTS)


def test_decode_gives_back_the_text_and_leaves_special_words_out(case):
    found = tokenizers.load(case[0])
    for text in (text for text in TEXTS if "e\u0301" not in text):  # Qwen's makes one character of the two
        assert found.decode(found.encode(text, bos=False), skip_special=False) == text
    end = found.piece(found.eos_id)
    assert found.decode(found.encode(f"A cat!{end}", bos=True)) == "A cat!"
    assert found.pad_id in found.specials.values()  # one that is a letter would be left out of answers
    typed = found.tokenize(f"A {end}{end}", [(2 + len(end), 2 + 2 * len(end))])
    assert [token.id for token in typed].count(found.eos_id) == 1 and typed[-1].id == found.eos_id
