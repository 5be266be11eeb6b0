"""The verbs as a person runs them: output, exit codes, one clear line for an error."""

import itertools
import json

import pytest

from llava_jax.data.__main__ import main


@pytest.fixture
def tokenizer(golden):
    return str(golden / "tiny_llama.model")


def test_show_writes_what_the_reference_writes(golden, tokenizer, tmp_path, capsys):
    """All 204 recorded cases: ids always, labels where they were recorded without a warning."""

    def mode(case):
        return case["version"], str(case["legacy"]).lower(), case["mm_use_im_start_end"]

    cases = sorted(json.loads((golden / "text_tiny.json").read_text())["cases"], key=mode)
    for (template, legacy, start_end), group in itertools.groupby(cases, key=mode):
        wanted = list(group)
        rows = [{"id": case["case"], "conversations": case["conversations"]}
                | ({"image": "x.png"} if case["has_image"] else {}) for case in wanted]  # fmt: skip
        (tmp_path / "r.json").write_text(json.dumps(rows))
        flags = ["--json"] + ["--image-start-end"] * start_end
        assert main(["show", str(tmp_path / "r.json"), "--template", template, "--tokenizer", tokenizer,
                     "--legacy", legacy, *flags]) == 0  # fmt: skip
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for case, line in zip(wanted, shown, strict=True):
            labels = case["labels"] if case["labels"] and not case["warning"] else line["labels"]
            assert line == {"id": case["case"], "input_ids": case["input_ids"], "labels": labels}


def test_show_marks_what_is_learned(make, tmp_path, tokenizer, capsys):
    make(2)
    assert main(["show", str(tmp_path / "a.json"), "--tokenizer", tokenizer, "--legacy", "true"]) == 0
    out = capsys.readouterr().out
    assert "a.json[1] id='r1'" in out and "<image>" in out and "⟦ ▁A" in out and "</s> ⟧" in out


def test_show_goes_on_after_a_record_that_cannot_be_encoded(make, tmp_path, tokenizer, capsys):
    rows = [r.raw for r in make(2)]
    make([rows[0], {"id": "x", "conversations": [{"from": "bot", "value": ""}]}, rows[1]])
    code = main(["show", str(tmp_path / "a.json"), "--tokenizer", tokenizer, "--legacy", "true", "--json"])
    out, err = capsys.readouterr()
    assert code == 65 and [json.loads(line)["id"] for line in out.splitlines()] == ["r0", "r1"]
    assert "a.json[1]" in err and "'bot'" in err and len(err.splitlines()) == 1


def test_validate_says_clean_or_lists_and_counts(make, folder, tmp_path, capsys):
    rows = [r.raw for r in make(3)]
    path = str(tmp_path / "a.json")
    assert main(["validate", path, "--images", str(folder)]) == 0
    assert "a.json: 3 records, 0 bad" in capsys.readouterr().out
    make([*rows, {"id": "x", "conversations": []}, rows[0] | {"id": "r1", "image": "no.png"}])
    assert main(["validate", path, "--images", str(folder)]) == 65
    out = capsys.readouterr().out
    assert "a.json[3] id='x' empty_conversations: " in out
    assert "a.json[4] id='r1' image_without_marker: " in out
    assert "1 empty_conversations    refused" in out and "1 duplicate_id           used" in out
    assert out.splitlines()[-1].startswith(f"{path}: 5 records, 2 bad, in ")


