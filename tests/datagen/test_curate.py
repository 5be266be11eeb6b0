"""MiniGPT-4's pipeline: short answers continued once, rules by name, a page for the person, and what is exported."""

import base64
import json
import re
import shutil
import zlib
from pathlib import Path

import pytest

from llava_jax import config as configs
from llava_jax.data.__main__ import main as data_command
from llava_jax.data.prepare import ALIGNMENT
from llava_jax.data.sources import open_source
from llava_jax.datagen import curate, rules, shots
from llava_jax.datagen.__main__ import main
from llava_jax.datagen.options import SHORT_TOKENS
from llava_jax.datagen.progress import Progress
from llava_jax.openai_client import Answer
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format, encode
from tests.datagen import small
from tests.fake_openai import FakeOpenAI, first

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURES = 8
GOOD = ("A wooden table stands in front of a window. On the left there is a blue vase with three tulips, and on the "
        "right lies an open book beside a pair of glasses.")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return small.write_world(tmp_path_factory.mktemp("world"), PICTURES) / "images"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(name, out, *options):
    return main(["curate", name, "--out", str(out), *map(str, options)])


def endpoint(server):
    return ["--base-url", server.url, "--model", "m"]


def see(body):
    """Describes in 40 words, or in 100 where the picture's data says so; goes on; mends."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str) and content.startswith("The paragraph below"):
        return content.split("Paragraph:")[1].strip().replace(" teh ", " the ") + " It is quiet."
    picture = body["messages"][0]["content"][0]["image_url"]["url"]
    number = zlib.crc32(picture.encode())
    if content == "Continue":
        return f"And teh number {number} is painted on it, which nobody would have expected at such a place."
    names = "".join(f" A{number % 10}{i}," for i in range(60 if number % 2 else 3))
    return f"{GOOD} Picture {number} hangs behind it, with all these names:{names} and B."


@pytest.fixture(scope="module")
def curated(images, tmp_path_factory):
    """A folder after describe, correct and filter, and the server's bodies."""
    out = tmp_path_factory.mktemp("curated")
    with FakeOpenAI(see, first("500")) as server:
        assert step("describe", out, "--images", images, *endpoint(server)) == 0
        assert step("correct", out, *endpoint(server)) == 0
    assert step("filter", out) == 0
    return out, server.bodies


def test_short_answers_are_continued_with_the_dialogue_so_far(curated):
    out, bodies = curated
    rows = lines(out / curate.DESCRIBED)
    assert len(rows) == PICTURES and 0 < sum(row["second"] is not None for row in rows) < PICTURES
    for row in rows:
        assert (row["second"] is not None) == (row["tokens"] <= 80)
        assert row["text"] == " ".join(f"{row['first']} {row['second'] or ''}".split())
    dialogues = [body["messages"] for body in bodies if body["messages"][-1]["content"] == "Continue"]
    assert {tuple(message["role"] for message in messages) for messages in dialogues} == {("user", "assistant", "user")}
    (picture, text) = dialogues[0][0]["content"]
    assert base64.b64decode(picture["image_url"]["url"].split(",")[1])[:2] == b"\xff\xd8" and "picture" in text["text"]


@pytest.mark.parametrize("tokens, continued", [(80, True), (81, False), (0, True)])
def test_eighty_tokens_are_short_and_eighty_one_are_not_and_one_continuation_is_enough(tokens, continued):
    requests = []

    def ask(dialogues):
        for index, (path, dialogue) in enumerate(dialogues):
            requests.append((path, *dialogue))
            text, count = ("One.", tokens) if len(dialogue) == 1 else ("Two.", 1)
            yield index, Answer(text, "stop", 5, count)

    prompts = curate.Prompts("tell", "go on")
    (row,) = curate.describe(["a.jpg"], ask, prompts, SHORT_TOKENS, Progress)
    assert row["text"] == ("One. Two." if continued else "One.")
    assert requests == [("a.jpg", "tell")] + [("a.jpg", "tell", "One.", "go on")] * continued


