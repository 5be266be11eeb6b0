"""prompt.encode against recordings of haotian-liu/LLaVA, and what must hold for any text."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from llava_jax.batch import Span
from llava_jax.data.records import Record
from llava_jax.prompt import templates
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode, marked, with_labels

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TINY = {legacy: tokenizers.load(GOLDEN / "tiny_llama.model", legacy=legacy) for legacy in (False, True)}
HASHES = ("llava_v0", "v0_mmtag")
LLAMA_2 = ("llama_2", "llava_llama_2", "mistral_instruct")
RECORDED = (*HASHES, *LLAMA_2, "v1", "llava_v1", "v1_mmtag", "mpt", "plain")
HOSTILE = ["</s>", "<s>", "<unk>", " ", "  ", "\n", "a", "Bc", "7", " ASSISTANT: ", "USER:", "###", "### Human: ",
           "[INST]", " [/INST]", "<|im_end|>", "<|im_start|>assistant\n", "<image>", "▁", "答", "🌋", "é", "\0",
           "<0x0A>", "<im_start>", "<", ">", ":"]  # fmt: skip


def format_of(template, legacy=False, start_end=False, tokenizer=None):
    return Format(templates.get(template), tokenizer or TINY[legacy], 28, 4, "pad", start_end)


def talk(*texts, **options):
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Conversation(turns, id="r1", **options)


def letters(ids, tokenizer):
    """The very characters of the tokens, dummy spaces included."""
    pieces = [tokenizer.piece(int(i)) for i in ids]
    own = [tokenizer.processor.is_byte(tokenizer.processor.piece_to_id(piece)) for piece in pieces]
    return b"".join(
        bytes([int(piece[3:5], 16)]) if byte else piece.replace("▁", " ").encode()
        for piece, byte in zip(pieces, own, strict=True)
    ).decode()


def learned_text(example, tokenizer):
    return letters(example.tokens[example.learned], tokenizer)


def without_shared_letter(text, template):
    """In mpt one token may hold the end of a stop and the "<" of the next turn's header."""
    return text.replace("<|im_end|><", "<|im_end|>") if template == "mpt" else text


def wanted_text(template, turns):
    """What is to be learned, spelled out without the code under test."""
    if template in HASHES:
        return "".join("###" if role == "user" else f"### Assistant: {text}\n" for role, text in turns) + "### "
    answers = [text for role, text in turns if role == "assistant" and (text or template == "plain")]
    before, after = {"mpt": ("", "<|im_end|>"), "plain": (" ", "\n")}.get(template, (" ", "</s>"))
    gap = " " if template in LLAMA_2 else ""
    return "".join(before + text + gap + after for text in answers)


def assert_learned(example, template, turns, tokenizer):
    learned, wanted = learned_text(example, tokenizer), wanted_text(template, turns)
    assert without_shared_letter(learned, template) == without_shared_letter(wanted, template)


def check_case(case, tokenizer):
    record = {"id": case["case"], "conversations": case["conversations"]}
    record |= {"image": "x.jpg"} if case["has_image"] else {}
    conversation = Record("", 0, None, record).conversation
    format = format_of(case["version"], start_end=case["mm_use_im_start_end"], tokenizer=tokenizer)
    example = encode(conversation, format, open_images=False)
    ids, labels = with_labels(example)
    assert ids.tolist() == case["input_ids"], marked(example, tokenizer)
    if case["labels"] is not None and not case["warning"]:
        assert labels.tolist() == case["labels"], marked(example, tokenizer)
        return
    turns = [(turn.role, turn.text) for turn in conversation.turns]
    turns = turns[1:] if case["case"] == "gpt_first" and case["version"] not in HASHES else turns
    assert_learned(example, case["version"], turns, tokenizer)


@pytest.mark.parametrize("version", RECORDED)
def test_ids_and_labels_equal_the_reference_with_the_tiny_tokenizer(version):
    cases = json.loads((GOLDEN / "text_tiny.json").read_text())["cases"]
    cases = [case for case in cases if case["version"] == version]
    assert len(cases) >= 8
    for case in cases:
        check_case(case, TINY[case["legacy"]])


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_and_labels_equal_the_reference_with_llamas_tokenizer(shared, legacy):
    tokenizer = tokenizers.load(shared / "data" / "llama_tokenizer.model", legacy=legacy)
    cases = json.loads((shared / "goldens" / "text_llama.json").read_text())["cases"]
    cases = [case for case in cases if case["legacy"] == legacy]
    assert len(cases) == 102
    for case in cases:
        check_case(case, tokenizer)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("template", RECORDED)
