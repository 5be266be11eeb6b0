"""model.json and the tokenizer: they come back, and nothing else is taken for them."""

import dataclasses
import json
import random
import shutil

import pytest

from llava_jax.checkpoint import model_json
from llava_jax.errors import UnusableCheckpoint

PROMPT = model_json.PromptMetadata("v1", False, "pad", False)
FILES = {"tokenizer.model": b"pieces", "tokenizer_config.json": b"{}"}


def _write(directory, bases=()):
    written = model_json.Metadata({"width": 4}, PROMPT, tuple(bases), {"layout": "hub"})
    model_json.write(directory, written, FILES)
    return written


def _edit(directory, change, checksum=False):
    path = directory / "model.json"
    content = json.loads(path.read_text())
    change(content)
    if checksum:
        content["checksum"] = model_json._checksum(content)
    path.write_text(json.dumps(content))


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    return model_json.epath.Path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket"))


def test_the_card_and_the_tokenizer_come_back(place):
    written = _write(place / "a", [model_json.Base("../b", 3, "sums:0", ("llm/.*", "vision/.*"))])
    assert model_json.read(place / "a") == written
    assert model_json.read_tokenizer_files(place / "a") == FILES


WRONG = {
    "newer": lambda c: c.update(format=3),
    "format true": lambda c: c.update(format=True),
    "unknown key": lambda c: c.update(extra=1),
    "missing key": lambda c: c.pop("source"),
    "no checksum": lambda c: c.pop("checksum"),
    "base without keys": lambda c: c.update(base=[{"path": "x"}]),
    "base is text": lambda c: c.update(base=["x"]),
    "no prompt": lambda c: c.update(prompt=None),
    "prompt's type": lambda c: c["prompt"].update(legacy="no"),
    "family": lambda c: c.update(family="other"),
    "tokenizer": lambda c: c.update(tokenizer={"tokenizer.model": 5}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_card_says_is_refused_by_name(tmp_path, name):
    _write(tmp_path)
    _edit(tmp_path, WRONG[name], checksum=name not in ("no checksum", "base is text"))
    with pytest.raises(UnusableCheckpoint, match="model.json"):
        model_json.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\udc80", '{"format": ' + "9" * 5000 + "}"])
def test_what_is_no_json_is_refused_by_name(tmp_path, content):
    _write(tmp_path)
    (tmp_path / "model.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UnusableCheckpoint, match="model.json"):
        model_json.read(tmp_path)


def test_a_flipped_bit_in_any_file_is_noticed_or_changes_nothing(tmp_path):
    written = _write(tmp_path, [model_json.Base("../b", 3, "sums:0", ("llm/.*",))])
    files, moments = [p for p in tmp_path.rglob("*") if p.is_file()], random.Random(0)
    noticed = 0
    for _ in range(600):
        path = moments.choice(files)
        before = path.read_bytes()
        after = bytearray(before)
        after[moments.randrange(len(after))] ^= 1 << moments.randrange(8)
        path.write_bytes(after)
        try:
            found = model_json.read(tmp_path)
            assert model_json.read_tokenizer_files(tmp_path) == FILES
            # Another path leads to something else, or nothing, and that has a fingerprint.
            base = dataclasses.replace(found.base[0], path=written.base[0].path, origin="")
            assert dataclasses.replace(found, base=(base,)) == written
        except UnusableCheckpoint:
            noticed += 1
        path.write_bytes(before)
    assert noticed > 500


def test_files_of_the_tokenizer_are_all_there_and_no_others(tmp_path):
    _write(tmp_path)
    folder = tmp_path / "tokenizer"
    (folder / ".DS_Store").write_bytes(b"not ours")
    model_json.read(tmp_path)
    (folder / "added_tokens.json").write_bytes(b"{}")
    with pytest.raises(UnusableCheckpoint, match="added_tokens.json: model.json names no such file"):
        model_json.read(tmp_path)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieceS")
    with pytest.raises(UnusableCheckpoint, match="tokenizer.model: it differs from its checksum"):
        model_json.read(tmp_path)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UnusableCheckpoint, match="tokenizer.model: it is missing"):
        model_json.read_tokenizer_files(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(UnusableCheckpoint, match="tokenizer: missing"):
        model_json.read(tmp_path)


def test_a_name_of_a_tokenizer_file_has_no_folder(tmp_path):
    with pytest.raises(ValueError, match="plain file name"):
        model_json.write(tmp_path, model_json.Metadata({}, PROMPT), {"../evil": b""})


def test_only_the_path_of_a_base_may_be_edited(tmp_path):
    _write(tmp_path, [model_json.Base("../b", 3, "sums:0", ("llm/.*",))])
    _edit(tmp_path, lambda c: c["base"][0].update(path="/new/place"))
    assert model_json.read(tmp_path).base[0].path == "/new/place"
    _edit(tmp_path, lambda c: c["base"][0].update(step=4))
    with pytest.raises(UnusableCheckpoint, match="differs from its checksum.*only the `path` of a base"):
        model_json.read(tmp_path)


@pytest.mark.parametrize(
    "directory, path, stored, tried",
    [
        ("/runs/ft", "/runs/base", "../base", ["/runs/base"]),
        ("/runs/ft", "/runs/ft/random", "random", ["/runs/ft/random"]),
        ("/home/u/ft", "/data/base", "../../../data/base", ["/data/base"]),
        ("/runs/ft", "gs://b/base", "gs://b/base", ["gs://b/base"]),
        ("gs://b/runs/ft", "gs://b/base", "../../base", ["gs://b/base"]),
        ("gs://b/runs/ft", "gs://other/base", "gs://other/base", ["gs://other/base"]),
        ("gs://b/runs/ft", "/data/base", "/data/base", ["/data/base"]),
    ],
)
def test_a_base_is_named_from_where_the_checkpoint_lies(directory, path, stored, tried):
    base = model_json._relative(model_json.epath.Path(directory), model_json.Base(path, 1, "sums:0", ()))
    assert (base.path, base.origin) == (stored, path)
    assert [str(place) for place in model_json.candidates(directory, base)] == tried


def test_a_base_is_looked_for_beside_the_checkpoint_first_and_then_where_it_was():
    base = model_json.Base("../base", 1, "sums:0", (), "/old/base")
    assert [str(place) for place in model_json.candidates("/new/ft", base)] == ["/new/base", "/old/base"]
    assert [str(place) for place in model_json.candidates("gs://b/new/ft", base)] == ["gs://b/new/base", "/old/base"]


def test_a_base_is_looked_for_beside_what_a_link_points_to(tmp_path):
    (tmp_path / "runs" / "ft").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "ft")
    base = model_json.Base("../base", 1, "sums:0", (), "/old/base")
    tried = [tmp_path / "base", tmp_path / "runs" / "base", "/old/base"]
    assert [str(place) for place in model_json.candidates(tmp_path / "latest", base)] == [str(place) for place in tried]


@pytest.mark.parametrize(
    "directory, files, message",
    [
        ("hub", ["config.json"], "convert import .*hub DST"),
        ("run", ["metrics.jsonl", "config.json"], "once it has begun to train"),
        ("empty", ["x"], "name a directory that `convert` or `train` wrote"),
        ("nothing", [], "convert assemble.*train --workdir"),
    ],
)
def test_a_directory_without_a_card_says_how_to_get_one(tmp_path, directory, files, message):
    for name in files:
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).write_text("{}")
    with pytest.raises(UnusableCheckpoint, match=message):
        model_json.read(tmp_path / directory)


def test_a_name_of_the_hub_says_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnusableCheckpoint, match=r"hf download llava-hf/llava-1.5-7b-hf --local-dir llava-1.5-7b-hf`"):
        model_json.read("llava-hf/llava-1.5-7b-hf")