def test_the_language_is_mended_and_both_texts_are_kept(curated):
    rows = lines(curated[0] / curate.CORRECTED)
    assert all(row["corrected"].endswith("It is quiet.") and " teh " not in row["corrected"] for row in rows)
    assert any(" teh " in row["text"] for row in rows)


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("empty", GOOD, " "),
        ("refusal", GOOD, f"I cannot see the picture. {GOOD}"),
        ("apology", GOOD, f"I'm sorry, I made a mistake. {GOOD}"),
        ("apology", GOOD, f"{GOOD} I apologize for that."),
        ("apology", GOOD, f"As an AI language model I like it. {GOOD}"),
        ("protocol", GOOD, f"{GOOD} ###Human: and now?"),
        ("protocol", GOOD, f"<Img> {GOOD}"),
        ("remark", GOOD, f"Corrected paragraph: {GOOD}"),
        ("remark", GOOD, f"{GOOD} There were no errors."),
        ("too_short", GOOD, "A table by a window."),
        ("too_long", GOOD * 12, GOOD * 12),
        ("unfinished", GOOD, GOOD.removesuffix(".")),
        ("loop", GOOD, f"{GOOD} {GOOD}"),
        ("loop", GOOD, GOOD + " It is by the sea and it is by the lake and it is by the road."),
        ("foreign", GOOD, GOOD + " 这是一张桌子，上面有花和书，还有眼镜。"),
        ("drift", GOOD * 2, GOOD),
        ("drift", " ".join(GOOD.split()[:10]), GOOD),
    ],
)
def test_each_rule_refuses_what_it_names(name, before, after):
    before = " ".join([before] * 3) if name == "drift" and before == GOOD * 2 else before
    names = [rule for rule in rules.RULES if rules.RULES[rule](before, after)]
    assert name in names and rules.refusal(before, after) == names[0]


def test_a_good_description_passes_every_rule():
    assert rules.refusal(GOOD, GOOD) is None
    assert rules.refusal(GOOD, f"{GOOD} “Café Zürich” is written on a sign in the window.") is None
    assert len(rules.RULES) == 11


def test_truncated_and_repeated_rows_are_dropped():
    row = {"image_id": "a", "text": GOOD, "corrected": GOOD, "finish": "stop"}
    rows = [row, {**row, "image_id": "b"}, {**row, "image_id": "c", "finish": "length"}, {"unanswered": "x"}]
    assert [checked["dropped"] for checked in curate.apply_rules(rows)] == [None, "duplicate", "unfinished"]