def test_learned_is_exactly_answers_and_stops_whatever_the_text(template, legacy):
    rng = random.Random(f"{template} {legacy}")
    for _ in range(30):
        texts = ["".join(rng.choices(HOSTILE, k=rng.randint(0, 6))) for _ in range(2 * rng.randint(1, 3))]
        texts[::2] = [f"{text}?" for text in texts[::2]]  # an empty question leaves an open turn, or no turn at all
        images = ()
        if template == "plain":
            texts, images = ["<image>", texts[1].replace("<image>", "")], ("x.jpg",)
        conversation = talk(*texts, images=images)
        example = encode(conversation, format_of(template, legacy), open_images=False)
        turns = [(turn.role, turn.text.replace("▁", " ")) for turn in conversation.turns]
        assert_learned(example, template, turns, TINY[legacy])


# MiniGPT-4 makes its chat's history into tokens as one text; its stages train on "minigpt4" and "minigpt4_llama_2".
@pytest.mark.parametrize("template", sorted(set(templates.TEMPLATES) - {"minigpt4_chat", "minigpt4_llama_2_chat"}))
def test_a_reply_starts_where_training_starts_to_learn_the_answer(template):
    marker = () if template == "mistral_instruct" else ("x.jpg",)
    question = "<image>\nWhat?" if marker else "What?"
    whole = encode(talk(question, "A cat.", images=marker), format_of(template), open_images=False)
    start = encode(talk(question, images=marker), format_of(template), reply=True, open_images=False)
    length = len(start.tokens)
    assert whole.tokens[:length].tolist() == start.tokens.tolist()
    rest, learned = whole.tokens[length:], whole.learned[length:]
    assert letters(rest, TINY[False]).strip().startswith("A cat.") and learned[: learned.sum()].all()
    assert letters(rest[~learned], TINY[False]) == ("\n" if template.startswith("qwen") else "")


def test_an_image_takes_its_features_positions_and_counts_once_in_labels():
    example = encode(talk("<image>\nWhat?", "A cat.", images=("x.jpg",)), format_of("v1"), open_images=False)
    (span,) = example.image_spans
    assert span.length == 4 and not example.tokens[span.start : span.start + 4].any()
    assert not example.learned[: span.start + 4].any() and example.images == ()
    ids, labels = with_labels(example)
    assert len(ids) == len(example.tokens) - 3 and ids[span.start] == -200 and labels[span.start] == -100
    assert (example.tokens.dtype, example.learned.dtype) == (np.int32, bool)


def test_a_list_of_images_keeps_every_marker_where_it_was_written():
    conversation = talk("Is <image> or <image> redder?", "The first.", images=("a", "b"), images_in_place=True)
    example = encode(conversation, format_of("v1"), open_images=False)
    first, second = example.image_spans
    between = letters(example.tokens[first.start + 4 : second.start], TINY[False])
    after = letters(example.tokens[second.start + 4 :], TINY[False])
    assert between.split() == ["or"] and after.startswith("  redder? ASSISTANT:")


@pytest.mark.parametrize("question", ["none", "<image> <image> <image>"])
def test_a_list_of_images_wants_as_many_markers(question):
    conversation = talk(question, "ok", images=("a", "b"), images_in_place=True)
    with pytest.raises(ValueError, match=r"'r1'.*2 image\(s\) but [03] <image>"):
        encode(conversation, format_of("v1"), open_images=False)


def test_an_image_without_marker_is_refused_once_images_are_opened():
    conversation = talk("What?", "A cat.", images=("a",))
    assert encode(conversation, format_of("v1"), open_images=False).image_spans == ()
    with pytest.raises(ValueError, match="'r1'.*write one <image>"):
        encode(conversation, format_of("v1"))


