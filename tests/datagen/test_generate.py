"""Contexts, prompts and answers: what the language model is told, and what is made of what it says."""

import json
from pathlib import Path

import pytest

from llava_jax.datagen import generate, progress, shots, subjects
from llava_jax.datagen.parsing import REASONS, Pair, Refusal, pairs, parse
from llava_jax.datagen.subjects import Box, Subject, context
from llava_jax.errors import DataError
from llava_jax.openai_client import Usage

DOG = Subject("7", "7.jpg", ("A dog on a sofa.", "A brown dog rests."), (Box("dog", (0.25, 0.40064, 0.7, 1.0)),))
LLAVA_BENCH = Path(__file__).parents[3] / "shared" / "data" / "llava_bench" / "caps_boxes_coco2014_val_80.jsonl"


def test_a_context_is_captions_and_then_the_things_with_three_decimals():
    assert context(DOG, boxes=False) == "A dog on a sofa.\nA brown dog rests."
    assert context(DOG, boxes=True) == "A dog on a sofa.\nA brown dog rests.\n\ndog: [0.25, 0.401, 0.7, 1.0]"
    assert context(DOG._replace(boxes=()), boxes=True) == context(DOG, boxes=False)


def coco(tmp_path, **changes):
    captions = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480},
                   {"id": 25, "file_name": "000000000025.jpg", "width": 200, "height": 100},
                   {"id": 30, "file_name": "000000000030.jpg", "width": 200, "height": 100}],
        "annotations": [{"image_id": 25, "caption": "A giraffe.\n"}, {"image_id": 9, "caption": "Lunch."},
                        {"image_id": 25, "caption": "Two  giraffes."}],
    }  # fmt: skip
    boxes = {
        "images": captions["images"],
        "categories": [{"id": 1, "name": "person"}, {"id": 25, "name": "giraffe"}],
        "annotations": [{"image_id": 25, "category_id": 25, "bbox": [20, 10, 100.5, 90.04], "iscrowd": 0},
                        {"image_id": 25, "category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1},
                        {"image_id": 9, "category_id": 1, "bbox": [64, 0, 64, 480], "iscrowd": 0}],
    }  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "instances.json").write_text(json.dumps(boxes | changes))
    return tmp_path / "captions.json", tmp_path / "instances.json"


def test_coco_boxes_become_shares_of_the_picture_in_the_files_order(tmp_path):
    nine, giraffe = subjects.from_coco(*coco(tmp_path))
    assert (giraffe.id, giraffe.image) == ("000000000025", "000000000025.jpg")
    assert context(giraffe, boxes=True) == "A giraffe.\nTwo giraffes.\n\ngiraffe: [0.1, 0.1, 0.603, 1.0]"
    assert context(nine, boxes=True) == "Lunch.\n\nperson: [0.1, 0.0, 0.2, 1.0]"
    _, with_crowds = subjects.from_coco(*coco(tmp_path), crowds=True)
    assert context(with_crowds, boxes=True).endswith("\nperson: [0.0, 0.0, 0.25, 0.5]")
    assert subjects.from_coco(coco(tmp_path)[0])[1].boxes == ()


def test_coco_files_that_do_not_fit_together_are_named(tmp_path):
    with pytest.raises(DataError, match="instances.json: annotations.0.: category_id=25: want one of the file's 1 "):
        subjects.from_coco(*coco(tmp_path, categories=[{"id": 1, "name": "person"}]))
    with pytest.raises(DataError, match="annotations.0.: image_id=25"):
        subjects.from_coco(*coco(tmp_path, images=[]))


@pytest.mark.skipif(not LLAVA_BENCH.exists(), reason="LLaVA-Bench's contexts are not at hand")
def test_llava_benchs_own_contexts_are_records():
    found = subjects.from_records(LLAVA_BENCH)
    rows = [json.loads(line) for line in LLAVA_BENCH.read_text().splitlines()]
    assert len(found) == 80 and [len(subject.boxes) for subject in found] == [len(row["instances"]) for row in rows]
    box = rows[0]["instances"][0]
    assert f"{box['category']}: {box['bbox']}" in context(found[0], boxes=True)


@pytest.mark.parametrize("kind, examples, blocks", [("conversation", 2, None), ("detail", 3, 0), ("reasoning", 3, 1)])
def test_our_examples_are_answers_that_we_would_accept(kind, examples, blocks):
    """As many as LLaVA's. Source: haotian-liu/LLaVA playground/data/prompts @ c121f04."""
    prompts = shots.read(kind)
    assert len(prompts.examples) == examples
    for example, answer in prompts.examples:
        turns = parse(kind, answer, "stop", "What is it?")
        assert blocks is None or len(turns) == 1
        assert ("]" in example) == (kind != "conversation") and len(example.split("\n\n")[0].splitlines()) == 5


def test_a_request_is_system_then_examples_then_the_context():
    messages = shots.Shots("Be kind.", (("one", "eins"), ("two", "zwei"))).messages("three")
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be kind."), ("user", "one"), ("assistant", "eins"), ("user", "two"), ("assistant", "zwei"),
        ("user", "three"),
    ]  # fmt: skip


