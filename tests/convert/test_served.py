"""`verify --served`: the table and the exit code, with transformers, and llama.cpp where xllamacpp is installed."""

import importlib.util
import re

import pytest

from llava_jax.convert import exporting, importing, readers, served
from llava_jax.convert.__main__ import main as convert
from tests.convert import tiny

SAME = re.compile(r" *\d+ \d pictures? +same +same +same +(\S+)")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name, seed in (("ours", 0), ("other", 1)):
        tiny.write_hub(folder / f"{name}_in", tiny.hub_tensors(seed))
        importing.import_checkpoint(folder / f"{name}_in", folder / name)
    exporting.export("hf", folder / "ours", folder / "hf")
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(served, "PROMPTS", 4)
    monkeypatch.setattr(served, "NEW_TOKENS", 4)


def verify(folder, export, *options):
    return convert(["verify", "--served", str(folder / export), "--checkpoint", str(folder / "ours"), *options])


def test_twenty_prompts_of_all_shapes_are_the_same_every_time():
    prompts = served.make_prompts(28)
    assert prompts == served.make_prompts(28) and len(prompts) == 20
    assert {(len(prompt.pictures), len(prompt.turns)) for prompt in prompts} == {(1, 1), (2, 1), (1, 3)}
    assert len({picture for prompt in prompts for picture in prompt.pictures}) == 24


def test_an_export_answers_in_transformers_as_its_checkpoint(exported, few, capsys):
    pytest.importorskip("torch")
    assert verify(exported, "hf", "--with", "transformers") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["transformers", "prompt", "ids", "greedy", "ids", "text", "max", "|logp", "difference|"]
    rows = [SAME.fullmatch(line) for line in lines[1:5]]
    assert all(rows) and all(float(row[1]) < 1e-5 for row in rows)
    assert lines[5] == "transformers: 4 of 4 prompts have the same prompt ids, greedy ids and text"


def test_an_export_of_another_checkpoint_is_told_by_the_exit_code(exported, few, capsys):
    pytest.importorskip("torch")
    folder = exported
    paths = ["--served", str(folder / "hf"), "--checkpoint", str(folder / "other")]
    command = ["verify", *paths, "--with", "transformers"]
    assert convert(command) == 66
    out, error = capsys.readouterr()
    assert "DIFFER" in out and "transformers differ from those of" in error


def test_what_is_not_installed_is_skipped_by_name(exported, few, monkeypatch, capsys):
    pytest.importorskip("torch")
    absent = readers.READERS["vllm"]._replace(modules=("a_module_of_no_such_name",))
    monkeypatch.setitem(readers.READERS, "vllm", absent)
    assert verify(exported, "hf") == 0
    assert "vllm: skipped, a_module_of_no_such_name is not installed" in capsys.readouterr().out
    assert verify(exported, "hf", "--with", "vllm") == 64
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, wish", [
    (["verify"], "want DIR alone"), (["verify", "--served", "x"], "want DIR alone"),
    (["verify", "d", "--with", "vllm"], "goes with --served"),
    (["verify", "--served", "HF", "--checkpoint", "OURS", "--with", "ollama"], "--with ollama: wanted some of"),
    (["verify", "--served", "HF", "--checkpoint", "OURS", "--with", "llama.cpp"], r"no \*.gguf there"),
    (["verify", "--served", "OURS", "--checkpoint", "OURS"], "wanted an export of the format hf"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(exported, arguments, wish, capsys):
    paths = {"HF": str(exported / "hf"), "OURS": str(exported / "ours")}
    assert convert([paths.get(one, one) for one in arguments]) == 64
    assert re.search(wish, capsys.readouterr().err)


@pytest.mark.slow
def test_llama_cpp_reads_the_same_prompts_and_says_the_same_of_text(exported, capsys):
    """Its CLIP is not ours (README of an export): ids of prompts are, and log-probabilities behind a text."""
    pytest.importorskip("xllamacpp")
    assert importlib.util.find_spec("gguf")
    exporting.export("gguf", exported / "ours", exported / "f32", dtype="f32")
    assert verify(exported, "f32") in (0, 66)
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r" *\d+ \d pictures? +(\w+) +\w+ +\w+ +(\S+)", line) for line in lines[1:21]]
    assert all(row[1] == "same" and float(row[2]) < 0.1 for row in rows)
