"""Files to records, and messages that say where."""

import json

import numpy as np
import pytest

from llava_jax import files
from llava_jax.data import index
from llava_jax.data.index import sizes, token_lengths, word_lengths
from llava_jax.data.sources import hold_out, open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.encode import encode


def test_a_list_and_lines_hold_the_same_records(make, tmp_path):
    listed, lined = make(9), make(9, "a.jsonl")
    assert [r.raw for r in listed] == [r.raw for r in lined]
    assert [r.conversation for r in listed] == [r.conversation for r in lined]
    assert listed[3].where == f"{tmp_path}/a.json[3]" and lined[3].where == f"{tmp_path}/a.jsonl:4"
    assert listed[3].id == lined[3].id == "r3"


def test_offsets_hold_for_text_beyond_ascii_and_odd_spacing(tmp_path):
    rows = [{"id": "é"}, {"id": "猫🐈", "x": "]},[{"}, {"id": "\ud83d\ude00"}]
    path = tmp_path / "u.json"
    path.write_bytes(b"\xef\xbb\xbf \n[\n" + ",\n ".join(json.dumps(r, ensure_ascii=False) for r in rows[:2]).encode()
                     + b" , " + json.dumps(rows[2]).encode() + b"\r\n ]\n")  # fmt: skip
    assert [r.raw for r in open_source(path)] == [{"id": "é"}, {"id": "猫🐈", "x": "]},[{"}, {"id": "😀"}]


def test_lines_count_blank_ones(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": 1}\r\n\n  \n{"id": 2}')
    assert [(r.line, r.id) for r in open_source(tmp_path / "b.jsonl")] == [(1, "1"), (4, "2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"id": 1},\n {"id": }]', r"a\.json:2:9: no valid JSON"),
        ("a.json", b'[{"id": 1},\n {"id": 2}', r"a\.json:2:11: no valid JSON.*cut short"),
        ("a.json", b'[{"id": 1}, {"conv', r"a\.json:1:14: no valid JSON"),
        ("a.json", b'{"id": 1}', r"a\.json:1:1: want one JSON list"),
        ("a.json", b"", r"a\.json:1:1: want one JSON list"),
        ("a.json", b"[1] x", r"a\.json:1:4: .*after the list's end"),
        ("a.json", b"[" * 100000, r"a\.json:1:2: no valid JSON"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b'["\xff"]', r"a\.json:1: byte 0xff is no UTF-8"),
        ("a.jsonl", b"\n", "holds no records"),
    ],
)
def test_a_file_that_is_no_json_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)


def test_what_is_not_there_is_said(tmp_path, make):
    with pytest.raises(FileNotFoundError, match="nope.json"):
        open_source(tmp_path / "nope.json")
    with pytest.raises(ValueError, match=r"want \.json"):
        (tmp_path / "a.txt").write_text("")
        open_source(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="image folder"):
        make(2)
        open_source(tmp_path / "a.json", tmp_path / "pictures")
    with pytest.raises(ValueError, match="weight=0.1 shows none of its 2"):
        open_source(tmp_path / "a.json", weight=0.1)


def test_the_fingerprint_is_of_the_content_only(make):
    assert make(3).fingerprint == make(3, "b.json").fingerprint != make(4).fingerprint


def test_word_lengths_count_as_the_reference_s_sampler(make):
    assert word_lengths(make(4)).tolist() == [-5, 8, 10, -11]
    odd = [{}, 3, {"image": "x", "conversations": []}, {"conversations": [{"value": 4}, 5]}]
    assert word_lengths(make(odd, "odd.json")).tolist() == [-1, -1, -1, -1]