def test_a_marker_in_a_text_only_record_is_only_letters():
    example = encode(talk("What does <image> mean?", "A picture."), format_of("v1"))
    assert example.image_spans == () and "<image>" in letters(example.tokens, TINY[False])


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_in_messages_are_only_letters(legacy):
    example = encode(talk("Say </s> and <s>!", "</s> <unk>"), format_of("v1", legacy))
    tokens = example.tokens.tolist()
    assert (tokens.count(1), tokens.count(2), tokens.count(0)) == (1, 1, 0) and tokens[-1] == 2


def test_a_conversations_own_system_text_replaces_the_templates():
    own = encode(talk("Hi", "Ho", system="Be </s> brief."), format_of("v1")).tokens
    none = encode(talk("Hi", "Ho", system=""), format_of("v1")).tokens
    assert letters(own, TINY[False]).startswith("<s> Be </s> brief. USER: Hi") and own.tolist().count(2) == 1
    assert letters(none, TINY[False]).startswith("<s> USER: Hi")
    inside = encode(talk("Hi", "Ho", system=""), format_of("llama_2")).tokens
    assert letters(inside, TINY[False]) == "<s> [INST] Hi [/INST] Ho </s>"


def test_the_examples_of_v0_stand_first_and_are_never_learned():
    example = encode(talk("Hi", "Ho"), format_of("v0"))
    text = letters(example.tokens, TINY[False])
    assert text.index("questions.\n\n### Human: What are the key") < text.index("instability.\n\n### Human: Hi\n")
    assert learned_text(example, TINY[False]) == "###### Assistant: Ho\n### "


def test_images_are_wrapped_by_added_tokens_when_the_format_says_so():
    tokenizer = tokenizers.load(GOLDEN / "tiny_llama.model", legacy=False, added=("<im_start>", "<im_end>"))
    conversation = talk("<image>\nWhat <im_end>?", "A cat.", images=("x.jpg",))
    example = encode(conversation, format_of("v1", tokenizer=tokenizer, start_end=True), open_images=False)
    (span,) = example.image_spans
    assert span == Span(int(np.flatnonzero(example.tokens == 960)[0]) + 1, 4)
    assert example.tokens[span.start + 4] == 961 and (example.tokens == 961).sum() == 1


@pytest.mark.parametrize(
    ("template", "conversation", "reply", "message"),
    [
        ("v1", Conversation((Turn("user", "a"), Turn("user", "b")), id="r1"), False, "'r1'.*roles.*in turn"),
        ("v1", Conversation((Turn("assistant", "a"),), id="r1"), False, "'r1'.*roles"),
        ("v1", talk("a", "b"), True, "'r1'.*last turn"),
        ("llama_2", talk("", "b"), False, "'r1'.*first turn is empty"),
        ("plain", talk("a", "b"), False, "'r1'.*plain.*caption"),
        ("v1", talk("a\ud800", "b"), False, "'r1'.*turn 0.*lone surrogate"),
    ],
)
def test_turns_that_do_not_fit_are_refused_by_name(template, conversation, reply, message):
    with pytest.raises(ValueError, match=message):
        encode(conversation, format_of(template), reply=reply)


def test_marked_shows_what_is_learned():
    conversation = talk("<image>\nHi", "Ho", images=("x.jpg",), system="")
    shown = marked(encode(conversation, format_of("mistral_instruct"), open_images=False), TINY[False])
    assert shown.startswith("<s> ▁[") and shown.endswith("</s> ⟧") and "<image> ▁ <0x0A>" in shown
    assert shown.count("⟦") == shown.count("⟧") == 1


def by_hand(*parts):
    """Ids of MiniGPT-4's segments, each made into tokens alone; an int stands for itself, True: 4 of an image."""
    ids, words = [], sentencepiece.SentencePieceProcessor(str(GOLDEN / "tiny_llama.model"))
    for part in parts:
        ids += [0] * 4 if part is True else [part] if isinstance(part, int) else words.encode(part)
    return ids