def test_the_review_page_holds_pictures_and_texts_and_nothing_from_elsewhere(curated, images, tmp_path):
    out, _ = curated
    rows = lines(out / curate.FILTERED)
    rows[0]["corrected"] += " </script><script>alert(1)</script>"
    (tmp_path / curate.FILTERED).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step("review", tmp_path, "--images", images, "--per-page", 5) == 0
    pages = sorted((tmp_path / "review").glob("*.html"))
    assert len(pages) == -(-sum(row["dropped"] is None for row in rows) // 5) == 2
    text = pages[0].read_text()
    assert text.count("<script") == 2 and "alert(1)\\u003c/script>" in text
    assert not re.findall(r"(?:src|href)=|https?://", text) and text.count("data:image/jpeg;base64,") == 5
    shown = json.loads(re.search(r'id="rows">(.*?)</script>', text, re.DOTALL)[1])
    assert [row["image_id"] for row in shown] == [row["image_id"] for row in rows[:5]]


def test_only_what_a_person_accepted_or_edited_is_exported(curated, images, tmp_path, capsys):
    out, _ = curated
    for name in (curate.DESCRIBED, curate.FILTERED):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    names = [row["image_id"] for row in lines(tmp_path / curate.FILTERED)]
    decisions = [{"image_id": names[0], "action": "accept"}, {"image_id": names[1], "action": "reject"},
                 {"image_id": names[2], "action": "edit", "caption": "A table,\nno more."},
                 {"image_id": names[3], "action": "accept"}]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions))
    (tmp_path / "later.jsonl").write_text(json.dumps(decisions[3] | {"action": "reject"}))
    files = [tmp_path / "d.jsonl", tmp_path / "later.jsonl"]
    assert step("export", tmp_path, "--images", images, "--decisions", *files) == 0
    exported = json.loads((tmp_path / "filter_cap.json").read_text())
    assert exported == {"annotations": [
        {"image_id": names[0], "caption": lines(tmp_path / curate.FILTERED)[0]["corrected"]},
        {"image_id": names[2], "caption": "A table, no more."}]}  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == [f"{names[i]}.jpg" for i in (0, 2)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reviewed"] and [report[name] for name in ("accept", "edit", "reject", "undecided")] == [1, 1, 2, 4]
    assert data_command(["validate", str(tmp_path / "llava.json"), "--images", str(tmp_path), "--open-images"]) == 0
    assert "2 records, 0 bad" in capsys.readouterr().out


def test_what_is_curated_goes_into_minigpt4s_second_stage_as_its_config_names_it(curated, images, tmp_path,
                                                                                 monkeypatch, capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = configs.load(small.ROOT / "configs" / "minigpt4_13b_stage2.py")
    (records,) = config.data.sources
    out = Path("data/cc_sbu_align")
    shutil.copytree(curated[0], out)
    assert step("export", out, "--images", images, "--no-review") == 0
    assert data_command(["prepare", "cc-sbu-align", "--from", str(out), "--out", "data"]) == 0
    assert data_command(["validate", records.path, "--images", records.images, "--open-images"]) == 0
    captions = {row["image_id"]: row["corrected"] for row in lines(out / curate.FILTERED) if row["dropped"] is None}
    assert f"{len(captions)} records, 0 bad" in capsys.readouterr().out and len(captions) > 1
    model_tokenizer = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)
    format = Format(templates.get(config.prompt.template), model_tokenizer, 28, 4, config.prompt.image_mode)
    for path, folder, questions in (
        (records.path, records.images, ALIGNMENT),
        (out / "llava.json", out, shots.lines("curation/instructions.txt", shots.PROMPTS)),
    ):
        for record in open_source(path, folder):
            example = encode(record.conversation, format, folder)
            (span,), (pixels,) = example.image_spans, example.images
            ids, end = example.tokens.tolist(), span.start + span.length
            assert pixels.shape == (28, 28, 3) and model_tokenizer.decode(ids[: span.start]) == "###Human: <Img>"
            question, _, answer = model_tokenizer.decode(ids[end:]).partition(" ###Assistant: ")
            assert question.removeprefix("</Img> ") in questions
            target = model_tokenizer.decode(example.tokens[example.learned].tolist())
            assert answer.strip() == target == f"{captions[record.id]}###"


def test_without_a_review_the_report_says_so(curated, images, tmp_path):
    out, _ = curated
    for name in (curate.DESCRIBED, curate.FILTERED):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    assert step("export", tmp_path, "--images", images) == 64
    assert step("export", tmp_path, "--images", images, "--no-review") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reviewed"] is False and report["exported"] == PICTURES - report["dropped"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image_id": "{first}", "action": "maybe"}, "want accept, edit or reject"),
        ({"image_id": "{first}", "action": "edit"}, "no field 'caption'"),
        ({"image_id": "{first}", "action": "edit", "caption": " "}, "empty caption"),
        ({"image_id": "stranger", "action": "accept"}, "'stranger': not one of"),
    ],
)
def test_a_decision_that_makes_no_sense_is_named(row, message, curated, images, tmp_path, capsys):
    out, _ = curated
    for name in (curate.DESCRIBED, curate.FILTERED):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    decision = json.dumps(row).replace("{first}", lines(out / curate.FILTERED)[0]["image_id"])
    (tmp_path / "d.jsonl").write_text(decision)
    assert step("export", tmp_path, "--images", images, "--decisions", tmp_path / "d.jsonl") == 65
    assert message in capsys.readouterr().err