def test_a_folder_in_llavas_layout_takes_the_place_of_our_prompts(tmp_path):
    (tmp_path / "complex_reasoning").mkdir()
    for name, text in {"system_message": "Theirs.\n", "001_caps": "c1", "001_conv": "a1", "000_caps": "c0",
                       "000_conv": "a0"}.items():  # fmt: skip
        (tmp_path / "complex_reasoning" / f"{name}.txt").write_text(text)
    assert shots.read("reasoning", tmp_path) == shots.Shots("Theirs.", (("c0", "a0"), ("c1", "a1")))
    (tmp_path / "complex_reasoning" / "001_conv.txt").unlink()
    with pytest.raises(FileNotFoundError, match="001_conv.txt"):
        shots.read("reasoning", tmp_path)


@pytest.mark.parametrize("name, count", [(shots.BRIEF, 11), (shots.DETAIL, 16), ("curation/instructions.txt", 4)])
def test_the_question_lists_are_as_long_as_the_references(name, count):
    """Sources: LLaVA llava/eval/model_vqa_science.py @ 8959d5c; MiniGPT-4 prompts/alignment.txt @ d94738a."""
    questions = shots.lines(name)
    assert len(set(questions)) == len(questions) == count and not any("<" in question for question in questions)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Question:\na?\n===\nAnswer:\nb", [("a?", "b")]),
        ("question: a?\n====\nANSWER: b\nc", [("a?", "b\nc")]),
        ("Question:\r\na?\r\n===\r\nAnswer:\r\nb\r\n", [("a?", "b")]),
        ("**Question:** a?\n===\n**Answer:** b", [("a?", "b")]),
        ("Question: a?\n===\nAnswer: b\n===\nQuestion: c?\n===\nAnswer: d = e", [("a?", "b"), ("c?", "d = e")]),
        ("Question: a?\n===\nAnswer: b\n===\nQuestion: c?", [("a?", "b")]),
    ],
)
def test_blocks_become_pairs(text, expected):
    assert pairs(text) == [Pair(*pair) for pair in expected]


@pytest.mark.parametrize(
    "kind, text, reason",
    [
        ("conversation", "", "empty"),
        ("detail", " \n", "empty"),
        ("conversation", "Sure! Here you are.", "shape: a block starts with 'Sure! Here"),
        ("conversation", "Answer: a\n===\nQuestion: b", "shape: block 1 is another answer"),
        ("conversation", "Question: a\n===\nQuestion: b\n===\nAnswer: c", "shape: block 2 is another question"),
        ("conversation", "Question: a\n===\nAnswer: b\n===\nAnswer: c", "shape: block 3 is another answer"),
        ("conversation", "Question: a\n===\nAnswer:", "shape: an empty answer"),
        ("conversation", "Question: a", "shape: a question without an answer"),
        ("reasoning", "Question: a\n===\nAnswer: b\n===\nQuestion: c\n===\nAnswer: d", "pairs: 2"),
        ("detail", "The <image> shows a dog.", "marker"),
        ("detail", "As the captions say, a dog.", "sources: 'captions'"),
        ("detail", "The dog, at [0.25, 0.4, 0.7, 1.0], rests.", "sources: '[0.25,'"),
        ("reasoning", "Question: Why, given the bounding boxes?\n===\nAnswer: b", "sources: 'bounding boxes'"),
        ("detail", "Based on the provided information, a dog.", "sources: 'provided information'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(kind, text, reason):
    with pytest.raises(Refusal) as caught:
        parse(kind, text, "stop", "What is it?")
    assert str(caught.value).startswith(reason) and reason.split(":")[0] in REASONS


def test_boxes_that_are_objects_are_no_leak():
    for text in ("A box of oranges stands on the given street.", "Two lists (2, 3) lie there.", "It rains 0.5 cm."):
        assert parse("detail", text, "stop", "What?") == [Pair("What?", text)]


def test_a_draw_depends_on_seed_and_id_alone():
    ids = [str(i) for i in range(400)]
    draws = [generate.draw(range(16), 0, name, "question") for name in ids]
    assert draws == [generate.draw(range(16), 0, name, "question") for name in ids]
    assert draws != [generate.draw(range(16), 1, name, "question") for name in ids]
    assert {draws.count(choice) > 8 for choice in range(16)} == {True}, "25 of each are expected"


def test_brief_records_pair_a_drawn_question_with_a_caption():
    pictures = [Subject(str(i), f"{i}.jpg", (f"one {i}", f"two {i}")) for i in range(200)]
    records = generate.brief(pictures, ["q1", "q2"], seed=3)
    assert records == generate.brief(pictures[::-1], ["q1", "q2"], seed=3)[::-1], "the order changes nothing"
    questions = {(turn["value"]) for record in records for turn in record["conversations"] if turn["from"] == "human"}
    assert questions == {"q1\n<image>", "<image>\nq1", "q2\n<image>", "<image>\nq2"}
    answers = {record["conversations"][1]["value"] for record in records}
    assert {answer.split()[0] for answer in answers} == {"one", "two"} and len(answers) == 200


def test_progress_tells_speed_time_left_and_money():
    usage = Usage(asked=100, cached=50, tokens_in=100_000, tokens_out=50_000, usd=1.5, earlier_usd=0.5)
    line = progress.line("detail", 150, 1150, {"good": 140, "refused": 10}, usage, secs=50)
    assert line == ("detail: 150 of 1,150; 140 good, 10 refused; 2.0/s, 8 min left; 150,000 tokens, "
                    "$1.50 of about $11.50")  # fmt: skip
    assert [progress.duration(secs) for secs in (5, 600, 12_000)] == ["5 s", "10 min", "3 h 20 min"]