def test_minigpt4s_second_stage_is_segments_apart_and_learns_the_answer_and_its_stop():
    conversation = talk("<image>\nDescribe it.", "A cat.", images=("a.png",))
    example = encode(conversation, format_of("minigpt4", legacy=True), open_images=False)
    before = by_hand(1, "###Human: <Img>", True, "</Img> Describe it. ###Assistant: ")
    answer = by_hand("A cat.###")
    assert example.tokens.tolist() == before + answer
    assert example.learned.tolist() == [False] * len(before) + [True] * len(answer)
    asked = encode(replace(conversation, turns=conversation.turns[:1]), format_of("minigpt4", legacy=True), reply=True,
                   open_images=False)  # fmt: skip
    assert asked.tokens.tolist() == before


def test_minigpt4s_first_stage_is_the_image_and_its_caption():
    conversation = talk("<image>", "a cat", images=("a.png",))
    example = encode(conversation, format_of("plain", legacy=True), open_images=False)
    assert example.tokens.tolist() == by_hand(1, True, "a cat\n")
    assert example.learned.tolist() == [False] * 5 + [True] * (len(example.tokens) - 5)


def test_minigpt4s_chat_begins_with_its_system_sentence_and_goes_on_behind_hashes():
    conversation = talk("<image>\nWhat is it?", "A cat.", "Where?", images=("a.png",))
    example = encode(conversation, format_of("minigpt4_chat", legacy=True), reply=True, open_images=False)
    system = templates.get("minigpt4_chat").system
    assert "<Img>ImageContent</Img>" in system
    rest = "</Img> What is it?###Assistant: A cat.###Human: Where?###Assistant: "
    assert example.tokens.tolist() == by_hand(1, f"{system}###Human: <Img>", True, rest)


def test_minigpt4s_second_question_follows_the_answers_own_hashes():
    """As its curation goes on with "Continue" after what stage 1 has described."""
    conversation = talk("<image>\nDescribe it.", "A cat.", "Continue", images=("a.png",))
    example = encode(conversation, format_of("minigpt4", legacy=True), reply=True, open_images=False)
    before = by_hand(1, "###Human: <Img>", True, "</Img> Describe it. ###Assistant: ")
    assert example.tokens.tolist() == before + by_hand("A cat.###Human: Continue ###Assistant: ")
    told = encode(replace(conversation, system="Be brief."), format_of("minigpt4", legacy=True), reply=True,
                  open_images=False)  # fmt: skip
    first = by_hand(1, "Be brief.###Human: <Img>", True)
    assert told.tokens.tolist()[: len(first)] == first


@pytest.mark.parametrize(("template", "end"), [("minigpt4_llama_2", " [/INST] "), ("minigptv2", " [/INST]")])
def test_minigpt4_on_llama_2_and_minigptv2_ask_between_inst_marks(template, end):
    conversation = talk("<image>\nDescribe it.", "A cat.", "[vqa] Where?", "Here.", images=("a.png",))
    example = encode(conversation, format_of(template, legacy=True), open_images=False)
    before = by_hand(1, "[INST] <Img>", True, f"</Img> Describe it.{end}")
    answer = by_hand("A cat.", 2)
    # Later questions begin with <s>; the words after a special token are cut as at a text's beginning.
    asked, said = by_hand(1, f"[INST] [vqa] Where?{end}"), by_hand("Here.", 2)
    assert example.tokens.tolist() == before + answer + asked + said
    learned = [(before, False), (answer, True), (asked, False), (said, True)]
    assert example.learned.tolist() == [flag for ids, flag in learned for _ in ids]


def test_minigptv2_is_asked_about_text_alone_too_and_begins_once():
    example = encode(talk("Hello?"), format_of("minigptv2", legacy=True), reply=True)
    assert example.tokens.tolist() == by_hand(1, "[INST] Hello? [/INST]")


def test_minigpt4s_chat_on_llama_2_begins_with_its_system_sentence():
    conversation = talk("<image>\nWhat is it?", "A cat.", "Where?", images=("a.png",))
    example = encode(conversation, format_of("minigpt4_llama_2_chat", legacy=True), reply=True, open_images=False)
    system = templates.get("minigpt4_llama_2_chat").system
    first = by_hand(1, system, 1, "[INST] <Img>", True, "</Img> What is it? [/INST] A cat.", 2)
    assert example.tokens.tolist() == first + by_hand(1, "[INST] Where? [/INST] ")