def test_a_damaged_picture_and_a_failed_request_cost_only_themselves(images, tmp_path, capsys):
    damaged = shutil.copytree(images, tmp_path / "images")
    (damaged / f"{3:012}.jpg").write_bytes(b"no picture")

    def fault(number, body):
        return "400" if number == 1 else None

    with FakeOpenAI(see, fault) as server:
        arguments = ["--images", damaged, *endpoint(server), "--concurrency", 1]
        assert step("describe", tmp_path / "out", *arguments) == 75
        rows = lines(tmp_path / "out" / curate.DESCRIBED)
        assert sum("unanswered" in row for row in rows) == 2 and len(rows) == PICTURES
        assert "1 without an answer" in capsys.readouterr().err
        before = len(server.bodies)
        assert step("describe", tmp_path / "out", *arguments) == 0
        assert len(server.bodies) - before <= 2, "the failed one, and its continuation"
    rows = lines(tmp_path / "out" / curate.DESCRIBED)
    assert [row["image_id"] for row in rows if "unanswered" in row] == [f"{3:012}"]


def test_steps_out_of_order_and_half_a_describer_are_refused(images, tmp_path, capsys):
    assert step("filter", tmp_path) == 64 and "run `curate correct --out" in capsys.readouterr().err
    assert step("describe", tmp_path, "--images", images) == 64 and "--checkpoint DIR" in capsys.readouterr().err
    assert step("describe", tmp_path, "--images", images, "--checkpoint", tmp_path) == 66
    assert step("describe", tmp_path, "--images", tmp_path, "--base-url", "http://a", "--model", "m") == 64
    (tmp_path / "a").mkdir()
    for name in ("x.jpg", "a/x.png"):
        (tmp_path / name).write_bytes(b"")
    assert step("describe", tmp_path, "--images", tmp_path, "--base-url", "http://a", "--model", "m") == 65


def test_a_sample_is_drawn_by_the_seed(images, tmp_path):
    with FakeOpenAI(see) as server:
        for seed, out in ((0, "a"), (0, "b"), (1, "c")):
            arguments = ["--images", images, *endpoint(server), "--sample", 4, "--seed", seed]
            assert step("describe", tmp_path / out, *arguments) == 0
    samples = [[row["image_id"] for row in lines(tmp_path / out / curate.DESCRIBED)] for out in "abc"]
    assert samples[0] == samples[1] != samples[2] and len(samples[0]) == 4


def test_a_checkpoint_describes_too_and_a_second_run_asks_it_nothing(images, tmp_path, monkeypatch):
    from llava_jax.generate.assistant import Assistant
    from tests.generate import tiny

    tiny.save(tmp_path / "model")
    batches, replies = [], Assistant.replies

    def record_batches(self, conversations, *arguments, **options):
        batches.append(conversations)
        return replies(self, conversations, *arguments, **options)

    monkeypatch.setattr(Assistant, "replies", record_batches)
    arguments = ["--images", images, "--checkpoint", tmp_path / "model", "--slots", 4, "--max-new-tokens", 3,
                 "--sample", 4]  # fmt: skip
    assert step("describe", tmp_path / "out", *arguments) == 0
    rows = lines(tmp_path / "out" / curate.DESCRIBED)
    assert [len(batch) for batch in batches] == [4, 4], "three tokens are short: all go on"
    assert all(row["second"] is not None and 0 < row["tokens"] for row in rows)
    assert len(batches[1][0].turns) == 3 and batches[1][0].turns[1].text == rows[0]["first"]
    written = (tmp_path / "out" / curate.DESCRIBED).read_bytes()
    assert step("describe", tmp_path / "out", *arguments) == 0
    assert len(batches) == 2 and (tmp_path / "out" / curate.DESCRIBED).read_bytes() == written
