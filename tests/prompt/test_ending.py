"""What ends an answer: the last supervised id of every answer ends generation, here and in an export."""

import json
from dataclasses import replace

import pytest

from llava_jax.errors import UsageError
from llava_jax.prompt import ending, templates
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode
from tests.prompt import layouts
from tests.prompt.test_layouts import fast_of

CHATML = {960: layouts.word("<|im_start|>"), 961: layouts.word("<|im_end|>")}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = CHATML | {number: layouts.word(text) for number, text in enumerate(HEADERS, 962)}
CHAT |= {965: layouts.word("<think>", False), 966: layouts.word("</think>", False)}
NOT_SPECIAL = {number: entry | {"special": False} for number, entry in CHATML.items()}


def every_tokenizer(folder):
    """LLaMA's and others', with and without ChatML's words, which may be its end of text, and Llama 3's and Qwen3's."""
    for number, (words, named) in enumerate([
        ({}, {}), (CHATML, {}), (CHATML, {"eos_token": "<|im_end|>"}), (NOT_SPECIAL, {}), (CHAT, {}),
    ]):  # fmt: skip
        for fast in (None, fast_of(True), fast_of(False)):
            place = folder / f"{number} {fast is None} {fast and fast['normalizer'] is None}"
            legacy = False if fast is None else None
            made = layouts.directory(place, words, model=fast is None, fast=fast, legacy=legacy, **named)
            yield tokenizers.load(made)


def ends(example, found, tokenizer):
    """Whether the supervised tokens of an answer contain one that ends it, or a text that does, and none before."""
    ids = example.tokens[example.learned].tolist()
    text = tokenizer.decode(ids, skip_special=False)
    return ids[-1] in found.ids or any(stop in text for stop in found.texts)


def test_the_last_supervised_id_of_an_answer_ends_generation_or_the_template_is_refused(tmp_path):
    fits, refused = set(), set()
    for index, tokenizer in enumerate(every_tokenizer(tmp_path)):
        for template in templates.TEMPLATES.values():
            try:
                ending.check(template, tokenizer, "here")
            except UsageError:
                refused.add((index, template.name))
                continue
            fits.add(template.name)
            marker = "" if template.name == "mistral_instruct" else "<image>\n"
            turns = (Turn("user", marker + "What?"), Turn("assistant", "A cat."))
            conversation = Conversation(turns, ("x.png",) if marker else ())
            example = encode(conversation, Format(template, tokenizer, 28, 4, "pad"), open_images=False)
            found = ending.of(template, tokenizer)
            assert ends(example, found, tokenizer), (index, template.name)
            # An id that ends an answer is told from one that stands in it, so an export can say it.
            assert tokenizer.eos_id in found.ids
            assert not found.texts or not any(mark in found.texts for mark in template.marks)
    assert fits == set(templates.TEMPLATES)
    assert refused == {
        *((index, name) for index in range(3) for name in ("mpt", "chatml_direct", "qwen", "qwen_2")),
        *((index, name) for index in range(12) for name in ("llama_3", "qwen_3")),
    }


def test_a_template_is_refused_by_mark_own_end_and_what_would_fit(tmp_path):
    letters = {"<|endoftext|>": 0, "a": 1, "b": 2}
    content = {"model": {"type": "WordLevel", "vocab": letters, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = tokenizers.load(tmp_path)
    message = "'v1' is written with </s>, no token of the tokenizer QWEN, which ends a text with '<.endoftext.>': "
    with pytest.raises(UsageError, match=message + "choose one of v0, .*, v0_mmtag, plain, minigpt4, minigpt4_chat$"):
        ending.check(templates.get("v1"), tokenizer, "QWEN")
    with pytest.raises(UsageError, match="written with </s> and <s>, no token"):
        ending.check(templates.get("llama_2"), tokenizer, "QWEN")
    ending.check(templates.get("llava_v0"), tokenizer, "QWEN")


def test_an_answer_ends_with_the_templates_mark_and_with_the_tokenizers_own_end(tmp_path):
    tokenizer = tokenizers.load(layouts.directory(tmp_path, CHATML, legacy=True))
    assert ending.of(templates.get("v1"), tokenizer) == ((2,), ())
    assert ending.of(templates.get("mpt"), tokenizer) == ((2, 961), ())
    assert ending.of(templates.get("llava_v0"), tokenizer) == ((2,), ("###",))
    assert ending.of(templates.get("plain"), tokenizer) == ((2,), ("\n",))


def test_marks_around_images_must_be_tokens(tmp_path):
    tokenizer = tokenizers.load(layouts.MODEL, legacy=True, added=("<im_start>",))
    ending.check(templates.get("v1"), tokenizer, "here")
    with pytest.raises(UsageError, match="mm_use_im_start_end.* is true, but <im_end> is no token of the tokenizer"):
        ending.check(templates.get("v1"), tokenizer, "here", image_start_end=True)
    whole = tokenizers.load(layouts.MODEL, legacy=True, added=("<im_start>", "<im_end>"))
    ending.check(templates.get("v1"), whole, "here", image_start_end=True)


def test_the_marks_of_a_template_are_its_tokens():
    assert templates.get("v1").marks == ("</s>",) and templates.get("llava_v0").marks == ()
    assert templates.get("llama_2").marks == ("</s>", "<s>")
    assert templates.get("mpt").marks == ("<|im_end|>", "<|im_start|>")
    assert templates.get("qwen_3").marks == ("</think>", "<think>", "<|im_end|>", "<|im_start|>")
    assert templates.get("llama_3").marks == ("<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>")
    assert replace(templates.get("plain"), between="<s>").marks == ("<s>",)
