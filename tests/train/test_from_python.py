"""README's "From Python", block by block, on a tiny model and tiny pictures under the names that it uses."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

import llava_jax
from llava_jax.checkpoint import reader
from llava_jax.train import metrics
from tests.train import tiny


def blocks():
    """The Python blocks of the section, in order."""
    page = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("\n### From Python\n")[1].split("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def stand_ins(folder):
    """A tiny model, its records and its config, under README's names."""
    config = tiny.write_run(folder / "run")
    (folder / "checkpoints").mkdir()
    (folder / "run" / "base").rename(folder / "checkpoints" / "llava15_7b")
    (folder / "run" / "images").rename(folder / "my_pictures")
    records = json.loads((folder / "run" / "records.json").read_text()) * 5  # 2 % of 50 is one
    (folder / "my.json").write_text(json.dumps(records))
    for name, shade in (("photo.jpg", 90), ("other.jpg", 200)):
        Image.new("RGB", (30, 20), (shade, 50, 50)).save(folder / name)
    (folder / "configs").mkdir()
    text = config.read_text().replace(str(folder / "run" / "base"), "checkpoints/llava15_7b")
    text = text.replace("steps=12", "epochs=1")  # as llava15_7b_task has it
    text = text[: text.index("validation=")] + text[text.index("batch_samples=") :]
    (folder / "configs" / "llava15_7b_task.py").write_text(text)


def test_every_block_of_the_readme_runs_in_order(tmp_path, monkeypatch, capsys, compiled):
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    names, printed = {}, []
    for block in blocks():
        exec(compile(block, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 4 and all(printed)
    held_out = float(printed[1].splitlines()[-1])
    assert 0 < held_out < metrics.read("runs/task")[0]["loss"]
    assert reader.latest_step("runs/task") == 13 and reader.latest_step("runs/photos") == 50
    scores, loss = re.search(r"\[(.*)\] (\S+)$", printed[3].splitlines()[0]).groups()
    assert all(float(score) < 0 for score in scores.split(", ")) and float(loss) > 0
    assert printed[3].rstrip().endswith("(1, 4, 48)")


def test_importing_the_package_brings_neither_jax_nor_anything_else_that_is_large():
    code = ("import sys; before = set(sys.modules); import llava_jax\n"
            "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
            "print(*new - sys.stdlib_module_names)\nprint(llava_jax.__version__, *dir(llava_jax))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    new, names = done.stdout.splitlines()
    assert new == "llava_jax" and names.split() == [llava_jax.__version__, *dir(llava_jax)]


def test_every_public_name_is_there_and_has_a_docstring():
    for name in set(dir(llava_jax)) - {"__version__"}:
        assert getattr(llava_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'; it has Config, Conversation, "):
        _ = llava_jax.Trainr


def test_setup_reads_the_version_where_the_package_has_it():
    pytest.importorskip("setuptools")  # new environments have none
    setup = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tiny.ROOT, capture_output=True, text=True)
    assert setup.stdout.split()[-1] == llava_jax.__version__, setup.stderr
