"""What no file should hold: it costs its own record, or is named in one line with the exit code of data."""

import json

import pytest
from PIL import Image

from llava_jax.datagen import curate
from llava_jax.datagen.__main__ import main
from tests.datagen import small
from tests.fake_openai import FakeOpenAI, always
from tests.odd import TEXTS, changed

HALF = "bad \ud83d half"


def run(*args):
    return main([str(arg) for arg in args])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(*captions):
    return [{"id": str(i), "image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(captions)]


@pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning"])
def test_a_caption_with_half_a_character_costs_its_own_record(kind, tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", records("This is 0: x.", HALF, "This is 2: x."))
    with FakeOpenAI(small.reply) as server:
        assert run(kind, "--records", path, "--out", tmp_path, "--base-url", server.url, "--model", "m") == 75
        assert len(server.bodies) == 2
    assert [row["id"] for row in json.loads((tmp_path / f"{kind}.json").read_text())] == ["0", "2"]
    (unanswered,) = lines(tmp_path / f"{kind}_unanswered.jsonl")
    assert unanswered["id"] == "1" and unanswered["reason"].startswith("cannot be sent: ")
    assert "1 without an answer, the last one: cannot be sent" in capsys.readouterr().err


def test_half_a_character_in_what_is_written_is_refused_by_its_id(tmp_path, capsys):
    rows = records("A cat.", "A dog.")
    for changes, message in (({"caption": HALF}, "id='1': caption"), ({"id": HALF}, "r.jsonl:2: id="),
                             ({"image": f"{HALF}.jpg"}, "r.jsonl:2: image=")):  # fmt: skip
        path = write(tmp_path / "r.jsonl", [rows[0], rows[1] | changes])
        assert run("brief", "--records", path, "--out", tmp_path) == 65
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_captions_are_filtered_without_being_changed(tmp_path):
    path = write(tmp_path / "r.jsonl", records(*["a cat"] * 4, f"a cat, {HALF}"))
    assert run("filter", "--records", path, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "filtered.json").read_text())[4]["caption"] == f"a cat, {HALF}"


def test_escape_codes_of_a_server_reach_neither_terminal_nor_files(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", records("A cat."))
    with FakeOpenAI(lambda body: "\x1b[31mred\x07", always("length")) as server:
        args = ("--records", path, "--base-url", server.url, "--model", "m\x1b")
        assert run("detail", *args, "--out", tmp_path / "a") == 65
    errors_seen = (tmp_path / "a" / "detail_rejects.jsonl").read_text()
    with FakeOpenAI(faults=always("escapes")) as server:
        assert run("detail", *args[:2], "--base-url", server.url, "--model", "m", "--retries", 0, "--out",
                   tmp_path / "b") == 75  # fmt: skip
    texts = [*capsys.readouterr(), errors_seen, *(file.read_text() for file in (tmp_path / "b").iterdir())]
    assert not any("\x1b" in text or "\x07" in text for text in texts)


def test_deep_json_in_the_cache_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", records("A cat."))
    (tmp_path / "detail_cache.jsonl").write_text("[" * 100_000 + "\n" + '{"key": "a", "sent": 1}\n')
    assert run("detail", "--records", path, "--out", tmp_path, "--base-url", "http://a/v1", "--model", "m") == 64
    error = capsys.readouterr().err
    assert "detail_cache.jsonl:1: no line of a cache" in error and error.count("\n") == 1


def refused_or_read(args, files, capsys):
    """Runs the command with odd values in every place of every file; returns how many were refused."""
    errors_seen = 0
    for path, rows in files.items():
        original = path.read_text()
        for value in changed(rows):
            if path.suffix == ".jsonl":
                write(path, value if isinstance(value, list) else [value])
            else:
                path.write_text(json.dumps(value))
            code = run(*args)
            error = capsys.readouterr().err
            assert code == 0 or (code in (64, 65) and error.count("\n") == 1), f"{path.name} {value!r} {error}"[:600]
            errors_seen += code != 0
        for text in TEXTS:
            path.write_text(text)
            assert run(*args) in (0, 64, 65) and capsys.readouterr().err.count("\n") <= 1
        path.write_bytes(b"\xff\xfe\x00")
        assert run(*args) == 65
        path.write_text(original)
        capsys.readouterr()
    return errors_seen


def test_odd_records_are_refused_in_one_line(tmp_path, capsys):
    row = {"id": "7", "image": "7.jpg", "captions": ["A cat."], "boxes": [
        {"category": "cat", "bbox": [0.1, 0, 0.5, 1]}]}  # fmt: skip
    path = write(tmp_path / "r.jsonl", [row])
    assert refused_or_read(("brief", "--records", path, "--out", tmp_path / "o"), {path: [row]}, capsys) > 50


def test_odd_coco_files_are_refused_in_one_line(tmp_path, capsys):
    image = {"id": 9, "file_name": "9.jpg", "width": 640, "height": 480}
    captions = {"images": [image], "annotations": [{"image_id": 9, "caption": "A cat."}]}
    instances = {"images": [image], "categories": [{"id": 1, "name": "cat"}],
                 "annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}]}  # fmt: skip
    files = {tmp_path / "captions.json": captions, tmp_path / "instances.json": instances}
    for path, value in files.items():
        path.write_text(json.dumps(value))
    args = ("brief", "--captions", tmp_path / "captions.json", "--instances", tmp_path / "instances.json", "--out",
            tmp_path / "o")  # fmt: skip
    assert refused_or_read(args, files, capsys) > 100


def test_odd_rows_between_the_steps_of_curate_are_refused_in_one_line(tmp_path, capsys):
    tmp_path = tmp_path / "work"
    images = tmp_path / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "a.jpg")
    text = "A small picture that is wholly black lies here, and there is nothing else to be seen in it, so all is calm."
    row = {"image_id": "a", "image": "a.jpg", "text": text, "tokens": 30, "first": text, "second": None}
    rows = {curate.DESCRIBED: row, curate.CORRECTED: row | {"corrected": text, "finish": "stop"},
            curate.FILTERED: row | {"corrected": text, "finish": "stop", "dropped": None}}  # fmt: skip
    files = {tmp_path / name: [row] for name, row in rows.items()}
    for path, value in files.items():
        write(path, value)
    decisions = write(tmp_path / "decisions.jsonl", [{"image_id": "a", "action": "edit", "caption": "Black."}])
    export = ("curate", "export", "--out", tmp_path, "--images", images, "--decisions", decisions)
    assert run(*export) == 0 and run("curate", "filter", "--out", tmp_path) == 0
    capsys.readouterr()
    corrected = {tmp_path / curate.CORRECTED: files[tmp_path / curate.CORRECTED]}
    assert refused_or_read(("curate", "filter", "--out", tmp_path), corrected, capsys) > 20
    write(tmp_path / curate.FILTERED, files[tmp_path / curate.FILTERED])
    del files[tmp_path / curate.CORRECTED]
    files[decisions] = lines(decisions)
    assert refused_or_read(export, files, capsys) > 50
    assert [path.name for path in tmp_path.parent.iterdir()] == ["work"], "nothing is written elsewhere"


@pytest.mark.parametrize("args, code, message", [
    (("detail", "--prompts", "{tmp}/prompts"), 64, "byte 0 is no UTF-8 text"),
    (("detail", "--limit", 0), 64, "--limit 0: want at least 1"),
    (("detail", "--limit", -1), 64, "--limit -1"),
    (("detail", "--temperature", "nan"), 64, "temperature=nan"),
    (("detail", "--max-new-tokens", 0), 64, "max_tokens=0"),
    (("detail", "--timeout-secs", "nan"), 64, "timeout_secs=nan"),
    (("detail", "--max-usd", -1), 64, "max_usd=-1.0"),
    (("detail", "--usd-per-million-in", "inf"), 64, "usd_per_million_in=inf"),
    (("detail", "--base-url", "http://[::1"), 64, "base_url"),
    (("curate", "describe", "--images", "{tmp}", "--sample", -3), 64, "--sample -3: want at least 1"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused_in_one_line(args, code, message, tmp_path, capsys):
    folder = tmp_path / "prompts" / "detail_description"
    folder.mkdir(parents=True)
    (folder / "system_message.txt").write_bytes(b"\xff\xfe")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    path = write(tmp_path / "r.jsonl", records("A cat."))
    usual = {"--base-url": "http://127.0.0.1:9/v1", "--model": "m", "--out": tmp_path / "o"}
    usual |= {"--records": path} if args[0] == "detail" else {}
    options = [arg for pair in usual.items() if pair[0] not in args for arg in pair]
    assert run(*(str(arg).replace("{tmp}", str(tmp_path)) for arg in args), *options) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("step, rows, message", [
    ("filter", [{"image_id": "a", "image": "a.jpg", "text": "x", "corrected": "", "finish": "stop"}],
     "none of 1 descriptions is left"),
])  # fmt: skip
def test_a_step_that_leaves_nothing_is_65(step, rows, message, tmp_path, capsys):
    write(tmp_path / curate.CORRECTED, rows)
    assert run("curate", step, "--out", tmp_path) == 65
    assert message in capsys.readouterr().err


def test_records_that_are_none_are_65(tmp_path, capsys):
    (tmp_path / "r.json").write_text("[]")
    assert run("brief", "--records", tmp_path / "r.json", "--out", tmp_path) == 65
    assert "r.json: holds no records" in capsys.readouterr().err
