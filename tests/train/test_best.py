"""A run that keeps its best step and ends when none gets better: killed at any point it keeps and ends the same."""

import json
import shutil

import jax
import numpy as np
import pytest

from llava_jax import chat
from llava_jax.checkpoint import best, reader
from llava_jax.checkpoint.best import Losses
from llava_jax.convert.__main__ import main as convert
from llava_jax.errors import UnusableCheckpoint
from llava_jax.generate.assistant import Assistant
from llava_jax.train import metrics
from tests.train import tiny
from tests.train.forks import finish
from tests.train.test_main import losses, train

CHANGES = {"train.steps": 24, "train.schedule": "constant", "train.eval_every": 2, "checkpoint.every": 5,
           "checkpoint.best": "true", "train.patience": 3}  # fmt: skip
BEST, END = 8, 14  # of this run; both are no multiples of checkpoint.every
WHY = "step 14: no validation loss below 5.7656 (step 8) in 3 validations (train.patience): the run ends here"


def write_run(folder):
    """A config that trains all of the model on ten answers, and validates on others."""
    config = tiny.write_run(folder / "run")
    records = json.loads((folder / "run" / "records.json").read_text())
    said = [record["conversations"][1]["value"] for record in records]
    for record, text in zip(records, said[5:] + said[:5]):
        record["conversations"][1]["value"] = text[::-1]
    (folder / "run" / "other.json").write_text(json.dumps(records))
    text = config.read_text().replace('(".*", None)', '(".*", config.train.get_ref("lr"))')
    begin, end = text.index("validation=("), text.index("batch_samples=")
    other = f"validation=(Source({str(folder / 'run' / 'other.json')!r}, {str(folder / 'run' / 'images')!r}),), "
    config.write_text(text[:begin] + other + text[end:])
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory, compiled):
    return write_run(tmp_path_factory.mktemp("best"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "out"
    assert train(config, workdir, **CHANGES) == 0
    return workdir


def validations(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir, metrics.VALIDATION)}


def same(workdir, whole):
    """Whether a run came to what the other came to: rows, steps, the best and all its weights."""
    assert losses(workdir) == losses(whole) and validations(workdir) == validations(whole)
    assert best.read(workdir) == best.read(whole) and reader.numbered(workdir) == [BEST, 10, END]
    for step in (BEST, END):
        jax.tree.map(np.testing.assert_array_equal, *(reader.load_params(one, step=step) for one in (workdir, whole)))


def test_the_best_step_is_kept_beside_the_newest_and_the_run_ends_when_nothing_gets_better(config, place, capsys):
    assert train(config, place / "out", **CHANGES) == 0
    lines = capsys.readouterr().out.splitlines()
    found = validations(place / "out")
    assert min(found, key=found.get) == BEST and max(found) == END == max(losses(place / "out"))
    assert reader.numbered(place / "out") == [BEST, 10, END] and reader.latest_step(place / "out") == END
    assert WHY in lines and "step 8: validation loss 5.7656, the lowest so far: it is kept" in lines
    assert lines[-1].startswith("done after 14 steps, of which 8 is the best (validation loss 5.7656): --step best.")
    assert train(config, place / "out", **CHANGES) == 0  # it is over
    lines = capsys.readouterr().out.splitlines()
    assert WHY in lines and not any("gradient" in line for line in lines) and max(losses(place / "out")) == END


def test_every_command_reads_the_best_step_and_says_where_there_is_none(whole, tmp_path, capsys):
    wanted = reader.load_params(whole, step=BEST)
    jax.tree.map(np.testing.assert_array_equal, reader.load_params(whole, step="best"), wanted)
    assert convert(["merge", str(whole), str(tmp_path / "merged"), "--step", "best"]) == 0
    assert reader.steps(tmp_path / "merged") == [BEST]
    opened = Assistant.open(whole, step="best")
    np.testing.assert_array_equal(opened.params["projector"]["0"]["kernel"], wanted["projector"]["0"]["kernel"])
    capsys.readouterr()
    words = ["--checkpoint", str(tmp_path / "merged"), "--step", "best", "--prompt", "Hello"]
    assert chat.main(words) == 66
    (line,) = capsys.readouterr().err.splitlines()
    assert "no step is known to be the best" in line and "checkpoint.best=true. Steps there: 8" in line


DIES = """
import os
from llava_jax.checkpoint import manager
from llava_jax.train import loop, metrics, validations

def dying(call, picked):
    def instead(*words):
        if picked(*words):
            os._exit(9)
        return call(*words)
    return instead
"""
# {where a run is killed: the line of its config that kills it}
POINTS = {
    "before the step is saved": "loop.save = dying(loop.save, lambda run, step, _: step == 8)",
    "while it is being saved": "manager.keep_also = dying(manager.keep_also, lambda _, step: step == 8)",
    "before its loss is written": "validations.best.write = dying(validations.best.write, "
                                  "lambda _, losses: losses.rows[-1][0] == 8)",
    "before the log's row": "metrics.write = dying(metrics.write, lambda _, name, row: (name, row['step']) == "
                            "('validation.jsonl', 8))",
    "after the next update": "metrics.write = dying(metrics.write, lambda _, name, row: row['step'] == 9)",
    "at the end": "loop.save = dying(loop.save, lambda run, step, _: step == 14)",
}  # fmt: skip


OFTEN = ("while it is being saved", "before the log's row")


@pytest.mark.parametrize("point", [point if point in OFTEN else pytest.param(point, marks=pytest.mark.slow)
                                   for point in POINTS])  # fmt: skip
def test_a_run_that_is_killed_while_it_keeps_a_step_comes_to_the_same_end(
    config, whole, forks, compiled, tmp_path, point
):
    dies = config.parent / "dies.py"
    dies.write_text(config.read_text() + DIES + POINTS[point] + "\n")
    words = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    finish([forks.start(dies, tmp_path / "out", *words, **compiled)], 9)
    finish([forks.start(config, tmp_path / "out", *words, **compiled)])
    same(tmp_path / "out", whole)


@pytest.mark.slow
def test_two_processes_end_at_the_same_step_also_after_one_was_killed(config, whole, forks, compiled, tmp_path):
    dies = config.parent / "dies.py"
    dies.write_text(config.read_text() + DIES + POINTS["before its loss is written"] + "\n")
    words = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    for process in forks.job(2, 1, [dies, config], tmp_path / "out", *words, **compiled):
        process.wait()
    ended = finish(forks.job(2, 1, config, tmp_path / "out", *words, **compiled))
    assert WHY in ended[0].out and WHY not in ended[1].out
    assert reader.numbered(tmp_path / "out") == [BEST, 10, END] and reader.best_step(tmp_path / "out") == BEST
    assert validations(tmp_path / "out") == pytest.approx(validations(whole), rel=1e-3)


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_a_damaged_file_of_losses_is_set_aside_and_those_of_the_log_are_taken(config, whole, tmp_path, capsys, content):
    workdir = shutil.copytree(whole, tmp_path / "out")
    path, damaged = workdir / best.FILE, (whole / best.FILE).read_text().replace("[8, 5.7", "[8, 9.7")
    path.write_text(damaged if content is None else content)
    with pytest.raises(UnusableCheckpoint, match="best.json: (not valid JSON|no validation losses|differs from its)"):
        reader.best_step(workdir)
    assert train(config, workdir, **CHANGES) == 0
    said = capsys.readouterr()
    assert "best.json is damaged: it is now called best.json.damaged" in said.err and WHY in said.out


def test_losses_of_other_records_are_not_compared(config, whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "out")
    changes = {"data.validation.0.path": config.parent / "records.json", "train.steps": 24}
    assert train(config, workdir, **CHANGES | changes) == 0
    said = capsys.readouterr()
    assert "the records that validate are others than before" in said.err and "goes on after step 14" in said.out
    assert [step for step, _ in best.read(workdir).rows] == [16, 18, 20, 22, 24]
    assert reader.best_step(workdir) > END


def test_the_lowest_loss_is_the_first_of_equals_and_never_one_that_is_no_number(tmp_path):
    nan = float("nan")
    assert best.lowest([(1, nan), (2, 3.0), (3, 2.0), (4, 2.0), (5, None)]) == (3, 2.0)
    assert best.lowest([(1, nan)]) is None and best.read(tmp_path) == Losses()
    best.write(tmp_path, Losses("x", ((1, nan), (2, 0.1 + 0.2))))
    assert best.read(tmp_path) == Losses("x", ((1, None), (2, 0.1 + 0.2)))
