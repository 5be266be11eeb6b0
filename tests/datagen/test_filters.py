"""Balancing captions by their phrases: who is skipped, who is thinned, and that the seed alone decides."""

import collections
import json

import pytest

from llava_jax.datagen import phrases
from llava_jax.datagen.__main__ import main
from llava_jax.datagen.filters import balance


def test_phrases_rarer_than_three_add_no_caption():
    captions = [["cat"], ["cat"], ["dog"], ["dog"], ["dog"], ["cat", "dog"], [], ["bird"]]
    selection = balance([*captions, ["horse"], ["horse"]])
    assert selection.kept == [0, 1, 2, 3, 4, 5] and (selection.phrases, selection.rare, selection.without) == (4, 2, 4)


@pytest.mark.parametrize("count, kept, thinned", [(99, 99, 0), (100, 100, 0), (101, 100, 1), (500, 100, 1)])
def test_a_phrase_above_a_hundred_gives_a_hundred(count, kept, thinned):
    selection = balance([["cat"]] * count)
    assert len(selection.kept) == kept == len(set(selection.kept)) and selection.thinned == thinned


def test_rare_phrases_go_first_and_their_captions_count_for_the_frequent_ones():
    captions = [["cat", "hat"]] * 60 + [["cat"]] * 300
    assert len(balance(captions).kept) == 100, "60 by their hats, and 40 more cats"
    literal = balance(captions, top_up=False).kept
    assert 100 < len(literal) <= 160, "60 by their hats, and 100 cats of any kind"
    assert set(range(60)) <= set(balance(captions).kept) and set(range(60)) <= set(literal)


def test_a_frequent_phrase_that_rarer_ones_already_filled_adds_none():
    captions = [["cat", f"hat {i // 50}"] for i in range(200)] + [["cat"]] * 100
    assert balance(captions).kept == list(range(200))


def test_a_phrase_counts_once_a_caption_and_not_by_its_article_or_case():
    assert balance([["A cat", "the cat", "CAT"], ["cat"]]).kept == []
    assert balance([["A  Cat"], ["the cat"], ["His cat"]]).phrases == 1


def test_the_same_seed_keeps_the_same_and_phrases_do_not_disturb_each_other():
    captions = [["cat"]] * 300
    assert balance(captions) == balance(captions) and balance(captions).kept != balance(captions, seed=1).kept
    assert [i for i in balance([*captions, *[["dog"]] * 300]).kept if i < 300] == balance(captions).kept


def test_limits_out_of_order_are_refused():
    with pytest.raises(ValueError, match="least=5, most=4"):
        balance([], least=5, most=4)


def test_every_phrase_that_is_not_rare_is_in_the_pool_as_often_as_it_may():
    """The rule as a property, on captions of Zipf's law."""
    captions = [[f"p{(i * 7919 + j * 104729) % (1 + (i * j + i) % 97)}" for j in range(3)] for i in range(3000)]
    holders = collections.Counter(phrase for row in captions for phrase in set(row))
    for top_up in (True, False):
        kept = collections.Counter(phrase for i in balance(captions, top_up=top_up).kept for phrase in set(captions[i]))
        assert all(kept[phrase] >= min(count, 100) for phrase, count in holders.items() if count >= 3)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A black dog is running on the wet grass.", ["black dog", "wet grass"]),
        ("Portrait of a young woman, smiling", ["portrait", "young woman", "smiling"]),
        ("the actor's well-known hat", ["actor's well-known hat"]),
        ("", []),
        ("on the", []),
    ],
)
def test_runs_of_words_stand_in_for_noun_phrases(caption, expected):
    assert phrases.runs(caption) == expected


def test_the_command_writes_the_records_unchanged_and_counts_them(tmp_path, capsys):
    rows = [{"id": i, "image": f"{i}.jpg", "caption": "a red cat" if i % 2 else f"thing{i}", "url": "kept"}
            for i in range(300)]  # fmt: skip
    (tmp_path / "all.json").write_text(json.dumps(rows))
    assert main(["filter", "--records", str(tmp_path / "all.json"), "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "filtered.json").read_text())
    assert len(kept) == 100 and all(row in rows for row in kept)
    assert "100 of 300 captions; 151 phrases, 150 of them rarer than 3" in capsys.readouterr().out
    assert main(["brief", "--records", str(tmp_path / "filtered.json"), "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "brief.json").read_text())) == 100


def test_phrases_of_any_tagger_may_come_from_a_file(tmp_path, monkeypatch, capsys):
    rows = [{"id": str(i), "image": "a.jpg", "caption": "x"} for i in range(4)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    phrase_lines = [json.dumps({"id": str(i), "phrases": ["cat"] if i else []}) for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(phrase_lines))
    monkeypatch.chdir(tmp_path)
    arguments = ["filter", "--records", "all.json", "--out", ".", "--phrases", "p.jsonl"]
    assert main(arguments) == 0
    assert [row["id"] for row in json.loads((tmp_path / "filtered.json").read_text())] == ["1", "2", "3"]
    (tmp_path / "p.jsonl").write_text(phrase_lines[0])
    assert main(arguments) == 65 and "no phrases of 3 records, '1'" in capsys.readouterr().err


def test_a_missing_spacy_is_named_with_the_remedy(tmp_path, capsys):
    (tmp_path / "all.json").write_text('[{"id": 1, "image": "a.jpg", "caption": "x"}]')
    arguments = ["filter", "--records", f"{tmp_path}/all.json", "--out", f"{tmp_path}", "--phrases", "spacy:none_such"]
    assert main(arguments) == 64 and "pip install spacy" in capsys.readouterr().err