def test_lengths_are_kept_for_this_data_and_this_code(make, v1, place, monkeypatch, caplog):
    source, cache = make(4), place / "lengths"
    fresh = token_lengths(source, v1, cache)
    (kept,) = files.listed(cache)
    with monkeypatch.context() as no_measuring:
        no_measuring.setattr(index, "_measured", None)
        assert token_lengths(source, v1, cache).tolist() == fresh.tolist()
    word_lengths(source, cache)
    assert len(files.listed(cache)) == 2
    # A release that counts otherwise does not find what this one counted.
    monkeypatch.setattr(index, "_code", lambda: "another")
    files.write_whole(kept, b"")
    assert token_lengths(source, v1, cache).tolist() == fresh.tolist() and len(files.listed(cache)) == 3
    assert not [record for record in caplog.records if record.name.startswith("llava_jax")]


def test_a_damaged_length_is_measured_again_and_said(make, v1, place, caplog):
    source, cache = make(4), place / "lengths"
    fresh = token_lengths(source, v1, cache)
    (kept,) = files.listed(cache)
    whole, rng = files.read(kept), np.random.default_rng(0)
    flips = [bytes([*whole[:i], whole[i] ^ 1 << int(rng.integers(8)), *whole[i + 1 :]]) for i in range(len(whole))]
    # The first is numpy's own and sound, as a release before this one has left it.
    for content in (whole[:-32], b"", whole[:-3], whole + b"0", *flips[::7]):
        files.write_whole(kept, content)
        caplog.clear()
        assert token_lengths(source, v1, cache).tolist() == fresh.tolist()
        assert [record.message for record in caplog.records if record.name.startswith("llava_jax")] == [
            f"{kept} is damaged: its records are measured again"
        ]
    assert files.read(kept) == whole


def test_a_refused_record_has_token_length_0(make, v1):
    assert token_lengths(make([{"id": "bad", "conversations": []}]), v1).tolist() == [0]


def test_sizes_are_those_of_what_encode_makes(make, v1):
    source = make([*(record.raw for record in make(5)), {"id": "bad"}])
    examples = [encode(source[i].conversation, v1, source.images) for i in range(5)]
    wanted = [[len(example.tokens), len(example.images)] for example in examples]
    assert sizes(source, v1).tolist() == [*wanted, [0, 0]] and {images for _, images in wanted} == {0, 1}


def test_records_held_out_are_the_same_whenever_they_are_asked_for_and_the_rest_is_trained_on(make, v1, tmp_path):
    source = make(50)
    kept, apart = hold_out(source, 0.1, seed=7)
    assert (len(kept), len(apart)) == (45, 5)
    ids = [[record.id for record in part] for part in (kept, apart)]
    assert sorted(sum(ids, [])) == sorted(record.id for record in source) and ids[1] != [f"r{i}" for i in range(5)]
    again = hold_out(make(50, "other.json"), 0.1, seed=7)
    assert [part.fingerprint for part in again] == [kept.fingerprint, apart.fingerprint]
    assert len({source.fingerprint, kept.fingerprint, apart.fingerprint, hold_out(source, 0.1, 8)[1].fingerprint}) == 4
    assert kept[3] == source[int(kept.chosen[3])] == kept.text(3) and kept.written(3) == source.written(kept[3].index)
    assert token_lengths(kept, v1).tolist() == token_lengths(source, v1)[kept.chosen].tolist()
    for share in (0.001, 0.999):
        with pytest.raises(UsageError, match=f"data.hold_out={share} of the 50 records of 'a.json' holds"):
            hold_out(source, share, 7)


def test_a_part_knows_which_of_its_records_are_unreadable(tmp_path):
    lines = ["{}" if i % 3 else "{" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for part in hold_out(open_source(tmp_path / "a.jsonl"), 0.4, 1):
        assert part.unreadable == [i for i, record in enumerate(part) if record.fault] != []


def test_a_record_is_written_again_as_it_was_written(tmp_path):
    text = '[\n {"id": 1, "x": "\\u00e9 é",\r\n  "y": 1.50},\n {"id":2}\n]'
    (tmp_path / "a.json").write_text(text, newline="")
    assert [open_source(tmp_path / "a.json").written(i) for i in range(2)] == [
        '{"id": 1, "x": "\\u00e9 é",   "y": 1.50}', '{"id":2}',
    ]  # fmt: skip
