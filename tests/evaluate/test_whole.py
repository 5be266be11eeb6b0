"""A checkpoint of the demo asked by one host and by two: from questions to the same numbers."""

import json

import pytest

from llava_jax.convert import __main__ as convert
from llava_jax.demo import bases, records
from llava_jax.evaluate import __main__ as command

SIZES = records.Sizes(train=2, heldout=20, unseen=12, heldout_per_kind=4, unseen_per_kind=1)


def run(*args):
    return command.main([str(arg) for arg in args])


@pytest.mark.slow
def test_two_hosts_and_one_give_the_demos_checkpoint_the_same_score(tmp_path, capsys):
    test_set = records.write(tmp_path / "images", 0, SIZES)["heldout"]
    args = ("assemble", tmp_path / "base", "--vision", bases.ASSETS / "clip", "--llm", bases.ASSETS / "llama")
    assert convert.main([str(arg) for arg in args]) == 0
    rows = [{"id": str(i), "image": test_set.pictures[picture], "question": turn.question, "answer": turn.answer,
             "category": turn.kind} for i, (picture, turn) in enumerate(test_set.questions)]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--benchmark", "custom", "--data", tmp_path)
    ask = ("answer", *options, "--checkpoint", tmp_path / "base", "--max-new-tokens", 32, "--slots", 8)
    assert run(*ask, "--out", tmp_path / "one.jsonl") == 0
    for host in range(2):
        assert run(*ask, "--out", tmp_path / "two.jsonl", "--host", host, "--hosts", 2) == 0
    shards = sorted(tmp_path.glob("two-*.jsonl"))
    assert run("merge", *options, *shards, "--out", tmp_path / "merged.jsonl") == 0
    assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    for name, files in (("one", [tmp_path / "one.jsonl"]), ("merged", shards)):
        assert run("score", *options, *files, "--out", tmp_path / f"{name}.json") == 0
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "merged")]
    assert results[0] == results[1] and results[0]["numbers"]["accuracy"]["mean"] > 0  # it guesses some, blind as it is
    assert len({json.loads(line)["text"] for line in (tmp_path / "one.jsonl").read_text().splitlines()}) > 5
