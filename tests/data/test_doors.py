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
def test_validate_lists_what_cannot_be_read(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_text(content)
    assert main(["validate", str(tmp_path / name)]) == 65
    out = capsys.readouterr().out
    assert all(text in out for text in said), out


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
        (["validate", "RECORDS", "--template", "v9"], "template 'v9' is unknown"),
        (["validate", "RECORDS", "--images", "nowhere"], "image folder 'nowhere'"),
        (["index", "RECORDS", "--tokenizer", "nope.model", "--legacy", "true"], "nope.model"),
    ],
)
def test_a_usage_error_is_one_line_and_64(make, tmp_path, capsys, arguments, said):
    make(1)
    arguments = [str(tmp_path / "a.json") if word == "RECORDS" else word for word in arguments]
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