def test_validate_as_json_and_with_token_counts(make, folder, tmp_path, tokenizer, capsys):
    make(6)
    flags = ["--tokenizer", tokenizer, "--legacy", "false", "--row-tokens", "75", "--image-features", "4"]
    assert main(["validate", str(tmp_path / "a.json"), "--images", str(folder), "--open-images", "--json", *flags]) == 0
    *found, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert found and {f["reason"] for f in found} == {"cut"} and not any(f["refused"] for f in found)
    assert summary["records"] == 6 and summary["bad"] == 0 and summary["counts"] == {"cut": len(found)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"id": 1}\n{"id": \n[]\n',
         ["a.jsonl:2' unreadable: no valid JSON", "bad_shape", "3 records, 3 bad"]),
        ("a.json", '[{"id": 1}', ["bad_source", "a.json:1:11", "1 bad_source"]),
        ("a.json", "[]", ["bad_source", "holds no records", "1 bad_source"]),
        ("a.jsonl", "\n\n", ["bad_source", "holds no records"]),
    ],
)  # fmt: skip
def test_validate_lists_what_cannot_be_read(tmp_path, monkeypatch, capsys, name, content, said):
    monkeypatch.chdir(tmp_path)  # long names are shortened
    (tmp_path / name).write_text(content)
    assert main(["validate", name]) == 65
    out = capsys.readouterr().out
    assert all(text in out for text in said), out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config with its base, ten records and their pictures."""
    from tests.train import tiny  # here only: it brings jax

    return tiny.write_run(tmp_path_factory.mktemp("run"))


def test_validate_knows_what_a_config_says(run, tmp_path, capsys):
    """Its sources, format, limits and budget; what it refuses is what `train` refuses."""
    records = json.loads((run.parent / "records.json").read_text())
    records[1]["image"] = ["1.jpg", "2.jpg"]
    records[1]["conversations"][0]["value"] = "<image><image>?"
    records[2]["conversations"][0]["value"] += " and" * 200
    (tmp_path / "mine.json").write_text(json.dumps(records))
    assert main(["validate", "--config", str(run)]) == 0
    assert "2 sources: 10 records, 0 bad, in" in capsys.readouterr().out
    mine = ["--config", str(run), "--config.data.sources.0.path", str(tmp_path / "mine.json")]
    assert main(["validate", *mine]) == 65
    out = capsys.readouterr().out
    assert "id='r1' too_many_images: 2 images for images_per_group=1: set data.images_per_group=2" in out
    assert "id='r2' no_learned_tokens: " in out and "tokens for a row of 96" in out
    assert "mine.json: 10 records, 2 bad" in out and "records.json: 10 records, 0 bad (of validation" in out
    wider = ["--config.data.images_per_group=2", "--config.data.row_tokens=250"]
    assert main(["validate", *mine, *wider]) == 65  # 200 words are more
    assert main(["validate", *mine, *wider, "--config.data.skip_budget=0.1"]) == 0
    assert "10 records, 1 bad (skip_budget=0.1 allows 1)" in capsys.readouterr().out.splitlines()[-1]
    images = f"--config.data.sources.0.images={run.parent / 'images'}"
    assert main(["validate", str(tmp_path / "mine.json"), *mine, images, "--json"]) == 65
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.data.row_tokns=3"], "unknown key 'data.row_tokns'"),
        (["--config.data.row_tokens=100000"], "data.row_tokens=100000: the model has"),
        (["--row-tokens", "3"], "--row-tokens: the config says it"),
        (["--out", "x.json"], "--out x.json is of one file: name it as RECORDS beside --config"),
    ],
)
def test_validate_refuses_what_a_config_cannot_say(run, capsys, words, said):
    assert main(["validate", "--config", str(run), *words]) == 64
    assert said in capsys.readouterr().err


def test_validate_writes_what_is_fit_as_it_was_written_and_train_takes_it(run, tmp_path, capsys):
    rows = ['{"id": "a", "x":1.50, "conversations": [{"from":"human","value":"\\u00e9"},{"from":"gpt","value":"Ho"}]}',
            '{"id": "b", "audio": "clip.mp3", "conversations": []}', '{"id": ',
            '{"id": "c", "image": "0.jpg", "conversations": [{"from":"human","value":"<image>"},'
            '{"from":"gpt","value":"Ho"}]}']  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for name in ("good.json", "good.jsonl"):
        command = ["validate", str(tmp_path / "a.jsonl"), "--images", str(run.parent / "images"), "--out"]
        assert main([*command, str(tmp_path / name)]) == 65
        out = capsys.readouterr().out
        assert f"wrote 2 records to {tmp_path / name}" in out and "1 unread_key" in out and "1 unknown_key" in out
        assert "'x' is not read; 1 record(s) have it" in out
        assert main([*command, str(tmp_path / name)]) == 64
        assert "exists already" in capsys.readouterr().err
        assert main(["validate", str(tmp_path / name), "--images", str(run.parent / "images"), "--open-images"]) == 0
    assert (tmp_path / "good.json").read_text() == f"[\n{rows[0]},\n{rows[3]}\n]\n"
    assert (tmp_path / "good.jsonl").read_text() == f"{rows[0]}\n{rows[3]}\n"
    (tmp_path / "none.jsonl").write_text(rows[1])
    assert main(["validate", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "no.json")]) == 65
    assert "no.json is not written: no record is fit" in capsys.readouterr().out and not (tmp_path / "no.json").exists()


def talks(*rows):
    return json.dumps([{"id": str(i), **row} for i, row in enumerate(rows)])


ASKED = [{"from": "human", "value": "What colour is the square?"}, {"from": "gpt", "value": "red"}]
MESSAGES = [{"role": "user", "content": "<image>What colour is the square?"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"images": ["0.png"], "conversations": ASKED}, 65, "1 image(s) under 'images' and no <image>"),
        ({"images": [], "conversations": ASKED}, 0, "0 bad"),
        ({"video": "clip.mp4", "conversations": ASKED}, 65, "unread_key: video='clip.mp4': video is not read without"),
        ({"images": ["0.png"], "messages": MESSAGES}, 0, "0 bad"),
        ({"system_prompt": "Answer in one word.", "conversations": ASKED}, 0, "0 bad"),
        ({"tools": "[]", "conversations": ASKED}, 0, "0 bad"),
        ({"tools": '[{"name": "f"}]', "conversations": ASKED}, 65, "unread_key: tools="),
    ],
)
def test_keys_of_others_are_read_or_refused_by_name(tmp_path, folder, capsys, row, code, said):
    (tmp_path / "a.json").write_text(talks(row))
    assert main(["validate", str(tmp_path / "a.json"), "--images", str(folder)]) == code
    assert said in capsys.readouterr().out


def test_a_system_text_is_shown_wherever_it_is_written(tmp_path, tokenizer, capsys):
    first = [{"from": "system", "value": "Answer in one word."}, *ASKED]
    asked = {"conversations": ASKED}
    beside = [{name: first[0]["value"], **asked} for name in ("system", "system_prompt")]
    (tmp_path / "a.json").write_text(talks({"conversations": first}, *beside, asked))
    assert main(["show", str(tmp_path / "a.json"), "--tokenizer", tokenizer, "--legacy", "true", "--json"]) == 0
    ids = [json.loads(line)["input_ids"] for line in capsys.readouterr().out.splitlines()]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_an_answer_that_is_marked_so_is_not_learned(tmp_path, tokenizer, capsys):
    wrong = [ASKED[0], {"from": "gpt", "value": "blue", "loss": False}]
    right = [{"from": "human", "value": "Look again."}, {"from": "gpt", "value": "red", "loss": True}]
    (tmp_path / "a.json").write_text(talks({"conversations": [*wrong, *right]}))
    assert main(["show", str(tmp_path / "a.json"), "--tokenizer", tokenizer, "--legacy", "true"]) == 0
    out = capsys.readouterr().out
    inside = out.replace(" ", "").partition("⟦")[2].partition("⟧")[0]
    assert out.count("⟦") == 1 and inside == "▁red</s>" and "blue" in out.replace(" ", "")


def test_absolute_paths_are_taken_inside_the_image_folder_and_refused_outside(tmp_path, folder, capsys):
    shown = [{"from": "human", "value": "<image>"}, ASKED[1]]
    (tmp_path / "a.json").write_text(talks({"image": str(folder / "0.png"), "conversations": shown}))
    for images in (folder, "/", folder.parent):
        assert main(["validate", str(tmp_path / "a.json"), "--images", str(images), "--open-images"]) == 0
    for images in ([], ["--images", str(tmp_path)]):
        assert main(["validate", str(tmp_path / "a.json"), *images]) == 65
        out = capsys.readouterr().out
        assert "unsafe_path" in out and "write paths relative to it (--images" in out
        assert "or name a folder above them" in out


def test_index_prints_lengths_and_keeps_them(make, tmp_path, tokenizer, capsys):
    make(9)
    path, cache = str(tmp_path / "a.json"), tmp_path / "cache"
    assert main(["index", path, "--json"]) == 0
    words = json.loads(capsys.readouterr().out)
    assert (words["records"], words["with_image"], words["unit"], words["p100"]) == (9, 6, "words", 17)
    assert sum(row["records"] for row in words["histogram"]) == 9
    assert main(["index", path, "--tokenizer", tokenizer, "--legacy", "true", "--cache", str(cache)]) == 0
    assert "unit=tokens" in capsys.readouterr().out and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: VERB"),
        (["show", "RECORDS"], "required: --tokenizer"),
        (["validate", "nope.json"], "'nope.json' does not exist"),
        (["validate"], "validate wants RECORDS, or --config FILE"),
        (["validate", "RECORDS", "--config.data.row_tokens=3"], "--config.data.row_tokens changes a config: name it"),
        (["validate", "RECORDS", "--config", "nope.py"], "config nope.py: no such file"),
        (["validate", "RECORDS", "--out", "good.txt"], "--out good.txt: want a name that ends in .json"),
        (["validate", "RECORDS", "--template", "v9"], "template 'v9' is unknown"),
        (["validate", "RECORDS", "--row-tokens", "1000000000"], "--row-tokens=1000000000: want 1 to 1,048,576"),
        (["index", "RECORDS", "--row-tokens", "300"], "--row-tokens=300: an image takes 576 positions"),
        (["validate", "RECORDS", "--tokenizer", "MODEL", "--legacy", "true", "--template", "mpt"], "'mpt' is written"),
        (["validate", "RECORDS", "--images", "nowhere"], "image folder 'nowhere'"),
        (["index", "RECORDS", "--tokenizer", "nope.model", "--legacy", "true"], "nope.model"),
    ],
)
def test_a_usage_error_is_one_line_and_64(make, tokenizer, tmp_path, capsys, arguments, said):
    make(1)
    places = {"RECORDS": str(tmp_path / "a.json"), "MODEL": tokenizer}
    arguments = [places.get(word, word) for word in arguments]
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 64 and said in err and len(err.splitlines()) == 1


def test_data_that_cannot_be_read_is_65(tmp_path, capsys, tokenizer):
    (tmp_path / "a.json").write_text("{}")
    assert main(["show", str(tmp_path / "a.json"), "--tokenizer", tokenizer, "--legacy", "true"]) == 65
    assert "want one JSON list" in capsys.readouterr().err
